"""The table of peers: what `bench --against` knows."""

from __future__ import annotations

from collections.abc import Sequence

from lfm_edge.errors import LfmEdgeError
from lfm_edge.harness.peers.executorch import ExportLlm
from lfm_edge.harness.peers.genai import OnnxRuntimeGenai
from lfm_edge.harness.peers.llamacpp import LlamaCpp
from lfm_edge.harness.peers.mlx import MlxLm
from lfm_edge.harness.peers.peer import Peer

PEERS: dict[str, Peer] = {peer.name: peer for peer in (LlamaCpp(), ExportLlm(), OnnxRuntimeGenai(), MlxLm())}


def peers_named(names: Sequence[str]) -> list[Peer]:
    """Those peers, each once. Raises LfmEdgeError where there is none of a name, or its packages are missing."""
    for name in names:
        if name not in PEERS:
            raise LfmEdgeError(f"--against {name}: unknown peer; known are {', '.join(PEERS)}")
        PEERS[name].check_installed()
    return [PEERS[name] for name in dict.fromkeys(names)]
