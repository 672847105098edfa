"""A peer: another exporter with a runtime of its own, to measure bundles against."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import runpy
import sys
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from lfm_edge.bundle.manifest import MANIFEST, Manifest
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.checkpoint.tokenizer import TextTokenizer
from lfm_edge.errors import LfmEdgeError
from lfm_edge.files import read_json_object
from lfm_edge.quantization.recipe import Scheme
from lfm_edge.session.session import Session
from lfm_edge.session.state import StateSpec

PEER_FILE = "peer.json"
WHOLE_PROMPT = "the whole prompt"
REPEATED, POSITION_ONLY, COMPUTED = "rows repeated", "position set", "computed"

Arguments = dict[str, Any]
Traits = dict[str, str]


@dataclass(frozen=True)
class Built:
    """What a peer's builder made, in the cache.

    directory: has `artifact`, and `tokenizer` with the checkpoint's text files
    arguments: what its builder was told
    config: of the model, its context the one that was built for
    build_s, build_peak_bytes: what its builder took, alone in a process
    """

    directory: Path
    peer: str
    arguments: Arguments
    versions: dict[str, str]
    source_sha256: str
    config: ModelConfig
    build_s: float
    build_peak_bytes: int
    artifact_bytes: int

    @property
    def artifact(self) -> Path:
        """The directory that the builder wrote."""
        return self.directory / "artifact"

    @cached_property
    def manifest(self) -> Manifest | None:
        """Where the artifact is a bundle, what that says."""
        return Manifest.read(self.artifact) if (self.artifact / MANIFEST).is_file() else None

    def tokenizer(self) -> TextTokenizer:
        """The checkpoint's tokenizer."""
        return TextTokenizer(self.directory / "tokenizer")

    def write(self) -> None:
        """Write peer.json, the last file of the directory."""
        raw = {**asdict(self), "config": self.config.to_dict()}
        del raw["directory"]
        (self.directory / PEER_FILE).write_text(json.dumps(raw, indent=2) + "\n")

    @classmethod
    def read(cls, directory: Path) -> Built:
        """Read it back. Raises LfmEdgeError where it is malformed."""
        raw = read_json_object(directory / PEER_FILE, LfmEdgeError)
        try:
            return cls(**{**raw, "directory": directory, "config": ModelConfig.from_dict(raw["config"])})
        except (TypeError, KeyError, ValueError) as error:
            raise LfmEdgeError(f"{directory / PEER_FILE}: malformed ({error}); delete the directory") from None


