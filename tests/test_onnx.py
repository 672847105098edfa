"""The ONNX artifact: what is in the graph and its data, and the packed copy that later loads map."""

import os
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest

import exporters.onnx
from lfm_edge import export
from lfm_edge.bundle.bundle import Bundle
from lfm_edge.calibration.quantize import quantize_checkpoint
from lfm_edge.checkpoint.checkpoint import open_checkpoint
from lfm_edge.errors import BundleError
from lfm_edge.harness.verify import verify
from lfm_edge.quantization.tensor import QuantizedTensor
from runtimes import onnxruntime as runtime
from tests.helpers import ALL_AT_ONCE, TINY, lfm_edge, reads_proc, resident, save_checkpoint


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return export(TINY, target="onnx-q4", output=tmp_path_factory.mktemp("onnx") / "bundle", context=256)


@pytest.fixture(scope="module")
def graph(bundle):
    return onnx_ir.load(bundle.artifact).graph


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def nodes(graph, kind):
    return [node for node in graph if node.op_type == kind]


def dequantized(node):
    """The weight of a MatMulNBits node, by the formula of its specification."""
    packed, scales = (node.inputs[index].const_value.numpy() for index in (1, 2))
    bits = node.attributes["bits"].as_int()
    codes = packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:2], -1)
    values = (codes.astype(np.float32) - 2 ** (bits - 1)) * scales[:, :, None]
    return values.reshape(len(packed), -1)[:, :node.attributes["K"].as_int()]


def test_the_graph_passes_the_checker_and_strict_shape_inference(bundle):
    onnx.checker.check_model(bundle.artifact, full_check=True)


def test_the_inputs_and_outputs_have_the_names_that_clients_know(graph):
    names = [value.name for value in graph.inputs]
    assert names[:4] == ["input_ids", "attention_mask", "past_conv.0", "past_conv.1"]
    assert "past_key_values.2.key" in names
    assert [value.name for value in graph.outputs] == [
        "logits", *(name.replace("past_key_values", "present").replace("past_conv", "present_conv")
                    for name in names[2:-1])]


def test_clients_that_do_not_ask_get_the_last_token_s_logits(bundle):
    """An input with a default, which ONNX Runtime does not list among the inputs."""
    program = onnxruntime.InferenceSession(str(bundle.artifact), providers=["CPUExecutionProvider"])
    assert "num_logits_to_keep" not in [value.name for value in program.get_inputs()]
    optional, = program.get_overridable_initializers()
    assert optional.name == "num_logits_to_keep"
    assert program.get_outputs()[0].shape[1] == 1  # what clients that allocate it go by
    state = {value.name: np.zeros([size if isinstance(size, int) else 0 for size in value.shape], np.float32)
             for value in program.get_inputs()[2:]}
    feeds = {"input_ids": np.array([[5, 6, 7, 8]]), "attention_mask": np.ones((1, 4), np.int64), **state}
    one, = program.run(["logits"], feeds)
    three, = program.run(["logits"], {**feeds, optional.name: np.array([3])})
    assert one.shape[1] == 1 and three.shape[1] == 3
    np.testing.assert_allclose(three[:, 2:], one, atol=1e-5 * one.std())


def test_every_weight_dequantizes_to_the_quantizer_s_own_bit_for_bit(bundle, graph):
    """Row by row: layers of one input stand one below the other in one product."""
    weights = quantize_checkpoint(open_checkpoint(TINY), bundle.manifest.recipe)
    expected = Counter(row.tobytes() for weight in weights.values() if isinstance(weight, QuantizedTensor)
                       for row in weight.dequantize().numpy())
    assert Counter(row.tobytes() for node in nodes(graph, "MatMulNBits") for row in dequantized(node)) == expected


def test_the_embedding_reads_the_bytes_of_the_tied_head(graph):
    table = nodes(graph, "GatherBlockQuantized")[0].inputs[0].const_value
    head = nodes(graph, "MatMulNBits")[-1].inputs[1].const_value
    assert (table.location, table.offset, table.length) == (head.location, head.offset, head.length)


def test_everything_with_a_fused_operator_is_fused(bundle, graph):
    config = bundle.manifest.config
    assert len(nodes(graph, "GroupQueryAttention")) == len(config.attention_layers)
    assert len(nodes(graph, "CausalConvWithState")) == len(config.conv_layers)
    # A layer has four products: into the operator, out of it, into the feed-forward, out of it. And the head.
    assert len(nodes(graph, "MatMulNBits")) == 4 * config.num_layers + 1
    # Every residual sum but the one before the last norm, which sees the last token only, is part of a norm.
    assert len(nodes(graph, "SkipSimplifiedLayerNormalization")) == 2 * config.num_layers - 1
    assert all(node.attributes["accuracy_level"].as_int() == 4 for node in nodes(graph, "MatMulNBits"))


