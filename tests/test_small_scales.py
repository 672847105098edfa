"""Weights that are small: as exact as others as far as scales go down, refused by name beyond that."""

import pytest
import torch

from lfm_edge import export
from lfm_edge.calibration.gptq import Feedback, gptq
from lfm_edge.calibration.quantize import quantize_checkpoint
from lfm_edge.checkpoint.checkpoint import open_checkpoint
from lfm_edge.errors import ExportError
from lfm_edge.quantization.recipe import Scheme, recipe
from lfm_edge.quantization.rounding import quantize, quantize_weight, relative_error
from lfm_edge.targets import target_named
from tests.helpers import rewrite, save_checkpoint

SCHEMES = [Scheme(4, 32), Scheme(4, 64), Scheme(4, 32, two_level=True), Scheme(8, None)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALLEST = 2.0 ** -24
LAYER = "model.layers.0.feed_forward.w1.weight"


def weights(largest, seed=0, rows=24, cols=256):
    """Rows of normal numbers, each with its largest at `largest`."""
    noise = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    return noise / noise.abs().amax(1, keepdim=True) * largest


# --- the grid -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("largest, eight_bits", [(0.1, 0.008), (1e-3, 0.008), (1e-4, 0.009), (2e-5, 0.02),
                                                 (2e-6, 0.05)])
def test_small_channels_lose_no_more_than_scales_of_few_bits_cost(scheme, largest, eight_bits):
    matrix = weights(largest)
    assert relative_error(matrix, quantize(matrix, scheme)) < (eight_bits if scheme.bits == 8 else 0.13)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("largest", [1e-3, 1e-4, 2e-5, 1e-6, 1e-8])
def test_every_scale_is_a_float16_and_a_bfloat16(scheme, largest):
    result = quantize(weights(largest), scheme)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(result.scales.to(dtype).float(), result.scales)
    assert (result.scales >= SMALLEST).all()
    if scheme.two_level:
        multiples, units = result.two_level_scales()
        assert torch.equal(multiples.float() * units[:, None], result.scales)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("largest", [1e-3, 1e-4, 2e-5, 1e-6])
def test_small_weights_that_are_quantized_already_do_not_change(scheme, dtype, largest):
    stored = quantize(weights(largest), scheme).dequantize().to(dtype)
    assert torch.equal(quantize(stored, scheme).dequantize().to(dtype), stored)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_weights_that_normal_scales_can_follow_have_normal_scales(scheme):
    matrix = weights(0.02)
    matrix[3] = 0  # a dead channel: any scale will do, and it keeps the one it always had
    scales = quantize(matrix, scheme).scales
    assert (scales >= 2.0 ** -14).all()
    assert (scales[3] == 2.0 ** -14).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_calibrated_rounding_has_the_same_scales(scheme):
    matrix = weights(2e-5)
    inputs = torch.randn(300, 256, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = quantize(matrix, scheme)
    rounded = gptq(matrix, start, Feedback.of(inputs))
    assert torch.equal(rounded.scales, start.scales)
    assert relative_error(matrix, rounded) < 0.2


# --- beyond it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("largest", [1e-7, 1e-8, 1e-30])
def test_a_weight_that_is_smaller_than_scales_go_is_refused_by_name(scheme, largest):
    with pytest.raises(ExportError, match=rf"{LAYER}: its largest number is {largest:.1g}, and .*% of it is lost"):
        quantize_weight(LAYER, weights(largest), scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dead", [0.0, 1e-8, 1e-30])
def test_dead_channels_among_others_are_no_reason(scheme, dead):
    matrix = weights(0.05)
    matrix[::3] = weights(1.0)[::3] * dead
    assert torch.equal(quantize_weight(LAYER, matrix, scheme).ints, quantize(matrix, scheme).ints)


def test_a_weight_of_zeros_is_no_reason():
    assert not quantize_weight(LAYER, torch.zeros(4, 64), Scheme(8, None)).ints.any()


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_an_export_of_such_a_weight_is_refused(tmp_path, rounding):
    source = save_checkpoint(tmp_path / "model", layer_types=["conv"])
    rewrite(source, lambda tensors: tensors[LAYER].mul_(1e-8))
    made = recipe(4, 32, 8, "float", rounding=rounding)
    with pytest.raises(ExportError, match=LAYER):
        quantize_checkpoint(open_checkpoint(source), made, windows=torch.arange(3, 35)[None])


# --- on every target ----------------------------------------------------------------------------------------------

# Rows of the head by the size of their largest number: 8 of each, multiples of the first 8 rows.
SIZES = {1e-4: 0.02, 2e-5: 0.05, 1e-6: 0.12}
NOTHING = 1e-8


def rows_of(index):
    return slice(100 + 8 * index, 108 + 8 * index)


@pytest.fixture(scope="module")
def with_small_channels(tmp_path_factory):
    """A checkpoint whose head has channels of every size, so that logits show what becomes of them."""
    directory = save_checkpoint(tmp_path_factory.mktemp("small") / "model", tie_word_embeddings=False,
                                layer_types=["conv", "full_attention"])

    def edit(tensors):
        head = tensors["lm_head.weight"]
        head[:8] /= head[:8].abs().amax(1, keepdim=True)
        for index, size in enumerate([*SIZES, NOTHING]):
            head[rows_of(index)] = head[:8] * size

    rewrite(directory, edit)
    return directory


@pytest.mark.parametrize("target", ["android-q8", "onnx-q8", "coreml-q8", "mlx-q8", "gguf-q4"])
def test_every_target_computes_small_channels(with_small_channels, tmp_path, target):
    kind = target_named(target)
    for package in (*kind.requires, *kind.runtime.requires):
        pytest.importorskip(package)
    session = export(with_small_channels, target=target, output=tmp_path / "bundle", context=64,
                     prefill_chunk=8).session()
    session.prefill([1, 5, 9])
    logits = torch.stack([torch.from_numpy(session.decode(token)) for token in range(20, 28)])  # [8, vocab]

    usual = logits[:, :8]
    for index, (size, limit) in enumerate(SIZES.items()):
        error = (logits[:, rows_of(index)] / size - usual).norm() / usual.norm()
        assert error < limit, size
    assert logits[:, rows_of(len(SIZES))].abs().max() < 10 * NOTHING * usual.abs().max()
