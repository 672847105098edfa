"""Sessions over a GGUF file, by llama.cpp on the CPU.

llama.cpp keeps the state in memory of its own. It gives and takes it as one block of bytes, whose layout is read and
written here: so a session has every tensor of the state, as the sessions of other backends do.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import math
import struct
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch
from llama_cpp import _logger

from lfm_edge.bundle.bundle import Bundle
from lfm_edge.bundle.manifest import Manifest
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.cores import usable_cores
from lfm_edge.errors import BundleError, LfmEdgeError
from lfm_edge.session.session import Logits, Session
from lfm_edge.session.state import APPEND, StateSpec, StateTensor

_SEQUENCE = 0  # llama.cpp's number of the one conversation that a context of ours has
_CONV_ONLY = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
_TYPES = {"float32": llama_cpp.GGML_TYPE_F32, "float16": llama_cpp.GGML_TYPE_F16}


def open_session(bundle: Bundle, threads: int | None = None) -> Session:
    """A session over the bundle's file. threads: all cores that this process may use where None is given

    Raises BundleError where llama.cpp cannot load the file.
    """
    with _errors() as errors:
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(str(bundle.artifact).encode(), _model_params())
        context = model and llama_cpp.llama_init_from_model(model, _context_params(bundle.manifest, threads))
    if not context:
        if model:
            llama_cpp.llama_model_free(model)
        raise BundleError(f"{bundle.artifact}: llama.cpp cannot load it ({'; '.join(errors) or 'no reason given'})")
    return LlamaCppSession(bundle.manifest, model, context)


def stored_constants(bundle: Bundle) -> set[bytes]:
    """SHA-256 of every tensor in the file. Raises BundleError where it is damaged."""
    try:
        tensors = gguf.GGUFReader(bundle.artifact).tensors
    except Exception as error:  # the reader trusts the file, and raises what it stumbles over
        raise BundleError(f"{bundle.artifact}: not a readable GGUF file ({error})") from None
    return {hashlib.sha256(np.ascontiguousarray(tensor.data)).digest() for tensor in tensors}


def _model_params() -> Any:
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE  # mapped, what is packed anew would be there twice while it loads
    return params


def _context_params(manifest: Manifest, threads: int | None) -> Any:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = manifest.state.context
    params.n_batch = params.n_ubatch = manifest.options.prefill_chunk
    params.n_threads = params.n_threads_batch = threads or usable_cores()
    params.type_k = params.type_v = _TYPES[_cache_dtype(manifest.state)]
    params.flash_attn_type = (llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if _is_flash(manifest.state)
                              else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED)
    params.offload_kqv = params.op_offload = False
    return params


def _cache_dtype(spec: StateSpec) -> str:
    """The type of the caches; llama.cpp's own where there are none."""
    return next((tensor.dtype for tensor in spec.tensors if tensor.update == APPEND), "float16")


def _is_flash(spec: StateSpec) -> bool:
    """Whether attention is fused, as it is by default. Fused attention makes float16 of keys and values first."""
    return _cache_dtype(spec) == "float16"


@contextmanager
def _errors() -> Iterator[list[str]]:
    """What llama.cpp says of errors meanwhile, one line each; everything else that it says is dropped."""
    errors: list[str] = []

    @llama_cpp.llama_log_callback
    def collect(level: int, text: bytes, _: Any) -> None:
        if _logger.GGML_LOG_LEVEL_TO_LOGGING_LEVEL.get(level) == logging.ERROR:
            errors.append(text.decode(errors="replace").strip())

    llama_cpp.llama_log_set(collect, None)
    try:
        yield errors
    finally:
        llama_cpp.llama_log_set(_logger.llama_log_callback, None)


