"""Calibrated rounding: the paper's algorithm, the scales as they were, and less lost than by rounding to nearest."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from lfm_edge import export
from lfm_edge.bundle.bundle import Bundle, weights_digest
from lfm_edge.calibration.gptq import DAMPING, Feedback, gptq, read_windows
from lfm_edge.calibration.quantize import quantize_checkpoint
from lfm_edge.calibration.sample import TEXT, prompt_windows, prompts_in, text_windows
from lfm_edge.checkpoint.checkpoint import open_checkpoint
from lfm_edge.checkpoint.tokenizer import TextTokenizer
from lfm_edge.errors import BundleError, ExportError
from lfm_edge.harness.quality import compare
from lfm_edge.model.decoder import FeedForward
from lfm_edge.quantization.recipe import GPTQ, Recipe, Scheme, recipe
from lfm_edge.quantization.rounding import quantize
from lfm_edge.session.state import StateSpec
from lfm_edge.targets import TARGETS
from runtimes.reference import ReferenceSession, float_weights
from tests.client_helpers import tasks
from tests.helpers import TINY, assert_verified, save_checkpoint

SCHEMES = [Scheme(4, 32), Scheme(4, 128), Scheme(4, 64, two_level=True), Scheme(4, None), Scheme(8, None)]
ROWS, COLS = 24, 256


def a_layer(seed=0):
    """A weight [ROWS, COLS], and inputs [512, COLS] that depend on each other, as those of a network do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(COLS, COLS, generator=generator, dtype=torch.float64)
    sizes = torch.logspace(0, -2, COLS, dtype=torch.float64)
    inputs = torch.randn(512, COLS, generator=generator, dtype=torch.float64) * sizes @ mixing
    return torch.randn(ROWS, COLS, generator=generator) * 0.05, inputs


def output_error(weight, inputs, quantized):
    return float((inputs @ (weight - quantized.dequantize()).double().T).norm())


