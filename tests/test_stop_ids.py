"""What ends a generation: one list, as transformers' `generate` takes it, in every file that a client reads."""

import json
import shutil

import gguf
import pytest
from executorch.extension.pybindings import portable_lib
from transformers import GenerationConfig, Lfm2ForCausalLM

from lfm_edge import export
from lfm_edge.bundle.bundle import open_bundle
from lfm_edge.checkpoint.checkpoint import open_checkpoint
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.errors import LfmEdgeError
from lfm_edge.session.generation import generate
from tests.helpers import TINY, save_checkpoint

ABSENT = object()
ANSWER = [35, 33]  # "42"
QUESTION = [{"role": "user", "content": "23+19=?"}]

# `eos_token_id` in config.json, then in generation_config.json (None: no such file), then the tokens that end a
# generation: `transformers` is asked as well.
STOPS = {
    "both say the same": (7, {"eos_token_id": 7}, (7,)),
    "only config.json": (7, None, (7,)),
    "a list in config.json": ([7, 2], None, (7, 2)),
    "another one in the other file": (2, {"eos_token_id": 7}, (7,)),
    "a list in the other file": (2, {"eos_token_id": [7, 2]}, (7, 2)),
    "null, and a list in the other file": (None, {"eos_token_id": [2, 7]}, (2, 7)),
    "null in the other file": (7, {"eos_token_id": None}, ()),
    "a file that names none": (7, {"temperature": 0.3}, ()),
    "nothing anywhere": (ABSENT, None, ()),
    "null and no other file": (None, None, ()),
    "the same one twice": (7, {"eos_token_id": [7, 7]}, (7,)),
}


def checkpoint(folder, eos, generation, **config):
    """The trained toy checkpoint with other tokens that end a generation."""
    copy = shutil.copytree(TINY, folder / "checkpoint")
    (copy / "generation_config.json").unlink()
    raw = json.loads((copy / "config.json").read_text()) | {"eos_token_id": eos} | config
    (copy / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not ABSENT}))
    if generation is not None:
        (copy / "generation_config.json").write_text(json.dumps(generation))
    return copy


def listed(value):
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


@pytest.mark.parametrize("eos, generation, expected", STOPS.values(), ids=STOPS)
def test_the_list_is_the_one_that_transformers_takes(tmp_path, eos, generation, expected):
    source = checkpoint(tmp_path, eos, generation)
    theirs = Lfm2ForCausalLM.from_pretrained(source).generation_config.eos_token_id

    assert open_checkpoint(source).config.eos_token_ids == expected
    assert tuple(dict.fromkeys(listed(theirs))) == expected


@pytest.mark.parametrize("eos, generation, expected", STOPS.values(), ids=STOPS)
def test_config_and_generation_config_of_a_bundle_say_the_same(tmp_path, eos, generation, expected):
    opened = open_checkpoint(checkpoint(tmp_path, eos, generation))
    (tmp_path / "bundle").mkdir()
    opened.copy_text_files(tmp_path / "bundle")
    written = json.loads((tmp_path / "bundle/generation_config.json").read_text())

    assert listed(written["eos_token_id"]) == listed(opened.config.to_dict()["eos_token_id"]) == expected
    assert listed(GenerationConfig.from_pretrained(tmp_path / "bundle").eos_token_id) == expected
    assert written.get("temperature") == (generation or {}).get("temperature")
    assert ModelConfig.from_dict(opened.config.to_dict()) == opened.config  # what a manifest keeps


@pytest.mark.parametrize("config, generation, bos, pad", [
    ({"bos_token_id": None, "pad_token_id": None}, None, None, None),
    ({"bos_token_id": None}, {"eos_token_id": 7, "bos_token_id": 1}, 1, 0),
    ({"pad_token_id": None}, {"eos_token_id": 7}, 1, None),
    ({}, {"eos_token_id": 7, "pad_token_id": 2}, 1, 2),
])
def test_the_tokens_that_begin_and_pad_a_text_may_be_absent_and_are_the_same_everywhere(tmp_path, config, generation,
                                                                                        bos, pad):
    opened = open_checkpoint(checkpoint(tmp_path, 7, generation, **config))
    (tmp_path / "bundle").mkdir()
    opened.copy_text_files(tmp_path / "bundle")
    written = json.loads((tmp_path / "bundle/generation_config.json").read_text())

    assert (opened.config.bos_token_id, opened.config.pad_token_id) == (bos, pad)
    assert (written["bos_token_id"], written["pad_token_id"]) == (bos, pad)


BAD = {
    "text": ({"eos_token_id": "<|im_end|>"}, "generation_config.json: eos_token_id is '<|im_end|>'; expected"),
    "a list with null": ({"eos_token_id": [7, None]}, "generation_config.json: eos_token_id is [7, None]"),
    "past the vocabulary": ({"eos_token_id": 272}, "eos_token_id 272 is outside the vocabulary of 272"),
    "below it": ({"eos_token_id": [7, -1]}, "eos_token_id -1 is outside the vocabulary of 272"),
    "no object": ([], "generation_config.json: expected an object"),
}


