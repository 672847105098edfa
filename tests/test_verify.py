"""`verify` must pass what is right and fail what is broken."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from lfm_edge import export
from lfm_edge.bundle.bundle import Bundle
from lfm_edge.bundle.manifest import Manifest
from lfm_edge.calibration.quantize import quantize_checkpoint
from lfm_edge.checkpoint.checkpoint import RandomCheckpoint, open_checkpoint
from lfm_edge.errors import BundleError
from lfm_edge.harness import parity
from lfm_edge.harness.quality import compare_tasks
from lfm_edge.harness.verify import COARSE_DRAWS, NOISE_DRAWS, _quality_limit, verify
from lfm_edge.quantization.recipe import recipe
from lfm_edge.session.session import Session
from lfm_edge.targets import TARGETS
from tests.helpers import TINY, lfm_edge, save_checkpoint


@pytest.fixture(scope="module")
def verified(tiny_bundle):
    return verify(tiny_bundle)


def copy_of(bundle, directory):
    shutil.copytree(bundle.directory, directory)
    return Bundle.open(directory)


def reseal(bundle):
    """Let the manifest agree with the files again, so that only `verify` can find what was changed."""
    bundle.manifest.write(bundle.directory)
    return Bundle.open(bundle.directory)


def flip(bundle, blob, size=16):
    """Invert `size` bytes in the middle of a packed weight of the artifact."""
    data = bytearray(bundle.artifact.read_bytes())
    start = data.index(blob) + len(blob) // 2
    data[start:start + size] = bytes(255 - byte for byte in data[start:start + size])
    bundle.artifact.write_bytes(data)


def test_the_trained_model_passes(verified):
    assert verified.passed
    assert verified.weights.blobs > 50
    assert [row.phase for row in verified.parity] == list(parity.PHASES)
    assert verified.greedy.tokens == 24
    assert verified.skipped == {}


def test_the_trained_model_answers_exactly_in_float32_and_on_the_device(verified):
    for task in verified.tasks:
        assert task.float_accuracy == 1.0, task
        assert task.accuracy >= 0.98, task
    assert sum(task.prompts for task in verified.tasks) >= 150


def test_one_flipped_weight_block_fails(tiny_bundle, tmp_path):
    from exporters.executorch import packed_weights

    broken = copy_of(tiny_bundle, tmp_path / "bundle")
    weights = quantize_checkpoint(open_checkpoint(TINY), broken.manifest.recipe)
    name = "model.layers.2.self_attn.out_proj.weight: codes"
    blobs = dict(packed_weights(broken.manifest.config, weights))
    name = name if name in blobs else next(n for n in blobs if n.endswith("out_proj.weight: codes"))
    flip(broken, blobs[name])
    result = verify(reseal(broken))
    assert not result.passed
    assert result.weights.missing == [name]


def test_a_conv_state_that_is_not_reset_fails(tiny_bundle, monkeypatch):
    def forgetful(self):
        self.position = 0

    runtime = tiny_bundle.runtime.module()
    monkeypatch.setattr(runtime.ExecutorchSession, "reset", forgetful)
    result = verify(tiny_bundle)
    assert not result.passed
    assert not next(row for row in result.parity if row.phase == "after reset").within(result.limits)


def test_a_cache_that_is_not_restored_fails(tiny_bundle, monkeypatch):
    def careless(self, snapshot):
        self.position = snapshot.position

    monkeypatch.setattr(tiny_bundle.runtime.module().ExecutorchSession, "restore", careless)
    result = verify(tiny_bundle)
    failed = [row.phase for row in result.parity if not row.within(result.limits)]
    assert failed == ["after restore"]


@pytest.fixture(scope="module")
def small_bundle(tmp_path_factory):
    """A random model of two layers."""
    folder = tmp_path_factory.mktemp("small")
    source = save_checkpoint(folder / "model", layer_types=["conv", "full_attention"])
    return export(source, target="android-q4", output=folder / "bundle", context=128,
                  prefill_chunk=32)


@pytest.fixture(scope="module")
def quiet_bundle(tmp_path_factory):
    """A random model of one layer, whose 8-bit activations do not tip: its noise is that of float32 sums."""
    folder = tmp_path_factory.mktemp("quiet")
    source = save_checkpoint(folder / "model", layer_types=["conv"])
    return export(source, target="android-q8", output=folder / "bundle", context=64, prefill_chunk=16)


def test_the_tolerance_is_tight_where_the_models_noise_allows_it(quiet_bundle):
    result = verify(quiet_bundle)
    assert result.limits.typical_error == 1e-4
    assert {limit.logit_error for limit in result.limits.phases.values()} == {1e-3}
    assert result.typical_error < 1e-5
    assert result.typical_passed and all(row.within(result.limits) for row in result.parity)


def test_quality_is_measured_on_a_text_of_the_users(small_bundle, tmp_path):
    (tmp_path / "text").write_text("the harbour wakes before the town does " * 30)
    result = verify(small_bundle, text=tmp_path / "text")
    tokens = small_bundle.tokenizer().encode((tmp_path / "text").read_text())
    assert len(tokens) > 3 * small_bundle.manifest.state.context
    assert len(tokens) - 16 < result.quality.positions <= len(tokens)
    assert result.parity == verify(small_bundle).parity


def test_a_shifted_position_fails(small_bundle, monkeypatch):
    """Off by one in the rotary positions and the cache rows: what a wrong chunk boundary does."""
    original = Session.prefill

    def shifted(self, tokens):
        if self.position == 0 and len(tokens) > 1 and type(self).__name__ == "ExecutorchSession":
            self.position = 1
        return original(self, tokens)

    monkeypatch.setattr(Session, "prefill", shifted)
    result = verify(small_bundle)
    assert not result.typical_passed and not result.passed


def test_another_checkpoint_is_refused(tiny_bundle, tmp_path):
    with pytest.raises(BundleError, match="not the checkpoint"):
        verify(tiny_bundle, model=save_checkpoint(tmp_path / "other"))


def test_a_bundle_quantized_by_other_rules_is_refused(tiny_bundle, tmp_path):
    changed = copy_of(tiny_bundle, tmp_path / "bundle")
    path = changed.directory / "manifest.json"
    raw = json.loads(path.read_text())
    raw["weights_sha256"] = "0" * 64
    path.write_text(json.dumps(raw))
    with pytest.raises(BundleError, match="quantized by another version"):
        verify(Bundle.open(changed.directory))


def test_the_command_exits_with_1_and_writes_json_when_a_check_fails(tiny_bundle, tmp_path):
    broken = copy_of(tiny_bundle, tmp_path / "bundle")
    weights_at = broken.artifact.read_bytes()
    middle = len(weights_at) // 2
    broken.artifact.write_bytes(weights_at[:middle] + bytes(255 - b for b in weights_at[middle:middle + 64])
                                + weights_at[middle + 64:])
    reseal(broken)
    finished = lfm_edge("verify", broken.directory, "--json", tmp_path / "result.json")
    assert finished.returncode == 1
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["passed"] is False
    assert "Traceback" not in finished.stderr


@pytest.mark.heavy
def test_the_command_exits_with_0_on_a_good_bundle_and_json_goes_to_standard_output(tiny_bundle):
    finished = lfm_edge("verify", tiny_bundle.directory, "--json", "-")
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["passed"] is True


def artifact_off_by(monkeypatch, bundle, error):
    """Let the artifact's logits be wrong by so much, and count how often the reference is disturbed."""
    from runtimes.reference import ReferenceSession

    disturbed, jitter = [], ReferenceSession.jitter
    monkeypatch.setattr(ReferenceSession, "jitter", lambda self, seed, *rest: (disturbed.append(seed),
                                                                               jitter(self, seed, *rest)))
    runtime = bundle.runtime.module().ExecutorchSession
    step = runtime._step

    def off(self, tokens):
        logits = step(self, tokens).copy()
        logits[3] += error
        return logits

    monkeypatch.setattr(runtime, "_step", off)
    return disturbed


