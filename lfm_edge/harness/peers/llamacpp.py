"""llama.cpp, on a GGUF file of our own quantizer's integers: a bundle, and measured as one."""

from __future__ import annotations

from pathlib import Path

import lfm_edge
from lfm_edge.bundle.bundle import Bundle
from lfm_edge.bundle.manifest import Manifest
from lfm_edge.harness.peers.peer import REPEATED, Arguments, Built, Peer, Traits, group_size, traits_of
from lfm_edge.session.session import Session
from lfm_edge.session.state import StateSpec
from lfm_edge.targets import Target, target_named

_UBATCH = 512  # tokens of a step of prefill, llama.cpp's own default


class LlamaCpp(Peer):
    """Exported by lfm-edge with the integers that its bundles have; llama.cpp's own quantizer rounds in another way."""

    name = "llama.cpp"
    packages = (("llama_cpp", "llama-cpp-python"),)
    extra = "llamacpp"
    filling = REPEATED

    @property
    def versions(self) -> dict[str, str]:
        return {"lfm-edge": lfm_edge.__version__, **super().versions}

    def arguments(self, manifest: Manifest) -> Arguments:
        target = _target(manifest.recipe.body.bits)
        target.runtime.module()  # raises where it is not installed
        context = manifest.state.context
        return {"target": target.name, "context": context, "prefill_chunk": min(_UBATCH, context),
                "group_size": group_size(manifest), "head_bits": manifest.recipe.head.bits}

    def build(self, checkpoint: Path, artifact: Path, arguments: Arguments) -> None:
        from lfm_edge.bundle.export import export

        export(checkpoint, output=artifact, **arguments)

    def traits(self, built: Built) -> Traits:
        return traits_of(built.manifest)

    def state(self, built: Built) -> StateSpec:
        return built.manifest.state

    def import_runtime(self) -> None:
        _target(4).runtime.module()

    def open_session(self, built: Built, threads: int | None, chunk: int) -> Session:
        return Bundle.open(built.artifact, check=False).session(threads)


def _target(bits: int) -> Target:
    return target_named(f"gguf-q{bits}")
