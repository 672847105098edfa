"""The quantizer: grids, errors, and what is quantized already."""


import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lfm_edge.calibration.quantize import quantize_checkpoint
from lfm_edge.checkpoint.checkpoint import open_checkpoint
from lfm_edge.checkpoint.layers import LINEAR, WeightEntry
from lfm_edge.errors import ExportError
from lfm_edge.quantization.activations import fake_quantize_rows
from lfm_edge.quantization.recipe import Recipe, Scheme, recipe
from lfm_edge.quantization.rounding import quantize, relative_error, round_to_nearest
from lfm_edge.quantization.tensor import QuantizedTensor, WeightsFile
from tests.helpers import TINY

SCHEMES = [Scheme(4, 32), Scheme(4, 64), Scheme(4, 128), Scheme(8, None)]
TWO_LEVEL = [Scheme(4, group, two_level=True) for group in (32, 64, 128)]


def weights(seed, rows=12, cols=256, spread=0.05):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator) * spread


@st.composite
def quantized_tensors(draw):
    """Any tensor of a scheme: any codes, any scales of the grid within what weights have."""
    scheme = draw(st.sampled_from(SCHEMES))
    rows, groups = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    size = scheme.group_size or 32
    limit = 2 ** (scheme.bits - 1)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    largest = draw(st.integers(1, limit))
    ints = torch.randint(-largest, min(largest, limit - 1) + 1, (rows, groups * size), generator=generator)
    exponents = torch.randint(-13, 4, (rows, 1 if scheme.group_size is None else groups), generator=generator)
    mantissas = 1 + torch.randint(0, 128, exponents.shape, generator=generator) / 128
    return scheme, QuantizedTensor(ints.to(torch.int8), mantissas * 2.0 ** exponents, scheme.bits)


