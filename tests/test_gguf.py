"""The GGUF file: what is in it, what llama.cpp's own clients make of it, and what a session does with it."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors

import exporters.gguf as exporter
import runtimes.llamacpp as runtime
from lfm_edge import export, open_bundle, targets
from lfm_edge.bundle.bundle import Bundle, weights_digest
from lfm_edge.calibration.quantize import quantize_checkpoint
from lfm_edge.checkpoint.checkpoint import open_checkpoint
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.errors import BundleError, ExportError, LfmEdgeError
from lfm_edge.harness import parity
from lfm_edge.harness.round import FILL, Plan, run_round
from lfm_edge.harness.verify import verify
from lfm_edge.quantization.activations import fake_quantize_blocks
from lfm_edge.quantization.recipe import recipe
from lfm_edge.quantization.tensor import QuantizedTensor
from lfm_edge.session.saved import Origin
from runtimes.reference import ReferenceSession
from tests.client_helpers import (
    CONVERSATION,
    TEXTS,
    assert_ours_or_tied,
    long_prompt,
    our_answers,
    output_of,
    tasks,
)
from tests.helpers import ALL_AT_ONCE, AWKWARD, TINY, assert_verified, code_of, save_checkpoint

# bits of the linear layers, columns that share a scale, bits of embedding and head
RECIPES = [(4, 32, 8), (4, 64, 8), (4, 128, 8), (4, 32, 4), (8, 32, 8)]

# What llama.cpp's LFM2 cannot be, with what it needs. It would refuse such a file, or end the process.
REFUSED = {
    "one conv tap": "two conv taps or more", "conv bias": "convolutions without bias",
    "conv only": "an attention layer", "one conv layer": "an attention layer", "attention only": "a conv layer",
    "untied odd vocabulary, conv bias, four taps": "convolutions without bias",
    "narrow heads": "heads as wide as hidden_size / num_attention_heads",
}
MODELS = AWKWARD | {"narrow heads": {"head_dim": 8}}
EXPRESSIBLE = ALL_AT_ONCE | {"conv_bias": False}
PROMPTS = [[1], [1, 20, 30, 40], [20 + 7 * index % 250 for index in range(40)]]


@pytest.fixture(scope="module")
def bundle(few_tasks, tmp_path_factory):
    """As the options are by default, but for a short context."""
    return export(few_tasks, target="gguf-q4", output=tmp_path_factory.mktemp("gguf") / "bundle", context=1024)


@pytest.fixture(scope="module")
def awkward_bundle(tmp_path_factory):
    """Everything that a hard-coded assumption breaks on, a vocabulary with many merges, and exact attention."""
    folder = tmp_path_factory.mktemp("awkward")
    source = save_checkpoint(folder / "model", **EXPRESSIBLE | {"vocab_size": 65_535})
    return export(source, target="gguf-q4", output=folder / "bundle", context=64, prefill_chunk=16,
                  kv_dtype="float32")


@pytest.fixture(scope="module", params=["float16", "float32"])
def small_bundle(request, tmp_path_factory):
    """Caches of both types: values lie in another order in each."""
    folder = tmp_path_factory.mktemp("small")
    return export(save_checkpoint(folder / "model"), target="gguf-q4", output=folder / "bundle", context=64,
                  prefill_chunk=16, kv_dtype=request.param)


class Client:
    """llama-cpp-python's own client, which gets the path of the file and nothing else of ours.

    exact: with caches of float32, not its default
    """

    def __init__(self, bundle, *, exact=False):
        kind = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32} if exact else {}
        self.model = llama_cpp.Llama(str(bundle.artifact), n_ctx=0, verbose=False, **kind)

    def encode(self, text, *, add_bos=True):
        return self.model.tokenize(text.encode(), add_bos=add_bos, special=True)

    def chat(self, messages):
        """Token ids by the template and the special tokens that are in the file."""
        bos, eos = (self.model.detokenize([token], special=True).decode()
                    for token in (self.model.token_bos(), self.model.token_eos()))
        template = self.model.metadata["tokenizer.chat_template"]
        prompt = Jinja2ChatFormatter(template, eos_token=eos, bos_token=bos)(messages=messages).prompt
        return self.encode(prompt, add_bos=False)

    def greedy(self, prompt, max_tokens):
        """Through the first stop token."""
        self.model.reset()
        answer = []
        for token in self.model.generate(prompt, temp=0.0, repeat_penalty=1.0):
            answer.append(token)
            if len(answer) == max_tokens or token == self.model.token_eos():
                break
        return answer


# --- the weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", RECIPES, ids=str)
def test_every_weight_dequantizes_to_the_quantizer_s_own_bit_for_bit(tmp_path, scheme):
    """By ggml's own definition of its formats, as the gguf package has it."""
    checkpoint = open_checkpoint(TINY)
    weights = quantize_checkpoint(checkpoint, recipe(*scheme, "q8_0"))
    path, formats = tmp_path / "model.gguf", {name: exporter.tensor_format(name, one) for name, one in weights.items()}
    exporter.write_tensors(gguf.GGUFWriter(path, "lfm2"), checkpoint.config, weights, formats)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    names = exporter.tensor_names(checkpoint.config)
    assert len(stored) == len(weights) == len(set(names.values()))
    for name, weight in weights.items():
        tensor = stored[names[name]]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(tensor.shape[::-1]))
        expected = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
        assert np.array_equal(values, expected.squeeze(1).numpy() if expected.dim() == 3 else expected.numpy())
        if isinstance(weight, QuantizedTensor):
            assert tensor.tensor_type.name == ("Q4_0" if weight.bits == 4 else "Q8_0")


