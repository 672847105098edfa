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
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lfm_edge.config import ModelConfig
from lfm_edge.errors import CheckpointError, LfmEdgeError
from lfm_edge.files import read_json_object
from lfm_edge.presets import PRESETS
from lfm_edge.tokenizer import TOKENIZER_FILES, default_template, write_chatml_tokenizer

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
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
        """Write the tokenizer, the chat template, the generation defaults and the licence into `directory`."""

    @property
    def names(self) -> list[str]:
        """Every weight of the model, in the order of the network."""
        return list(self.config.weight_shapes())


class DirectoryCheckpoint(Checkpoint):
    """A Hugging Face directory: config.json and one or several safetensors files.

    The headers are checked when it is opened: every tensor of the model is there, with the shape that
    config.json implies, in a known dtype. Raises CheckpointError or ConfigError otherwise.

    hub_name: `owner/name@commit`, where it was fetched from the hub
    """

    def __init__(self, directory: Path, source: str | None = None, hub_name: str | None = None) -> None:
        self.directory = directory
        self.source = source or str(directory)
        self.name = hub_name or directory.resolve().name
        self.place = hub_name or str(directory.absolute())
        self.config = ModelConfig.from_dict(read_json_object(directory / "config.json", CheckpointError))
        self.licence = _licence(directory)
        self._files = self._locate()
        self._check_headers()

    def tensor(self, name: str) -> torch.Tensor:
        path = self._files[name]
        with _opened(path) as file:
            value = file.get_tensor(name)
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinite values")
        return value

    def digest(self) -> str:
        hasher = hashlib.sha256((self.directory / "config.json").read_bytes())
        for path in sorted(set(self._files.values())):
            with path.open("rb") as file:
                hasher.update(hashlib.file_digest(file, "sha256").digest())
        return hasher.hexdigest()

    def copy_text_files(self, directory: Path) -> None:
        if not (self.directory / "tokenizer.json").is_file():
            raise CheckpointError(f"{self.directory}: tokenizer.json is missing; a bundle needs the model's tokenizer")
        for name in (*TOKENIZER_FILES, "LICENSE", TASKS_FILE):
            if (self.directory / name).is_file():
                shutil.copyfile(self.directory / name, directory / name)
        _embed_chat_template(directory)

    def _locate(self) -> dict[str, Path]:
        """Which file holds each tensor."""
        index = self.directory / "model.safetensors.index.json"
        if not index.is_file():
            return dict.fromkeys(_names_in(self.directory / "model.safetensors"), self.directory / "model.safetensors")
        weight_map = read_json_object(index, CheckpointError).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: weight_map is missing")
        files: dict[str, Path] = {}
        for shard in sorted(set(map(str, weight_map.values()))):
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise CheckpointError(f"{index}: '{shard}' is not a safetensors file of this directory")
            files |= dict.fromkeys(_names_in(self.directory / shard), self.directory / shard)
        return files

    def _check_headers(self) -> None:
        expected = self.config.weight_shapes()
        missing = [name for name in expected if name not in self._files]
        if missing:
            raise CheckpointError(f"{self.directory}: {missing[0]} is missing" + _and_others(missing))
        # A tied head may be stored as well; it is the embedding.
        unknown = [name for name in self._files if name not in expected and name != "lm_head.weight"]
        if unknown:
            raise CheckpointError(f"{self.directory}: {unknown[0]} is not a tensor of this model" + _and_others(unknown)
                                  + "; does config.json belong to these weights?")
        for path in sorted(set(self._files.values())):
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 - a safetensors file is no dict
                    if name in expected:
                        _check_header(file.get_slice(name), name, expected[name], path)


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
        return hashlib.sha256(f"{self.source}:{self.seed}:{self.config}".encode()).hexdigest()

    def copy_text_files(self, directory: Path) -> None:
        write_chatml_tokenizer(directory, self.config.vocab_size)


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
        raise CheckpointError(f"{text}: a checkpoint is a directory with config.json and safetensors files")
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

    wanted = ["config.json", "*.safetensors", "model.safetensors.index.json", "LICENSE", "README.md", *TOKENIZER_FILES]
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
        raise CheckpointError(f"{path}: {name} has dtype {entry.get_dtype()}; expected one of {', '.join(_DTYPES)}")
    if tuple(entry.get_shape()) != shape:
        raise CheckpointError(f"{path}: {name}: expected shape {shape}, found {tuple(entry.get_shape())}: "
                              "config.json and the weights disagree")


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


def _embed_chat_template(directory: Path) -> None:
    """Let both places that clients read the chat template from hold it."""
    config_path, template_path = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    config = read_json_object(config_path, CheckpointError) if config_path.is_file() else {}
    embedded = default_template(config.get("chat_template"))
    if template_path.is_file() and not embedded:
        try:
            config["chat_template"] = template_path.read_text()
        except ValueError as error:
            raise CheckpointError(f"{template_path.name}: not text ({error})") from None
        config_path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    elif isinstance(embedded, str) and not template_path.is_file():
        template_path.write_text(embedded)
