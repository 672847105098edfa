"""What a GGUF file says about the model that it is, as llama.cpp's clients and the hub show it."""

import dataclasses

import pytest

gguf = pytest.importorskip("gguf", reason="needs the package gguf")

from exporters.gguf import add_origin  # noqa: E402 - it needs gguf
from lfm_edge import export  # noqa: E402
from lfm_edge.bundle.job import ExportJob  # noqa: E402
from lfm_edge.bundle.options import ExportOptions  # noqa: E402
from lfm_edge.checkpoint.config import ModelConfig  # noqa: E402
from lfm_edge.checkpoint.presets import PRESETS  # noqa: E402
from tests.helpers import save_checkpoint  # noqa: E402


def fields(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_a_file_names_its_model_its_licence_and_its_size(tmp_path):
    source = save_checkpoint(tmp_path / "Lighthouse-Instruct-v2", layer_types=["conv", "full_attention"])
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: lfm1.0\n---\n")
    bundle = export(source, target="gguf-q4", output=tmp_path / "bundle", context=64)

    expected = {
        "general.type": "model", "general.name": "Lighthouse Instruct v2", "general.basename": "Lighthouse",
        "general.version": "v2", "general.finetune": "Instruct", "general.license": "lfm1.0",
        "general.size_label": gguf.size_label(bundle.manifest.config.num_parameters, 0, 0, 0),
        "general.quantization_version": 2, "general.file_type": 2,
    }
    written = fields(bundle.artifact)
    assert {name: written.get(name) for name in expected} == expected


@pytest.mark.parametrize("source, licence, expected", [
    ("LiquidAI/LFM2.5-1.2B-Instruct", "lfm1.0", {
        "general.name": "LFM2.5 1.2B Instruct", "general.basename": "LFM2.5", "general.size_label": "1.2B",
        "general.finetune": "Instruct", "general.license": "lfm1.0"}),
    ("random:lfm2-1.2b", "unknown", {"general.name": "Random Lfm2 1.2b", "general.size_label": "1.2B"}),
    ("some/where/my model/", "unknown", {"general.name": "My Model", "general.size_label": "1.2B"}),
])
def test_names_are_taken_apart_as_llama_cpp_s_converter_does(tmp_path, source, licence, expected):
    job = ExportJob(ModelConfig.from_dict(PRESETS["lfm2-1.2b"][0]), {}, None, None, ExportOptions())
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "lfm2")
    add_origin(writer, dataclasses.replace(job, source=source, licence=licence))
    written = {name: value.value for name, value in writer.kv_data[0].items()}

    assert expected.items() <= written.items()
    assert ("general.license" in written) == (licence != "unknown")