def as_the_paper_has_it(weight, start, inputs, order):
    """Algorithm 1 of Frantar et al. (2023), column by column, with the inverse of H, in the given order."""
    moments = inputs.T @ inputs
    moments += DAMPING * moments.diagonal().mean() * torch.eye(COLS, dtype=torch.float64)
    inverse = torch.linalg.inv(moments[order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    left = weight.double()[:, order].clone()
    scales = start.scales.double().repeat_interleave(start.group_size, 1)[:, order]
    limit = 2 ** (start.bits - 1)
    ints = torch.empty(ROWS, COLS, dtype=torch.int8)
    for k in range(COLS):
        codes = (left[:, k] / scales[:, k]).round().clamp(-limit, limit - 1)
        error = (left[:, k] - codes * scales[:, k]) / upper[k, k]
        left[:, k:] -= error[:, None] * upper[k, k:]
        ints[:, order[k]] = codes.to(torch.int8)
    return ints


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_codes_are_those_of_the_papers_algorithm(scheme):
    weight, inputs = a_layer()
    start, feedback = quantize(weight, scheme), Feedback.of(inputs)
    assert torch.equal(gptq(weight, start, feedback).ints, as_the_paper_has_it(weight, start, inputs, feedback.order))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_layers_output_is_closer_and_the_scales_stay(scheme):
    weight, inputs = a_layer(1)
    nearest = quantize(weight, scheme)
    rounded = gptq(weight, nearest, Feedback.of(inputs))
    assert torch.equal(rounded.scales, nearest.scales)
    assert rounded.ints.dtype == torch.int8 and rounded.bits == scheme.bits
    assert int(rounded.ints.min()) >= -2 ** (scheme.bits - 1) and int(rounded.ints.max()) < 2 ** (scheme.bits - 1)
    assert output_error(weight, inputs, rounded) < 0.7 * output_error(weight, inputs, nearest)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_quantized_already_do_not_change(scheme, dtype):
    weight, inputs = a_layer(2)
    once = quantize(weight, scheme)
    stored = once.dequantize().to(dtype)
    start = quantize(stored, scheme)
    assert torch.equal(gptq(stored, start, Feedback.of(inputs)).ints, start.ints)


def test_inputs_that_do_not_depend_on_each_other_leave_every_weight_at_the_nearest_code():
    weight, _ = a_layer(3)
    start = quantize(weight, Scheme(4, 32))
    assert torch.equal(gptq(weight, start, Feedback.of(torch.eye(COLS, dtype=torch.float64))).ints, start.ints)


def test_inputs_that_are_always_zero_are_no_trouble():
    weight, inputs = a_layer(4)
    start = quantize(weight, Scheme(4, 32))
    inputs[:, 10:20] = 0.0
    assert torch.equal(gptq(weight, start, Feedback.of(inputs)).ints[:, 10:20], start.ints[:, 10:20])
    assert torch.equal(gptq(weight, start, Feedback.of(inputs * 0)).ints, start.ints)


def test_no_inputs_at_all_leave_every_weight_at_the_nearest_code():
    weight, inputs = a_layer()
    start = quantize(weight, Scheme(4, 32))

    assert torch.equal(gptq(weight, start, Feedback.of(inputs[:0])).ints, start.ints)


def test_a_weight_that_no_token_reaches_is_rounded_to_nearest(tmp_path, monkeypatch):
    """As an expert may be that no token of the text is sent to."""
    checkpoint = open_checkpoint(save_checkpoint(tmp_path / "model"))
    monkeypatch.setattr(FeedForward, "forward", lambda self, x: self.w2(nn.functional.silu(self.w1_w3[0](x))))
    monkeypatch.setattr(FeedForward, "__init__", _with_w3_apart)
    bits = recipe(4, 32, 8, "float", rounding=GPTQ)
    done = []

    found = quantize_checkpoint(checkpoint, bits, done.append, torch.randint(300, (2, 16)))
    nearest = quantize_checkpoint(checkpoint, dataclasses.replace(bits, rounding="nearest"))

    assert sorted(done) == sorted(checkpoint.names)
    for name in (name for name in found if ".feed_forward." in name):
        assert torch.equal(found[name].ints, nearest[name].ints) == name.endswith("w3.weight")


def _with_w3_apart(self, weights):
    nn.Module.__init__(self)
    self.w1_w3 = nn.ModuleList(weights.linear(f"feed_forward.{name}") for name in ("w1", "w3"))
    self.w2 = weights.linear("feed_forward.w2")


def test_another_order_of_sums_gives_the_same_codes():
    """What another machine, or another number of threads, may do to float64 sums."""
    weight, inputs = a_layer(5)
    start = quantize(weight, Scheme(4, 32))
    noise = 1 + 1e-13 * torch.randn(inputs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gptq(weight, start, Feedback.of(inputs)).ints,
                       gptq(weight, start, Feedback.of((inputs * noise).flip(0))).ints)


def test_inputs_that_are_not_finite_are_refused():
    with pytest.raises(ExportError, match="not finite"):
        Feedback.of(torch.full((4, 8), torch.inf, dtype=torch.float64))


# --- the whole model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibration():
    """Every other prompt of the tasks."""
    prompts = [task["messages"][0]["content"] for task in tasks(each=60)[::2]]
    return torch.tensor(prompt_windows(TextTokenizer(TINY), 272, prompts_in("\n\n".join(prompts)), 256, 4096))


@pytest.fixture(scope="module")
def divergence():
    """weights -> mean KL divergence from the float32 model on conversations that no calibration has seen."""
    tokenizer, config = TextTokenizer(TINY), open_checkpoint(TINY).config
    asked = tasks(each=60)[1::2]
    windows = [[*tokenizer.chat(task["messages"]), *tokenizer.encode(task["answer"], special=False), 7]
               for task in asked][::4]

    def scores(weights):
        session = ReferenceSession(config, weights, StateSpec.of(config, 1024))
        return [session.score(window) for window in windows]

    exact = scores(float_weights(open_checkpoint(TINY)))
    return lambda weights: compare(windows, exact, scores(weights), 1.0).kl_divergence


def calibrated(scheme, windows):
    made = Recipe(scheme, Scheme(8, None), "float", rounding=GPTQ)
    return quantize_checkpoint(open_checkpoint(TINY), made, windows=windows)


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(4, 128), Scheme(4, 32, two_level=True),
                                    pytest.param(Scheme(4, 64), marks=pytest.mark.heavy)], ids=str)
def test_the_trained_model_loses_a_third_less_on_text_that_it_was_not_calibrated_on(scheme, calibration, divergence):
    nearest = quantize_checkpoint(open_checkpoint(TINY), Recipe(scheme, Scheme(8, None), "float"))
    assert divergence(calibrated(scheme, calibration)) < 0.67 * divergence(nearest)


def test_the_built_in_prompts_do_as_well_for_a_model_that_never_saw_such_text(divergence):
    windows = torch.tensor(prompt_windows(TextTokenizer(TINY), 272, prompts_in(TEXT), 256, 4096))
    nearest = quantize_checkpoint(open_checkpoint(TINY), recipe(4, 32, 8, "float"))
    assert divergence(calibrated(Scheme(4, 32), windows)) < 0.75 * divergence(nearest)


def test_every_target_has_the_same_integers(calibration):
    windows = calibration[:2, :64]
    digests = {weights_digest(quantize_checkpoint(open_checkpoint(TINY), recipe(4, 32, 8, activations, rounding=GPTQ),
                                                  windows=windows))
               for activations in ("float", "int8 rows", "int8 blocks")}
    assert len(digests) == 1


