"""The MLX artifact: what is in the weights, the configuration and the functions, and what a session does with them."""

import json
import math
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import exporters.mlx as exporter
import runtimes.mlx as runtime
from lfm_edge import export
from lfm_edge.bundle.bundle import Bundle
from lfm_edge.calibration.quantize import quantize_checkpoint
from lfm_edge.checkpoint.checkpoint import open_checkpoint
from lfm_edge.checkpoint.layers import ATTENTION
from lfm_edge.errors import BundleError, ExportError
from lfm_edge.harness.verify import verify
from lfm_edge.model.lowering import rotary_angles
from lfm_edge.quantization.recipe import recipe
from lfm_edge.quantization.tensor import QuantizedTensor
from tests.helpers import ALL_AT_ONCE, AWKWARD, TINY, assert_verified, lfm_edge, save_checkpoint

# bits of the linear layers, columns that share a scale, bits of embedding and head
RECIPES = [(4, 32, 8), (4, 64, 8), (4, 128, 8), (4, 32, 4), (8, 32, 8), (8, 64, 4)]


@pytest.fixture(scope="module")
def bundle(few_tasks, tmp_path_factory):
    """As the options are by default, but for a short context and short steps."""
    return export(few_tasks, target="mlx-q4", output=tmp_path_factory.mktemp("bfloat16") / "bundle", context=256,
                  prefill_chunk=16)


@pytest.fixture(scope="module")
def exact_bundle(few_tasks, tmp_path_factory):
    return export(few_tasks, target="mlx-q8", output=tmp_path_factory.mktemp("float32") / "bundle", context=256,
                  prefill_chunk=16, compute_dtype="float32")


@pytest.fixture
def small_bundle(tmp_path):
    """A model of one layer, which takes a second to export."""
    source = save_checkpoint(tmp_path / "model", **AWKWARD["one conv layer"])
    return export(source, target="mlx-q4", output=tmp_path / "bundle", context=64, prefill_chunk=16)


def resealed(bundle, **files):
    """The bundle with other content in some files, as if it had been exported so."""
    for name, content in files.items():
        (bundle.directory / name.replace("_", ".")).write_bytes(content)
    bundle.manifest.write(bundle.directory)
    return Bundle.open(bundle.directory)


# The weights


@pytest.mark.parametrize("scheme", RECIPES, ids=str)
def test_every_weight_dequantizes_to_the_quantizer_s_own_bit_for_bit(tmp_path, scheme):
    weights = quantize_checkpoint(open_checkpoint(TINY), recipe(*scheme, "float"))
    quantized = {name: weight for name, weight in weights.items() if isinstance(weight, QuantizedTensor)}
    assert {weight.bits for weight in quantized.values()} == {scheme[0], scheme[2]}
    for dtype in (mx.bfloat16, mx.float32):
        path = tmp_path / "model.safetensors"
        exporter.write_safetensors(path, exporter.stored(weights, str(dtype).removeprefix("mlx.core.")))
        arrays = mx.load(str(path))
        for name, weight in quantized.items():
            scales, biases = (arrays[f"{name.removesuffix('.weight')}.{part}"] for part in ("scales", "biases"))
            assert scales.dtype == biases.dtype == dtype
            values = mx.dequantize(arrays[name], scales.astype(mx.float32), biases.astype(mx.float32),
                                   bits=weight.bits, group_size=weight.shape[1] // scales.shape[1])
            assert np.array_equal(np.array(values), weight.dequantize().numpy())


@given(st.sampled_from([(4, 32), (4, 64), (4, 128), (8, 32), (8, 64), (8, 96), (8, 128), (8, 160), (8, 256)]),
       st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_any_integers_and_scales_come_back_bit_for_bit(scheme, rows, groups, seed):
    (bits, group), generator = scheme, np.random.default_rng(seed)
    ints = generator.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, group * groups), np.int8)
    scales = torch.from_numpy(generator.uniform(2**-14, 2**8, (rows, groups)).astype(np.float32)).bfloat16().float()
    weight = QuantizedTensor(torch.from_numpy(ints), scales, bits)
    made = [mx.array(entry.make()) for entry in exporter.quantized_entries("w.weight", weight, "float32").values()]
    values = mx.dequantize(*made, bits=bits, group_size=exporter.shared_columns("w.weight", weight))
    assert np.array_equal(np.array(values), weight.dequantize().numpy())


def test_all_other_tensors_are_the_checkpoint_s_in_the_compute_type(bundle):
    original, arrays = open_checkpoint(TINY), mx.load(str(bundle.artifact))
    plain = {name for name, shape in original.config.weight_shapes().items() if len(shape) != 2}
    for name in plain:
        value = original.tensor(name).to(torch.bfloat16)
        expected = value.transpose(1, 2) if name.endswith("conv.conv.weight") else value
        assert torch.equal(runtime.to_torch(arrays[name]), expected)
    assert arrays["model.layers.0.conv.conv.weight"].shape == (128, 3, 1)


