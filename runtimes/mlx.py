"""Sessions over the bundle's MLX function: on Apple's GPU where there is one, else on the CPU."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from lfm_edge.bundle.bundle import Bundle
from lfm_edge.errors import BundleError
from lfm_edge.session.session import Logits, Session
from lfm_edge.session.state import APPEND, StateSpec, StateTensor

WEIGHTS = "model.safetensors"
GPU_FUNCTION, CPU_FUNCTION = "model.mlxfn", "model.cpu.mlxfn"

Function = Callable[..., tuple[mx.array, ...]]


def open_session(bundle: Bundle, threads: int | None = None) -> Session:
    """A session over the bundle's function. (MLX takes no number of threads, and the target says so.)

    Raises BundleError where the weights or the function cannot be read, or do not belong together.
    """
    manifest, on_gpu = bundle.manifest, mx.metal.is_available()
    path = bundle.listed(GPU_FUNCTION if on_gpu else CPU_FUNCTION)
    session = MlxSession(load_function(path), load_weights(bundle.artifact), manifest.state, manifest.config.vocab_size,
                         manifest.options.prefill_chunk, manifest.options.compute_dtype)
    session.remark = "" if on_gpu else "computed by MLX on the CPU, not by an Apple GPU"
    try:
        for length in {1, session.chunk}:
            session.outputs([0] * length)
    except Exception:
        raise BundleError(f"{path}: has no step for the weights and the state of this bundle") from None
    return session


def stored_constants(bundle: Bundle) -> set[bytes]:
    """SHA-256 of every tensor in model.safetensors, floating-point ones as float32, which holds bfloat16 exactly.

    Raises BundleError where the file is damaged.
    """
    with _opened(bundle.artifact) as file:
        tensors = (file.get_tensor(name) for name in file.keys())  # noqa: SIM118 - a safetensors file is no dict
        return {hashlib.sha256((tensor.float() if tensor.is_floating_point() else tensor).numpy()).digest()
                for tensor in tensors}


def load_function(path: Path) -> Function:
    """The function in an .mlxfn file. Raises BundleError where there is none."""
    try:
        return mx.import_function(str(path))
    except Exception as error:  # MLX raises what its parser stumbles over
        raise BundleError(f"{path}: not a function that MLX can import ({_first_line(error)})") from None


def load_weights(path: Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file, by name. Raises BundleError where it is damaged."""
    with _opened(path):  # checks the header against the length of the file
        weights = mx.load(str(path))
        mx.eval(weights)
        return weights


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise BundleError(f"{path}: damaged safetensors file ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def from_torch(tensor: torch.Tensor) -> mx.array:
    """A copy for MLX. numpy, which stands between the two, has no bfloat16."""
    if tensor.dtype == torch.bfloat16:
        array = mx.array(tensor.contiguous().view(torch.uint16).numpy()).view(mx.bfloat16)
    else:
        array = mx.array(tensor.numpy())
    mx.eval(array)
    return array


def to_torch(array: mx.array) -> torch.Tensor:
    """A copy for torch."""
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.view(mx.uint16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


class MlxSession(Session):
    """The state is MLX's memory, and the caches are written in place. `state` copies it.

    arithmetic: what the function computes in
    """

    multiplies_unseen = True

    def __init__(self, function: Function, weights: dict[str, mx.array], spec: StateSpec, vocab_size: int, chunk: int,
                 arithmetic: str) -> None:
        super().__init__(spec, vocab_size, chunk)
        self.arithmetic = arithmetic
        self.function = function
        self.weights = weights

    @property
    def state(self) -> list[torch.Tensor]:
        """Copies of the state tensors."""
        return [to_torch(array) for array in self.arrays]

    @state.setter
    def state(self, tensors: list[torch.Tensor]) -> None:
        self.arrays = [from_torch(tensor) for tensor in tensors]

    def outputs(self, tokens: list[int]) -> list[mx.array]:
        """Logits [1, 1, vocab] and the next state of a step, not computed yet. Raises ValueError for no such step."""
        length = 1 if len(tokens) == 1 else self.chunk
        padded = mx.array([tokens + [0] * (length - len(tokens))], mx.int32)
        valid = [] if length == 1 else [mx.array([len(tokens)], mx.int32)]
        return self.function(padded, mx.array([self.position], mx.int32), *valid, *self.arrays, **self.weights)

    def _step(self, tokens: list[int]) -> Logits:
        logits, *following = self.outputs(tokens)
        logits = logits[0, 0].astype(mx.float32)
        mx.eval(logits, *following)  # before the caches are written, or MLX would have to copy them
        for index, value in enumerate(following):
            self._put(index, value, self.position, len(tokens))
        mx.eval(self.arrays)
        return np.array(logits)

    def _put(self, index: int, value: mx.array, position: int, count: int) -> None:
        """Write the first `count` rows of a value into its cache from `position` on, or replace what is no cache."""
        tensor = self.spec.tensors[index]
        if tensor.update == APPEND:
            self.arrays[index][_rows(tensor, position, count)] = value[_rows(tensor, 0, count)]
        else:
            self.arrays[index] = value

    def _repeat_rows(self, position: int) -> None:
        """Nothing: `state` is a copy, and MLX's own arrays are in memory as a whole from the beginning."""

    def _replaced(self, most: int | None) -> dict[int, mx.array]:
        return {index: array for index, (tensor, array) in enumerate(zip(self.held, self.arrays, strict=True))
                if tensor.update != APPEND}  # no copies: a step gives others in their place

    def _replace(self, kept: dict[int, mx.array]) -> None:
        for index, array in kept.items():
            self.arrays[index] = array
        mx.eval(self.arrays)  # a cache whose rows cannot be written is found now

    def _clear_rows(self, start: int, count: int) -> None:
        for tensor, array in zip(self.held, self.arrays, strict=True):
            if tensor.update == APPEND:
                array[_rows(tensor, start, count)] = 0
        mx.eval(self.arrays)

    def _read(self, index: int, position: int) -> torch.Tensor:
        tensor, array = self.spec.tensors[index], self.arrays[index]
        if tensor.update == APPEND:
            return to_torch(array[_rows(tensor, 0, position)])
        return tensor.kept(to_torch(array), position)

    def _write(self, index: int, kept: torch.Tensor, position: int) -> None:
        tensor = self.spec.tensors[index]
        if tensor.update == APPEND:
            self._put(index, from_torch(kept), 0, position)
        else:
            value = tensor.fresh()
            tensor.put_back(value, kept, position)
            self.arrays[index] = from_torch(value)


def _rows(tensor: StateTensor, start: int, count: int) -> tuple[slice, ...]:
    """The index of a cache's rows; of all of a tensor that is none."""
    return (slice(None),) * tensor.axis + (slice(start, start + count),) if tensor.update == APPEND else (slice(None),)
