"""What holds for the artifact of every target: it computes what the quantized reference computes."""

import dataclasses

import numpy as np
import pytest

from lfm_edge import export, open_bundle
from lfm_edge.calibration.kv_scales import read_kv_scales
from lfm_edge.calibration.quantize import quantize_checkpoint
from lfm_edge.errors import ContextFull
from lfm_edge.harness.quality import read_tasks
from lfm_edge.session.generation import generate
from lfm_edge.targets import TARGETS
from runtimes.reference import ReferenceSession
from tests.helpers import ALL_AT_ONCE, AWKWARD, TINY, assert_verified, save_checkpoint
from tests.untrusted_helpers import in_hub_cache

FOUR_BITS = [name for name, target in TARGETS.items() if target.bits == 4]


@pytest.fixture(scope="module", params=FOUR_BITS)
def awkward_bundle(request, tmp_path_factory):
    """With 8-bit caches, where the target has them. (llama.cpp refuses the bias: test_gguf.py.)"""
    folder = tmp_path_factory.mktemp("awkward")
    config = ALL_AT_ONCE | ({"conv_bias": False} if request.param == "gguf-q4" else {})
    return export(save_checkpoint(folder / "model", max_shard_size="100KB", **config), target=request.param,
                  output=folder / "bundle", context=96, prefill_chunk=16,
                  kv_dtype="int8" if "int8" in TARGETS[request.param].arithmetic.kv_dtypes else None)


def test_an_awkward_sharded_model_is_verified(awkward_bundle):
    assert_verified(awkward_bundle)


def test_prompts_of_one_token_and_of_exactly_the_context(tmp_path, awkward_bundle):
    target, checkpoint = awkward_bundle.target, awkward_bundle.source()
    exact = "float32" if "float32" in target.arithmetic.compute_dtypes else None
    bundle = export(checkpoint.source, target=target.name, output=tmp_path / "bundle", context=96, prefill_chunk=16,
                    compute_dtype=exact, kv_dtype="float32" if target.arithmetic.converts_kv else None)
    manifest = bundle.manifest
    weights = quantize_checkpoint(checkpoint, manifest.recipe) | read_kv_scales(bundle.directory)
    reference = ReferenceSession(checkpoint.config, weights, manifest.state.for_reference(manifest.config),
                                 activations=target.arithmetic.activations)
    session = bundle.session()
    for length in (1, manifest.options.prefill_chunk, manifest.options.prefill_chunk + 1, manifest.state.context):
        tokens = [20 + index % 250 for index in range(length)]
        session.reset()
        reference.reset()
        expected = reference.prefill(tokens)
        limit = max(0.05, target.thresholds.logit_error)
        assert np.abs(session.prefill(tokens) - expected).max() <= limit * expected.std()
    with pytest.raises(ContextFull):
        session.decode(1)
    assert session.position == manifest.state.context


def test_a_bundle_in_the_cache_of_the_hub_s_client_runs_as_it_is(tmp_path, awkward_bundle):
    """Where every file is a link to `../../blobs/HASH`. `verify` reads the artifact as well."""
    cached = open_bundle(in_hub_cache(awkward_bundle.directory, tmp_path))
    assert cached.artifact.is_symlink() or any(path.is_symlink() for path in cached.artifact.rglob("*"))
    tokens = [1, 30, 40, 50, 60]
    assert np.array_equal(cached.session().prefill(tokens), awkward_bundle.session().prefill(tokens))
    runtime = cached.runtime.module()
    assert runtime.stored_constants(cached) == runtime.stored_constants(awkward_bundle)


def test_a_second_session_does_not_share_state_with_the_first(awkward_bundle):
    first, second = awkward_bundle.session(), awkward_bundle.session()
    expected = first.prefill([1, 30, 40])
    second.prefill([90, 91, 92, 93])
    first.reset()
    assert np.array_equal(first.prefill([1, 30, 40]), expected)


def test_a_step_writes_its_own_rows_of_the_caches_and_no_others(awkward_bundle):
    session = awkward_bundle.session()
    session.prefill([3, 4, 5])
    session.decode(6)
    for tensor, cache in zip(session.spec.tensors, session.state, strict=True):
        if tensor.kind in ("key", "value"):
            assert all(tensor.kept(cache, 4).select(tensor.axis, row).any() for row in range(4))
            assert not cache.narrow(tensor.axis, 4, session.spec.context - 4).any()


