"""A bundle: one directory with the artifact, the tokenizer, and a manifest that describes and seals both."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch

from lfm_edge.bundle.manifest_checks import check_manifest
from lfm_edge.bundle.output import new_directory
from lfm_edge.calibration.kv_scales import KV_SCALES_FILE
from lfm_edge.checkpoint.checkpoint import RANDOM, Checkpoint, is_hub_id, open_checkpoint
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.checkpoint.sources import place_of
from lfm_edge.checkpoint.tokenizer import TextTokenizer
from lfm_edge.errors import BundleError, CheckpointError, LfmEdgeError
from lfm_edge.files import read_json_object, text, whole_number
from lfm_edge.model.weights import Weights
from lfm_edge.quantization.recipe import Recipe
from lfm_edge.quantization.tensor import QuantizedTensor
from lfm_edge.session.saved import Origin
from lfm_edge.session.state import StateSpec
from lfm_edge.targets import TARGETS, Target, target_named

if TYPE_CHECKING:
    from lfm_edge.session.session import Session

MANIFEST = "manifest.json"
SCHEMA_VERSION = 2
NOT_SEALED = ("README.md", "LICENSE")  # for people: no runtime reads them, and whoever publishes a bundle edits them


@dataclass(frozen=True)
class BakedPrompt:
    """A system prompt that was prefilled at export. file: the saved session; tokens: how many it has taken"""

    file: str
    tokens: int


@dataclass(frozen=True)
class Manifest:
    """All that a runtime or an app needs to drive the artifact, and where it came from.

    compute_dtype: of activations and of all that is not quantized
    lowering: what the exporter tells about its work (delegates, operators left out)
    source: the checkpoint's name, which does not tell where it lies; source_sha256: its content
    weights_sha256: of the quantized integers and scales, the same for every target with this recipe
    activation_ranges: of activations with constant scales, lowest and highest number by the name of the value
    scored: of how many of a step's last tokens the artifact gives the logits; 1 where a manifest does not say
    files: size and SHA-256 of every other file, by its path inside the bundle
    baked_prompt: None where the bundle has none
    """

    target: str
    artifact: str
    compute_dtype: str
    state_mode: str
    prefill_chunk: int
    config: ModelConfig
    recipe: Recipe
    state: StateSpec
    lowering: dict[str, Any]
    source: str
    source_sha256: str
    licence: str
    weights_sha256: str
    versions: dict[str, str]
    activation_ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    scored: int = 1
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    baked_prompt: BakedPrompt | None = None

    @property
    def origin(self) -> Origin:
        """What the states of its sessions come from."""
        scales = self.files.get(KV_SCALES_FILE, {}) if self.state.needs_kv_scales else {}
        return Origin(self.weights_sha256, scales.get("sha256", ""))

    def write(self, directory: Path) -> None:
        """Seal `directory`: list every file in it with size and hash, and write manifest.json."""
        files = {path.relative_to(directory).as_posix(): _seal(path)
                 for path in sorted(directory.rglob("*")) if path.is_file() and path.name != MANIFEST}
        raw = {
            "schema_version": SCHEMA_VERSION, "target": self.target, "artifact": self.artifact,
            "compute_dtype": self.compute_dtype, "state_mode": self.state_mode,
            "prefill_chunk": self.prefill_chunk, "config": self.config.to_dict(),
            "recipe": self.recipe.to_dict(), "state": self.state.to_dict(), "lowering": self.lowering,
            "source": self.source, "source_sha256": self.source_sha256, "licence": self.licence,
            "weights_sha256": self.weights_sha256, "versions": self.versions,
            "activation_ranges": self.activation_ranges, "files": files,
            **({"scored": self.scored} if self.scored > 1 else {}),
            **({"baked_prompt": asdict(self.baked_prompt)} if self.baked_prompt else {}),
        }
        (directory / MANIFEST).write_text(json.dumps(raw, indent=2) + "\n")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read manifest.json. Raises BundleError where it is missing, malformed, or of another version."""
        path = directory / MANIFEST
        if not path.is_file():
            raise BundleError(f"{directory}: not a bundle (no {MANIFEST})")
        try:
            raw = json.loads(path.read_bytes())
            version = raw["schema_version"]
            if version != SCHEMA_VERSION:
                raise BundleError(f"{path}: schema version {version}; this lfm-edge reads {SCHEMA_VERSION}")
            return cls(
                target=text(raw["target"]), artifact=_inside(raw["artifact"], path),
                compute_dtype=text(raw["compute_dtype"]), state_mode=text(raw["state_mode"]),
                prefill_chunk=whole_number(raw["prefill_chunk"], at_least=1),
                scored=whole_number(raw.get("scored", 1), at_least=1),
                config=ModelConfig.from_dict(raw["config"], f"{path}: config"), recipe=Recipe.from_dict(raw["recipe"]),
                state=StateSpec.from_dict(raw["state"]),
                lowering=dict(raw["lowering"].items()),
                source=text(raw["source"]), source_sha256=text(raw["source_sha256"]),
                licence=text(raw["licence"]), weights_sha256=text(raw["weights_sha256"]),
                versions=dict(raw["versions"].items()),
                activation_ranges={name: (float(low), float(high))
                                   for name, (low, high) in raw["activation_ranges"].items()},
                files={_inside(name, path): {"bytes": whole_number(entry["bytes"]), "sha256": text(entry["sha256"])}
                       for name, entry in raw["files"].items()},
                baked_prompt=_baked(raw["baked_prompt"], path) if "baked_prompt" in raw else None)
        except LfmEdgeError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise BundleError(f"{path}: malformed ({type(error).__name__}: {error})") from None