class LlamaCppSession(Session):
    """The state is in llama.cpp's memory; `state` copies it.

    arithmetic: that of attention; everything else is float32
    """

    def __init__(self, manifest: Manifest, model: Any, context: Any) -> None:
        if _logger.logger.level == logging.NOTSET:  # when the package prints all that llama.cpp says
            _logger.set_verbose(False)
        self.context = context
        self._has_overflown = False  # whether infinities, or what comes of them, may be in its memory
        self.arithmetic = _cache_dtype(manifest.state)
        self.memory = llama_cpp.llama_get_memory(context)
        self.layout = StateBytes(manifest.state, manifest.config)
        weakref.finalize(self, _free, context, model)
        super().__init__(manifest.state, manifest.config.vocab_size, manifest.options.prefill_chunk)

    @property
    def state(self) -> list[torch.Tensor]:
        """Copies of the state tensors, zeros where a cache has no row yet."""
        tensors = [tensor.fresh() for tensor in self.spec.tensors]
        for tensor, value, kept in zip(self.spec.tensors, tensors, self._kept(), strict=True):
            tensor.put_back(value, kept, self.position)
        return tensors

    @state.setter
    def state(self, tensors: list[torch.Tensor]) -> None:
        self._put_back([tensor.kept(value, self.position)
                        for tensor, value in zip(self.spec.tensors, tensors, strict=True)], self.position)

    def _empty(self) -> None:
        self._clear()

    def _clear(self) -> None:
        """Forget everything. llama.cpp begins with its old conv state times 0, so what is not finite is overwritten.

        Overwriting takes in the whole cache, also what was never filled of it.
        """
        llama_cpp.llama_memory_clear(self.memory, self._has_overflown)
        self._has_overflown = False

    def _replaced(self, most: int | None) -> np.ndarray:
        """The conv state alone, as llama.cpp writes it; nothing before the first token."""
        if not self._taken:
            return np.empty(0, np.uint8)
        content = np.empty(llama_cpp.llama_state_seq_get_size_ext(self.context, _SEQUENCE, _CONV_ONLY), np.uint8)
        llama_cpp.llama_state_seq_get_data_ext(self.context, _bytes_of(content), content.size, _SEQUENCE, _CONV_ONLY)
        return content

    def _replace(self, kept: np.ndarray) -> None:
        if not kept.size:
            self._clear()
            return
        taken = llama_cpp.llama_state_seq_set_data_ext(self.context, _bytes_of(kept), kept.size, _SEQUENCE, _CONV_ONLY)
        llama_cpp.llama_memory_seq_rm(self.memory, _SEQUENCE, self.position, -1)  # the rows of the cache past it
        if taken != kept.size or self._taken != self.position:
            raise LfmEdgeError(f"llama.cpp cannot go back to position {self.position}")
        if self._has_overflown:
            self._put_back(self._kept(), self.position)

    def _step(self, tokens: list[int]) -> Logits:
        if self.position != self._taken:  # somebody has set it back, as measurements do
            self._put_back(self._kept(), self.position)
        ids = (llama_cpp.llama_token * len(tokens))(*tokens)
        failed = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(ids, len(tokens)))
        if failed:
            raise LfmEdgeError(f"llama.cpp could not run {len(tokens)} tokens at position {self.position} ({failed})")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        logits = np.ctypeslib.as_array(logits, (self.vocab_size,)).copy()
        self._has_overflown |= not np.isfinite(logits).all()
        return logits

    @property
    def _taken(self) -> int:
        """Tokens that llama.cpp's state has taken."""
        return llama_cpp.llama_memory_seq_pos_max(self.memory, _SEQUENCE) + 1

    def _kept(self) -> tuple[torch.Tensor, ...]:
        if not self.position:
            return tuple(tensor.kept(tensor.fresh(), 0) for tensor in self.spec.tensors)
        size = llama_cpp.llama_state_seq_get_size(self.context, _SEQUENCE)
        content = np.empty(size, np.uint8)
        llama_cpp.llama_state_seq_get_data(self.context, _bytes_of(content), size, _SEQUENCE)
        return tuple(tensor.kept(value, self.position)
                     for tensor, value in zip(self.spec.tensors, self.layout.read(content), strict=True))

    def _put_back(self, tensors: Sequence[torch.Tensor], position: int) -> None:
        self._clear()
        if not position:
            return
        self._has_overflown = not all(tensor.isfinite().all() for tensor in tensors)
        content = self.layout.write(tensors, position)
        with _errors() as errors:
            taken = llama_cpp.llama_state_seq_set_data(self.context, _bytes_of(content), content.size, _SEQUENCE)
        if taken != content.size:
            raise LfmEdgeError(f"llama.cpp does not take the state back ({'; '.join(errors)})")

    def _repeat_rows(self, position: int) -> None:
        self._put_back(self._kept(), position)


