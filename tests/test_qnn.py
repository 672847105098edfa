"""NPU bundles: graphs of quantized operators, what they are compiled to, and what the simulator makes of them."""

import hashlib
import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporters import qnn as exporter
from lfm_edge import export
from lfm_edge.backends import htp
from lfm_edge.backends.npu import NpuSession
from lfm_edge.backends.socs import SOCS
from lfm_edge.bundle.bundle import Bundle
from lfm_edge.calibration.kv_scales import read_kv_scales
from lfm_edge.calibration.quantize import quantize_checkpoint
from lfm_edge.calibration.ranges import Encoding
from lfm_edge.calibration.sample import (
    LEAST_CALIBRATION_TOKENS,
    MOST_CALIBRATION_TOKENS,
    calibration_tokens,
    whole_chunks,
)
from lfm_edge.checkpoint.checkpoint import open_checkpoint
from lfm_edge.checkpoint.tokenizer import TextTokenizer
from lfm_edge.errors import BundleError
from lfm_edge.harness.quality import read_tasks
from lfm_edge.harness.verify import verify
from lfm_edge.quantization.tensor import QuantizedTensor
from lfm_edge.session.generation import generate
from runtimes import qnn as runtime
from runtimes.reference import ReferenceSession
from tests.helpers import ALL_AT_ONCE, TINY, example, lfm_edge, save_checkpoint

CONTEXT, CHUNK = 96, 16
ALL_SOCS = ",".join(SOCS)
# Errors in standard deviations of the logits. Half of it is keys and values that 16-bit noise tips to the next of their
# 8-bit integers; v68 rounds sums of 16-bit products more coarsely than later architectures.
TOLERANCE = dict.fromkeys(SOCS, 0.1) | {"sm8350": 0.2}


@pytest.fixture(scope="module", params=["npu-q4", "npu-q8"])
def bundle(request, tmp_path_factory):
    """A small random model with all that is awkward, compiled for all chips."""
    folder = tmp_path_factory.mktemp("npu")
    return export(save_checkpoint(folder / "model", **ALL_AT_ONCE), target=request.param, output=folder / "bundle",
                  context=CONTEXT, prefill_chunk=CHUNK, soc=ALL_SOCS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, few_tasks):
    return export(few_tasks, target="npu-q4", output=tmp_path_factory.mktemp("trained") / "bundle", context=512,
                  prefill_chunk=32)


def reference_of(bundle):
    manifest = bundle.manifest
    weights = quantize_checkpoint(bundle.source(), manifest.recipe) | read_kv_scales(bundle.directory)
    return ReferenceSession(manifest.config, weights, manifest.state.for_reference(manifest.config))


def tokens(count):
    return [20 + 7 * index % 250 for index in range(count)]


def error(ours, expected):
    return np.abs(ours - expected).max() / expected.std()


def graph(bundle, phase):
    return onnx.load(bundle.artifact / "graphs" / f"{phase}.onnx", load_external_data=False).graph


def test_the_example_holds_a_chunk_and_steps_against_the_reference(bundle, capsys):
    example("simulate").main(bundle.directory, "sm8650", 2)
    remark, chunk, *steps, agreement = capsys.readouterr().out.splitlines()
    assert remark.startswith("sm8650")
    assert chunk.split()[:5] == [str(CHUNK), "tokens", "to", "position", f"{CHUNK}:"] and len(steps) == 2
    assert all("cosine 0.99" in line for line in (chunk, *steps))
    assert agreement.startswith("best token the same in ") and " of 3 steps" in agreement


@pytest.mark.parametrize("soc", SOCS)
def test_every_chip_computes_what_the_reference_computes(bundle, soc):
    session, reference = bundle.session(soc=soc), reference_of(bundle)
    assert soc in session.remark and "simulated" in session.remark
    text = tokens(25)
    assert error(session.prefill(text[:21]), reference.prefill(text[:21])) < TOLERANCE[soc]
    for token in text[21:]:
        assert error(session.decode(token), reference.decode(token)) < TOLERANCE[soc]


