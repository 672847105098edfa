"""Checkpoints: what Hugging Face writes is read lazily; what is damaged or hostile is refused in one line."""

import json
import os
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import Lfm2ForCausalLM

from lfm_edge import export
from lfm_edge.bundle.bundle import Bundle
from lfm_edge.checkpoint import checkpoint as module
from lfm_edge.checkpoint.checkpoint import open_checkpoint
from lfm_edge.errors import CheckpointError, ConfigError
from tests.helpers import AWKWARD, fill_bundle, hf_model, rewrite, save_checkpoint

CONV = "model.layers.0.conv.conv.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A checkpoint in one file."""
    return save_checkpoint(tmp_path_factory.mktemp("published") / "model")


@pytest.fixture
def checkpoint(published, tmp_path):
    """A copy of it, to damage."""
    return shutil.copytree(published, tmp_path / "model")


@pytest.fixture
def sharded(tmp_path):
    return save_checkpoint(tmp_path / "sharded", max_shard_size="100KB")


def rename(new_name):
    """A change for `rewrite`: every tensor under another name."""
    def change(tensors):
        renamed = {new_name(name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    return change


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def refusal(directory, error=CheckpointError):
    """The one line with which opening the checkpoint is refused."""
    with pytest.raises(error) as raised:
        open_checkpoint(directory)
    line = str(raised.value)
    assert "\n" not in line
    return line


def read_all(checkpoint):
    return {name: checkpoint.tensor(name) for name in checkpoint.names}


# --- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", AWKWARD.values(), ids=AWKWARD)
def test_every_weight_is_read_as_transformers_wrote_it(tmp_path, overrides):
    opened = open_checkpoint(save_checkpoint(tmp_path, tokenizer=False, **overrides))
    expected = dict(hf_model(**overrides).named_parameters())

    assert set(opened.names) == set(expected)
    for name, tensor in read_all(opened).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_keep_the_dtype_they_are_stored_in(tmp_path, dtype):
    opened = open_checkpoint(save_checkpoint(tmp_path, dtype=dtype))
    expected = dict(hf_model().to(dtype).named_parameters())

    for name, tensor in read_all(opened).items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name])


def test_shards_and_a_single_file_hold_the_same_model(published, sharded):
    shards = list(sharded.glob("model-*-of-*.safetensors"))
    whole, parts = open_checkpoint(published), open_checkpoint(str(sharded))

    assert len(shards) > 2
    assert not (sharded / "model.safetensors").exists()
    assert whole.config == parts.config
    assert whole.names == parts.names
    assert all(torch.equal(tensor, parts.tensor(name)) for name, tensor in read_all(whole).items())


def test_opening_reads_no_tensor(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors[CONV][0].fill_(float("nan")))

    opened = open_checkpoint(checkpoint)
    opened.tensor("model.layers.0.conv.in_proj.weight")

    with pytest.raises(CheckpointError, match=rf"{CONV} holds NaN or infinite values"):
        opened.tensor(CONV)


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_infinite_weights_are_refused(checkpoint, value):
    rewrite(checkpoint, lambda tensors: tensors[CONV][-1].fill_(value))

    with pytest.raises(CheckpointError, match=CONV):
        open_checkpoint(checkpoint).tensor(CONV)


def test_digest_follows_weights_and_config(checkpoint):
    before = open_checkpoint(checkpoint).digest()
    assert open_checkpoint(checkpoint).digest() == before

    rewrite(checkpoint, lambda tensors: tensors[CONV][0].add_(1))
    changed = open_checkpoint(checkpoint).digest()
    edit_json(checkpoint / "config.json", lambda config: config.update(norm_eps=1e-6))

    assert len({before, changed, open_checkpoint(checkpoint).digest()}) == 3


def test_a_home_relative_path_is_found(published, monkeypatch):
    monkeypatch.setenv("HOME", str(published.parent))

    assert open_checkpoint("~/model").names


# --- the head -----------------------------------------------------------------------------------------------------


