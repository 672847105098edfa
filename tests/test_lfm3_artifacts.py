"""LFM3 on every target: verified, and exact in all that a session can do once the window has moved on."""

import json
import sys

import numpy as np
import pytest

from lfm_edge import export, open_bundle
from lfm_edge.checkpoint.checkpoint import open_checkpoint
from lfm_edge.errors import ExportError
from lfm_edge.harness.predict import predict
from lfm_edge.harness.roofline import step_bytes
from lfm_edge.harness.sensitivity import analyse
from lfm_edge.session.generation import generate
from tests.client_helpers import output_of
from tests.helpers import ALL_AT_ONCE_LFM3, AWKWARD_LFM3, REPO, assert_verified, lfm3_model, save_model

CONTEXT, CHUNK, WINDOW = 96, 16, ALL_AT_ONCE_LFM3["sliding_window"]
TOKENS = [20 + (index * 37) % 250 for index in range(CONTEXT)]
TARGETS = ["android-q4", "onnx-q4", "mlx-q4", pytest.param("coreml-q4", marks=pytest.mark.heavy),
           pytest.param("npu-q4", marks=pytest.mark.heavy)]
SCORING = ["android-q4", "onnx-q4"]  # those that tell the logits of several tokens


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("lfm3") / "model", lfm3_model(**ALL_AT_ONCE_LFM3))


@pytest.fixture(scope="module")
def bundles(checkpoint, tmp_path_factory):
    """Bundles by target, each made when it is first asked for, in float32 where there is a choice."""
    made = {}

    def bundle(target):
        if target not in made:
            exact = "float32" if target.startswith(("mlx", "coreml")) else None
            made[target] = export(checkpoint, target=target, output=tmp_path_factory.mktemp(target) / "bundle",
                                  context=CONTEXT, prefill_chunk=CHUNK, compute_dtype=exact)
        return made[target]

    return bundle


@pytest.mark.parametrize("target", TARGETS)
def test_it_is_verified(bundles, target):
    assert_verified(bundles(target))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("position", [3, WINDOW, 40, 70])
def test_a_snapshot_brings_back_the_window_too(bundles, target, position):
    session = bundles(target).session()
    session.prefill(TOKENS[:position])
    snapshot = session.snapshot()
    expected = [session.decode(token) for token in TOKENS[:5]]
    session.restore(snapshot)
    session.prefill(TOKENS[10:10 + 20])  # the window is past what it was
    session.restore(snapshot)
    again = [session.decode(token) for token in TOKENS[:5]]
    assert np.array_equal(expected, again)


@pytest.mark.parametrize("target", TARGETS)
def test_a_reset_leaves_nothing_of_the_window(bundles, target):
    session = bundles(target).session()
    expected = session.prefill(TOKENS[:5])
    session.prefill(TOKENS[5:60])
    session.reset()
    assert np.array_equal(session.prefill(TOKENS[:5]), expected)


@pytest.mark.parametrize("target", SCORING)
def test_a_step_can_be_taken_back_wherever_the_window_stands(bundles, target):
    session, undisturbed = bundles(target).session(), bundles(target).session()
    count = min(5, session.scored)
    for position in range(CONTEXT - count):
        session.prefill_scored(TOKENS[-count:], count)
        session.take_back()
        logits, expected = session.decode(TOKENS[position]), undisturbed.decode(TOKENS[position])
        assert np.array_equal(logits, expected), position


@pytest.mark.parametrize("target", SCORING)
def test_a_lookahead_changes_no_answer(bundles, target):
    prompt = TOKENS[:20] * 2
    session = bundles(target).session()
    plain = list(generate(session, prompt, max_tokens=40))
    session.reset()
    assert list(generate(session, prompt, max_tokens=40, lookahead=min(7, session.scored - 1))) == plain


@pytest.mark.parametrize(("here", "there"), [("android-q4", "onnx-q4"), ("onnx-q4", "android-q4"),
                                             ("onnx-q4", "mlx-q4"), ("mlx-q4", "android-q4")])
@pytest.mark.parametrize("position", [5, 33, 70])
def test_a_saved_session_goes_on_in_another_runtime(bundles, tmp_path, here, there, position):
    first, second = bundles(here).session(), bundles(there).session()
    first.prefill(TOKENS[:position])
    first.save(tmp_path / "session")
    second.load(tmp_path / "session")
    expected, logits = first.decode(7), second.decode(7)
    assert np.abs(logits - expected).max() < 0.2 * expected.std()  # each rounds activations in its own way


def test_a_prompt_longer_than_the_window_is_baked(checkpoint, tmp_path):
    (tmp_path / "system.txt").write_text("Answer in one word, and never in two.")
    bundle = export(checkpoint, target="onnx-q4", output=tmp_path / "bundle", context=CONTEXT, prefill_chunk=CHUNK,
                    bake_prompt=tmp_path / "system.txt")
    baked, plain = bundle.session(), bundle.session()
    baked.load(bundle.baked_prompt)
    assert baked.position > WINDOW
    plain.prefill(baked.tokens)
    assert np.abs(baked.decode(30) - plain.decode(30)).max() < 1e-3