def test_a_chunk_of_any_length_agrees_with_single_steps(bundle):
    """The masks of a chunk, the conv state after its last valid token, and the head of that token alone."""
    session = bundle.session()
    for length in (2, 3, CHUNK - 1, CHUNK):
        session.reset()
        at_once = session.prefill(tokens(length))
        session.reset()
        for token in tokens(length):
            stepwise = session.decode(token)
        assert error(at_once, stepwise) < 0.1, length


@pytest.mark.parametrize("soc", SOCS)
def test_prefill_and_decode_share_one_context_binary(bundle, soc):
    compiled = bundle.artifact / soc
    assert sorted(path.name for path in compiled.iterdir()) == ["decode.onnx", "prefill.onnx", "prefill_qnn.bin"]
    for phase in ("prefill", "decode"):
        model = onnx.load(compiled / f"{phase}.onnx")
        node, = model.graph.node
        attributes = {attribute.name: attribute for attribute in node.attribute}
        assert node.op_type == "EPContext" and attributes["ep_cache_context"].s == b"prefill_qnn.bin"
        named = [value.name for value in graph(bundle, phase).input]
        assert [value.name for value in model.graph.input] == named
        compatible = {entry.key: entry.value for entry in model.metadata_props}
        architecture, chip = str(SOCS[soc].htp_arch), str(SOCS[soc].model)
        assert f":{architecture}:{chip}:" in compatible["ep_compatibility_info.QNNExecutionProvider"]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_every_node_of_a_graph_is_on_the_npu(bundle, phase):
    path = bundle.artifact / "graphs" / f"{phase}.onnx"
    session = htp.load(path, SOCS["sm8650"])
    placed = {part.ep_name: len(part.get_nodes()) for part in session.get_provider_graph_assignment_info()}
    assert set(placed) == {"QNNExecutionProvider"}
    assert placed["QNNExecutionProvider"] >= len(onnx.load(path, load_external_data=False).graph.node)