class Peer(ABC):
    """One row of the table of peers.

    packages: what it needs, each the module to import and the distribution that has it
    extra: of lfm-edge, which installs them
    measured_on: systems on which its speed and memory mean something, as `sys.platform`
    takes_threads: whether its runtime can be told how many threads to use
    filling: how a session of it comes to a fill of the context: `rows repeated`, `position set` or `computed`
    """

    name: ClassVar[str]
    packages: ClassVar[tuple[tuple[str, str], ...]]
    extra: ClassVar[str] = "peers"
    measured_on: ClassVar[tuple[str, ...]] = ("linux", "darwin")
    takes_threads: ClassVar[bool] = True
    model_types: ClassVar[tuple[str, ...]] = ("lfm2",)
    filling: ClassVar[str]

    def asked(self, manifest: Manifest) -> Arguments:
        """`arguments`, for a model of a type that the peer has. Raises LfmEdgeError as that does, and for another."""
        if manifest.config.model_type not in self.model_types:
            raise LfmEdgeError(f"--against {self.name}: it has no {manifest.config.model_type}")
        return self.arguments(manifest)

    @abstractmethod
    def arguments(self, manifest: Manifest) -> Arguments:
        """What to tell its builder for an artifact as near to this bundle as it can make. All in JSON's types.

        Raises LfmEdgeError where it cannot make one that is comparable.
        """

    @abstractmethod
    def build(self, checkpoint: Path, artifact: Path, arguments: Arguments) -> None:
        """Make the artifact, by the peer's own builder, in a process of its own and in a directory for its litter.

        checkpoint: a Hugging Face directory with one safetensors file and no code; artifact: the directory to make
        """

    @abstractmethod
    def traits(self, built: Built) -> Traits:
        """What the artifact is, in the terms of `traits_of`."""

    @abstractmethod
    def import_runtime(self) -> None:
        """Import what `open_session` needs: the empty process that memory is measured above."""

    @abstractmethod
    def open_session(self, built: Built, threads: int | None, chunk: int) -> Session:
        """A session over the artifact. chunk: tokens of one step of prefill where something is to be filled"""

    def state(self, built: Built) -> StateSpec:
        """The state that its sessions have, wherever they keep it."""
        return StateSpec.of(built.config, built.config.max_position_embeddings)

    @property
    def is_measured_here(self) -> bool:
        """Whether this machine can tell its speed and memory."""
        return sys.platform in self.measured_on

    @property
    def versions(self) -> dict[str, str]:
        """Of its packages."""
        return {name: importlib.metadata.version(name) for _, name in self.packages}

    def check_installed(self) -> None:
        """Raises LfmEdgeError, with what to install, where one of its packages is missing."""
        for module, package in self.packages:
            if importlib.util.find_spec(module) is None:
                raise LfmEdgeError(f"--against {self.name}: needs the package {package}: "
                                   f"pip install 'lfm-edge[{self.extra}]'")


class PeerSession(Session):
    """A session whose state is the peer's own. (What only bundles can do, such as snapshots, it refuses.)"""

    def __init__(self, spec: StateSpec, vocab_size: int, chunk: int) -> None:
        super().__init__(spec, vocab_size, chunk, held=())

    def _room(self) -> int:
        """The whole prompt: none of the peers cuts it in parts by itself."""
        return self.spec.context

    def _replace(self, kept: Any) -> None:
        """Refused: a peer goes forward, or begins anew."""
        raise LfmEdgeError("the peer keeps its state")


def traits_of(manifest: Manifest) -> Traits:
    """What a bundle is, line by line, to hold beside what a peer's artifact is."""
    bits = manifest.recipe
    caches = {tensor.dtype for tensor in manifest.state.tensors if tensor.kind == "key"}
    mixed = f", some {', '.join(sorted({scheme_line(scheme) for scheme in bits.mixed.values()}))}" if bits.mixed else ""
    return {"linear layers": scheme_line(bits.body) + mixed, "head": scheme_line(bits.head),
            "embedding": scheme_line(bits.head), "activations": bits.activations,
            "computes in": manifest.options.compute_dtype, "KV cache": ", ".join(caches) or "none",
            "step of prefill": f"{manifest.options.prefill_chunk} tokens", "rounding": bits.rounding}


def scheme_line(scheme: Scheme) -> str:
    """`4 bits in groups of 32`."""
    return f"{scheme.bits} bits " + (f"in groups of {scheme.group_size}" if scheme.group_size else "per row")


def differences(theirs: Traits, ours: Traits) -> list[str]:
    """One line for each trait that a peer's artifact does not share with a bundle."""
    return [f"{name}: {theirs[name]}, the bundle {ours[name]}" for name in ours if theirs[name] != ours[name]]


def group_size(manifest: Manifest) -> int:
    """Columns that share a scale: of 4-bit layers the bundle's; blocks of 32 stand for whole rows."""
    return manifest.recipe.body.group_size or 32


def refuse_biases(peer: str, config: ModelConfig) -> None:
    """Raises LfmEdgeError for a model with biases, which some builders leave out without a word."""
    if config.conv_bias:
        raise LfmEdgeError(f"--against {peer}: its builder leaves out the biases of this model's convolutions")


def run_module(module: str, *arguments: str) -> None:
    """Run a program as `python -m MODULE ARGUMENTS...` does, in this process."""
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