@pytest.mark.parametrize("error", [0.0, 0.003, 50.0])
def test_the_noise_is_drawn_as_often_whatever_the_artifact_does(quiet_bundle, monkeypatch, error):
    expected = verify(quiet_bundle)
    disturbed = artifact_off_by(monkeypatch, quiet_bundle, error)
    result = verify(quiet_bundle)
    assert disturbed == list(range(NOISE_DRAWS + COARSE_DRAWS))
    assert result.passed == (error == 0.0)
    assert result.limits == expected.limits and result.floor == expected.floor


def test_a_phase_is_held_to_its_own_limit():
    """An error that the noise of another phase is as large as."""
    noisy, quiet = (parity.Agreement(phase, 4, error, 1.0, error ** 2, 1.0)
                    for phase, error in (("decode", 0.1), ("after reset", 1e-6)))
    limits = parity.Limits.of(TARGETS["android-q4"].thresholds, [noisy, quiet], 1e-6)
    assert limits.of_phase("decode").logit_error == pytest.approx(0.3)
    assert limits.of_phase("after reset").logit_error == 1e-3
    assert noisy.within(limits) and quiet.within(limits)
    assert not replace(noisy, phase="after reset").within(limits)
    assert replace(noisy, phase="baked prompt").within(limits)


def test_a_tie_of_the_greedy_answer_is_as_wide_as_the_limit_of_decode():
    limits = parity.Limits({"decode": parity.Limit(0.1, 1.0), "lookahead": parity.Limit(9.0, 9.0)}, 1.0)
    logits = np.array([1.0, 0.9, -1.0, -0.9], np.float32)
    near, far = (parity.judge_greedy([token], [logits], limits) for token in (1, 3))
    assert (near.exact, near.ties, near.passed) == (0, 1, True) and not far.passed


