"""Qualcomm's NPU through ONNX Runtime: the real one on a Snapdragon device, its simulator on an x86-64 host."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import onnxruntime
import onnxruntime_qnn

from lfm_edge.backends.ort import session_options
from lfm_edge.backends.socs import SOCS, Soc
from lfm_edge.errors import LfmEdgeError
from lfm_edge.progress import native_messages_hidden

PROVIDER = "QNNExecutionProvider"


class NpuError(LfmEdgeError):
    """The NPU or its simulator refuses a graph."""


def is_simulated() -> bool:
    """Whether this machine has the simulator in place of an NPU."""
    return platform.machine().lower() in ("x86_64", "amd64")


def load(graph: Path, soc: Soc, *, binary: Path | None = None, last: bool = True,
         shared: bool = False) -> onnxruntime.InferenceSession:
    """Load a graph on the NPU, all of it: a graph of quantized operators, which is compiled now, or a compiled one.

    binary: where to write the compiled graph, an ONNX file beside which the context binary is put
    shared: this graph has its weights in one context binary with those loaded so before it; last: no other follows
    Raises NpuError where the graph cannot be compiled or loaded, or a node of it would run on the CPU.
    """
    # The provider compiles for the simulator as it does for the chip: the same operators, the same roundings.
    device = {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), "htp_arch": str(soc.htp_arch),
              "soc_model": str(soc.model)}
    # Its default puts the quantization of inputs and outputs on the CPU.
    device |= {"offload_graph_io_quantization": "0", "htp_graph_finalization_optimization_mode": "3"}
    entries = {"session.disable_cpu_ep_fallback": "1", "session.record_ep_graph_assignment_info": "1"}
    if binary is not None:
        entries |= {"ep.context_enable": "1", "ep.context_embed_mode": "0", "ep.context_file_path": str(binary)}
    if shared:
        entries |= {"ep.share_ep_contexts": "1"} | ({"ep.stop_share_ep_contexts": "1"} if last else {})
    try:
        session = _session(graph, device, entries)
    except Exception as error:  # the binding raises a class of its own for each status
        raise NpuError(f"{graph}: {_reason(graph, device, error)}") from None
    astray = _not_on_the_npu(session)
    if astray:
        raise NpuError(f"{graph}: would run on the CPU: {astray}")
    return session


def compile_together(graphs: Sequence[Path], soc: Soc, output: Path) -> None:
    """Compile graphs that share their weights into one context binary; each gets an ONNX file of its name in `output`.

    In a process of its own: the compiler takes gigabytes that it does not give back, and one that is left in the middle
    ends its process. Raises NpuError as `load` does.
    """
    arguments = [sys.executable, "-m", "lfm_edge.backends.htp", soc.name, str(output), *map(str, graphs)]
    finished = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if finished.returncode:
        reason = (finished.stderr.strip().splitlines() or [f"the compiler ended with {finished.returncode}"])[-1]
        raise NpuError(reason)


def _compile(soc: Soc, output: Path, graphs: Sequence[Path]) -> None:
    # The binary is written when the last graph is loaded.
    _ = [load(graph, soc, binary=output / graph.name, shared=len(graphs) > 1, last=graph == graphs[-1])
         for graph in graphs]


def _session(graph: Path, device: dict[str, str], entries: dict[str, str]) -> onnxruntime.InferenceSession:
    options = session_options(entries)
    with native_messages_hidden():
        options.add_provider_for_devices(_devices(), device)
        return onnxruntime.InferenceSession(graph, options)


@functools.cache
def _devices() -> list[onnxruntime.OrtEpDevice]:
    """The provider's device, registered once in a process."""
    try:
        onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    except Exception as error:
        raise NpuError(f"the QNN provider cannot be loaded here ({error})") from None
    found = [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER]
    if not found:
        raise NpuError("the QNN provider finds no device here, not even its simulator")
    return found[:1]


def _reason(graph: Path, device: dict[str, str], error: Exception) -> str:
    """Why a graph was refused: by name what would fall to the CPU, where that is it."""
    if isinstance(error, NpuError):
        return str(error)
    if "fallback" in str(error):
        try:
            session = _session(graph, device, {"session.record_ep_graph_assignment_info": "1"})
            return f"would run on the CPU: {_not_on_the_npu(session)}"
        except Exception as second:
            error = second
    return f"the NPU's compiler refuses it ({error})"


def _not_on_the_npu(session: onnxruntime.InferenceSession) -> str:
    """What kinds of operators went elsewhere, and how many."""
    kinds = Counter(node.op_type for part in session.get_provider_graph_assignment_info()
                    if part.ep_name != PROVIDER for node in part.get_nodes())
    return ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items()))


if __name__ == "__main__":
    status = 0
    try:
        _compile(SOCS[sys.argv[1]], Path(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
    except LfmEdgeError as error:
        print(error, file=sys.stderr, flush=True)
        status = 2
    os._exit(status)  # what the provider's libraries do on the way out is not asked for