def store_head(directory, head, *, with_embedding=True):
    """Store a head, made of the embedding by `head`, beside it or alone."""
    def change(tensors):
        tensors[HEAD] = head(tensors[EMBEDDING])
        if not with_embedding:
            del tensors[EMBEDDING]

    rewrite(directory, change)


def is_tied_by_transformers(directory):
    model = Lfm2ForCausalLM.from_pretrained(directory)
    return model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_head_that_is_stored_as_well_is_passed_over(checkpoint):
    store_head(checkpoint, torch.clone)

    assert HEAD not in open_checkpoint(checkpoint).names
    assert open_checkpoint(checkpoint).config.tie_embedding
    assert is_tied_by_transformers(checkpoint)


@pytest.mark.parametrize("row", [0, 150, 299])
def test_a_head_that_differs_from_the_embedding_is_kept_whatever_config_says(checkpoint, row, monkeypatch):
    def other(embedding):
        head = embedding.clone()
        head[row, 5] += 1e-6
        return head

    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 100)
    store_head(checkpoint, other)
    opened = open_checkpoint(checkpoint)

    assert not opened.config.tie_embedding
    assert opened.config.to_dict()["tie_word_embeddings"] is opened.config.to_dict()["tie_embedding"] is False
    assert torch.equal(opened.tensor(HEAD), other(opened.tensor(EMBEDDING)))
    assert not is_tied_by_transformers(checkpoint)


@pytest.mark.parametrize("stored, head, tied", [
    (torch.float32, torch.bfloat16, True), (torch.bfloat16, torch.float32, True), (torch.float16, torch.float32, True),
    (torch.float16, torch.bfloat16, False), (torch.bfloat16, torch.float16, True),
])
def test_a_head_that_is_the_embedding_but_for_the_rounding_of_its_type_is_tied(tmp_path, stored, head, tied):
    directory = save_checkpoint(tmp_path / "model", dtype=stored)
    store_head(directory, lambda embedding: embedding.to(head))

    assert open_checkpoint(directory).config.tie_embedding is tied


def test_a_head_alone_is_the_embedding_of_a_tied_model(checkpoint, published):
    store_head(checkpoint, torch.clone, with_embedding=False)

    assert torch.equal(open_checkpoint(checkpoint).tensor(EMBEDDING), open_checkpoint(published).tensor(EMBEDDING))
    assert is_tied_by_transformers(checkpoint)


def test_a_tied_head_of_another_shape_is_refused(checkpoint):
    store_head(checkpoint, lambda embedding: embedding[:10].clone())

    assert f"{HEAD}: expected shape (300, 64), found (10, 64)" in refusal(checkpoint)


def test_an_untied_model_without_a_head_is_refused(checkpoint):
    """transformers makes one up of random numbers."""
    edit_json(checkpoint / "config.json", lambda config: config.update(tie_word_embeddings=False))

    assert f"{HEAD} is missing; config.json says that the head is not the embedding" in refusal(checkpoint)


def test_a_bundle_of_a_model_whose_head_differs_computes_what_transformers_does(checkpoint, tmp_path):
    pytest.importorskip("onnxruntime")
    store_head(checkpoint, lambda embedding: embedding.flip(0) * 1.5)
    bundle = export(checkpoint, target="onnx-q8", output=tmp_path / "bundle", context=64, prefill_chunk=8)
    tokens = [1, 20, 30, 40, 50]
    with torch.no_grad():
        expected = Lfm2ForCausalLM.from_pretrained(checkpoint)(torch.tensor([tokens])).logits[0, -1]

    logits = torch.from_numpy(bundle.session().prefill(tokens))
    assert (logits - expected).abs().max() < 0.2 * expected.std()
    for name in ("manifest.json", "config.json"):
        config = json.loads((bundle.directory / name).read_text())
        assert config.get("config", config)["tie_word_embeddings"] is False


# --- which file -------------------------------------------------------------------------------------------------


