"""The Android artifact: what is in the program, and ExecuTorch's own LLM runner. (test_artifacts.py has the rest.)"""

import json
import subprocess
import sys

import numpy as np
import pytest
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.extension.pybindings import portable_lib

from exporters import executorch
from lfm_edge import export
from lfm_edge.errors import LfmEdgeError
from lfm_edge.session.generation import generate
from tests.helpers import ALL_AT_ONCE, TINY, assert_verified, reads_proc, resident, save_checkpoint


@pytest.fixture(scope="module")
def awkward_bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("awkward")
    return export(save_checkpoint(folder / "model", max_shard_size="100KB", **ALL_AT_ONCE), target="android-q4",
                  output=folder / "bundle", context=96, prefill_chunk=16, kv_dtype="int8")


@pytest.fixture(scope="module")
def internal_bundle(tmp_path_factory):
    return export(TINY, target="android-q4", output=tmp_path_factory.mktemp("internal") / "bundle", context=512,
                  prefill_chunk=64, state="internal")


@reads_proc
@pytest.mark.parametrize("kept", ["awkward_bundle", "internal_bundle"])
def test_no_page_of_a_large_embedding_stays_mapped_after_a_step(kept, request, monkeypatch):
    bundle = request.getfixturevalue(kept)
    assert not bundle.session().table.ranges  # a small one is left alone
    monkeypatch.setattr("lfm_edge.backends.mapped.WORTH_FORGETTING", 1)
    session = bundle.session()
    assert session.table.ranges
    first = session.prefill(list(range(5, 69)))
    assert resident(bundle.artifact.resolve()) == 0
    session.decode(7)
    assert resident(bundle.artifact.resolve()) == 0
    session.reset()
    assert np.array_equal(session.prefill(list(range(5, 69))), first)  # from the file again


@reads_proc
def test_a_session_never_touches_what_another_has_mapped(awkward_bundle, monkeypatch):
    monkeypatch.setattr("lfm_edge.backends.mapped.WORTH_FORGETTING", 1)
    first, second = awkward_bundle.session(), awkward_bundle.session()
    assert first.table.ranges and second.table.ranges
    assert not set(first.table.ranges) & set(second.table.ranges)


def test_the_state_is_changed_where_it_lies_and_is_no_output(awkward_bundle):
    session = awkward_bundle.session()
    before = [tensor.data_ptr() for tensor in session.state]
    session.prefill([3, 4, 5])
    assert [tensor.data_ptr() for tensor in session.state] == before
    assert all(tensor.any() for tensor in session.state)
    meta = session.forward.method_meta()
    assert meta.num_outputs() == 1
    assert meta.output_tensor_meta(0).sizes() == (1, 8, 301)  # at most: of a single token it is one row
    keys = session.state[0]
    assert not keys[:, 3:].any()  # rows past the position are untouched


def test_no_operator_copies_a_cache(awkward_bundle):
    """The only copies are those of the conv states; a cache is written by update_cache alone."""
    portable = awkward_bundle.manifest.decoder.lowering["left portable"]
    assert portable.get("aten::copy_", 0) == len(awkward_bundle.manifest.config.conv_layers)
    assert portable["llama::update_cache"] == 6 * len(awkward_bundle.manifest.config.attention_layers)
    assert not any("clone" in name or "copy.out" in name for name in portable)


def test_everything_between_two_attention_kernels_is_one_delegate(awkward_bundle):
    attention = len(awkward_bundle.manifest.config.attention_layers)
    assert awkward_bundle.manifest.decoder.lowering["delegates"] <= attention + 3


@pytest.mark.parametrize("state", ["explicit", "internal"])
def test_the_program_is_the_one_that_executorch_s_own_lowering_makes(tmp_path, monkeypatch, state):
    """Byte for byte: what `exporters/xnnpack.py` leaves out had nothing to do."""
    checkpoint = save_checkpoint(tmp_path / "model", **ALL_AT_ONCE)
    options = {"target": "android-q4", "context": 96, "prefill_chunk": 16, "state": state}
    ours = export(checkpoint, output=tmp_path / "ours", **options)

    def stock(program, metadata, release):
        return to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], constant_methods=metadata,
                                           compile_config=EdgeCompileConfig(_check_ir_validity=False))

    monkeypatch.setattr(executorch.xnnpack, "lower", stock)
    theirs = export(checkpoint, output=tmp_path / "theirs", **options)
    assert ours.artifact.read_bytes() == theirs.artifact.read_bytes()


def in_the_runner(bundle, prompts):
    """What ExecuTorch's TextLLMRunner answers to each (prompt, most tokens), with its `reset()` between them.

    In a process of its own: the runner prints to standard output and aborts on a failed check.
    """
    script = f"""
import json, sys
import executorch.extension.llm.custom_ops.custom_ops, executorch.kernels.quantized
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
runner = TextLLMRunner({str(bundle.artifact)!r}, {str(bundle.directory / "tokenizer.json")!r})
answers = []
for prompt, tokens in {prompts!r}:
    pieces = []
    runner.generate(prompt, GenerationConfig(echo=False, max_new_tokens=tokens, temperature=0.0), pieces.append)
    answers.append("".join(pieces))
    runner.reset()
print("\\nANSWERS " + json.dumps(answers))
"""
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    line = next((line for line in finished.stdout.splitlines() if line.startswith("ANSWERS ")), None)
    assert line is not None, finished.stderr[-2000:]
    return json.loads(line.removeprefix("ANSWERS "))


def test_the_stock_runner_answers_token_by_token_as_our_session_does_also_after_its_reset(internal_bundle):
    tokenizer, session = internal_bundle.tokenizer(), internal_bundle.session()
    question = "<|im_start|>user\n12+30=?<|im_end|>\n<|im_start|>assistant\n"
    chunk, context = internal_bundle.manifest.options.prefill_chunk, internal_bundle.manifest.state.context
    # One token; one chunk exactly, and one more; the longest prompt that the runner itself takes.
    prompts = [(question, 12), ("a", 12), (question, 12), ("x" * chunk, 12), ("xy" * chunk + "z", 12),
               ("b" * (context - 1), 1), (question, 12)]
    answers = in_the_runner(internal_bundle, prompts)
    stop = internal_bundle.manifest.config.eos_token_ids
    for (prompt, most), answer in zip(prompts, answers, strict=True):
        session.reset()
        tokens = list(generate(session, tokenizer.encode(prompt, special=False), max_tokens=most, stop=stop))
        assert answer.removesuffix("<|im_end|>") == tokenizer.decode(tokens, skip_special=False), prompt[:20]
    assert answers[0] == answers[2] == answers[-1]


def test_an_internal_state_is_verified_and_says_what_it_cannot_do(internal_bundle):
    result = assert_verified(internal_bundle)
    assert set(result.skipped) == {"after restore"}
    session = internal_bundle.session()
    for refused in (session.snapshot, lambda: session.restore(None)):
        with pytest.raises(LfmEdgeError, match="--state explicit"):
            refused()


def test_the_program_has_the_metadata_that_the_runners_ask_for(internal_bundle):
    program = portable_lib._load_for_executorch(str(internal_bundle.artifact))

    def constant(name):
        return program.run_method(name, [])

    assert constant("get_max_seq_len") == [64]
    assert constant("get_max_context_len") == [512]
    assert constant("get_vocab_size") == [272]
    assert constant("get_bos_id") == [1]
    assert constant("get_eos_ids") == [7]
    assert constant("use_kv_cache") == constant("use_sdpa_with_kv_cache") == constant("enable_dynamic_shape") == [True]