class StateBytes:
    """How llama.cpp 0.3.36 of its Python package writes the state of one conversation (`llama_state_seq_get_data`).

    After a mark come two parts, each with the positions that it has taken and a tensor for each layer, one row after
    the other: the cache, keys of all layers before values, a row for every position; and the convolutions, one row
    that is the state after the last position. Rows are ours: [kv_heads, head_dim], [hidden, taps - 1]. Where attention
    is not fused, values lie with their positions last.
    """

    _MARK = struct.pack("<Ii", 0xAF143CD8, _SEQUENCE)

    def __init__(self, spec: StateSpec, config: ModelConfig) -> None:
        self.spec = spec
        self.config = config

    def read(self, content: np.ndarray) -> list[torch.Tensor]:
        """The tensors of the state in the order of its layout, caches as long as what was taken.

        content: uint8 [bytes]. Raises LfmEdgeError where the bytes are laid out in another way.
        """
        position = int(content[12:16].view(np.int32)[0])
        found: dict[str, torch.Tensor] = {}
        start = 0
        for part in self._parts(position):
            if isinstance(part, bytes):
                if content[start:start + len(part)].tobytes() != part:
                    raise LfmEdgeError("this version of llama.cpp writes its state in another way than the one that "
                                       "lfm-edge was made for")
                start += len(part)
                continue
            shape = part.kept_shape(position)
            end = start + math.prod(shape) * part.torch_dtype.itemsize
            value = torch.from_numpy(content[start:end].copy()).view(part.torch_dtype)
            value = value.view(-1, position).t().contiguous() if self._lies_last(part) else value
            found[part.name] = value.view(shape)
            start = end
        return [found[tensor.name] for tensor in self.spec.tensors]

    def write(self, tensors: Sequence[torch.Tensor], position: int) -> np.ndarray:
        """The bytes, uint8, of tensors in the order of the layout at `position`, which is not 0.

        Caches with fewer rows are repeated up to it; one without any has zeros.
        """
        named = {tensor.name: value for tensor, value in zip(self.spec.tensors, tensors, strict=True)}
        content = bytearray()
        for part in self._parts(position):
            content += part if isinstance(part, bytes) else self._rows(part, named[part.name], position)
        return np.frombuffer(content, np.uint8)

    def _rows(self, tensor: StateTensor, value: torch.Tensor, position: int) -> memoryview:
        """What stands there of a tensor."""
        if tensor.update == APPEND and value.shape[tensor.axis] < position:
            value = value if value.numel() else torch.zeros(tensor.kept_shape(1), dtype=value.dtype)
            value = value.index_select(tensor.axis, torch.arange(position) % value.shape[tensor.axis])
        if self._lies_last(tensor):
            value = value.reshape(position, -1).t()
        return value.contiguous().flatten().view(torch.uint8).numpy().data

    def _parts(self, position: int) -> Iterator[bytes | StateTensor]:
        """What stands there after `position` tokens: bytes, or the rows of a tensor."""
        attention = [self._of_kind(kind) for kind in ("key", "value")]
        conv = self._of_kind("conv")
        yield self._MARK + struct.pack("<II", 1, position)  # one stream of so many cells
        cells = np.zeros((position, 3), np.int32)  # position, number of sequences, sequence
        cells[:, 0], cells[:, 1], cells[:, 2] = np.arange(position), 1, _SEQUENCE
        yield cells.tobytes() + struct.pack("<II", not _is_flash(self.spec), len(attention[0]))
        width = self.config.num_key_value_heads * self.config.head_dim
        for tensor in (*attention[0], *attention[1]):
            size = tensor.torch_dtype.itemsize
            lengths = struct.pack("<II", size, width) if self._lies_last(tensor) else struct.pack("<Q", width * size)
            yield struct.pack("<i", _TYPES[tensor.dtype]) + lengths
            yield tensor
        yield struct.pack("<IiIII", 1, position - 1, 0, 0, self.config.num_layers)  # one cell, of no sequence
        for tensor in conv:
            yield struct.pack("<iQ", _TYPES[tensor.dtype], tensor.nbytes)
            yield tensor
        yield struct.pack("<iQ", _TYPES["float32"], 0) * len(conv)  # a second state, which LFM2 has not

    def _lies_last(self, tensor: StateTensor) -> bool:
        return tensor.kind == "value" and not _is_flash(self.spec)

    def _of_kind(self, kind: str) -> list[StateTensor]:
        return [tensor for tensor in self.spec.tensors if tensor.kind == kind]


def _free(context: Any, model: Any) -> None:
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)


def _bytes_of(content: np.ndarray) -> Any:
    return content.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