@pytest.mark.parametrize("generation, message", BAD.values(), ids=BAD)
def test_a_generation_config_that_is_none_is_one_line(tmp_path, generation, message):
    with pytest.raises(LfmEdgeError) as refusal:
        open_checkpoint(checkpoint(tmp_path, 7, generation))

    assert message in str(refusal.value) and "\n" not in str(refusal.value)


# --- in every bundle ----------------------------------------------------------------------------------------------


def of_json(name):
    return lambda directory: listed(json.loads((directory / name).read_text())["eos_token_id"])


def of_genai(directory):
    return listed(json.loads((directory / "genai_config.json").read_text())["model"].get("eos_token_id"))


def of_program(directory):
    return tuple(portable_lib._load_for_executorch(str(directory / "model.pte")).run_method("get_eos_ids", []))


def of_gguf(directory):
    fields = gguf.GGUFReader(directory / "model.gguf").fields
    ids = [fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    return tuple(int(field.contents()) for field in ids if field is not None)


def of_manifest(directory):
    return listed(json.loads((directory / "manifest.json").read_text())["config"]["eos_token_id"])


CLIENTS = {
    "onnx-q4": (of_manifest, of_json("generation_config.json"), of_json("config.json"), of_genai),
    "mlx-q4": (of_manifest, of_json("generation_config.json"), of_json("config.json")),
    "android-q4": (of_manifest, of_json("generation_config.json"), of_program),
    "gguf-q4": (of_manifest, of_json("generation_config.json"), of_gguf),
}


@pytest.mark.parametrize("target", CLIENTS)
@pytest.mark.parametrize("eos, generation, expected", [(2, {"eos_token_id": [7, 2]}, (7, 2)), (7, {}, ())],
                         ids=["a list in the other file", "none"])
def test_every_file_that_a_client_reads_says_the_same(tmp_path, target, eos, generation, expected):
    source = save_checkpoint(tmp_path / "model", layer_types=["conv", "full_attention"], eos_token_id=eos)
    (source / "generation_config.json").write_text(json.dumps(generation))
    if target == "gguf-q4" and not expected:
        with pytest.raises(LfmEdgeError, match="0 tokens end a generation; GGUF names 1 to 3"):
            export(source, target=target, output=tmp_path / "bundle", context=64)
        return
    export(source, target=target, output=tmp_path / "bundle", context=64, prefill_chunk=16)

    assert {read(tmp_path / "bundle") for read in CLIENTS[target]} == {expected}


def test_an_answer_ends_where_transformers_ends_it(tmp_path):
    """config.json alone would let it run past <|im_end|>."""
    source = checkpoint(tmp_path, 2, {"eos_token_id": 7})
    bundle = export(source, target="onnx-q4", output=tmp_path / "bundle", context=64)
    prompt = bundle.tokenizer().chat(QUESTION)

    assert list(generate(bundle.session(), prompt, max_tokens=8, stop=bundle.manifest.config.eos_token_ids)) == ANSWER


def test_a_bundle_without_an_end_is_verified_and_answers_until_the_limit(tmp_path):
    bundle = export(checkpoint(tmp_path, None, None, bos_token_id=None, pad_token_id=None), target="onnx-q4",
                    output=tmp_path / "bundle", context=64)
    opened = open_bundle(bundle.directory)
    answer = list(generate(opened.session(), opened.tokenizer().chat(QUESTION), max_tokens=8,
                           stop=opened.manifest.config.eos_token_ids))

    assert answer[:3] == [*ANSWER, 7] and len(answer) == 8


# --- tokens without a row -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", CLIENTS)
def test_a_token_without_a_row_in_the_embedding_is_one_line_on_every_target(tmp_path, target):
    source = shutil.copytree(TINY, tmp_path / "checkpoint")
    raw = json.loads((source / "tokenizer.json").read_text())
    raw["added_tokens"].append(raw["added_tokens"][-1] | {"id": 272, "content": "<|new|>"})
    (source / "tokenizer.json").write_text(json.dumps(raw))

    with pytest.raises(LfmEdgeError) as refusal:
        export(source, target=target, output=tmp_path / "bundle", context=64)

    assert f"{source}/tokenizer.json: token 272 ('<|new|>') is past the 272 rows" in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_rows_without_a_token_are_no_fault(tmp_path):
    """Published embeddings are padded to a round number of rows."""
    source = save_checkpoint(tmp_path / "model", vocab_size=301)
    raw = json.loads((source / "tokenizer.json").read_text())
    raw["model"]["merges"].pop()
    raw["model"]["vocab"] = {token: index for token, index in raw["model"]["vocab"].items() if index < 300}
    (source / "tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "bundle").mkdir()

    open_checkpoint(source).copy_text_files(tmp_path / "bundle")

    assert (tmp_path / "bundle/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