@dataclass(frozen=True)
class Bundle:
    """An opened bundle directory. Only files that the manifest lists are used.

    edited: those of the listed files that no runtime reads which are not as they were exported, or gone
    """

    directory: Path
    manifest: Manifest
    edited: tuple[str, ...] = ()

    @classmethod
    def open(cls, directory: str | Path, *, check: bool = True) -> Bundle:
        """Open a bundle; with `check`, every file that a runtime reads is there, has its size and its hash.

        A file may be a link to wherever that content is, as in the cache of the hub's client. Raises BundleError where
        the check fails, or the manifest holds a value that no export writes.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise BundleError(f"{directory}: no such bundle directory")
        manifest = Manifest.read(directory)
        if manifest.target not in TARGETS:
            raise BundleError(f"{directory / MANIFEST}: unknown target '{manifest.target}'; "
                              f"this lfm-edge knows {', '.join(TARGETS)}")
        try:
            check_manifest(manifest, target_named(manifest.target))
        except (ValueError, LfmEdgeError) as error:
            raise BundleError(f"{directory / MANIFEST}: {error}") from None
        bundle = cls(directory, manifest)
        return replace(bundle, edited=bundle._check_files()) if check else bundle

    @property
    def target(self) -> Target:
        """The row of the table that the bundle was made for."""
        return target_named(self.manifest.target)

    @property
    def artifact(self) -> Path:
        """The file, or the package of files, that the runtime loads."""
        return self.directory / self.manifest.artifact

    @property
    def files(self) -> list[Path]:
        """The manifest and all that it lists."""
        return [self.directory / name for name in (MANIFEST, *self.manifest.files)]

    @property
    def artifact_names(self) -> list[str]:
        """The listed files that the artifact consists of, in order: itself, or all of its package.

        A graph that has a folder to itself may have data in that folder only: all of that is the artifact's.
        """
        artifact = PurePosixPath(self.manifest.artifact)
        place = artifact.parent if len(artifact.parts) > 1 else artifact
        return sorted(name for name in self.manifest.files if PurePosixPath(name).is_relative_to(place))

    @property
    def artifact_files(self) -> list[dict[str, Any]]:
        """Size and SHA-256 of each of them."""
        return [self.manifest.files[name] for name in self.artifact_names]

    @property
    def artifact_bytes(self) -> int:
        """Size of the artifact, with its external data."""
        return sum(entry["bytes"] for entry in self.artifact_files)

    @property
    def baked_prompt(self) -> Path | None:
        """The saved session after the system prompt, for `session.load`; None where the bundle has none."""
        baked = self.manifest.baked_prompt
        return self.directory / baked.file if baked else None

    def listed(self, name: str) -> Path:
        """A file of the bundle. Raises BundleError where the manifest does not list it."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.directory / name}: is not part of this bundle (the manifest does not list it)")
        return self.directory / name

    def tokenizer(self) -> TextTokenizer:
        """The bundle's tokenizer and chat template."""
        return TextTokenizer(self.directory, self.manifest.files)

    def source(self, model: str | Path | None = None) -> Checkpoint:
        """The checkpoint that it was exported from.

        model: where that is; if None, where it was when this user exported from it on this machine. A manifest is not
            trusted and is followed nowhere, but for random weights.
        Raises CheckpointError where there is none, BundleError where it is another one.
        """
        source = self.manifest.source
        model = model or (source if source.startswith(RANDOM) else place_of(self.manifest.source_sha256))
        if model is None:
            raise CheckpointError(f"{self.directory}: was not exported on this machine, which does not know where its "
                                  f"checkpoint '{source}' is; give "
                                  + (f"--model {source}" if is_hub_id(source) else "its directory with --model"))
        try:
            checkpoint = open_checkpoint(model)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; --model says where the checkpoint of this bundle is now") from None
        if checkpoint.digest() != self.manifest.source_sha256:
            raise BundleError(f"{checkpoint.source}: not the checkpoint that {self.directory} was exported from "
                              "(SHA-256 differs); give the right one with --model")
        return checkpoint

    def session(self, threads: int | None = None, soc: str | None = None) -> Session:
        """A session of the bundle's own runtime.

        threads: None for the runtime's default; soc: which of the chips it was compiled for, None for the one at hand
        Raises LfmEdgeError where the runtime takes no number of threads, or cannot load the artifact.
        """
        if soc is not None and not self.target.compiled:
            raise LfmEdgeError(f"--soc {soc}: {self.target.name} is not compiled for chips")
        if threads is not None and not self.target.takes_threads:
            raise LfmEdgeError(f"--threads {threads}: the runtime of {self.target.name} chooses its threads itself")
        which = (soc,) if self.target.compiled else ()
        session = self.target.runtime().open_session(self, threads, *which)
        session.origin = self.manifest.origin
        return session

    def _check_files(self) -> tuple[str, ...]:
        """Hold every listed file against its size and hash; the names of those that may differ, and do."""
        edited = []
        for name in self.manifest.files:
            try:
                self._check_file(name)
            except BundleError:
                if name not in NOT_SEALED:
                    raise
                edited.append(name)
        self._check_package()
        return tuple(edited)

    def _check_file(self, name: str) -> None:
        path, expected = self.directory / name, self.manifest.files[name]
        try:
            if not path.is_file():
                raise BundleError(f"{path}: missing from the bundle")
            if path.stat().st_size != expected["bytes"]:
                raise BundleError(f"{path}: {path.stat().st_size} bytes, the manifest says {expected['bytes']}")
            if _sha256(path) != expected["sha256"]:
                raise BundleError(f"{path}: changed since the export (SHA-256 differs from the manifest's)")
        except OSError as error:
            raise BundleError(f"{path}: cannot be read ({error.strerror})") from None

    def _check_package(self) -> None:
        """Where the artifact is a directory, which runtimes read as they find it, nothing else may be in it."""
        for folder, folders, files in os.walk(self.artifact):
            for name in (*files, *(one for one in folders if Path(folder, one).is_symlink())):
                path = Path(folder, name)
                if path.relative_to(self.directory).as_posix() not in self.manifest.files and name != ".DS_Store":
                    raise BundleError(f"{path}: is not part of this bundle (the manifest does not list it); remove it")


