"""Where weights come from: a Hugging Face directory, a hub id, or a seeded random model.

Checkpoints are not trusted: only safetensors are read (never pickle), no code of theirs runs, and no file
name of theirs leads out of their directory. Tensors are read one at a time, when asked for.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.checkpoint.fields import token_ids
from lfm_edge.checkpoint.presets import PRESETS
from lfm_edge.checkpoint.tokenizer import (
    CHAT_TEMPLATE,
    DEFAULT_TEMPLATE,
    GENERATION_CONFIG,
    MORE_TEMPLATES,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    TextTokenizer,
    chat_templates,
    write_chatml_tokenizer,
)
from lfm_edge.errors import CheckpointError, ConfigError, LfmEdgeError
from lfm_edge.files import read_json_object

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROWS_AT_ONCE = 4096
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
TASKS_FILE = "tasks.json"
RANDOM = "random:"  # before a preset's name


class Checkpoint(ABC):
    """A model's config and its weights, read lazily.

    config: the model's dimensions
    source: what the user asked for
    name: what a bundle calls it, which does not tell where it lies: the last part of its directory's path,
        `owner/name@commit`, or `random:PRESET`
    place: where it is found again, from whatever directory: a whole path, or the name
    licence: the licence that its card names, or `unknown`
    """

    config: ModelConfig
    source: str
    name: str
    place: str
    licence: str = "unknown"

    @abstractmethod
    def tensor(self, name: str) -> torch.Tensor:
        """One weight, in the dtype that it is stored in.

        Raises CheckpointError where it cannot be read or holds NaN or infinite values.
        """

    @abstractmethod
    def digest(self) -> str:
        """SHA-256 over the config and the weights."""

    @abstractmethod
    def copy_text_files(self, directory: Path) -> None:
        """Write the tokenizer, the chat template, the generation defaults and the licence into `directory`.

        Clients read these files each in their own way, so what two of them say is made the same, as transformers
        takes it. Raises CheckpointError where the tokenizer is missing or does not belong to the weights.
        """

    def tokenizer(self) -> TextTokenizer:
        """Its tokenizer and chat template, as a bundle has them. Raises as `copy_text_files` does."""
        with TemporaryDirectory() as directory:
            self.copy_text_files(Path(directory))
            return TextTokenizer(Path(directory))

    @property
    def names(self) -> list[str]:
        """Every weight of the model, in the order of the network."""
        return list(self.config.weight_shapes())


class DirectoryCheckpoint(Checkpoint):
    """A Hugging Face directory: config.json and one or several safetensors files, taken as transformers takes them.

    The headers are checked when it is opened: every tensor of the model is there, with the shape that
    config.json implies, in a known dtype. Raises CheckpointError or ConfigError otherwise.
    A head that is stored and is not the embedding makes an untied model, whatever config.json says.

    hub_name: `owner/name@commit`, where it was fetched from the hub
    """

    def __init__(self, directory: Path, source: str | None = None, hub_name: str | None = None) -> None:
        self.directory = directory
        self.source = source or str(directory)
        self.name = hub_name or directory.resolve().name
        self.place = hub_name or str(directory.absolute())
        _refuse_adapters(directory)
        path = directory / "config.json"
        if not path.is_file() and any(directory.glob("*.gguf")):
            raise CheckpointError(f"{path}: no such file{_GGUF_HINT}")
        config = read_json_object(path, CheckpointError)
        self.config = ModelConfig.from_dict(config | _special_ids(directory, config), str(path))
        self.licence = _licence(directory)
        self._stored = self._locate()
        self._check_headers()
        if self.config.tie_embedding and self._has_its_own_head():
            self.config = replace(self.config, tie_embedding=False)

    def tensor(self, name: str) -> torch.Tensor:
        path, stored = self._stored[name]
        with _opened(path) as file:
            value = file.get_tensor(stored)
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinite values")
        return value

    def digest(self) -> str:
        hasher = hashlib.sha256((self.directory / "config.json").read_bytes())
        for path in self._paths():
            with path.open("rb") as file:
                hasher.update(hashlib.file_digest(file, "sha256").digest())
        return hasher.hexdigest()

    def copy_text_files(self, directory: Path) -> None:
        if not (self.directory / TOKENIZER).is_file():
            raise CheckpointError(f"{self.directory}: tokenizer.json is missing; a bundle needs the model's tokenizer")
        for name in (*TOKENIZER_FILES, "LICENSE", TASKS_FILE):
            if (self.directory / name).is_file():
                shutil.copyfile(self.directory / name, directory / name)
        _write_chat_templates(self.directory, directory)
        _write_tokenizer(self.directory, directory, self.config.vocab_size)
        _rewrite(directory / GENERATION_CONFIG, self.config.special_ids())

    def _paths(self) -> list[Path]:
        return sorted({path for path, _ in self._stored.values()})

    def _locate(self) -> dict[str, tuple[Path, str]]:
        """Which file holds each tensor, and under which name."""
        if (self.directory / SINGLE_FILE).is_file() or not (self.directory / INDEX).is_file():
            files = dict.fromkeys(self._names_in_single_file(), self.directory / SINGLE_FILE)
        else:
            files = self._files_by_index()
        expected = self.config.weight_shapes()
        # transformers takes the names of the model without its head as well.
        located = {f"model.{name}" if f"model.{name}" in expected else name: (path, name)
                   for name, path in files.items()}
        if self.config.tie_embedding and _EMBEDDING not in located and _HEAD in located:
            located[_EMBEDDING] = located.pop(_HEAD)
        return located

    def _names_in_single_file(self) -> list[str]:
        path = self.directory / SINGLE_FILE
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file" + _other_formats(self.directory))
        return _names_in(path)

    def _files_by_index(self) -> dict[str, Path]:
        index = self.directory / INDEX
        weight_map = read_json_object(index, CheckpointError).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: weight_map is missing")
        shard_of = {name: str(shard) for name, shard in weight_map.items()}
        found: dict[str, list[str]] = {}
        for shard in sorted(set(shard_of.values())):
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise CheckpointError(f"{index}: {shard!r} is not a safetensors file of this directory")
            found[shard] = _names_in(self.directory / shard)
        files = {name: self.directory / shard for shard, names in found.items() for name in names}
        for name, shard in shard_of.items():
            if name not in found[shard]:
                raise CheckpointError(f"{self.directory / shard}: {_printable(name)} is missing, "
                                      f"which {INDEX} has there")
            files[name] = self.directory / shard
        return files

    def _check_headers(self) -> None:
        expected = self.config.weight_shapes()
        # A tied head may be stored as well.
        shapes = {_HEAD: expected[_EMBEDDING], **expected}
        missing = [name for name in expected if name not in self._stored]
        unknown = [name for name in self._stored if name not in shapes]
        if hint := _kind_of_names(unknown):
            raise CheckpointError(f"{self.directory}: {hint}")
        if missing:
            raise CheckpointError(f"{self.directory}: {missing[0]} is missing" + _and_others(missing)
                                  + ("; config.json says that the head is not the embedding (tie_word_embeddings)"
                                     if missing == [_HEAD] else ""))
        if unknown:
            raise CheckpointError(f"{self.directory}: {_printable(unknown[0])} is not a tensor of this model"
                                  + _and_others(unknown) + "; does config.json belong to these weights?")
        for path in self._paths():
            with _opened(path) as file:
                for name, (place, stored) in self._stored.items():
                    if place == path:
                        _check_header(file.get_slice(stored), name, shapes[name], path)

    def _has_its_own_head(self) -> bool:
        """Whether a head is stored that differs from the embedding, in the less exact of their two dtypes."""
        if _HEAD not in self._stored:
            return False
        (path, embedding), (head_path, head) = self._stored[_EMBEDDING], self._stored[_HEAD]
        with _opened(path) as file, _opened(head_path) as head_file:
            pieces = [file.get_slice(embedding), head_file.get_slice(head)]
            dtypes = {_DTYPES[piece.get_dtype()] for piece in pieces}
            # Which neither loses by, unless one is float32: transformers then reads both in one type too.
            dtype = min(dtypes, key=lambda one: one.itemsize) if torch.float32 in dtypes else torch.float32
            for start in range(0, self.config.vocab_size, _ROWS_AT_ONCE):
                ours, theirs = (piece[start:start + _ROWS_AT_ONCE].to(dtype) for piece in pieces)
                if not torch.equal(ours, theirs):
                    return True
        return False


class RandomCheckpoint(Checkpoint):
    """A model of a published size with seeded random weights in bfloat16, and a ChatML tokenizer.

    Each tensor depends on its name and the seed alone, so that it can be made when it is read.
    """

    def __init__(self, preset: str, seed: int = 0) -> None:
        if preset not in PRESETS:
            raise CheckpointError(f"random:{preset}: unknown preset; known are {', '.join(sorted(PRESETS))}")
        self.source = self.name = self.place = f"random:{preset}"
        self.config = ModelConfig.from_dict(PRESETS[preset][0])
        self.licence = "none (random weights)"
        self.seed = seed

    def tensor(self, name: str) -> torch.Tensor:
        shape = self.config.weight_shapes()[name]
        key = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
        noise = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            return (1.0 + 0.1 * noise).bfloat16()
        if name == "model.embed_tokens.weight":
            return noise.mul_(0.02).bfloat16()
        # Variance that keeps activations of one size through all layers, as a trained model's are.
        fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else shape[0]
        return noise.mul_(fan_in ** -0.5).bfloat16()

    def digest(self) -> str:
        return hashlib.sha256(f"{self.source}:{self.seed}:{self.config.identity}".encode()).hexdigest()

    def copy_text_files(self, directory: Path) -> None:
        write_chatml_tokenizer(directory, self.config.vocab_size, self.config.pad_token_id)


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open a local directory, a hub id (`owner/name`, or `owner/name@REVISION`), or `random:PRESET`.

    Raises CheckpointError or ConfigError with one line that says what is wrong.
    """
    text = str(model)
    if text.startswith(RANDOM):
        return RandomCheckpoint(text.removeprefix(RANDOM))
    path = Path(text).expanduser()
    if path.is_dir():
        return DirectoryCheckpoint(path, text)
    if path.exists():
        raise CheckpointError(f"{text}: a checkpoint is a directory with config.json and safetensors files"
                              + _GGUF_HINT * (path.suffix == ".gguf"))
    if not is_hub_id(text):
        raise CheckpointError(f"{text}: no such directory, and not a hub id (owner/name or owner/name@REVISION) or "
                              "random:PRESET")
    repository, _, revision = text.partition("@")
    directory = _download(repository, revision or None)
    commit = directory.name if _COMMIT.fullmatch(directory.name) else revision
    return DirectoryCheckpoint(directory, text, f"{repository}@{commit}" if commit else repository)