@given(data=st.data(), bits=st.sampled_from([4, 8]), rows=st.integers(1, 5), groups=st.integers(1, 3),
       blocks=st.integers(1, 4))
def test_all_codes_and_scales_survive(data, bits, rows, groups, blocks):
    limit = 2 ** (bits - 1)
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    ints = torch.randint(-limit, limit, (rows, groups * blocks * 32), generator=generator).to(torch.int8)
    exponents = torch.randint(-14, 8, (rows, groups), generator=generator)
    scales = torch.ldexp(1 + torch.randint(0, 128, (rows, groups), generator=generator) / 128, exponents)
    weight = QuantizedTensor(ints, scales, bits)
    kind = exporter.tensor_format("weight", weight)
    assert np.array_equal(gguf.quants.dequantize(exporter.packed("weight", weight), kind), weight.dequantize().numpy())


def test_what_does_not_fit_the_format_is_refused():
    ints = torch.zeros(2, 48, dtype=torch.int8)
    with pytest.raises(ExportError, match=r"w: 48 columns share a scale; GGUF takes a multiple of 32$"):
        exporter.tensor_format("w", QuantizedTensor(ints, torch.ones(2, 1), 8))
    with pytest.raises(ExportError, match=r"w: scales up to 131072 do not fit GGUF's float16$"):
        exporter.tensor_format("w", QuantizedTensor(ints[:, :32], torch.full((2, 1), 2.0 ** 17), 8))


def test_what_llama_cpp_packs_anew_is_last_in_the_file(bundle):
    """So a client that maps the file can give the rest of it up (docs/internals/gguf.md)."""
    kinds = [tensor.tensor_type.name for tensor in sorted(gguf.GGUFReader(bundle.artifact).tensors,
                                                          key=lambda tensor: tensor.data_offset)]
    first = kinds.index("Q4_0")
    assert first > 0 and set(kinds[first:]) == {"Q4_0"}


def test_activations_are_rounded_as_ggml_defines_q8_0():
    """Its definition divides twice, the kernels and we once: a value in the middle of two codes may go either way."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 64)[:, None]
    ours = fake_quantize_blocks(x, 32, torch.float16).numpy()
    theirs = gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType.Q8_0),
                                    gguf.GGMLQuantizationType.Q8_0)
    assert (ours != theirs).mean() < 1e-3
    assert np.abs(ours - theirs).max() <= (np.abs(x.numpy()).max(1) / 120).max()


# --- parity -------------------------------------------------------------------------------------------------------


def test_the_trained_model_is_verified_with_its_answers(bundle):
    result = verify(bundle)
    assert result.passed and result.weights.blobs == 47 and not result.skipped
    assert {task.accuracy for task in result.tasks} == {1.0}


def test_with_exact_attention_nothing_is_left_but_the_order_of_sums(tmp_path):
    """The reference rounds activations as ggml's kernels do, to the last bit of a scale."""
    source = save_checkpoint(tmp_path / "model", **EXPRESSIBLE)
    result = assert_verified(export(source, target="gguf-q4", output=tmp_path / "bundle", context=64,
                                    prefill_chunk=16, kv_dtype="float32"))
    assert result.typical_error < 2e-6


