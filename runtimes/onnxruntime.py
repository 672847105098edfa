"""Sessions over an ONNX graph with explicit state, by ONNX Runtime's CPU provider."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime
import torch

from lfm_edge.bundle import Bundle
from lfm_edge.errors import BundleError
from lfm_edge.session import Logits, Session
from lfm_edge.state import APPEND, StateSpec


def open_session(bundle: Bundle, threads: int | None = None) -> Session:
    """A session over the bundle's graph. threads: of this session; None for the cores of this machine"""
    manifest = bundle.manifest
    return OnnxSession(load(bundle.artifact, threads), manifest.state, manifest.config.vocab_size,
                       manifest.prefill_chunk)


def stored_constants(bundle: Bundle) -> set[bytes]:
    """SHA-256 of every constant that the bundle's graph keeps in external data.

    Raises BundleError where the graph is unreadable, or refers to data outside its directory.
    """
    try:
        graph = onnx_ir.load(bundle.artifact).graph
        return {hashlib.sha256(value.const_value.tobytes()).digest() for value in graph.initializers.values()
                if isinstance(value.const_value, onnx_ir.ExternalTensor)}
    except Exception as error:  # protobuf and mmap raise what they like on damaged files
        raise BundleError(f"{bundle.artifact}: not a readable ONNX graph ({error})") from None


def load(path: Path, threads: int | None = None) -> onnxruntime.InferenceSession:
    """Load a graph. Raises BundleError where ONNX Runtime cannot."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 4  # what goes wrong is raised as well
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the binding raises a class of its own for each status
        raise BundleError(f"{path}: ONNX Runtime cannot load it ({error})") from None


class OnnxSession(Session):
    """The state is ours. Past and present KV are bound to the same memory, so a step copies no cache.

    A conv state cannot be read and written in one place: each has two buffers, which take turns.
    """

    def __init__(self, program: onnxruntime.InferenceSession, spec: StateSpec, vocab_size: int, chunk: int) -> None:
        super().__init__(spec, vocab_size, chunk)
        self.program = program
        self._next = [state if tensor.update == APPEND else tensor.fresh()
                      for tensor, state in zip(spec.tensors, self.state, strict=True)]
        self._logits = np.empty((1, 1, vocab_size), np.float32)
        self._mask = np.ones((1, spec.context), np.int64)
        self._bindings = [self._bind(self.state, self._next), self._bind(self._next, self.state)]

    def _bind(self, past: list[torch.Tensor], present: list[torch.Tensor]) -> onnxruntime.IOBinding:
        binding = self.program.io_binding()
        outputs = [output.name for output in self.program.get_outputs()]
        for tensor, old, new, name in zip(self.spec.tensors, past, present, outputs[1:], strict=True):
            element = np.dtype(tensor.dtype)
            binding.bind_input(tensor.name, "cpu", 0, element, tensor.shape, old.data_ptr())
            binding.bind_output(name, "cpu", 0, element, tensor.shape, new.data_ptr())
        binding.bind_output("logits", "cpu", 0, np.float32, self._logits.shape, self._logits.ctypes.data)
        return binding

    def _step(self, tokens: list[int]) -> Logits:
        ids = np.array([tokens], np.int64)
        binding = self._bindings[0]
        binding.bind_input("input_ids", "cpu", 0, np.int64, ids.shape, ids.ctypes.data)
        binding.bind_input("attention_mask", "cpu", 0, np.int64, (1, self.position + len(tokens)),
                           self._mask.ctypes.data)
        self.program.run_with_iobinding(binding)
        self.state, self._next = self._next, self.state
        self._bindings.reverse()
        return self._logits[0, 0].copy()