def test_only_the_last_token_goes_through_the_head(graph):
    assert list(graph.outputs[0].shape) == [1, 1, 272]


def test_the_graph_tells_nothing_about_the_machine_it_was_made_on(bundle):
    data = bundle.artifact.read_bytes()
    assert not any(trace in data for trace in (b".py", b"site-packages", os.sep.encode() + b"home", b"torch."))


def test_large_weights_are_spread_over_files_that_a_browser_can_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(exporters.onnx, "_LARGEST_FILE", 300_000)
    bundle = export(TINY, target="onnx-q4", output=tmp_path / "bundle", context=64)
    parts = sorted(path for path in (bundle.directory / "onnx").iterdir() if path.suffix != ".onnx")
    assert [path.name for path in parts[:3]] == ["model_q4.onnx_data", "model_q4.onnx_data_1", "model_q4.onnx_data_2"]
    assert all(path.stat().st_size <= 300_000 for path in parts)
    assert f'"model_q4.onnx": {len(parts)}' in (bundle.directory / "config.json").read_text()
    assert bundle.artifact_bytes == sum(path.stat().st_size for path in (*parts, bundle.artifact))
    assert np.isfinite(bundle.session().prefill([1, 30, 40])).all()


def test_the_first_load_keeps_a_packed_graph_and_later_loads_read_it(bundle, cache):
    packed = runtime.packed_directory(bundle)
    expected = bundle.session().prefill([1, 30, 40])
    assert packed.is_relative_to(cache)
    assert sorted(path.name for path in packed.iterdir()) == ["model.onnx", "model.onnx_data", "seal.json"]
    before = (packed / "model.onnx").stat().st_mtime_ns
    assert np.array_equal(bundle.session().prefill([1, 30, 40]), expected)
    assert (packed / "model.onnx").stat().st_mtime_ns == before
    assert [path.name for path in packed.parent.iterdir()] == [packed.name]  # nothing half-written


@reads_proc
def test_no_page_of_a_large_embedding_stays_mapped_after_a_step(bundle, cache, monkeypatch):
    assert not bundle.session().table.ranges  # a small one is left alone
    monkeypatch.setattr("lfm_edge.backends.mapped.WORTH_FORGETTING", 1)
    session = bundle.session()
    data = (runtime.packed_directory(bundle) / "model.onnx_data").resolve()
    tokens = [1, *range(30, 61)]
    first = session.prefill(tokens)
    length = sum(length for _, length in session.table.ranges)
    mapped = resident(data)
    assert length >= 272 * 128 and 0 < mapped <= data.stat().st_size - length
    session.reset()
    assert np.array_equal(session.prefill(tokens), first)  # from the file again


@reads_proc
def test_a_session_never_touches_what_another_has_mapped(bundle, cache, monkeypatch):
    monkeypatch.setattr("lfm_edge.backends.mapped.WORTH_FORGETTING", 1)
    first, second = bundle.session(), bundle.session()
    assert first.table.ranges and second.table.ranges
    assert not set(first.table.ranges) & set(second.table.ranges)


def test_a_packed_graph_computes_what_the_bundle_s_own_does_bit_for_bit(tmp_path, cache):
    """Packed weights of these sizes lie at odd offsets where ONNX Runtime saves them."""
    source = save_checkpoint(tmp_path / "model", **ALL_AT_ONCE)
    bundle = export(source, target="onnx-q8", output=tmp_path / "bundle", context=32)
    manifest = bundle.manifest
    exact = runtime.OnnxSession(runtime.load(bundle.artifact), manifest.state, manifest.config.vocab_size, 16)
    packed = runtime.OnnxSession(runtime.load(runtime.packed_graph(bundle)), manifest.state,
                                 manifest.config.vocab_size, 16)
    assert runtime.packed_graph(bundle) != bundle.artifact
    for tokens in ([5, 40, 77, 99, 100, 3], [9], [8, 7]):
        assert np.array_equal(packed.prefill(tokens), exact.prefill(tokens))


def test_a_packed_graph_with_other_logits_is_not_used_and_not_made_again(bundle, cache, monkeypatch):
    trials = iter([np.zeros(1), np.ones(1)])
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "_trial", lambda bundle, program: next(trials))
        assert runtime.packed_graph(bundle) == bundle.artifact
    assert runtime.packed_graph(bundle) == bundle.artifact
    assert [path.name for path in runtime.packed_directory(bundle).iterdir()] == ["seal.json"]


def test_what_a_killed_process_left_in_the_cache_is_removed(bundle, cache):
    left = runtime.packed_directory(bundle).parent / ".partial-killed"
    (left / "saved").mkdir(parents=True)
    os.utime(left, (0, 0))
    runtime.packed_graph(bundle)
    assert not left.exists()