def is_hub_id(text: str) -> bool:
    """Whether this is `owner/name` or `owner/name@REVISION`."""
    return bool(_HUB_ID.fullmatch(text)) and ".." not in text


def _download(repository: str, revision: str | None) -> Path:
    """Fetch the files of a checkpoint from the hub into its own cache, resuming what is there already.

    revision: a branch, a tag or a commit; what the hub has now where None is given
    Returns the directory of one commit, which is named after it.
    """
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "*.safetensors", INDEX, "adapter_config.json", "LICENSE", "README.md", *TOKENIZER_FILES,
              f"{MORE_TEMPLATES}/*.jinja", TASKS_FILE]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        wanted_id = f"{repository}@{revision}" if revision else repository
        raise CheckpointError(f"{wanted_id}: cannot be fetched from the hub ({reason}); "
                              "without a network, give a local directory or random:PRESET") from None


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, with the library's errors as ours."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except LfmEdgeError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged safetensors file ({error})") from None


def _names_in(path: Path) -> list[str]:
    with _opened(path) as file:
        return list(file.keys())


def _check_header(entry: Any, name: str, shape: tuple[int, ...], path: Path) -> None:
    if entry.get_dtype() not in _DTYPES:
        raise CheckpointError(f"{path}: {name} has dtype {entry.get_dtype()}; expected one of {', '.join(_DTYPES)}"
                              + f": {_QUANTIZED_HINT}" * (entry.get_dtype() not in ("F64", "BOOL")))
    if tuple(entry.get_shape()) != shape:
        raise CheckpointError(f"{path}: {name}: expected shape {shape}, found {tuple(entry.get_shape())}: "
                              "config.json and the weights disagree")