@pytest.mark.parametrize("options", [{"target": "android-q8", "kv_dtype": "int8"},
                                     {"target": "onnx-q8", "kv_dtype": "int8"},
                                     {"target": "android-q4", "state": "internal"},
                                     {"target": "onnx-q4", "prefill_chunk": 1},
                                     pytest.param({"target": "coreml-q8", "state": "internal"},
                                                  marks=pytest.mark.heavy),
                                     pytest.param({"target": "android-q4", "prefill_chunk": 1},
                                                  marks=pytest.mark.heavy)], ids=str)
def test_so_is_every_option(checkpoint, tmp_path, options):
    assert_verified(export(checkpoint, output=tmp_path / "bundle",
                           **{"context": CONTEXT, "prefill_chunk": CHUNK, **options}))


@pytest.mark.heavy
@pytest.mark.parametrize("name", AWKWARD_LFM3)
@pytest.mark.parametrize("target", ["android-q4", "onnx-q4", "coreml-q4", "mlx-q4", "npu-q8"])
def test_awkward_models_are_verified(tmp_path, name, target):
    source = save_model(tmp_path / "model", lfm3_model(**AWKWARD_LFM3[name]))
    exact = "float32" if target.startswith(("mlx", "coreml")) else None
    assert_verified(export(source, target=target, output=tmp_path / "bundle", context=320, prefill_chunk=32,
                           compute_dtype=exact))


@pytest.mark.parametrize("context", [4, 7, WINDOW])
def test_a_context_within_the_window_is_exact(checkpoint, tmp_path, context):
    assert_verified(export(checkpoint, target="onnx-q4", output=tmp_path / "bundle", context=context, prefill_chunk=2))


def test_rounding_by_a_text_and_sensitivity_know_its_layers(checkpoint, tmp_path):
    bundle = export(checkpoint, target="onnx-q4", output=tmp_path / "bundle", context=CONTEXT, prefill_chunk=CHUNK,
                    rounding="gptq")
    assert_verified(bundle)
    found, _, _ = analyse(checkpoint, tokens=64)
    named = {name for cost in found.costs for name in cost.weights}
    config = open_checkpoint(checkpoint).config
    assert named == {name for name, entry in config.weights().items() if entry.role in ("linear", "table", "head")}


def test_what_a_step_reads_and_a_session_takes_stops_growing_with_the_window(bundles):
    manifest = bundles("onnx-q4").manifest
    row = 2 * manifest.config.head_dim * 4  # one key head
    assert step_bytes(manifest, 80) - step_bytes(manifest, 60) == 20 * row  # of the one layer with full attention
    caches = [predict(manifest, 10**6, filled).kv_cache for filled in (60, 80)]
    assert caches[1] - caches[0] == 20 * row


# --- clients ------------------------------------------------------------------------------------------------------


def test_onnxruntime_genai_runs_the_bundle_as_it_is(bundles):
    bundle, prompts = bundles("onnx-q4"), [TOKENS[:5], TOKENS[:50], [30] * 9]
    session, expected, stop = bundle.session(), [], bundle.manifest.config.eos_token_ids
    for prompt in prompts:
        session.reset()
        expected.append(list(generate(session, prompt, max_tokens=30, stop=stop)))
    jobs = [{"tokens": prompt, "max_tokens": 30} for prompt in prompts]
    results = json.loads(output_of([sys.executable, str(REPO / "tests/clients/greedy_genai.py")],
                                   json.dumps({"directory": str(bundle.directory), "jobs": jobs})))
    generated = [result["generated"] for result in results]
    assert [tokens[:-1] if tokens[-1] in stop else tokens for tokens in generated] == expected


def test_the_program_in_the_readme_runs(bundles):
    readme = (bundles("onnx-q4").directory / "README.md").read_text()
    program = readme.split("```python\n")[1].split("```")[0]
    assert output_of([sys.executable, "-c", program], cwd=bundles("onnx-q4").directory).strip()
    assert "transformers.js: cannot run it" in readme


def test_mlx_bundles_say_that_mlx_lm_has_no_such_model(bundles):
    assert "needs a model of type lfm2, and this one is lfm3" in (
        bundles("mlx-q4").directory / "README.md").read_text()


def test_gguf_says_which_llama_cpp_it_would_need(checkpoint, tmp_path):
    with pytest.raises(ExportError, match=r"llama\.cpp runs lfm3 from its version 0\.8\.0"):
        export(checkpoint, target="gguf-q4", output=tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_bundle_opens_in_another_process(bundles):
    assert open_bundle(bundles("onnx-q4").directory).manifest.config == bundles("onnx-q4").manifest.config