def test_the_reference_reads_the_text_once_for_all_phases(small_bundle):
    """Each phase of the artifact's is compared at the places of the text where it stands."""
    tokens = list(range(20, 76))
    places = parity.places(small_bundle.session(), tokens, list(parity.PHASES))
    assert places["full prefill"] == [41] and places["decode"] == list(range(42, 56))
    assert places["chunked prefill"] == [0, 3, 12, 39, 41]
    assert places["after reset"] == list(range(6))
    assert places["after restore"] == [23, *range(24, 29)] and places["lookahead"] == list(range(21, 29))


def test_what_quantization_may_cost_is_by_the_fewest_bits_and_looser_for_random_weights(verified):
    trained, random = open_checkpoint(TINY), RandomCheckpoint("lfm2-350m")
    four, eight, narrow_head = (recipe(*bits, "float") for bits in ((4, 32, 8), (8, 32, 8), (8, 32, 4)))
    assert verified.quality.limit == 0.25
    assert [_quality_limit(trained, bits) for bits in (four, eight, narrow_head)] == [0.25, 0.05, 0.25]
    assert [_quality_limit(random, bits) for bits in (four, eight, narrow_head)] == [0.5, 0.1, 0.5]
    assert verified.quality.kl_divergence < 0.02


def test_nan_logits_are_never_close():
    bad = parity.compare("decode", [np.array([np.nan, 1.0], np.float32)], [np.array([0.0, 1.0], np.float32)])
    assert not bad.within(parity.Limits({"decode": parity.Limit(1e9, 1e9)}, 1e9))


def test_every_target_states_thresholds_that_a_chance_answer_misses():
    for target in TARGETS.values():
        assert target.thresholds.logit_error < 0.1
        assert target.thresholds.noise_factor < 10


def test_the_manifest_of_a_good_bundle_is_complete(tiny_bundle):
    manifest = Manifest.read(tiny_bundle.directory)
    assert manifest == tiny_bundle.manifest
    assert {"model.pte", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
            "README.md", "tasks.json"} <= set(manifest.files)
    assert manifest.decoder.lowering["delegates"] >= 1


@pytest.mark.parametrize("prompts, drop", [(20, 0.05), (50, 0.02), (40, 0.05)])
def test_a_task_may_lose_just_what_it_may_lose(prompts, drop):
    allowed = round(prompts * drop)
    for lost, passed in ((allowed, True), (allowed + 1, False)):
        task, = compare_tasks({"task": [True] * prompts}, {"task": [True] * (prompts - lost) + [False] * lost}, drop)
        assert task.passed is passed
