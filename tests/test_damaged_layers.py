"""One layer that the quantizer has damaged: the artifact is then just what the reference computes, and yet it fails."""

import pytest
import torch

from lfm_edge import export
from lfm_edge.calibration.gptq import MOST_TOKENS, WINDOW
from lfm_edge.calibration.quantize import quantize_checkpoint
from lfm_edge.calibration.sample import TEXT, prompt_windows, prompts_in
from lfm_edge.checkpoint.checkpoint import open_checkpoint
from lfm_edge.checkpoint.tokenizer import TextTokenizer
from lfm_edge.harness.rounding import check_rounding, error_share
from lfm_edge.harness.verify import verify
from lfm_edge.quantization.recipe import GPTQ, NEAREST, Scheme, recipe
from lfm_edge.quantization.rounding import quantize
from lfm_edge.quantization.tensor import QuantizedTensor
from lfm_edge.targets import TARGETS
from tests.helpers import TINY

CONFIG = open_checkpoint(TINY).config
MATRICES = [name for name, shape in CONFIG.weight_shapes().items() if len(shape) == 2]
KERNELS = [name for name, shape in CONFIG.weight_shapes().items() if len(shape) == 3]


def with_ints(weight, ints):
    limit = 2 ** (weight.bits - 1)
    return QuantizedTensor(ints.clamp(-limit, limit - 1).to(torch.int8), weight.scales, weight.bits)


def with_scales(weight, scales):
    return QuantizedTensor(weight.ints, scales, weight.bits)


def in_two_bits(weight):
    """Every code at one of four places."""
    step = 2 ** (weight.bits - 2)
    return with_ints(weight, (weight.ints.float() / step).floor() * step + step / 2)


def scales_swapped(weight):
    """Of the groups of a row, or of rows where a row is one group."""
    return with_scales(weight, weight.scales.flip(1) if weight.scales.shape[1] > 1 else weight.scales.roll(1, 0))


DAMAGE = {
    "scales doubled": lambda weight: with_scales(weight, weight.scales * 2),
    "scales halved": lambda weight: with_scales(weight, weight.scales / 2),
    "rows rolled by one": lambda weight: QuantizedTensor(weight.ints.roll(1, 0), weight.scales.roll(1, 0), weight.bits),
    "scales swapped": scales_swapped,
    "zero": lambda weight: with_ints(weight, torch.zeros_like(weight.ints)),
    "sign flipped": lambda weight: with_ints(weight, -weight.ints.to(torch.int16)),
    "rounded to 2 bits": in_two_bits,
    "one row zero": lambda weight: with_ints(weight, weight.ints * (torch.arange(len(weight.ints)) > 0)[:, None]),
}


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint(TINY)


@pytest.fixture(scope="module", params=[4, 8])
def weights(request, checkpoint):
    return quantize_checkpoint(checkpoint, recipe(request.param, 32, 8, "float"))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_of_any_matrix_is_further_off_than_its_rounding_may_err(checkpoint, weights, damage):
    for name in MATRICES:
        exact = checkpoint.tensor(name).float()
        assert error_share(exact, weights[name], NEAREST) < 0.7
        assert error_share(exact, DAMAGE[damage](weights[name]), NEAREST) > 1.2, name


def test_the_damaged_weight_is_named_and_no_other(checkpoint, weights):
    name = "model.layers.3.feed_forward.w2.weight"
    found = check_rounding(checkpoint, weights | {name: DAMAGE["scales halved"](weights[name])}, NEAREST)
    assert not found.passed and found.wrong == [name] and found.worst == name
    assert found.relative_error == pytest.approx(0.5, abs=0.05)


def test_a_conv_kernel_whose_taps_are_reversed_is_named(checkpoint, weights):
    reversed_ = {name: weights[name].flip(-1) for name in KERNELS}
    assert check_rounding(checkpoint, weights | reversed_, NEAREST).wrong == KERNELS


def test_the_same_matrix_of_another_layer_is_named(checkpoint, weights):
    first, second = (f"model.layers.{layer}.feed_forward.w1.weight" for layer in (3, 4))
    assert check_rounding(checkpoint, weights | {first: weights[second]}, NEAREST).wrong == [first]