def _printable(name: str) -> str:
    """A name of somebody else's file, on one line."""
    return name if name.isprintable() else ascii(name)


def _refuse_adapters(directory: Path) -> None:
    """Raises CheckpointError where there is an adapter, which changes a model that may or may not be there too."""
    path = directory / "adapter_config.json"
    if not path.is_file() and not (directory / "adapter_model.safetensors").is_file():
        return
    base = read_json_object(path, CheckpointError).get("base_model_name_or_path") if path.is_file() else None
    of = f" of {base!r}" if isinstance(base, str) and base else ""
    if (directory / SINGLE_FILE).is_file() or (directory / INDEX).is_file():
        raise CheckpointError(f"{directory}: holds a model and an adapter{of}; if the adapter is merged into the model "
                              "already, remove the adapter's files, otherwise merge it first "
                              "(docs/guides/fine-tunes.md)")
    raise CheckpointError(f"{directory}: holds an adapter{of} and no model; merge the two with peft's merge_and_unload "
                          "and give the result (docs/guides/fine-tunes.md)")


_GGUF_HINT = "; a GGUF file is made from one: give the directory that this file was converted from"


def _other_formats(directory: Path) -> str:
    """What there is in place of model.safetensors, and what to do about it."""
    names = sorted(path.name for path in directory.iterdir())
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        return f"; there is {shards[0]}" + _and_others(shards) + f", but no {INDEX} that says which tensors are where"
    if pickled:
        return (f"; {pickled[0]} is pickled, and never read, as it may run code: load it with transformers where you "
                "trust it, and save it again with save_pretrained")
    return _GGUF_HINT if any(name.endswith(".gguf") for name in names) else ""