def test_a_single_file_wins_over_an_index_beside_it(sharded, published):
    rewrite_shards(sharded, lambda tensor: tensor + 1)
    shutil.copyfile(published / "model.safetensors", sharded / "model.safetensors")
    for leftovers in ("whole", "some", "none"):
        if leftovers != "whole":
            next(sharded.glob("model-*.safetensors")).unlink()
        if leftovers == "none":
            [path.unlink() for path in sharded.glob("model-*.safetensors")]
        opened = open_checkpoint(sharded)
        theirs = Lfm2ForCausalLM.from_pretrained(sharded).state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in read_all(opened).items()), leftovers
    assert open_checkpoint(sharded).digest() == open_checkpoint(published).digest()


def rewrite_shards(directory, change):
    for path in directory.glob("model-*.safetensors"):
        save_file({name: change(tensor) for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def test_shards_that_the_index_does_not_name_are_not_read(sharded, published):
    (sharded / "model-99999-of-00001.safetensors").write_bytes(b"left over, and no safetensors file")

    assert read_all(open_checkpoint(sharded)).keys() == read_all(open_checkpoint(published)).keys()


def test_of_a_tensor_in_two_shards_the_index_says_which_one_counts(sharded, published):
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    shards = sorted(set(index.values()))
    other = sharded / next(shard for shard in (shards[0], shards[-1]) if shard != index[CONV])
    save_file({**load_file(other), CONV: torch.zeros(64, 1, 3)}, other, metadata={"format": "pt"})

    assert torch.equal(open_checkpoint(sharded).tensor(CONV), open_checkpoint(published).tensor(CONV))


def test_shards_without_an_index_are_refused(sharded):
    (sharded / INDEX).unlink()

    assert f"but no {INDEX} that says which tensors are where" in refusal(sharded)


def test_names_without_the_model_s_prefix_are_read_as_transformers_reads_them(checkpoint, published):
    rewrite(checkpoint, rename(lambda name: name.removeprefix("model.")))
    theirs = Lfm2ForCausalLM.from_pretrained(checkpoint).state_dict()

    for name, tensor in read_all(open_checkpoint(checkpoint)).items():
        assert torch.equal(tensor, open_checkpoint(published).tensor(name))
        assert torch.equal(tensor, theirs[name])


# --- damage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused(checkpoint, keep):
    path = checkpoint / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:keep])

    assert f"{path}: damaged safetensors file" in refusal(checkpoint)


