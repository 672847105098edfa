"""The table of peers: what `bench --against` knows."""

from __future__ import annotations

from lfm_edge.errors import LfmEdgeError
from lfm_edge.harness.peers.executorch import ExportLlm
from lfm_edge.harness.peers.genai import OnnxRuntimeGenai
from lfm_edge.harness.peers.llamacpp import LlamaCpp
from lfm_edge.harness.peers.mlx import MlxLm
from lfm_edge.harness.peers.peer import Peer

PEERS: dict[str, Peer] = {peer.name: peer for peer in (LlamaCpp(), ExportLlm(), OnnxRuntimeGenai(), MlxLm())}


def peer_named(name: str) -> Peer:
    """That peer. Raises LfmEdgeError where there is none of the name, or its packages are missing."""
    if name not in PEERS:
        raise LfmEdgeError(f"--against {name}: unknown peer; known are {', '.join(PEERS)}")
    PEERS[name].check_installed()
    return PEERS[name]