_QUANTIZED_NAMES = (".qweight", ".qzeros", ".g_idx", ".absmax", ".quant_map", ".SCB", ".weight_scale",
                    ".weight_scale_inv", ".weight_packed", ".weight_shape")
_QUANTIZED_HINT = "its weights are quantized already; give the bfloat16, float16 or float32 model they were made from"
_PREFIXES = {
    "base_model.model.": "as peft names them: call merge_and_unload before save_pretrained",
    "model.language_model.": "the text part of a model for images: save its language model alone",
    "language_model.": "the text part of a model for images: save its language model alone",
    "_orig_mod.": "as torch.compile names them: save the model that was compiled (model._orig_mod)",
    "module.": "as a parallel wrapper names them: save the model inside (model.module)",
}


def _kind_of_names(names: list[str]) -> str:
    """What these tensors are that are not the model's, and what to do, where it is known."""
    if any(".lora_" in name or ".base_layer." in name for name in names):
        return "holds an adapter that is not merged; merge it with peft's merge_and_unload (docs/guides/fine-tunes.md)"
    if any(name.endswith(_QUANTIZED_NAMES) for name in names):
        return _QUANTIZED_HINT
    for prefix, meaning in _PREFIXES.items():
        if any(name.startswith(prefix) for name in names):
            return (f"the names of its tensors begin with '{prefix}' ({meaning}), and should with 'model.'; or rename "
                    "them (docs/guides/fine-tunes.md)")
    return ""


def _and_others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _licence(directory: Path) -> str:
    """The licence named in the front matter of the model card."""
    card = directory / "README.md"
    if not card.is_file():
        return "unknown"
    text = card.read_text(errors="replace")
    front_matter = text.split("\n---", 1)[0] if text.startswith("---") else ""
    fields = dict(re.findall(r"^(license_name|license):\s*[\"']?([^\s\"']+)", front_matter, flags=re.MULTILINE))
    return fields.get("license_name") or fields.get("license") or "unknown"


def _special_ids(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The tokens that end a generation, as transformers' `generate` takes them, and those that begin and pad a text.

    generation_config.json decides where it is there, though it name none; config.json, where it is not.
    """
    path, generation = directory / "config.json", config
    if (directory / GENERATION_CONFIG).is_file():
        path = directory / GENERATION_CONFIG
        generation = read_json_object(path, CheckpointError)
    try:
        ends = token_ids(generation.get("eos_token_id"))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    size = config.get("vocab_size")
    outside = [token for token in ends if isinstance(size, int) and not 0 <= token < size]
    if outside:
        raise CheckpointError(f"{path}: eos_token_id {outside[0]} is outside the vocabulary of {size}")
    return {"eos_token_id": list(ends) or None,
            **{name: generation[name] for name in ("bos_token_id", "pad_token_id") if generation.get(name) is not None}}


def _write_chat_templates(source: Path, directory: Path) -> None:
    """Let every place in `directory` that a client reads a chat template from hold those of `source`."""
    path = source / TOKENIZER_CONFIG
    config = read_json_object(path, CheckpointError) if path.is_file() else {}
    templates = chat_templates(source, config, CheckpointError)
    for name, template in templates.items():
        path = directory / (CHAT_TEMPLATE if name == DEFAULT_TEMPLATE else f"{MORE_TEMPLATES}/{name}.jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(template, "utf-8")
    if templates:
        named = [{"name": name, "template": template} for name, template in templates.items()]
        _rewrite(directory / TOKENIZER_CONFIG,
                 {"chat_template": templates[DEFAULT_TEMPLATE] if set(templates) == {DEFAULT_TEMPLATE} else named})


def _write_tokenizer(source: Path, directory: Path, rows: int) -> None:
    """Let tokenizer.json alone say how a text becomes tokens: other clients than transformers read nothing else.

    rows: of the embedding. Raises CheckpointError where a token has none.
    """
    backend = TextTokenizer(source).backend
    vocabulary = backend.get_vocab(with_added_tokens=True)
    last = max(vocabulary, key=vocabulary.__getitem__, default=None)
    if last is not None and vocabulary[last] >= rows:
        raise CheckpointError(f"{source / TOKENIZER}: token {vocabulary[last]} ({last!r}) is past the {rows} rows of "
                              "the embedding; use the tokenizer of these weights, or add rows for its tokens")
    settled = json.loads(backend.to_str())
    _rewrite(directory / TOKENIZER, {key: settled[key] for key in ("truncation", "padding", "added_tokens")})


def _rewrite(path: Path, changes: dict[str, Any]) -> None:
    """Change entries of a JSON file, or make one; a file that says the same already stays as it is."""
    held = read_json_object(path, CheckpointError) if path.is_file() else {}
    if any(key not in held or held[key] != value for key, value in changes.items()):
        path.write_text(json.dumps(held | changes, indent=2, ensure_ascii=False) + "\n", "utf-8")