def test_half_precision_attention_is_held_to_the_noise_of_half_precision(small_bundle):
    assert_verified(small_bundle)
    assert small_bundle.session().arithmetic == small_bundle.manifest.state.tensors[1].dtype


@pytest.mark.parametrize("name", [name if name in REFUSED else pytest.param(name, marks=pytest.mark.heavy)
                                  for name in MODELS])
def test_awkward_models_are_verified_or_refused_with_one_line(tmp_path, name):
    """With exact attention: float16 is too noisy on random weights."""
    source, output = save_checkpoint(tmp_path / "model", **MODELS[name]), tmp_path / "bundle"

    def exported():
        return export(source, target="gguf-q4", output=output, context=64, prefill_chunk=16, kv_dtype="float32")

    if name in REFUSED:
        with pytest.raises(ExportError, match=f"^llama.cpp cannot run this model: its LFM2 needs .*{REFUSED[name]}"):
            exported()
        assert not output.exists()
        return
    bundle = exported()
    assert_verified(bundle)
    client = Client(bundle, exact=True)
    for prompt in PROMPTS:
        assert_ours_or_tied(bundle, prompt, client.greedy(prompt, 16), 16)


def test_a_flipped_byte_in_a_weight_is_found_and_named(bundle, tmp_path):
    broken = open_bundle(shutil.copytree(bundle.directory, tmp_path / "broken"))
    content = bytearray(broken.artifact.read_bytes())
    content[-40] ^= 1  # in the last Q4_0 tensor
    broken.artifact.write_bytes(content)
    weights = quantize_checkpoint(open_checkpoint(TINY), bundle.manifest.recipe)
    stored = [{*runtime.stored_constants(each)} for each in (bundle, broken)]
    found = [[name for name, data in exporter.packed_weights(bundle.manifest.config, weights)
              if hashlib.sha256(data).digest() not in constants] for constants in stored]
    assert found[0] == [] and len(found[1]) == 1 and found[1][0].startswith("model.layers.")


# --- llama.cpp's own clients --------------------------------------------------------------------------------------


def test_the_plain_client_reads_the_same_conversations_and_gives_the_same_answers(bundle):
    examples, tokenizer, client = tasks(each=2), bundle.tokenizer(), Client(bundle)
    conversations = [tokenizer.chat(example["messages"]) for example in examples]
    assert [client.chat(example["messages"]) for example in examples] == conversations
    answers = [client.greedy(conversation, 32) for conversation in conversations]
    assert answers == our_answers(bundle, conversations, 32)
    assert [tokenizer.decode(answer) for answer in answers] == [example["answer"] for example in examples]


def test_prompts_of_one_token_and_beyond_a_step_get_the_same_answers_in_the_plain_client(bundle):
    chunk, client = bundle.manifest.options.prefill_chunk, Client(bundle)
    prompts = [[1], *(long_prompt(bundle.tokenizer(), length) for length in (chunk, chunk + 1, 5 * chunk + 3))]
    assert [client.greedy(prompt, 16) for prompt in prompts] == our_answers(bundle, prompts, 16)


def test_the_plain_client_s_chat_completion_answers_right(bundle):
    model = Client(bundle).model
    for example in tasks(each=1):
        reply = model.create_chat_completion(example["messages"], temperature=0.0, max_tokens=32)["choices"][0]
        assert (reply["message"]["content"], reply["finish_reason"]) == (example["answer"], "stop")