def open_bundle(directory: str | Path) -> Bundle:
    """Open a bundle directory after checking every file against the manifest. Raises BundleError."""
    return Bundle.open(directory)


def new_bundle(output: Path, force: bool) -> AbstractContextManager[Path]:
    """A directory to write a bundle into, which is at `output` when the block ends well (see `output.new_directory`).

    force: replace the bundle that is there
    """
    return new_directory(output, force, _is_bundle)


def _is_bundle(path: Path) -> bool:
    """Whether a directory is one of ours, of any version; other programs have a manifest.json too."""
    try:
        return {"schema_version", "target", "artifact", "files"} <= set(read_json_object(path / MANIFEST, BundleError))
    except BundleError:
        return False


def weights_digest(weights: Weights) -> str:
    """SHA-256 over every weight: integers and scales of quantized ones, values of the others."""
    hasher = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name]
        parts = (weight.ints, weight.scales) if isinstance(weight, QuantizedTensor) else (weight,)
        hasher.update(name.encode())
        for part in parts:
            hasher.update(str(tuple(part.shape)).encode())
            hasher.update(part.contiguous().view(-1).view(torch.uint8).numpy().data)
        if isinstance(weight, QuantizedTensor):
            weight.release()
    return hasher.hexdigest()


def _inside(name: Any, manifest: Path) -> str:
    """A path of the manifest, which must stay inside the bundle, and have one spelling."""
    path = PurePosixPath(str(name))
    if not isinstance(name, str) or not name or path.is_absolute() or ".." in path.parts or "\\" in name:
        raise BundleError(f"{manifest}: '{name}' leads out of the bundle")
    if str(path) != name or not name.isprintable():
        raise BundleError(f"{manifest}: '{name}' is no plain path of a file")
    return name


def _baked(raw: dict[str, Any], manifest: Path) -> BakedPrompt:
    return BakedPrompt(_inside(raw["file"], manifest), whole_number(raw["tokens"], at_least=1))


def _seal(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