def test_a_packed_graph_serves_its_own_artifact_version_and_processor_only(bundle, tiny_bundle, monkeypatch):
    places = {runtime.packed_directory(bundle), runtime.packed_directory(tiny_bundle)}
    with monkeypatch.context() as patch:
        patch.setattr(runtime.onnxruntime, "__version__", "0.0")
        places.add(runtime.packed_directory(bundle))
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "_processor", lambda: ("another",))
        places.add(runtime.packed_directory(bundle))
    assert len(places) == 4


def test_without_a_place_for_the_packed_graph_the_bundle_s_own_is_loaded(bundle, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert runtime.packed_graph(bundle) == bundle.artifact
    assert np.isfinite(bundle.session().prefill([1, 30, 40])).all()


def test_a_graph_that_cannot_be_loaded_is_one_clear_line(bundle, tmp_path, cache):
    shutil.copytree(bundle.directory, tmp_path / "broken")
    broken = Bundle.open(tmp_path / "broken")
    broken.artifact.write_bytes(b"not a graph")
    broken.manifest.write(broken.directory)
    broken = Bundle.open(broken.directory)
    with pytest.raises(BundleError, match=r"model_q4\.onnx: ONNX Runtime cannot load it"):
        runtime.load(broken.artifact)
    for use in (Bundle.session, runtime.stored_constants):
        with pytest.raises(BundleError, match=r"model_q4\.onnx: not a readable ONNX graph"):
            use(broken)
    assert not runtime.packed_directory(broken).exists()
    run = lfm_edge("generate", broken.directory, "--prompt", "x", env={"XDG_CACHE_HOME": str(cache)})
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1 and "Traceback" not in run.stderr


@pytest.fixture
def copied(bundle, tmp_path):
    """The bundle, to change."""
    return shutil.copytree(bundle.directory, tmp_path / "copied")


def reopened(directory, rename=None):
    """The bundle, sealed again. rename: what the graph's data is called now"""
    graph = directory / "onnx/model_q4.onnx"
    if rename is not None:
        model = onnx.load(graph, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = rename if entry.key == "location" else entry.value
        onnx.save(model, graph)
    manifest = Bundle.open(directory, check=False).manifest
    replace(manifest, parts=(replace(manifest.decoder, files=()),)).write(directory)
    return Bundle.open(directory)


@pytest.mark.parametrize("location", ["beside.bin", "../beside.bin", "/etc/passwd", "../../copied/onnx/beside.bin"])
def test_data_that_the_manifest_does_not_list_is_not_read(copied, cache, location):
    changed = reopened(copied, rename=location)
    for place in ("onnx/beside.bin", "beside.bin"):
        shutil.copyfile(copied / "onnx/model_q4.onnx_data", copied / place)
    for use in (Bundle.session, runtime.stored_constants):
        with pytest.raises(BundleError, match=f"refers to data in '{location}', which the manifest does not list"):
            use(changed)
    assert not (cache / "lfm-edge/onnxruntime").exists()


def test_packed_weights_are_those_of_the_data_whatever_that_is_called(bundle, copied, cache):
    (copied / "onnx/model_q4.onnx_data").rename(copied / "onnx/any name")
    first = reopened(copied, rename="any name")
    expected = first.session().prefill([1, 30, 40])
    assert np.array_equal(expected, bundle.session().prefill([1, 30, 40]))
    content = bytearray((copied / "onnx/any name").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (copied / "onnx/any name").write_bytes(content)
    changed = reopened(copied)
    assert runtime.packed_directory(changed) != runtime.packed_directory(first)
    assert not np.array_equal(changed.session().prefill([1, 30, 40]), expected)


def test_data_behind_a_link_to_anywhere_is_read(bundle, copied, cache, tmp_path):
    """What ONNX Runtime does not do by itself: the graph is no link, and its data lies in no folder that it allows."""
    shutil.move(copied / "onnx/model_q4.onnx_data", tmp_path / "elsewhere")
    (copied / "onnx/model_q4.onnx_data").symlink_to(tmp_path / "elsewhere")
    linked = Bundle.open(copied)
    assert np.array_equal(linked.session().prefill([1, 30, 40]), bundle.session().prefill([1, 30, 40]))
    assert runtime.stored_constants(linked) == runtime.stored_constants(bundle)


def test_one_flipped_weight_is_found(bundle, tmp_path):
    shutil.copytree(bundle.directory, tmp_path / "flipped")
    data = tmp_path / "flipped" / "onnx" / "model_q4.onnx_data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 0xFF
    data.write_bytes(content)
    bundle.manifest.write(tmp_path / "flipped")  # sealed again, so that only `verify` can find it
    assert len(verify(Bundle.open(tmp_path / "flipped")).weights.missing) == 1


def test_a_width_that_no_block_divides_is_refused_by_name(tmp_path):
    source = save_checkpoint(tmp_path / "model", hidden_size=40, vocab_size=300)
    run = lfm_edge("export", "--target", "onnx-q8", "--model", source, "--output", tmp_path / "out")
    assert run.returncode == 2
    assert "model.embed_tokens.weight: 40 columns" in run.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