@given(quantized_tensors(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_weights_that_are_quantized_already_do_not_change(case, dtype):
    scheme, tensor = case
    stored = tensor.dequantize().to(dtype)
    again = quantize(stored, scheme)
    assert torch.equal(again.dequantize().to(dtype), stored)


@given(quantized_tensors())
def test_quantizing_twice_is_quantizing_once(case):
    scheme, _ = case
    once = quantize(weights(3, 4, (scheme.group_size or 32) * 2), scheme)
    assert torch.equal(quantize(once.dequantize(), scheme).dequantize(), once.dequantize())


@pytest.mark.parametrize("scheme", SCHEMES + TWO_LEVEL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_fit_their_bits_and_scales_are_positive_bfloat16(scheme, dtype):
    result = quantize(weights(0).to(dtype), scheme)
    limit = 2 ** (scheme.bits - 1)
    assert result.ints.dtype == torch.int8
    assert -limit <= int(result.ints.min()) and int(result.ints.max()) < limit
    assert torch.equal(result.scales.bfloat16().float(), result.scales)
    assert (result.scales > 0).all()
    assert result.group_size == (scheme.group_size or 256)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_scale_search_beats_round_to_nearest_on_every_matrix(scheme):
    matrices = {"normal": weights(1), "heavy tails": weights(2) ** 3 * 100, "outlier": weights(3)}
    matrices["outlier"][0, 0] = 3.0
    for name, matrix in matrices.items():
        assert relative_error(matrix, quantize(matrix, scheme)) < relative_error(
            matrix, round_to_nearest(matrix, scheme)), name


def test_the_search_saves_a_tenth_of_the_error_of_four_bits_on_normal_weights():
    matrix = weights(4, 64, 1024)
    searched, plain = quantize(matrix, Scheme(4, 32)), round_to_nearest(matrix, Scheme(4, 32))
    assert relative_error(matrix, searched) < 0.9 * relative_error(matrix, plain)


@pytest.mark.parametrize("scheme", TWO_LEVEL)
@pytest.mark.parametrize("spread", [1e-6, 0.05, 40.0])
def test_two_level_scales_are_small_multiples_of_a_unit_of_their_row(scheme, spread):
    result = quantize(weights(6, spread=spread), scheme)
    multiples, units = result.two_level_scales()
    assert multiples.dtype == torch.uint8
    assert int(multiples.min()) >= 1 and int(multiples.max()) <= 15
    assert torch.equal(multiples.float() * units[:, None], result.scales)


@pytest.mark.parametrize("scheme", TWO_LEVEL)
def test_weights_with_two_level_scales_do_not_change(scheme):
    once = quantize(weights(7, 24, 512), scheme)
    again = quantize(once.dequantize(), scheme)
    assert torch.equal(again.dequantize(), once.dequantize())


@pytest.mark.parametrize("tails", [1, 3])
def test_two_level_scales_cost_little_of_what_groups_save_over_channels(tails):
    matrix = weights(8, 64, 1024) ** tails
    error = {scheme: relative_error(matrix, quantize(matrix, scheme))
             for scheme in (Scheme(4, 32), Scheme(4, 32, two_level=True), Scheme(4, None))}
    free, two_level, channel = error.values()
    assert free < two_level < free + 0.15 * (channel - free)


def test_scales_that_are_no_multiples_have_no_second_level():
    with pytest.raises(ValueError, match="multiples"):
        QuantizedTensor(torch.zeros(1, 64, dtype=torch.int8), torch.tensor([[1.0, 1.0078125]]), 4).two_level_scales()


@pytest.mark.parametrize("scheme", SCHEMES + TWO_LEVEL)
def test_zero_and_tiny_weights_survive(scheme):
    matrix = torch.zeros(4, 256)
    matrix[1] = 1e-30
    result = quantize(matrix, scheme)
    assert torch.equal(result.dequantize(), torch.zeros(4, 256))


def test_rows_are_quantized_independently():
    matrix = weights(5)
    whole, part = quantize(matrix, Scheme(4, 32)), quantize(matrix[3:5], Scheme(4, 32))
    assert torch.equal(whole.ints[3:5], part.ints)
    assert torch.equal(whole.scales[3:5], part.scales)


def test_a_group_size_that_does_not_divide_is_refused_with_the_weights_name():
    with pytest.raises(ExportError, match=r"w1\.weight: 96 columns are not a multiple of the group size 64"):
        recipe(4, 64, 8, "int8 rows").scheme("model.layers.0.feed_forward.w1.weight", WeightEntry((10, 96), LINEAR))


def test_the_recipe_keeps_norms_and_convolutions_in_float_and_the_head_at_eight_bits():
    weights_of = quantize_checkpoint(open_checkpoint(TINY), recipe(4, 32, 8, "int8 rows"))
    bits = {name: w.bits if isinstance(w, QuantizedTensor) else None for name, w in weights_of.items()}
    assert bits["model.embed_tokens.weight"] == 8
    assert bits["model.layers.0.feed_forward.w2.weight"] == 4
    assert bits["model.layers.0.conv.conv.weight"] is None
    assert bits["model.embedding_norm.weight"] is None
    assert set(bits.values()) == {4, 8, None}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("head", [4, 8])
def test_recipes_survive_the_manifest(bits, head):
    made = recipe(bits, 64, head, "int8 rows")
    assert Recipe.from_dict(made.to_dict()) == made


@given(st.integers(0, 2**32), st.sampled_from([1.0, 100.0, 1e-4]))
def test_activation_rounding_is_within_half_a_step_and_keeps_zero(seed, size):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed)) * size
    x[:, 0] = 0.0
    rounded = fake_quantize_rows(x)
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 255
    assert ((rounded - x).abs() <= step * 1.01).all()
    assert (rounded[:, 0] == 0).all()
    assert len(torch.unique(rounded[0])) <= 256


def test_activation_rounding_of_a_row_of_zeros_is_zero():
    assert torch.equal(fake_quantize_rows(torch.zeros(2, 8)), torch.zeros(2, 8))


def test_a_weight_in_a_file_is_the_same_before_and_after_it_was_let_go(tmp_path):
    weight = quantize(torch.randn(48, 96, generator=torch.Generator().manual_seed(3)), Scheme(4, 32))
    other = quantize(torch.randn(7, 32, generator=torch.Generator().manual_seed(4)), Scheme(8, None))
    with WeightsFile(tmp_path) as file:
        moved, other_moved = weight.moved_to(file), other.moved_to(file)
    for _ in range(2):  # read again from the file, which has no name any more
        for before, after in ((weight, moved), (other, other_moved)):
            assert torch.equal(before.ints, after.ints) and torch.equal(before.scales, after.scales)
            assert before.bits == after.bits and not before.pages and after.pages
            after.release()
    assert not list(tmp_path.iterdir())