def test_a_graph_with_an_operator_that_the_npu_lacks_is_refused_by_its_name(tmp_path):
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8]) for name in "xyz"]
    nodes = [helper.make_node("Abs", ["x"], ["y"]), helper.make_node("Hardmax", ["y"], ["z"])]
    model = helper.make_model(helper.make_graph(nodes, "g", [values[0]], [values[2]]),
                              opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(htp.NpuError, match=r"model\.onnx: would run on the CPU: .*Hardmax"):
        htp.load(tmp_path / "model.onnx", SOCS["sm8650"])


def test_a_file_that_is_no_graph_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(htp.NpuError, match=r"model\.onnx: the NPU's compiler refuses it"):
        htp.load(tmp_path / "model.onnx", SOCS["sm8650"])


def test_the_graphs_hold_the_quantizers_weights_as_onnx_defines_them(bundle):
    """Every weight of the graphs, dequantized by the definition of DequantizeLinear, is the quantizer's."""
    checkpoint = bundle.source()
    expected = {name: weight.dequantize().numpy() for name, weight in
                quantize_checkpoint(checkpoint, bundle.manifest.recipe).items() if isinstance(weight, QuantizedTensor)}
    found = {}
    for phase in ("prefill", "decode"):
        model = onnx.load(bundle.artifact / "graphs" / f"{phase}.onnx")
        held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        made = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
        for node in made.values():
            if node.input[0] in held and node.input[0].startswith(("model.", "lm_head.")) and "scale" not in \
                    node.output[0]:
                codes = held[node.input[0]].astype(np.float32)  # [cols, rows]
                scale = node.input[1]
                if scale in made:
                    multiples, units, _ = made[scale].input
                    scales = held[multiples].astype(np.float32) * held[units]
                    scales = np.repeat(scales, codes.shape[0] // scales.shape[0], axis=0)
                else:
                    scales = held[scale]
                found.setdefault(node.input[0], []).append((codes * scales).T)
    for name, (first, second) in found.items():
        assert np.array_equal(first, second)
        whole, _, part = name.partition(".weight")
        weight = expected[f"{whole}.weight"]
        rows = first.shape[0]
        here = slice(int(part[1:]) * rows, (int(part[1:]) + 1) * rows) if part else slice(None)
        assert np.array_equal(first, weight[here]), name
    in_graphs = {name.partition(".weight")[0] + ".weight" for name in found}
    assert in_graphs == set(expected) - {"model.embed_tokens.weight"}


def test_the_embedding_gives_the_quantizers_rows(bundle):
    weights = quantize_checkpoint(bundle.source(), bundle.manifest.recipe)
    rows = runtime.Embedding(bundle.artifact / "embedding.onnx")(tokens(9))
    assert np.array_equal(rows[0], weights["model.embed_tokens.weight"].dequantize()[tokens(9)].numpy())


def test_onnx_runtimes_cpu_computes_the_graphs_as_the_reference_does(bundle):
    """The same graphs by another implementation: what is left is 16-bit rounding."""
    class OnCpu(runtime.Host):
        def programs(self, phase):
            options = onnxruntime.SessionOptions()
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            return [onnxruntime.InferenceSession(bundle.artifact / "graphs" / f"{phase}.onnx", options,
                                                 providers=["CPUExecutionProvider"])]

    manifest = bundle.manifest
    session = NpuSession(manifest.config, manifest.state, manifest.options.prefill_chunk,
                         runtime.Embedding(bundle.artifact / "embedding.onnx"),
                         OnCpu().run)
    reference = reference_of(bundle)
    assert error(session.prefill(tokens(21)), reference.prefill(tokens(21))) < 0.05
    assert error(session.decode(40), reference.decode(40)) < 0.05


def test_both_graphs_round_the_state_alike(bundle):
    """What one of them gives, the other takes: the same scale and zero point on both sides."""
    def roundings(phase):
        nodes = graph(bundle, phase).node
        taken = {node.input[0]: tuple(node.input[1:]) for node in nodes
                 if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[0].startswith("past_")}
        given = {node.output[0]: tuple(node.input[1:]) for node in nodes if node.output[0].startswith("present")}
        return taken, given

    assert roundings("prefill") == roundings("decode")
    taken, given = roundings("decode")
    for tensor in bundle.manifest.state.tensors:
        assert taken[tensor.name] == given[tensor.next_name]


def test_the_manifest_has_the_measured_ranges(bundle):
    measured = json.loads((bundle.directory / "manifest.json").read_text())["parts"][0]["activation_ranges"]
    assert measured == {name: list(bounds) for name, bounds in bundle.manifest.decoder.activation_ranges.items()}
    assert "layers.1.feed_forward.w2/linear.0" in measured and "lm_head/linear.0" in measured
    assert all(low <= 0 <= high for low, high in measured.values())


def test_a_model_in_parts_computes_the_same(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "_LARGEST_PART", 30_000)
    parted = export(bundle.source().source, target=bundle.manifest.target, output=tmp_path / "parted", context=CONTEXT,
                    prefill_chunk=CHUNK, soc="sm8650")
    assert parted.manifest.decoder.lowering["parts"] == 3
    names = {path.name for path in (parted.artifact / "sm8650").glob("*.onnx")}
    assert names == {f"{phase}.{part}.onnx" for phase in ("prefill", "decode") for part in range(3)}
    whole, session = bundle.session(soc="sm8650"), parted.session()
    assert error(session.prefill(tokens(21)), whole.prefill(tokens(21))) < 0.05
    assert error(session.decode(40), whole.decode(40)) < 0.05


@pytest.mark.heavy
def test_the_trained_model_keeps_its_answers(trained):
    result = verify(trained, tokens=60)
    assert result.passed and result.weights.blobs > 100
    assert all(row.cosine > 0.999 for row in result.parity)
    assert [task.accuracy for task in result.tasks] == [1.0] * 5
    assert "sm8750" in result.remark


@pytest.mark.heavy
@pytest.mark.parametrize("target", ["npu-q4", "npu-q8"])
def test_greedy_answers_agree_with_the_reference_over_500_tokens(tmp_path, target):
    """Answers to prompts that were not measured on, each led along by the simulator's own tokens."""
    bundle = export(TINY, target=target, output=tmp_path / "bundle", context=512, prefill_chunk=32)
    session, reference, tokenizer = bundle.session(), reference_of(bundle), bundle.tokenizer()
    same = []
    for task in read_tasks(bundle)[1::4]:
        prompt = tokenizer.chat(task["messages"])
        session.reset()
        reference.reset()
        answer = list(generate(session, prompt, max_tokens=16))
        logits = reference.prefill(prompt)
        for token in answer:
            same.append(int(logits.argmax()) == token)
            logits = reference.decode(token)
        if len(same) >= 500:
            break
    assert len(same) >= 500 and np.mean(same) >= 0.99


@pytest.mark.parametrize("location", ["../../secret", "/etc/passwd", "unlisted.data"])
def test_the_files_of_a_bundle_are_checked_for_where_they_lead(bundle, tmp_path, location):
    shutil.copytree(bundle.directory, tmp_path / "bundle")
    path = tmp_path / "bundle/npu/graphs/decode.onnx"
    model = onnx.load(path, load_external_data=False)
    outside = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in outside.external_data if entry.key == "location").value = location
    onnx.save(model, path)
    bundle.manifest.write(tmp_path / "bundle")
    changed = Bundle.open(tmp_path / "bundle")
    for use in (runtime.stored_constants, Bundle.session):
        with pytest.raises(BundleError, match=f"refers to data in '{location}', which the manifest does not list"):
            use(changed)


def test_a_chip_that_a_bundle_was_not_compiled_for_is_refused(trained):
    with pytest.raises(BundleError, match="is compiled for sm8750, not for sm8350"):
        trained.session(soc="sm8350")
    run = lfm_edge("verify", trained.directory, "--soc", "sm8350")
    assert run.returncode == 2 and "not for sm8350" in run.stderr


@pytest.mark.parametrize(("options", "message"), [
    (["--soc", "sm9999"], "'sm9999' is no chip that is known here; known are sm8350, sm8550"),
    (["--kv-dtype", "float32"], "--kv-dtype float32: npu-q8 takes int8"),
    (["--state", "internal"], "--state internal: npu-q8 takes explicit"),
    (["--threads", "2"], "No such option"),
])
def test_what_cannot_be_honoured_is_refused(tmp_path, options, message):
    run = lfm_edge("export", "--target", "npu-q8", "--model", TINY, "--output", tmp_path / "out", *options)
    assert run.returncode == 2 and message in " ".join(run.stderr.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("content", "message"), [
    (b"Hi!\n\nHow are you?\n", f"calibration needs at least {LEAST_CALIBRATION_TOKENS}"),
    (b"\n \n\n", "is empty"), (b"\xff\xfe\xff", "not UTF-8 text"), (None, "cannot be read")])
def test_a_calibration_text_that_is_of_no_use_is_refused(tmp_path, content, message):
    text = tmp_path / "prompts.txt"
    if content is not None:
        text.write_bytes(content)
    run = lfm_edge("export", "--target", "npu-q8", "--model", TINY, "--output", tmp_path / "out", "--calibration", text)
    assert run.returncode == 2 and message in run.stderr and len(run.stderr.strip().splitlines()) <= 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "value"), [("--soc", "sm8650"), ("--calibration", "prompts.txt")])
