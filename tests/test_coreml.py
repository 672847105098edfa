"""The Core ML package: what is in it, and that it computes what transformers computes. (Ops: tests/test_mil.py)"""

import hashlib
import shutil

import coremltools as ct
import numpy as np
import pytest
import torch
from coremltools.proto import MIL_pb2

from lfm_edge import export
from lfm_edge.bundle.bundle import Bundle
from lfm_edge.calibration.quantize import quantize_checkpoint
from lfm_edge.checkpoint.checkpoint import open_checkpoint
from lfm_edge.checkpoint.tokenizer import write_chatml_tokenizer
from lfm_edge.errors import BundleError, ExportError, LfmEdgeError
from lfm_edge.harness.verify import verify
from lfm_edge.quantization.tensor import QuantizedTensor
from runtimes import coreml as runtime
from runtimes.mil import MilProgram
from runtimes.reference import ReferenceSession
from tests.helpers import AWKWARD, TINY, hf_model, lfm_edge, save_checkpoint

CONTEXT, CHUNK = 40, 16


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The trained toy model, float16."""
    return export(TINY, target="coreml-q4", output=tmp_path_factory.mktemp("coreml") / "bundle", context=256)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("model"), **AWKWARD["conv bias"])


@pytest.fixture(scope="module")
def exact(source, tmp_path_factory):
    """A small random model, float32. Its context is no multiple of its chunk."""
    return export(source, target="coreml-q4", output=tmp_path_factory.mktemp("exact") / "bundle", context=CONTEXT,
                  prefill_chunk=CHUNK, compute_dtype="float32")


@pytest.fixture(scope="module")
def internal(source, tmp_path_factory):
    return export(source, target="coreml-q8", output=tmp_path_factory.mktemp("internal") / "bundle", context=CONTEXT,
                  prefill_chunk=CHUNK, state="internal")


def tokens(count):
    return [20 + 7 * index % 250 for index in range(count)]


def test_two_functions_with_the_features_of_the_manifest(bundle):
    functions = MilProgram.load(bundle.artifact).functions
    state = [tensor.name.replace(".", "_") for tensor in bundle.manifest.state.tensors]
    assert list(functions["decode"].inputs) == ["tokens", "position", *state]
    assert list(functions["prefill"].inputs) == ["tokens", "position", "valid", *state]
    for length, function in ((128, functions["prefill"]), (1, functions["decode"])):
        assert function.inputs["tokens"].shape == (1, length)
        assert function.outputs["logits"].shape == (1, 1, 272)
        assert function.inputs["past_key_values_2_key"].shape == (1, 2, 256, 32)
        assert function.outputs["present_2_key"].shape == (1, 2, length, 32)
        assert function.outputs["present_conv_0"].shape == (1, 2, 128)
    assert ct.utils.load_spec(str(bundle.artifact)).description.defaultFunctionName == "decode"


def test_the_package_asks_for_ios_18_and_no_later_system(bundle):
    assert ct.utils.load_spec(str(bundle.artifact)).specificationVersion == ct.target.iOS18


def test_a_float16_program_computes_nothing_in_float32(bundle):
    spec = ct.utils.load_spec(str(bundle.artifact))
    for function in spec.mlProgram.functions.values():
        operations = function.block_specializations[function.opset].operations
        types = {output.type.tensorType.dataType for operation in operations for output in operation.outputs}
        assert MIL_pb2.FLOAT16 in types and MIL_pb2.FLOAT32 not in types


def test_the_functions_share_every_weight(bundle):
    weights = quantize_checkpoint(open_checkpoint(TINY), bundle.manifest.recipe).values()
    quantized = [weight for weight in weights if isinstance(weight, QuantizedTensor)]
    size = sum(weight.ints.numel() * weight.bits // 8 + 2 * weight.scales.numel() for weight in quantized)
    assert len(list(MilProgram.load(bundle.artifact).constants())) == len(quantized)
    stored = (bundle.artifact / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size
    assert size < stored < 1.5 * size  # twice the size, if each had its own


def test_every_weight_dequantizes_to_the_quantizer_s_own_bit_for_bit(bundle):
    weights = quantize_checkpoint(open_checkpoint(TINY), bundle.manifest.recipe).values()
    expected = {hashlib.sha256(weight.dequantize().numpy().tobytes()).digest()
                for weight in weights if isinstance(weight, QuantizedTensor)}
    assert runtime.stored_constants(bundle) == expected


def test_no_operator_is_a_convolution_or_has_an_index_that_is_not_constant(bundle):
    operators = MilProgram.load(bundle.artifact).functions["prefill"].operators
    assert not {"conv", "slice_update", "scatter", "gather_along_axis"} & set(operators)
    assert operators["gather"] == 2  # embedding and rotations


def test_the_program_agrees_with_transformers(source, exact):
    """With the dequantized weights in transformers' own model."""
    model = hf_model(**AWKWARD["conv bias"])
    weights = quantize_checkpoint(open_checkpoint(source), exact.manifest.recipe)
    state = {name: weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
             for name, weight in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    session = exact.session()
    for length in (1, 2, CHUNK, CHUNK + 1, CONTEXT):
        session.reset()
        with torch.no_grad():
            expected = model(torch.tensor([tokens(length)])).logits[0, -1].numpy()
        assert np.abs(session.prefill(tokens(length)) - expected).max() < 1e-4 * expected.std()


def test_a_padded_chunk_leaves_the_state_that_single_tokens_leave(exact):
    padded, single = exact.session(), exact.session()
    padded.prefill(tokens(5))
    for token in tokens(5):
        single.decode(token)
    for ours, theirs in zip(padded.state, single.state, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_caches_are_states_of_the_program_where_that_is_asked_for(internal):
    functions = MilProgram.load(internal.artifact).functions
    assert list(functions["decode"].states) == [
        f"past_key_values_{layer}_{kind}" for layer in (1, 3) for kind in ("key", "value")]
    assert list(functions["decode"].outputs) == ["logits", "present_conv_0", "present_conv_2"]


def test_internal_state_reaches_the_end_of_the_context_and_begins_anew(source, internal):
    manifest = internal.manifest
    weights = quantize_checkpoint(open_checkpoint(source), manifest.recipe)
    reference = ReferenceSession(manifest.config, weights, manifest.state.for_reference(manifest.config))
    session = internal.session()
    for length in (CONTEXT, 3, CONTEXT - 5):
        session.reset()
        reference.reset()
        expected = reference.prefill(tokens(length))
        assert np.abs(session.prefill(tokens(length)) - expected).max() < 0.1 * expected.std()
    with pytest.raises(LfmEdgeError, match="inside the program"):
        session.snapshot()


def test_activations_whose_squares_float16_cannot_hold(tmp_path):
    model = hf_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2000)  # residuals in the thousands
    model.save_pretrained(tmp_path / "model")
    write_chatml_tokenizer(tmp_path / "model", 300)
    bundle = export(tmp_path / "model", target="coreml-q8", output=tmp_path / "bundle", context=32, prefill_chunk=1)
    weights = quantize_checkpoint(open_checkpoint(tmp_path / "model"), bundle.manifest.recipe)
    reference = ReferenceSession(bundle.manifest.config, weights, bundle.manifest.state.for_reference(
        bundle.manifest.config))
    expected = reference.prefill(tokens(6))
    assert np.abs(bundle.session().prefill(tokens(6)) - expected).max() < 0.05 * expected.std()


def test_a_scale_that_float16_cannot_hold_is_refused_by_name(tmp_path):
    model = hf_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(1e8)
    model.save_pretrained(tmp_path / "model")
    write_chatml_tokenizer(tmp_path / "model", 300)
    with pytest.raises(ExportError, match=r"layers\.1\.self_attn\.q_proj\.weight: .* --compute-dtype float32"):
        export(tmp_path / "model", target="coreml-q8", output=tmp_path / "bundle", context=32)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(("options", "reason"), [
    ({"state": "internal", "compute_dtype": "float32"}, "Core ML's states are float16"),
    ({"kv_dtype": "int8"}, "--kv-dtype int8: coreml-q4 takes float16"),
    ({"kv_dtype": "float32"}, "--kv-dtype float32: coreml-q4 takes float16"),
    ({"compute_dtype": "bfloat16"}, "--compute-dtype bfloat16: coreml-q4 takes float16 or float32")])
def test_what_core_ml_cannot_do_is_refused_with_the_reason(tmp_path, options, reason):
    with pytest.raises(ExportError, match=reason):
        export(TINY, target="coreml-q4", output=tmp_path / "bundle", context=64, **options)


def test_a_number_of_threads_is_refused(bundle):
    with pytest.raises(LfmEdgeError, match="chooses its threads itself"):
        bundle.session(threads=2)


def test_inspect_tells_what_stays_off_the_neural_engine(bundle, exact):
    assert "nothing else that is known" in lfm_edge("inspect", bundle.directory).stdout
    shown = " ".join(lfm_edge("inspect", exact.directory).stdout.split())
    assert "it computes in float16" in shown
    assert "no multiple of 32 (context 40, head 16)" in shown


def test_bench_says_that_it_cannot_measure_here(bundle):
    run = lfm_edge("bench", bundle.directory, "--json", "-")
    assert run.returncode == 0
    assert '"benchmarks": []' in run.stdout and "Run this command there" in run.stdout


def test_verify_says_whose_arithmetic_it_checked(exact):
    assert "not the arithmetic of the Neural Engine" in verify(exact).remark


def test_one_flipped_weight_is_found(source, exact, tmp_path):
    weights = quantize_checkpoint(open_checkpoint(source), exact.manifest.recipe)
    codes = weights["model.layers.1.self_attn.q_proj.weight"].ints.numpy().view(np.uint8) & 15
    packed = (codes[:, ::2] | codes[:, 1::2] << 4).tobytes()  # two's complement, the even column in the low half
    shutil.copytree(exact.directory, tmp_path / "flipped")
    data = tmp_path / "flipped" / "model.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    content = bytearray(data.read_bytes())
    content[content.index(packed) + 100] ^= 0x10
    data.write_bytes(content)
    exact.manifest.write(tmp_path / "flipped")  # sealed again, so that only `verify` can find it
    assert len(verify(Bundle.open(tmp_path / "flipped")).weights.missing) == 1


@pytest.mark.parametrize("name", ["model.mlmodel", "weights/weight.bin"])
def test_a_damaged_package_is_one_clear_line(bundle, tmp_path, name):
    shutil.copytree(bundle.directory, tmp_path / "broken")
    file = tmp_path / "broken" / "model.mlpackage/Data/com.apple.CoreML" / name
    file.write_bytes(file.read_bytes()[:1000])
    bundle.manifest.write(tmp_path / "broken")
    broken = Bundle.open(tmp_path / "broken")
    with pytest.raises(BundleError, match=r"model\.mlpackage"):
        broken.session().prefill(tokens(3))
    run = lfm_edge("generate", broken.directory, "--prompt", "x")
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1 and "Traceback" not in run.stderr