def test_the_file_has_the_checkpoint_s_names_and_each_tensor_begins_at_a_multiple_of_its_size(bundle):
    data = bundle.artifact.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    assert header.pop("__metadata__") == {"format": "mlx"}
    names = {name.replace(".scales", ".weight").replace(".biases", ".weight") for name in header}
    assert names == set(open_checkpoint(TINY).names)
    sizes = {"U32": 4, "BF16": 2}
    for entry in header.values():
        start, end = entry["data_offsets"]
        assert (8 + length + start) % sizes[entry["dtype"]] == 0
        assert end - start == sizes[entry["dtype"]] * math.prod(entry["shape"])
    assert max(entry["data_offsets"][1] for entry in header.values()) == len(data) - 8 - length


def test_a_width_that_no_group_divides_is_refused_by_name(tmp_path):
    source = save_checkpoint(tmp_path / "model", hidden_size=40, vocab_size=300)
    with pytest.raises(ExportError, match=r"^model\.embed_tokens\.weight: 40 columns; MLX takes a multiple of 32$"):
        export(source, target="mlx-q8", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# config.json


def test_the_configuration_names_the_common_scheme_and_the_exceptions(bundle, exact_bundle):
    config = json.loads((bundle.directory / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"] == {
        "group_size": 32, "bits": 4, "mode": "affine", "model.embed_tokens": {"group_size": 128, "bits": 8}}
    assert (config["block_dim"], config["block_ff_dim"], config["block_auto_adjust_ff_dim"]) == (128, 256, False)
    exact = json.loads((exact_bundle.directory / "config.json").read_text())
    assert exact["quantization"] == {"group_size": 128, "bits": 8, "mode": "affine"}


def test_an_int8_channel_is_cut_into_the_widest_groups_that_divide_it(tmp_path):
    source = save_checkpoint(tmp_path / "model", **AWKWARD["one conv layer"])  # 64 wide, feed-forward of 96
    bundle = export(source, target="mlx-q8", output=tmp_path / "bundle", context=32, prefill_chunk=1)
    assert json.loads((bundle.directory / "config.json").read_text())["quantization"] == {
        "group_size": 64, "bits": 8, "mode": "affine",
        "model.layers.0.feed_forward.w2": {"group_size": 32, "bits": 8}}
    assert_verified(bundle)
    assert list(bundle.manifest.decoder.lowering) == ["decode operators"]


# The functions


def moved_to_cpu(bundle, path):
    """The function for the GPU, with its operators on the CPU."""
    operators = sum(map(Counter, bundle.manifest.decoder.lowering.values()), Counter())
    traced = (bundle.directory / runtime.GPU_FUNCTION).read_bytes()
    path.write_bytes(exporter.moved(traced, exporter.GPU, exporter.CPU, operators))
    return runtime.load_function(path)


def test_the_function_for_the_gpu_is_the_one_for_the_cpu_on_another_device(exact_bundle, tmp_path):
    ours, other = exact_bundle.session(), exact_bundle.session()
    other.function = moved_to_cpu(exact_bundle, tmp_path / "moved.mlxfn")
    for tokens in ([5, 40, 77], [9], list(range(20, 60))):
        assert np.array_equal(ours.prefill(tokens), other.prefill(tokens))


def test_in_16_bits_they_differ_by_how_mlx_s_kernel_for_the_cpu_sums(bundle, tmp_path):
    ours, other = bundle.session(), bundle.session()
    other.function = moved_to_cpu(bundle, tmp_path / "moved.mlxfn")
    expected = ours.prefill(list(range(20, 60)))
    error = np.abs(other.prefill(list(range(20, 60))) - expected).max() / expected.std()
    assert 0 < error < 0.5


@pytest.mark.skipif(mx.metal.is_available(), reason="this machine has the GPU that the function asks for")
def test_the_function_for_the_gpu_asks_for_one(bundle):
    with pytest.raises(BundleError, match=r"model\.mlxfn: not a function that MLX can import .*gpu"):
        runtime.load_function(bundle.directory / runtime.GPU_FUNCTION)


def test_a_file_of_another_format_is_not_changed_in_silence(bundle):
    traced = (bundle.directory / runtime.CPU_FUNCTION).read_bytes()
    operators = sum(map(Counter, bundle.manifest.decoder.lowering.values()), Counter())
    with pytest.raises(ExportError, match="writes another format"):
        exporter.moved(traced.replace(b"Softmax", b"softmax"), exporter.CPU, exporter.GPU, operators)


def test_a_function_has_no_weights_and_constants_that_its_steps_share_once(bundle):
    data = (bundle.directory / runtime.CPU_FUNCTION).read_bytes()
    for name, array in mx.load(str(bundle.artifact)).items():
        if array.size > 256:
            assert np.array(array.view(mx.uint8)).tobytes() not in data, name
    config = bundle.manifest.config
    angles = rotary_angles(config.rotation(ATTENTION), config.head_dim, 256)[200].repeat(2)  # of one position
    rotation = torch.cat([angles.cos(), angles.sin()]).bfloat16().view(torch.uint8).numpy().tobytes()
    assert data.count(rotation) == 1


# Sessions


def test_a_bfloat16_bundle_is_verified_and_keeps_its_answers(bundle):
    result = assert_verified(bundle)
    assert result.passed
    assert result.remark == "computed by MLX on the CPU, not by an Apple GPU"


def test_a_float32_bundle_is_verified_and_keeps_its_answers(exact_bundle):
    result = assert_verified(exact_bundle)
    assert result.passed
    assert {limit.logit_error for limit in result.limits.phases.values()} == {1e-4}


@pytest.mark.parametrize("name", ["all at once", "attention only", "one conv tap"])
def test_awkward_models_are_verified_in_float32(tmp_path, name):
    source = save_checkpoint(tmp_path / "model", **(AWKWARD | {"all at once": ALL_AT_ONCE})[name])
    assert_verified(export(source, target="mlx-q4", output=tmp_path / "bundle", context=64, prefill_chunk=16,
                           compute_dtype="float32"))


def test_what_stands_in_the_padding_changes_nothing(exact_bundle):
    session = exact_bundle.session()
    session.prefill([5, 6, 7])
    state, results = [runtime.from_torch(tensor) for tensor in session.state], []
    for padding in (0, 99):
        tokens = mx.array([[40, 41, 42] + [padding] * 13])
        outputs = session.function(tokens, mx.array([3]), mx.array([3]), *state, **session.weights)
        results.append([value[:, :, :3] if tensor.update == "append" else value
                        for tensor, value in zip([None, *session.spec.tensors], outputs, strict=True) if tensor]
                       + [outputs[0]])
    assert all(mx.array_equal(first, second) for first, second in zip(*results, strict=True))


def place(array):
    return np.asarray(array.view(mx.uint8)).__array_interface__["data"][0]


def test_caches_are_written_in_place(bundle):
    session = bundle.session()
    before = [place(array) for array in session.arrays]
    session.prefill([1, 30, 40])
    snapshot = session.snapshot()
    session.decode(50)
    session.restore(snapshot)
    for tensor, array, old in zip(session.spec.tensors, session.arrays, before, strict=True):
        assert tensor.update != "append" or place(array) == old, tensor.name


def test_the_state_is_a_copy_in_which_rows_past_the_position_are_untouched(bundle):
    session = bundle.session()
    session.prefill([1, 30, 40])
    state = session.state
    session.decode(50)
    for tensor, value in zip(session.spec.tensors, state, strict=True):
        assert value.dtype == torch.bfloat16 and value.shape == tensor.shape
        if tensor.update == "append":
            assert value.narrow(tensor.axis, 0, 3).any(dim=-1).all()
            assert not value.narrow(tensor.axis, 3, 253).any()


def test_a_snapshot_forks_into_another_session(bundle):
    first, second = bundle.session(), bundle.session()
    first.prefill(list(range(20, 50)))
    second.prefill([90, 91])
    second.restore(first.snapshot())
    assert second.position == 30
    assert np.array_equal(second.decode(7), first.decode(7))


# Damaged files


@pytest.mark.parametrize("content", [b"", b"not tensors", None], ids=["empty", "garbage", "truncated"])
def test_damaged_weights_are_one_clear_line(small_bundle, content):
    content = small_bundle.artifact.read_bytes()[:-100] if content is None else content
    broken = resealed(small_bundle, model_safetensors=content)
    for read in (broken.session, lambda: runtime.stored_constants(broken)):
        with pytest.raises(BundleError, match=r"model\.safetensors: damaged safetensors file \([^\n]+\)$"):
            read()


@pytest.mark.parametrize("content", [b"", b"not a function", None], ids=["empty", "garbage", "truncated"])
def test_a_damaged_function_is_one_clear_line(small_bundle, content):
    path = small_bundle.directory / runtime.CPU_FUNCTION
    broken = resealed(small_bundle, model_cpu_mlxfn=path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(BundleError, match=r"mlxfn: not a function that MLX can import \([^\n]+\)$"):
        broken.session()


def test_the_command_line_says_what_is_damaged_in_one_line(small_bundle):
    broken = resealed(small_bundle, model_cpu_mlxfn=b"not a function")
    run = lfm_edge("generate", broken.directory, "--prompt", "x")
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1 and "model.cpu.mlxfn: not a function" in run.stderr


def test_weights_of_another_model_are_refused(small_bundle, bundle):
    other = resealed(small_bundle, model_safetensors=bundle.artifact.read_bytes())
    with pytest.raises(BundleError, match="has no step for the weights and the state of this bundle"):
        other.session()


def test_one_flipped_weight_is_found(small_bundle):
    content = bytearray(small_bundle.artifact.read_bytes())
    content[len(content) // 2] ^= 0xFF
    flipped = resealed(small_bundle, model_safetensors=bytes(content))  # so that only `verify` can find it
    assert len(verify(flipped).weights.missing) == 1