@pytest.mark.parametrize("name", ["bundle", "awkward_bundle"])
def test_awkward_texts_become_the_same_tokens_in_the_plain_client(request, name):
    bundle = request.getfixturevalue(name)
    tokenizer, client = bundle.tokenizer(), Client(bundle)
    assert [client.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert client.chat(CONVERSATION) == tokenizer.chat(CONVERSATION)


def test_an_awkward_model_gets_the_same_answers_in_the_plain_client(awkward_bundle):
    client = Client(awkward_bundle, exact=True)
    for prompt in PROMPTS:
        assert_ours_or_tied(awkward_bundle, prompt, client.greedy(prompt, 16), 16)


def test_the_python_of_the_docs_answers_right(bundle):
    program = code_of("guides/desktop.md", "python", "from llama_cpp")
    program = program.replace("out/tiny-model-gguf-q4/model.gguf", str(bundle.artifact))
    assert output_of([sys.executable, "-c", program]) == "42\n"


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_the_c_plus_plus_of_the_docs_gives_the_same_answer(bundle, tmp_path):
    """Compiled against the headers and the library of the package."""
    package = Path(llama_cpp.__file__).parent
    source = code_of("guides/desktop.md", "cpp", '#include "llama.h"')
    (tmp_path / "ask.cpp").write_text(source)
    subprocess.run(["c++", "-std=c++17", tmp_path / "ask.cpp", "-o", tmp_path / "ask",
                    f"-I{package.parent / 'include'}", f"-L{package / 'lib'}", "-lllama",
                    f"-Wl,-rpath,{package / 'lib'}", f"-Wl,-rpath-link,{package / 'lib'}"], check=True)
    example = tasks(each=1)[0]
    question = bundle.tokenizer().decode(bundle.tokenizer().chat(example["messages"])[1:], skip_special=False)
    assert output_of([tmp_path / "ask", bundle.artifact, question]) == example["answer"] + "\n"


# --- the tokenizer ------------------------------------------------------------------------------------------------


def with_tokenizer(folder, change, **overrides):
    """A checkpoint whose tokenizer.json is changed."""
    source = save_checkpoint(folder / "model", **overrides)
    path = source / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    changed = change(tokenizer)
    (changed or tokenizer).save(str(path))
    return source


def with_raw(change):
    def changed(tokenizer):
        raw = json.loads(tokenizer.to_str())
        change(raw)
        return Tokenizer.from_str(json.dumps(raw))

    return changed


def assign(name, value):
    return lambda tokenizer: setattr(tokenizer, name, value)


REFUSED_TOKENIZERS = {
    "a normalizer": (assign("normalizer", normalizers.Lowercase()), "has a normalizer"),
    "another pattern": (assign("pre_tokenizer", pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\w+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])),
        "another splitting of text than LFM2's"),
    "no splitting": (assign("pre_tokenizer", None), "another splitting of text than LFM2's"),
    "a first space": (assign("pre_tokenizer", pre_tokenizers.ByteLevel(True)), "another splitting of text"),
    "a greedy added token": (lambda tokenizer: tokenizer.add_tokens([AddedToken("!<", lstrip=True)]) and None,
                             "added tokens that take spaces with them"),
    "byte fallback": (with_raw(lambda raw: raw["model"].update(byte_fallback=True)), "byte fallback"),
    "two first tokens": (assign("post_processor", processors.TemplateProcessing(
        single="<|startoftext|> <|pad|> $A", special_tokens=[("<|startoftext|>", 1), ("<|pad|>", 0)])),
        r"puts \[1, 0, 80\] around \[80\]"),
}


@pytest.mark.parametrize("name", list(REFUSED_TOKENIZERS))
def test_a_tokenizer_that_llama_cpp_would_not_follow_is_refused_with_one_line(tmp_path, name):
    change, reason = REFUSED_TOKENIZERS[name]
    source = with_tokenizer(tmp_path, change)
    with pytest.raises(ExportError, match=reason) as refusal:
        export(source, target="gguf-q4", output=tmp_path / "bundle", context=64)
    assert str(refusal.value).startswith("tokenizer.json: ") and "\n" not in str(refusal.value)


def test_many_ends_of_a_generation_are_refused(tmp_path):
    source = save_checkpoint(tmp_path / "model", eos_token_id=[7, 2, 5, 6])
    with pytest.raises(ExportError, match=r"eos_token_id: 4 tokens end a generation; GGUF names 1 to 3"):
        export(source, target="gguf-q4", output=tmp_path / "bundle", context=64)


