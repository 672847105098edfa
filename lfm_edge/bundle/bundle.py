"""A bundle: one directory with the artifact, the tokenizer, and a manifest that describes and seals both."""

from __future__ import annotations

import hashlib
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lfm_edge.bundle.manifest import MANIFEST, Manifest, is_manifest_of_ours
from lfm_edge.bundle.manifest_checks import check_manifest
from lfm_edge.bundle.output import new_directory
from lfm_edge.bundle.parts import files_of
from lfm_edge.checkpoint.checkpoint import RANDOM, Checkpoint, is_hub_id, open_checkpoint
from lfm_edge.checkpoint.sources import place_of
from lfm_edge.checkpoint.tokenizer import GENERATION_CONFIG, TextTokenizer
from lfm_edge.errors import BundleError, CheckpointError, LfmEdgeError
from lfm_edge.files import read_json_object, sha256
from lfm_edge.model.weights import Weights
from lfm_edge.quantization.tensor import QuantizedTensor
from lfm_edge.session.sampling import Sampling
from lfm_edge.targets import RUNTIMES, Runtime, Target, target_named

if TYPE_CHECKING:
    from lfm_edge.session.session import Session

NOT_SEALED = ("README.md", "LICENSE")  # for people: no runtime reads them, and whoever publishes a bundle edits them


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
        try:
            check_manifest(manifest)
        except (ValueError, LfmEdgeError) as error:
            raise BundleError(f"{directory / MANIFEST}: {error}") from None
        bundle = cls(directory, manifest)
        return replace(bundle, edited=bundle._check_files()) if check else bundle

    @property
    def target(self) -> Target:
        """The row of the table that the bundle was made for."""
        return target_named(self.manifest.target)

    @property
    def runtime(self) -> Runtime:
        """What runs it."""
        return RUNTIMES[self.manifest.runtime]

    @property
    def artifact(self) -> Path:
        """The file, or the package of files, that the runtime loads."""
        return self.directory / self.manifest.decoder.artifact

    @property
    def files(self) -> list[Path]:
        """The manifest and all that it lists."""
        return [self.directory / name for name in (MANIFEST, *self.manifest.files)]

    @property
    def artifact_names(self) -> list[str]:
        """The listed files that the artifact consists of, in order."""
        return list(files_of(self.manifest.decoder.artifact, self.manifest.files))

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

    @property
    def sampling(self) -> Sampling:
        """How its makers want it to choose tokens: what generation_config.json says.

        Raises LfmEdgeError where that holds a value that is none.
        """
        if GENERATION_CONFIG not in self.manifest.files:
            return Sampling()
        return Sampling.of_generation_config(read_json_object(self.directory / GENERATION_CONFIG, BundleError))

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
        runtime = self.runtime
        if soc is not None and not runtime.takes_chip:
            raise LfmEdgeError(f"--soc {soc}: {self.manifest.target} is not compiled for chips")
        if threads is not None and not runtime.takes_threads:
            raise LfmEdgeError(f"--threads {threads}: the runtime of {self.manifest.target} chooses its threads itself")
        session = runtime.module().open_session(self, threads, *((soc,) if runtime.takes_chip else ()))
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
            if sha256(path) != expected["sha256"]:
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
    return new_directory(output, force, is_bundle)


def is_bundle(path: Path) -> bool:
    """Whether a directory is one of ours, of any version; other programs have a manifest.json too."""
    try:
        return is_manifest_of_ours(read_json_object(path / MANIFEST, BundleError))
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