def test_the_caches_keep_their_place(awkward_bundle):
    if awkward_bundle.manifest.runtime in ("mlx", "llamacpp"):
        pytest.skip("the caches are in the runtime's memory, and `state` copies them")
    session = awkward_bundle.session()
    caches = [state for tensor, state in zip(session.spec.tensors, session.state, strict=True)
              if tensor.kind in ("key", "value")]
    session.prefill([3, 4, 5])
    session.decode(6)
    assert {cache.data_ptr() for cache in caches} <= {state.data_ptr() for state in session.state}


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.heavy)])
def test_every_target_has_the_same_weights_and_gives_the_same_answers(tmp_path, few_tasks, bits):
    """The digest is over integers and scales; `verify` finds them in each artifact, bit for bit.

    Those of the NPU's 4-bit groups are others: its scales come in two levels.
    """
    names = [name for name, target in TARGETS.items() if target.bits == bits]
    weights, answers = {}, {}
    for name in names:
        bundle = export(few_tasks, target=name, output=tmp_path / name, context=512, prefill_chunk=16)
        assert assert_verified(bundle).passed
        session, tokenizer = bundle.session(), bundle.tokenizer()
        weights.setdefault(bundle.manifest.recipe.body, set()).add(bundle.manifest.weights_sha256)
        answers[name] = []
        for task in read_tasks(bundle):
            session.reset()
            answers[name].append(list(generate(session, tokenizer.chat(task["messages"]), max_tokens=64,
                                               stop=bundle.manifest.config.eos_token_ids)))
    assert len(names) > 1 and len(answers[names[0]]) == 10 and all(answers[names[0]])
    assert all(len(digests) == 1 for digests in weights.values()) and len(weights) == (2 if bits == 4 else 1)
    for name in names:
        assert answers[name] == answers[names[0]], name


@pytest.mark.heavy
@pytest.mark.parametrize("name", list(AWKWARD))
@pytest.mark.parametrize("options", [
    {"target": "android-q4"}, {"target": "android-q8", "head_bits": 4},
    {"target": "onnx-q4"}, {"target": "onnx-q8", "head_bits": 4},
    {"target": "coreml-q4", "compute_dtype": "float32"}, {"target": "coreml-q8", "head_bits": 4},
    {"target": "coreml-q4", "state": "internal"},
    {"target": "mlx-q4", "compute_dtype": "float32"},
    {"target": "mlx-q8", "head_bits": 4, "compute_dtype": "float32"},  # bfloat16 is too noisy on random weights
    {"target": "npu-q4"}, {"target": "npu-q8", "head_bits": 4, "soc": "sm8350"},
], ids=lambda options: "-".join(map(str, options.values())))
def test_awkward_models_are_verified(tmp_path, name, options):
    source = save_checkpoint(tmp_path / "model", **AWKWARD[name])
    assert_verified(export(source, output=tmp_path / "bundle", context=64, prefill_chunk=16, **options))


@pytest.mark.heavy
@pytest.mark.parametrize("options", [
    {"target": "android-q4", "head_bits": 4}, {"target": "android-q8"}, {"target": "android-q8", "kv_dtype": "int8"},
    {"target": "android-q4", "group_size": 64}, {"target": "android-q4", "group_size": 128, "context": 300},
    {"target": "android-q4", "prefill_chunk": 1}, {"target": "android-q8", "state": "internal", "kv_dtype": "int8"},
    {"target": "onnx-q4", "head_bits": 4}, {"target": "onnx-q8"}, {"target": "onnx-q8", "kv_dtype": "int8"},
    {"target": "onnx-q4", "group_size": 64}, {"target": "onnx-q4", "group_size": 128, "context": 300},
    {"target": "onnx-q4", "prefill_chunk": 1, "kv_dtype": "int8"},
    {"target": "coreml-q4", "head_bits": 4}, {"target": "coreml-q8"}, {"target": "coreml-q4", "group_size": 128},
    {"target": "coreml-q8", "compute_dtype": "float32", "prefill_chunk": 1},
    {"target": "coreml-q8", "state": "internal", "context": 300},
    {"target": "mlx-q4", "head_bits": 4}, {"target": "mlx-q8"}, {"target": "mlx-q4", "group_size": 128},
    {"target": "mlx-q8", "compute_dtype": "float32", "prefill_chunk": 1},
    {"target": "npu-q4", "head_bits": 4}, {"target": "npu-q8"}, {"target": "npu-q4", "group_size": 128},
    {"target": "npu-q4", "group_size": 64, "prefill_chunk": 1, "soc": "sm8350"},
    {"target": "gguf-q4", "head_bits": 4}, {"target": "gguf-q4", "group_size": 128, "context": 300},
    {"target": "gguf-q4", "kv_dtype": "float32", "prefill_chunk": 1},
], ids=str)
def test_the_trained_model_keeps_its_answers_with_every_option(tmp_path, few_tasks, options):
    is_native = "linux" in TARGETS[options["target"]].runtime.measured_on
    bundle = export(TINY if is_native else few_tasks, output=tmp_path / "bundle", **{"context": 512, **options})
    result = assert_verified(bundle)
    assert result.passed, dataclasses.asdict(result)