@pytest.mark.parametrize("options", [
    {"bits": 4}, {"bits": 8}, {"bits": 4, "head_bits": 4}, {"bits": 8, "head_bits": 4}, {"bits": 4, "group_size": 64},
    {"bits": 4, "group_size": 128}, {"bits": 4, "two_level": True}, {"bits": 4, "rounding": GPTQ},
    {"bits": 8, "rounding": GPTQ}, {"bits": 4, "group_size": 128, "rounding": GPTQ},
    {"bits": 8, "mixed": {MATRICES[1]: 4}}], ids=str)
def test_what_is_rounded_right_passes_with_every_recipe(checkpoint, options):
    chosen = recipe(**{"group_size": 32, "head_bits": 8, "activations": "float", **options})
    tokenizer = TextTokenizer(TINY)
    windows = torch.tensor(prompt_windows(tokenizer, CONFIG.vocab_size, prompts_in(TEXT), WINDOW, MOST_TOKENS))
    found = check_rounding(checkpoint, quantize_checkpoint(checkpoint, chosen, windows=windows), chosen.rounding)
    assert found.passed and found.weights == len(CONFIG.weight_shapes())
    assert 0.3 < found.share < 0.8


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(4, 128), Scheme(4, 32, two_level=True), Scheme(8, None)],
                         ids=str)
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "uniform", "one large column", "rows of many sizes"])
def test_the_bound_holds_whatever_the_weights_are(kind, scheme):
    generator = torch.Generator().manual_seed(0)
    normal = 0.05 * torch.randn(64, 256, generator=generator)
    weight = {
        "normal": normal,
        "heavy tails": normal / torch.rand(64, 256, generator=generator).sqrt(),
        "uniform": 0.1 * (torch.rand(64, 256, generator=generator) - 0.5),
        "one large column": normal * (1 + 50.0 * (torch.arange(256) == 7)),
        "rows of many sizes": normal * torch.exp(3 * torch.randn(64, 1, generator=generator)),
    }[kind]
    assert error_share(weight, quantize(weight, scheme), NEAREST) < 0.8


def test_weights_that_are_not_finite_never_pass():
    weight = torch.randn(8, 64)
    quantized = quantize(weight, Scheme(4, 32))
    for wrong in (torch.nan, torch.inf):
        weight[0, 0] = wrong
        assert error_share(weight, quantized, NEAREST) == error_share(weight, quantized, GPTQ) == float("inf")
    assert error_share(torch.zeros(8, 64), quantize(torch.zeros(8, 64), Scheme(4, 32)), NEAREST) == 0.0


@pytest.fixture
def damaged(monkeypatch):
    """Let the quantizer damage the matrices of one layer, of the export and of `verify` alike."""

    def call(layer, damage):
        def quantize_wrong(checkpoint, *arguments, **options):
            found = quantize_checkpoint(checkpoint, *arguments, **options)
            return {name: DAMAGE[damage](weight) if name.startswith(f"model.layers.{layer}.")
                    and isinstance(weight, QuantizedTensor) else weight for name, weight in found.items()}

        for module in ("lfm_edge.bundle.export", "lfm_edge.harness.verify"):
            monkeypatch.setattr(f"{module}.quantize_checkpoint", quantize_wrong)

    return call


def assert_found(bundle, layer):
    """All that compares the artifact with its reference is as it should be, and the layer is named."""
    result = verify(bundle)
    assert result.weights.passed
    assert not result.passed
    assert result.rounding.wrong == [name for name in MATRICES if name.startswith(f"model.layers.{layer}.")]


def test_a_damaged_layer_of_the_trained_model_fails(few_tasks, tmp_path, damaged):
    damaged(3, "scales halved")
    assert_found(export(few_tasks, target="onnx-q4", output=tmp_path / "bundle", context=512), 3)


@pytest.mark.heavy
@pytest.mark.parametrize("layer", [0, CONFIG.num_layers - 1])
@pytest.mark.parametrize("damage", [name for name in DAMAGE if name != "one row zero"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_damaged_layer_fails_on_every_target(few_tasks, tmp_path, damaged, target, damage, layer):
    damaged(layer, damage)
    assert_found(export(few_tasks, target=target, output=tmp_path / "bundle", context=512, prefill_chunk=16), layer)