def test_other_targets_refuse_the_npus_options(tmp_path, option, value):
    run = lfm_edge("export", "--target", "android-q4", "--model", TINY, "--output", tmp_path / "out", option, value)
    assert run.returncode == 2 and f"{option} {value}: android-q4" in run.stderr


def test_a_calibration_text_of_the_users_changes_the_ranges_and_not_the_weights(tmp_path):
    source = save_checkpoint(tmp_path / "model", layer_types=["conv", "full_attention"])
    text = tmp_path / "prompts.txt"
    text.write_text("\n\n".join(f"zz {index} qq" for index in range(60)))
    bundles = [export(source, target="npu-q8", output=tmp_path / name, context=64, prefill_chunk=16, **options)
               for name, options in (("default", {}), ("own", {"calibration": text}))]
    ranges = [bundle.manifest.decoder.activation_ranges for bundle in bundles]
    assert ranges[0].keys() == ranges[1].keys() and ranges[0] != ranges[1]
    assert bundles[0].manifest.weights_sha256 == bundles[1].manifest.weights_sha256


def test_more_prompts_than_there_is_room_for_are_chosen_evenly(tmp_path):
    tokenizer, config = TextTokenizer(TINY), open_checkpoint(TINY).config
    kinds = "abcdefgh"  # as in files of tasks, one kind after the other
    prompts = [[{"role": "user", "content": kind * 50}] for kind in kinds for _ in range(60)]
    tokens = calibration_tokens(tokenizer, config, prompts)
    text = tokenizer.decode(tokens)
    shares = [text.count(kind * 50) for kind in kinds]
    assert len(tokens) == MOST_CALIBRATION_TOKENS and max(shares) - min(shares) <= 2 and min(shares) > 10
    few = tokenizer.decode(calibration_tokens(tokenizer, config, prompts[::30]))
    assert [few.count(kind * 50) for kind in kinds] == [2] * 8 and "harbour" in few