def test_a_calibrated_recipe_wants_its_text():
    with pytest.raises(ExportError, match="needs the text"):
        quantize_checkpoint(open_checkpoint(TINY), recipe(4, 32, 8, "float", rounding=GPTQ))


# --- bundles ------------------------------------------------------------------------------------------------------

MIXED = {"model.layers.0.conv.in_proj.weight": 8, "model.layers.1.self_attn.q_proj.weight": 8,
         "model.layers.1.feed_forward.w3.weight": 8, "model.layers.0.feed_forward.w2.weight": 4}


LIGHT = ("onnx-q4",)


@pytest.mark.parametrize("target", [name if name in LIGHT else pytest.param(name, marks=pytest.mark.heavy)
                                    for name in TARGETS])
def test_a_bundle_of_mixed_bits_rounded_by_a_text_is_verified_bit_for_bit(tmp_path, target):
    """Every weight is looked up in the artifact; layers that backends would join have different bits."""
    bits = {name: 12 - its for name, its in MIXED.items()} if TARGETS[target].bits == 8 else MIXED
    (tmp_path / "bits.json").write_text(json.dumps({"group_size": 32, "head_bits": 8, "linear_bits": bits}))
    (tmp_path / "prompts.txt").write_text("one two three\n\nfour, five\nsix\n \nseven\n\n" * 4)
    source = save_checkpoint(tmp_path / "model", layer_types=["conv", "full_attention"])
    exact = "float32" if "float32" in TARGETS[target].arithmetic.compute_dtypes else None  # the NPU has integers only
    bundle = export(source, target=target, output=tmp_path / "bundle", context=64, prefill_chunk=16, rounding="gptq",
                    calibration=tmp_path / "prompts.txt", recipe=tmp_path / "bits.json", compute_dtype=exact)
    assert bundle.manifest.recipe.rounding == "gptq"
    assert {name for name, scheme in bundle.manifest.recipe.mixed.items()} == {
        name for name, its in bits.items() if its != TARGETS[target].bits}
    assert_verified(bundle)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gptq")
    source = save_checkpoint(folder / "model", layer_types=["conv", "full_attention"])
    return export(source, target="onnx-q4", output=folder / "bundle", context=64, prefill_chunk=16, rounding="gptq")


def test_a_bundle_keeps_the_tokens_that_it_was_calibrated_on(bundle):
    windows = read_windows(bundle.directory, bundle.manifest.config)
    vocabulary = bundle.manifest.config.vocab_size
    assert windows.tolist() == prompt_windows(bundle.tokenizer(), vocabulary, prompts_in(TEXT), 256, 4096)
    assert {"rounding": "gptq"}.items() <= bundle.manifest.recipe.to_dict().items()


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"windows": []}', '{"windows": [[1, 2], [3]]}',
                                     '{"windows": [[1.5]]}', '{"windows": [["a"]]}', '{"windows": [[-1, 5]]}',
                                     '{"windows": [[5, 99999999]]}', '{"windows": [[1e400]]}'])
def test_damaged_tokens_are_refused(bundle, tmp_path, content):
    (tmp_path / "calibration.json").write_text(content)
    with pytest.raises(BundleError, match=r"calibration\.json"):
        read_windows(tmp_path, bundle.manifest.config)


def test_manifests_from_before_there_was_a_choice_are_read(bundle):
    raw = bundle.manifest.recipe.to_dict()
    del raw["rounding"], raw["mixed"]
    assert Recipe.from_dict(raw) == dataclasses.replace(bundle.manifest.recipe, rounding="nearest")


def test_an_unknown_rounding_in_a_manifest_is_refused(bundle, tmp_path):
    raw = json.loads((bundle.directory / "manifest.json").read_text())
    raw["recipe"]["rounding"] = "down"
    (tmp_path / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(BundleError, match="malformed"):
        Bundle.open(tmp_path)


# --- windows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most, length", [(10**6, 256), (100, 256), (1000, 99), (257, 256)])
def test_windows_have_one_length_and_leave_out_next_to_nothing(most, length):
    tokenizer = TextTokenizer(TINY)
    windows = text_windows(tokenizer, 272, TEXT, length, most)
    tokens = tokenizer.encode(TEXT)[:most]
    assert len({len(window) for window in windows}) == 1 and len(windows[0]) <= length
    together = [token for window in windows for token in window]
    assert together == tokens[:len(together)] and len(tokens) - len(together) < len(windows)


def test_each_prompt_is_a_users_turn():
    tokenizer = TextTokenizer(TINY)
    windows = prompt_windows(tokenizer, 272, prompts_in("\none\nline\n \n\n two\n"), 1000, 1000)
    assert windows == [[token for content in ("one\nline", "two")
                        for token in tokenizer.chat([{"role": "user", "content": content}])]]
