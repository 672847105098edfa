"""ONNX graphs and ONNX Runtime, as every part that loads one needs them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import onnx_ir
import onnxruntime

from lfm_edge.errors import BundleError


def session_options(entries: dict[str, str] | None = None, threads: int | None = None) -> onnxruntime.SessionOptions:
    """Options of a session. threads: None for the cores of this machine; entries: of its configuration"""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 4  # what goes wrong is raised as well
    for name, value in (entries or {}).items():
        options.add_session_config_entry(name, value)
    return options


def load_on_cpu(path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """Load a graph on the CPU. Raises BundleError where that fails."""
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the binding raises a class of its own for each status
        raise BundleError(f"{path}: ONNX Runtime cannot load it ({error})") from None


def constants(path: Path) -> Iterator[bytes]:
    """SHA-256 of every constant of a graph, in it or in external data.

    Raises BundleError where the graph is unreadable, or refers to data outside its directory.
    """
    try:
        for value in onnx_ir.load(path).graph.initializers.values():
            yield hashlib.sha256(value.const_value.tobytes()).digest()
    except Exception as error:  # protobuf and mmap raise what they like on damaged files
        raise BundleError(f"{path}: not a readable ONNX graph ({error})") from None