def test_a_token_that_merges_do_not_reach_stays_unreached(tmp_path):
    """By the pattern's first name llama.cpp takes a piece of text that is a token before it tries merges."""
    def without_a_merge(raw):
        assert raw["model"]["merges"].pop() == ["!", "<"]  # the token of the last id of 300

    source = with_tokenizer(tmp_path, with_raw(without_a_merge))
    bundle = export(source, target="gguf-q4", output=tmp_path / "bundle", context=64, prefill_chunk=16)
    assert bundle.manifest.decoder.lowering["pre-tokenizer"] == "smaug-bpe"
    texts, client = ("!<", "a!< b!", *TEXTS), Client(bundle)
    ours = [bundle.tokenizer().encode(text) for text in texts]
    assert len(ours[0]) == 3 and 299 not in ours[0]
    assert [client.encode(text) for text in texts] == ours


def test_ids_without_a_token_and_tokens_that_are_not_special_are_there(tmp_path):
    def change(raw):
        raw["added_tokens"].append({"id": 299, "content": "[tool]", "single_word": False, "lstrip": False,
                                    "rstrip": False, "normalized": False, "special": False})
        raw["model"]["merges"] = raw["model"]["merges"][:20]
        raw["model"]["vocab"] = {token: index for token, index in raw["model"]["vocab"].items() if index < 292}

    source = with_tokenizer(tmp_path, with_raw(change))
    bundle = export(source, target="gguf-q4", output=tmp_path / "bundle", context=64, prefill_chunk=16)
    client = Client(bundle)
    for text in ("a [tool] b", "[tool][tool]", "[PAD295]", "plain"):
        assert client.encode(text) == bundle.tokenizer().encode(text)


# --- the state ----------------------------------------------------------------------------------------------------


def state_bytes(session):
    size = llama_cpp.llama_state_seq_get_size(session.context, 0)
    content = np.empty(size, np.uint8)
    pointer = content.ctypes.data_as(llama_cpp.ctypes.POINTER(llama_cpp.ctypes.c_uint8))
    assert llama_cpp.llama_state_seq_get_data(session.context, pointer, size, 0) == size
    return content


def test_the_state_is_read_and_written_as_llama_cpp_does_byte_for_byte(small_bundle):
    session = small_bundle.session()
    session.prefill([1, 30, 40, 50, 60])
    session.decode(7)
    content = state_bytes(session)
    tensors = session.layout.read(content)
    assert np.array_equal(session.layout.write(tensors, 6), content)
    session.restore(session.snapshot())
    assert np.array_equal(state_bytes(session), content)


def test_the_tensors_of_the_state_are_the_reference_s(small_bundle):
    """Names, shapes, rotation, and which column of a conv state is the last."""
    manifest, source = small_bundle.manifest, small_bundle.source()
    reference = ReferenceSession(manifest.config, quantize_checkpoint(source, manifest.recipe),
                                 manifest.state.for_reference(manifest.config), activations="q8_0")
    session, tokens = small_bundle.session(), [1, 40, 41, 90, 200, 33, 17]
    for each in (session, reference):
        each.prefill(tokens)
    for tensor, ours, theirs in zip(manifest.state.tensors, session.snapshot().tensors,
                                    reference.snapshot().tensors, strict=True):
        assert ours.shape == theirs.shape
        limit = 1e-4 if manifest.state.tensors[1].dtype == "float32" else 0.05
        assert (ours - theirs).abs().max() <= limit * theirs.std(), tensor.name


def test_another_layout_of_the_state_is_refused(small_bundle):
    session = small_bundle.session()
    session.prefill([1, 30])
    content = state_bytes(session)
    content[0] ^= 1
    with pytest.raises(LfmEdgeError, match="writes its state in another way"):
        session.layout.read(content)
    with pytest.raises(LfmEdgeError, match="does not take the state back"):
        wrong = session.snapshot().tensors
        session.layout.config = ModelConfig.from_dict({**small_bundle.manifest.config.to_dict(),
                                                       "num_key_value_heads": 4})
        session._put_back(wrong, 2)