@pytest.mark.parametrize(("low", "high"), [(-1.0, 0.0), (0.0, 3.5), (-7.25, 2.0), (0.0, 0.0), (1.0, 2.0)])
def test_an_encoding_holds_its_range_and_zero_exactly(low, high):
    encoding = Encoding.of(low, high)
    values = np.linspace(min(low, 0), max(high, 0), 1001, dtype=np.float32)
    back = (encoding.quantize(values).astype(np.float64) - encoding.zero_point) * encoding.scale
    assert np.abs(back - values).max() <= encoding.scale
    assert encoding.quantize(np.zeros(1))[0] == encoding.zero_point
    assert encoding.span == pytest.approx(max(high, 0) - min(low, 0), rel=1e-6, abs=1e-5)


@pytest.mark.parametrize(("chunk", "context", "lengths"), [
    (128, 4096, [512, 384]), (64, 100, [64] * 15), (1, 700, [512, 489]), (512, 4096, [512])])
def test_prompts_are_cut_into_texts_of_whole_chunks(chunk, context, lengths):
    texts = whole_chunks(list(range(100, 1099)) if chunk < 512 else list(range(600)), chunk, context, first=1)
    assert [len(text) for text in texts] == lengths
    assert all(text[0] == 1 and len(text) % chunk == 0 for text in texts)


def test_an_npu_bundle_is_not_measured_on_a_simulator(trained):
    run = lfm_edge("bench", trained.directory, "--json", "-")
    result = json.loads(run.stdout)
    assert run.returncode == 0 and result["benchmarks"] == []
    assert "Snapdragon" in result["not_measured"][0]["reason"]


def test_the_same_checkpoint_gives_the_same_graphs(tmp_path):
    source = save_checkpoint(tmp_path / "model", layer_types=["conv", "full_attention"])
    digests = []
    for name in ("first", "second"):
        bundle = export(source, target="npu-q4", output=tmp_path / name, context=64, prefill_chunk=16)
        files = sorted((bundle.artifact / "graphs").iterdir())
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])
    assert digests[0] == digests[1]
