"""What a manifest says of its program, against what the program says of itself; and manifests of schema 2."""

import json
from dataclasses import asdict, replace
from functools import cache

import numpy as np
import pytest

from lfm_edge import export, open_bundle
from lfm_edge.bundle.bundle import Bundle
from lfm_edge.bundle.manifest import MANIFEST, Manifest
from lfm_edge.bundle.options import ExportOptions
from lfm_edge.bundle.parts import TOKENS
from lfm_edge.errors import ExportError
from lfm_edge.targets import TARGETS
from tests.helpers import AWKWARD, TINY, save_checkpoint

CHUNK = 8


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A bundle of an awkward model for a target, made once."""
    folder = tmp_path_factory.mktemp("parts")
    save_checkpoint(folder / "model", **AWKWARD["five conv taps"])

    @cache
    def make(target: str, **options: str) -> Bundle:
        return export(folder / "model", target=target, output=folder / "-".join([target, *options.values()]),
                      context=32, prefill_chunk=CHUNK, **options)

    return make


def sized(value, tokens, **sizes):
    """Name, type and shape of a value in a step of so many tokens."""
    names = {TOKENS: tokens, f"min({TOKENS}, 8)": min(tokens, 8), f"2*{TOKENS}": 2 * tokens, **sizes}
    return value.name, value.dtype, [names.get(size, size) for size in value.shape]


def test_the_values_of_an_onnx_graph(exported):
    import onnxruntime

    bundle = exported("onnx-q4", kv_dtype="int8")
    part, session = bundle.manifest.decoder, onnxruntime.InferenceSession(bundle.artifact)
    types = {"float32": "tensor(float)", "int64": "tensor(int64)", "int8": "tensor(int8)"}

    for described, real in ((part.inputs, session.get_inputs()), (part.outputs, session.get_outputs())):
        named = {value.name: (types[value.dtype], list(value.shape)) for value in described}
        assert {value.name: (value.type, value.shape) for value in real}.items() <= named.items()
        assert named.keys() - {value.name for value in real} == {v.name for v in described if v.optional}


@pytest.mark.parametrize("state", ["explicit", "internal"])
def test_the_values_of_an_executorch_program(exported, state):
    from executorch.extension.pybindings import portable_lib

    bundle = exported("android-q4", kv_dtype="int8", state=state)
    part, meta = bundle.manifest.decoder, portable_lib._load_for_executorch(str(bundle.artifact)).method_meta("forward")
    of_torch = {"uint8": 0, "int8": 1, "int32": 3, "int64": 4, "float32": 6}

    for described, count, real in ((part.inputs, meta.num_inputs(), meta.input_tensor_meta),
                                   (part.outputs, meta.num_outputs(), meta.output_tensor_meta)):
        assert [(of_torch[dtype], shape) for _, dtype, shape in (sized(value, CHUNK) for value in described)] == [
            (real(index).dtype(), list(real(index).sizes())) for index in range(count)]


@pytest.mark.parametrize("state", ["explicit", "internal"])
def test_the_features_of_a_core_ml_package(exported, state):
    import coremltools as ct
    from coremltools.proto.FeatureTypes_pb2 import ArrayFeatureType

    bundle = exported("coreml-q4", state=state)
    part, spec = bundle.manifest.decoder, ct.utils.load_spec(str(bundle.artifact))
    kinds = {"float16": ArrayFeatureType.FLOAT16, "int32": ArrayFeatureType.INT32}

    for function in spec.description.functions:
        tokens = {"decode": 1, "prefill": CHUNK}[function.name]
        for described, real in ((part.inputs, function.input), (part.outputs, function.output)):
            there = [value for value in described if tokens > 1 or not value.optional]
            assert [(name, kinds[dtype], shape) for name, dtype, shape in (sized(v, tokens) for v in there)] == [
                (feature.name, feature.type.multiArrayType.dataType, list(feature.type.multiArrayType.shape))
                for feature in real]


@pytest.mark.parametrize("tokens", [1, CHUNK])
def test_the_arrays_of_an_mlx_function(exported, tokens):
    mx = pytest.importorskip("mlx.core")
    bundle = exported("mlx-q4")
    part = bundle.manifest.decoder
    assert {"model.safetensors", "model.mlxfn", "model.cpu.mlxfn"} <= set(part.files)

    step = mx.import_function(str(bundle.directory / "model.cpu.mlxfn"))
    inputs = [sized(value, tokens) for value in part.inputs if tokens > 1 or not value.optional]
    arrays = step([mx.zeros(shape, getattr(mx, dtype)) for _, dtype, shape in inputs],
                  mx.load(str(bundle.artifact)))

    assert [(str(array.dtype), list(array.shape)) for array in arrays] == [
        (f"mlx.core.{dtype}", shape) for _, dtype, shape in (sized(value, tokens) for value in part.outputs)]


@pytest.mark.parametrize("phase, tokens", [("prefill", CHUNK), ("decode", 1)])
def test_the_values_of_the_npu_s_graphs(exported, phase, tokens):
    onnx = pytest.importorskip("onnx")
    bundle = exported("npu-q4")
    part = bundle.manifest.decoder
    graph = onnx.load(bundle.artifact / f"graphs/{phase}.onnx", load_external_data=False).graph

    for described, real in ((part.inputs, graph.input), (part.outputs, graph.output)):
        there = [value for value in described if tokens > 1 or not value.optional]
        assert {name: (dtype, shape) for name, dtype, shape in (sized(value, tokens) for value in there)} == {
            value.name: (str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))),
                         [dim.dim_value for dim in value.type.tensor_type.shape.dim]) for value in real}


def test_a_manifest_keeps_what_was_chosen_and_no_place_of_the_user_s(tmp_path):
    (tmp_path / "secret place").mkdir()
    (tmp_path / "secret place/support.txt").write_text("Hello!\n\nHow are you today?\n\n" * 40)
    bundle = export(TINY, target="onnx-q4", output=tmp_path / "bundle", context=64, kv_dtype="int8",
                    calibration=tmp_path / "secret place/support.txt")

    written = (bundle.directory / MANIFEST).read_text()
    assert json.loads(written)["options"] == {
        "context": 64, "prefill_chunk": 64, "group_size": 32, "head_bits": 8, "compute_dtype": "float32",
        "kv_dtype": "int8", "state": "explicit", "rounding": "nearest", "calibration": "support.txt"}
    assert "secret place" not in written


@pytest.mark.parametrize("name", TARGETS)
def test_options_are_whole_once_they_are_checked_and_checking_again_changes_nothing(name):
    chosen = ExportOptions().checked(TARGETS[name])

    left = {field for field, value in asdict(chosen).items() if value is None}
    assert left == {"context", "calibration", "recipe", "bake_prompt"} | (set() if "npu" in name else {"soc"})
    assert chosen.checked(TARGETS[name]) == chosen


def test_an_option_that_is_none_is_a_mistake_of_the_program(tmp_path):
    with pytest.raises(TypeError, match="colour"):
        export(TINY, target="android-q4", output=tmp_path / "bundle", colour="green")
    with pytest.raises(ExportError, match=r"^--context 5000 is more than the model's 2048$"):
        export(TINY, target="android-q4", output=tmp_path / "bundle", context=5000)


# --- schema 2 -----------------------------------------------------------------------------------------------------


def in_schema_2(raw):
    """A manifest as it was written before bundles had parts."""
    part, = raw.pop("parts")
    options = raw.pop("options")
    raw.pop("runtime"), raw.pop("state_layout")
    return raw | {"schema_version": 2, "artifact": part["artifact"], "compute_dtype": options["compute_dtype"],
                  "state_mode": options["state"], "prefill_chunk": options["prefill_chunk"],
                  "lowering": part["lowering"], "activation_ranges": part["activation_ranges"],
                  **({"scored": part["scored"]} if part["scored"] > 1 else {})}


@pytest.mark.parametrize("target, options", [
    ("android-q4", {"kv_dtype": "int8"}), ("android-q4", {"state": "internal"}), ("onnx-q4", {"kv_dtype": "int8"}),
    ("coreml-q4", {}), ("mlx-q4", {}), ("npu-q4", {})], ids=str)
def test_a_bundle_of_schema_2_opens_and_answers_as_it_did(exported, tmp_path, target, options):
    import shutil

    new = exported(target, **options)
    directory = tmp_path / "old"
    shutil.copytree(new.directory, directory)
    path = directory / MANIFEST
    path.write_text(json.dumps(in_schema_2(json.loads(path.read_text()))))

    old = open_bundle(directory)

    for entry in ("target", "runtime", "config", "recipe", "state", "state_layout", "files"):
        assert getattr(old.manifest, entry) == getattr(new.manifest, entry)
    assert replace(old.manifest.options, soc=new.manifest.options.soc) == new.manifest.options
    assert (old.manifest.decoder.scored, old.artifact_names) == (new.manifest.decoder.scored, new.artifact_names)
    if target != "npu-q4":  # minutes on the simulator
        answers = [bundle.session().prefill([1, 5, 9, 200, 7]) for bundle in (old, new)]
        assert (answers[0] == answers[1]).all()


def test_a_session_that_was_saved_from_a_bundle_of_schema_2_goes_on(exported, tmp_path):
    bundle = exported("android-q4", kv_dtype="int8", state="explicit")
    raw = json.loads((bundle.directory / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(in_schema_2(raw)))
    before = bundle.session()
    before.origin = Manifest.read(tmp_path).origin
    before.prefill([1, 5, 9])
    before.save(tmp_path / "saved")

    after = bundle.session()
    after.load(tmp_path / "saved")

    assert after.tokens == [1, 5, 9]