def test_a_conversation_goes_on_from_another_runtime_s_state(tmp_path, awkward_bundle):
    manifest = awkward_bundle.manifest
    weights = quantize_checkpoint(awkward_bundle.source(), manifest.recipe)
    reference = ReferenceSession(manifest.config, weights, manifest.state.for_reference(manifest.config),
                                 activations="q8_0")
    reference.origin = Origin(weights_digest(weights))
    tokens = [1, 40, 41, 90, 200, 33, 17, 16, 55, 70, 71, 72, 3]
    for there, here in ((awkward_bundle.session(), reference), (reference, awkward_bundle.session())):
        there.reset()
        there.prefill(tokens)
        there.save(tmp_path / "session")
        here.load(tmp_path / "session")
        assert here.tokens == tokens
        assert parity.compare("moved", [here.decode(9)], [there.decode(9)]).logit_error < 1e-4


def test_a_position_set_back_is_that_of_llama_cpp_at_the_next_step(small_bundle):
    """As a sustained measurement does. Caches are cut; a conv state cannot be, and stays."""
    session = small_bundle.session()
    session.prefill([1, 30, 40, 50, 60])
    session.position = 3
    session.decode(7)
    assert llama_cpp.llama_memory_seq_pos_max(session.memory, 0) == 3
    assert session.snapshot().position == 4


@pytest.mark.parametrize("before", [[], [1, 30, 40]])
def test_standing_at_a_position_fills_the_cache_up_to_it(small_bundle, before):
    session = small_bundle.session()
    if before:
        session.prefill(before)
    session.stand_at(60)
    session.prefill([5, 6, 7])
    assert session.position == 63
    rows = next(value for tensor, value in zip(session.spec.tensors, session.snapshot().tensors, strict=True)
                if tensor.kind == "key")
    assert rows.shape[1] == 63 and rows[:, 60:].any()
    if before:
        assert torch.equal(rows[:, 3:6], rows[:, :3])


def test_a_round_of_bench_measures_it_in_a_fresh_process(bundle):
    measured = run_round(Plan(str(bundle.directory), 1, (32,), 4, (512,), 0.2))
    assert [point.kind for point in measured.points] == ["prompt", FILL]
    assert all(point.prefill_tps > 0 and point.decode_tps > 0 for point in measured.points)
    assert measured.peak_bytes > bundle.artifact_bytes and measured.sustained_tps


# --- what is missing or damaged -----------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no model at all", b"GGUF" + b"\xff" * 64])
def test_a_damaged_file_is_refused_with_one_line(bundle, tmp_path, content):
    broken = open_bundle(shutil.copytree(bundle.directory, tmp_path / "broken"))
    broken.artifact.write_bytes(content)
    broken.manifest.write(broken.directory)
    for use in (Bundle.session, runtime.stored_constants):
        with pytest.raises(BundleError) as refusal:
            use(Bundle.open(broken.directory))
        assert "model.gguf: " in str(refusal.value) and "\n" not in str(refusal.value)


def test_without_llama_cpp_a_bundle_is_made_and_running_it_says_what_to_install(bundle, monkeypatch):
    target = bundle.target
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else name)
    target.check_installed()
    assert target.to_install == "lfm-edge[llamacpp]"
    with pytest.raises(ExportError, match=r"running this bundle needs the package llama_cpp: "
                                          r"pip install 'lfm-edge\[llamacpp\]'$"):
        bundle.session()


@pytest.mark.parametrize(("options", "reason"), [
    ({"kv_dtype": "int8"}, "--kv-dtype int8: gguf-q4 takes float16 or float32"),
    ({"state": "internal"}, "--state internal: gguf-q4 takes explicit"),
    ({"compute_dtype": "float16"}, "--compute-dtype float16: gguf-q4 takes float32"),
    ({"soc": "sm8750"}, "--soc sm8750: gguf-q4 is not compiled for chips"),
], ids=str)
def test_options_that_it_cannot_honour_are_refused(tmp_path, options, reason):
    with pytest.raises(ExportError, match=f"^{reason}$"):
        export(TINY, target="gguf-q4", output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