@pytest.mark.parametrize("content", [b"garbage" * 100, b"\xff" * 64, (2).to_bytes(8, "little") + b"[]",
                                     (4).to_bytes(8, "little") + b"null", (10**15).to_bytes(8, "little") + b"{}",
                                     b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94."])
def test_a_file_with_a_garbage_header_is_refused(checkpoint, content):
    (checkpoint / "model.safetensors").write_bytes(content)

    assert "damaged safetensors file" in refusal(checkpoint)


def test_a_missing_tensor_is_named(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.pop(CONV))

    assert f"{CONV} is missing" in refusal(checkpoint)


def test_of_many_missing_tensors_the_first_is_named_and_the_rest_counted(checkpoint):
    edit_json(checkpoint / "config.json", lambda config: config.update(conv_bias=True))

    assert "model.layers.0.conv.in_proj.bias is missing (and 5 more)" in refusal(checkpoint)


def test_a_misshaped_tensor_is_told_with_both_shapes(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.update({CONV: torch.zeros(64, 1, 4)}))

    assert f"{CONV}: expected shape (64, 1, 3), found (64, 1, 4)" in refusal(checkpoint)


@pytest.mark.parametrize("dtype, name", [(torch.float64, "F64"), (torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"),
                                         (torch.bool, "BOOL")])
def test_a_tensor_of_another_dtype_is_refused(checkpoint, dtype, name):
    rewrite(checkpoint, lambda tensors: tensors.update({CONV: tensors[CONV].to(dtype)}))

    line = refusal(checkpoint)
    assert f"{CONV} has dtype {name}; expected one of BF16, F16, F32" in line
    assert ("quantized already" in line) is (name in ("I8", "F8_E4M3"))


def test_a_tensor_that_the_model_has_no_place_for_is_refused(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.update({"model.layers.0.adapter.weight": torch.zeros(2)}))

    assert "model.layers.0.adapter.weight is not a tensor of this model" in refusal(checkpoint)


def test_weights_of_a_longer_model_are_refused(checkpoint):
    edit_json(checkpoint / "config.json",
              lambda config: config.update(num_hidden_layers=3, layer_types=config["layer_types"][:3]))

    assert "does config.json belong to these weights?" in refusal(checkpoint)


@pytest.mark.parametrize("shard", ["../stolen.safetensors", "/etc/passwd", "sub/model.safetensors", "..",
                                   "model.safetensors/../../stolen.safetensors", "pytorch_model.bin"])
def test_an_index_cannot_lead_out_of_the_directory(sharded, shard):
    shutil.copyfile(next(sharded.glob("model-*.safetensors")), sharded.parent / "stolen.safetensors")
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({CONV: shard}))

    assert f"'{shard}' is not a safetensors file of this directory" in refusal(sharded)


def test_a_missing_shard_is_named(sharded):
    shard = max(sharded.glob("model-*.safetensors"))
    shard.unlink()

    assert f"{shard}: no such file" in refusal(sharded)


def test_a_shard_that_does_not_hold_its_tensor_is_refused(sharded):
    shard = sharded / json.loads((sharded / INDEX).read_text())["weight_map"][CONV]
    tensors = load_file(shard)
    del tensors[CONV]
    save_file(tensors, shard)

    assert f"{CONV} is missing" in refusal(sharded)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', "\x00"])
def test_a_damaged_index_is_refused(sharded, text):
    (sharded / INDEX).write_text(text)

    assert INDEX in refusal(sharded)


def test_pickled_weights_are_never_read(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    marker = checkpoint / "executed"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    torch.save({CONV: Payload()}, checkpoint / "pytorch_model.bin")

    assert "model.safetensors: no such file" in refusal(checkpoint)
    assert not marker.exists()


def test_config_is_needed(checkpoint):
    (checkpoint / "config.json").unlink()

    assert "config.json: no such file" in refusal(checkpoint)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe\x00", b"[" * 100_000, b"lfm2"])
def test_config_that_is_no_json_is_refused(checkpoint, content):
    (checkpoint / "config.json").write_bytes(content)

    assert "config.json: not JSON" in refusal(checkpoint)


def test_config_of_another_model_is_refused(checkpoint):
    edit_json(checkpoint / "config.json", lambda config: config.update(model_type="qwen3"))

    assert refusal(checkpoint, ConfigError).startswith(f"{checkpoint}/config.json: model_type is 'qwen3'")


# --- other formats ------------------------------------------------------------------------------------------------

NAMES = {
    "peft": (lambda name: f"base_model.model.{name}", "'base_model.model.' (as peft names them: call merge_and_unload"),
    "images": (lambda name: f"model.language_model.{name.removeprefix('model.')}", "text part of a model for images"),
    "language model": (lambda name: f"language_model.{name}", "begin with 'language_model.' (the text part"),
    "compiled": (lambda name: f"_orig_mod.{name}", "as torch.compile names them"),
    "parallel": (lambda name: f"module.{name}", "as a parallel wrapper names them"),
    "adapter inside": (lambda name: name.replace(".w1.weight", ".w1.lora_A.default.weight"), "merge_and_unload"),
    "adapter around": (lambda name: name.replace(".w1.weight", ".w1.base_layer.weight"), "merge_and_unload"),
    "gptq": (lambda name: name.replace(".w1.weight", ".w1.qweight"), "its weights are quantized already; give the"),
    "bitsandbytes": (lambda name: name.replace(".w1.weight", ".w1.weight.absmax"), "quantized already"),
    "another line": (lambda name: name.replace(".w1.weight", "\n"), r"'model.layers.0.feed_forward\n' is not"),
}


@pytest.mark.parametrize("new_name, words", NAMES.values(), ids=NAMES)
def test_other_names_of_tensors_are_refused_with_what_they_are(checkpoint, new_name, words):
    if words.endswith("is not"):
        rewrite(checkpoint, lambda tensors: tensors.update({"model.layers.0.feed_forward\n": torch.zeros(1)}))
    else:
        rewrite(checkpoint, rename(new_name))

    assert words in refusal(checkpoint)


ADAPTER = {"adapter_config.json": '{"base_model_name_or_path": "LiquidAI/LFM2-350M"}', "adapter_model.safetensors": ""}


def test_an_adapter_alone_is_refused_with_the_name_of_its_model(tmp_path):
    for name, content in ADAPTER.items():
        (tmp_path / name).write_text(content)

    line = refusal(tmp_path)
    assert "holds an adapter of 'LiquidAI/LFM2-350M' and no model" in line
    assert "merge_and_unload" in line


@pytest.mark.parametrize("name", ADAPTER)
def test_an_adapter_beside_a_model_is_not_dropped_without_a_word(checkpoint, name):
    (checkpoint / name).write_text(ADAPTER[name])

    assert "holds a model and an adapter" in refusal(checkpoint)


@pytest.mark.parametrize("name, words", [
    ("pytorch_model.bin", "pytorch_model.bin is pickled, and never read"),
    ("model-Q4_0.gguf", "a GGUF file is made from one"),
    ("consolidated.safetensors", "there is consolidated.safetensors, but no"),
])
def test_weights_of_another_format_are_refused_with_what_to_do(checkpoint, name, words):
    (checkpoint / "model.safetensors").rename(checkpoint / name)

    assert words in refusal(checkpoint)


def test_a_gguf_file_or_a_folder_of_them_is_refused_with_what_to_give(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")

    for given in (tmp_path, tmp_path / "model.gguf"):
        assert "give the directory that this file was converted from" in refusal(given)


@pytest.mark.parametrize("key", ["quantization_config", "quantization"])
def test_a_quantized_checkpoint_is_refused_with_what_to_give(checkpoint, key):
    edit_json(checkpoint / "config.json",
              lambda config: config.update({key: {"quant_method": "bitsandbytes", "load_in_8bit": True}}))

    line = refusal(checkpoint, ConfigError)
    assert f"{key}: the weights are quantized already ('bitsandbytes'); give the bfloat16" in line


def test_a_bundle_s_config_is_refused_with_the_manifest_s_path(tmp_path):
    fill_bundle(tmp_path)
    edit_json(tmp_path / "manifest.json", lambda manifest: manifest["config"].update(partial_rotary_factor=0.5))

    with pytest.raises(ConfigError) as raised:
        Bundle.open(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}/manifest.json: config: partial_rotary_factor is 0.5")


# --- where checkpoints come from ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["/no/such/directory", "./missing", "../missing", "missing", "a/b/c", "~/missing"])
def test_a_path_that_is_not_there_is_refused(model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    assert "no such directory" in refusal(model)


def test_a_file_is_no_checkpoint(published):
    assert "a checkpoint is a directory" in refusal(published / "model.safetensors")


def test_a_hub_id_without_a_network_is_refused_in_one_line(monkeypatch):
    def offline(*_, **__):
        raise LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder.\nSecond line.\nThird.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)

    line = refusal("LiquidAI/LFM2.5-1.2B-Instruct")
    assert line.startswith("LiquidAI/LFM2.5-1.2B-Instruct: cannot be fetched from the hub (Cannot find an appropriate")
    assert "give a local directory or random:PRESET" in line


def test_a_hub_id_fetches_only_what_is_safe_to_read(monkeypatch, published):
    asked = {}

    def download(repository, revision, allow_patterns):
        asked.update(repository=repository, patterns=allow_patterns)
        return str(published)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    opened = open_checkpoint("LiquidAI/LFM2-350M")

    assert opened.source == "LiquidAI/LFM2-350M"
    assert asked["repository"] == "LiquidAI/LFM2-350M"
    assert not [pattern for pattern in asked["patterns"] if pattern.endswith((".bin", ".py", ".pt")) or pattern == "*"]


# --- tokenizer, chat template, licence ----------------------------------------------------------------------------


def test_text_files_are_copied(checkpoint, tmp_path):
    (checkpoint / "LICENSE").write_text("LFM Open License v1.0")
    (checkpoint / "modeling_evil.py").write_text("raise SystemExit")
    target = tmp_path / "bundle"
    target.mkdir()

    open_checkpoint(checkpoint).copy_text_files(target)

    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE"):
        assert (target / name).read_bytes() == (checkpoint / name).read_bytes()
    assert not (target / "modeling_evil.py").exists()


def test_a_checkpoint_without_a_tokenizer_makes_no_bundle(checkpoint, tmp_path):
    (checkpoint / "tokenizer.json").unlink()

    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        open_checkpoint(checkpoint).copy_text_files(tmp_path)


def test_a_template_file_is_embedded_into_the_tokenizer_config(checkpoint, tmp_path):
    edit_json(checkpoint / "tokenizer_config.json", lambda config: config.pop("chat_template"))
    (checkpoint / "chat_template.jinja").write_text("{{ 'Grüße' }}")

    open_checkpoint(checkpoint).copy_text_files(tmp_path)

    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == "{{ 'Grüße' }}"
    assert "chat_template" not in json.loads((checkpoint / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("embedded", ["{{ 'one' }}", [{"name": "tool_use", "template": "{{ 'other' }}"},
                                                      {"name": "default", "template": "{{ 'one' }}"}]])
def test_an_embedded_template_is_written_to_its_file(checkpoint, tmp_path, embedded):
    (checkpoint / "chat_template.jinja").unlink()
    edit_json(checkpoint / "tokenizer_config.json", lambda config: config.update(chat_template=embedded))

    open_checkpoint(checkpoint).copy_text_files(tmp_path)

    assert (tmp_path / "chat_template.jinja").read_text() == "{{ 'one' }}"
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == embedded


def test_a_template_without_a_tokenizer_config_gets_one(checkpoint, tmp_path):
    (checkpoint / "tokenizer_config.json").unlink()

    open_checkpoint(checkpoint).copy_text_files(tmp_path)

    assert json.loads((tmp_path / "tokenizer_config.json").read_text()).keys() == {"chat_template"}


def test_a_template_that_is_no_text_is_refused(checkpoint, tmp_path):
    edit_json(checkpoint / "tokenizer_config.json", lambda config: config.pop("chat_template"))
    (checkpoint / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")

    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: not text"):
        open_checkpoint(checkpoint).copy_text_files(tmp_path)


def test_a_base_model_without_a_template_stays_without_one(checkpoint, tmp_path):
    (checkpoint / "chat_template.jinja").unlink()
    edit_json(checkpoint / "tokenizer_config.json", lambda config: config.pop("chat_template"))

    open_checkpoint(checkpoint).copy_text_files(tmp_path)

    assert not (tmp_path / "chat_template.jinja").exists()


@pytest.mark.parametrize("card, licence", [
    (None, "unknown"),
    ("---\nlicense: other\nlicense_name: lfm1.0\nlicense_link: LICENSE\n---\n# LFM2", "lfm1.0"),
    ("---\nlanguage:\n- en\nlicense: other\n---\n", "other"),
    ('---\nlicense: "apache-2.0"\n---\n', "apache-2.0"),
    ("---\nlanguage: en\n---\nlicense: mit\n", "unknown"),
    ("# A card without front matter\nlicense: mit\n", "unknown"),
    ("", "unknown"),
])
def test_the_licence_comes_from_the_front_matter_of_the_card(checkpoint, card, licence):
    (checkpoint / "README.md").unlink(missing_ok=True)
    if card is not None:
        (checkpoint / "README.md").write_text(card)

    assert open_checkpoint(checkpoint).licence == licence
