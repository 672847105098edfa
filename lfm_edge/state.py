"""The explicit state of a session: which tensors there are, their shapes, and how a step changes them.

A step takes every tensor of the `StateSpec` as an input and gives each one's next value. The host owns
the memory, so a session can be snapshotted, restored and saved without asking the backend.
"""

from __future__ import annotations

import mmap
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lfm_edge.config import ModelConfig
from lfm_edge.errors import BundleError
from lfm_edge.targets import StateLayout

REPLACE = "replace"
APPEND = "append"


@dataclass(frozen=True)
class StateTensor:
    """One tensor of the state.

    kind: conv | key | value | key_scale | value_scale | key_zero_point | value_zero_point
    update: `replace` (a step gives a whole new value) or `append` (a step writes its rows at `position`
        along dimension `axis`, and leaves the others as they are)
    initial: the value that every element has in a fresh session
    """

    name: str
    layer: int
    kind: str
    shape: tuple[int, ...]
    dtype: str
    update: str
    initial: float = 0.0
    axis: int = 1

    @property
    def next_name(self) -> str:
        """The output that gives its next value, or the step's rows of it."""
        return self.name.replace("past_key_values", "present").replace("past_conv", "present_conv")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The element type, as torch knows it."""
        return getattr(torch, self.dtype)

    def filled(self, value: torch.Tensor, position: int) -> torch.Tensor:
        """What of its value a session at `position` has written: a view."""
        return value.narrow(self.axis, 0, position) if self.update == APPEND else value

    @property
    def nbytes(self) -> int:
        """Bytes that this tensor takes."""
        return int(torch.Size(self.shape).numel()) * self.torch_dtype.itemsize

    def fresh(self) -> torch.Tensor:
        """The tensor of a session at position 0."""
        if self.initial == 0 and self.nbytes > 0:
            return torch.frombuffer(_zeroed_pages(self.nbytes), dtype=self.torch_dtype).view(self.shape)
        return torch.full(self.shape, self.initial, dtype=self.torch_dtype)


def _zeroed_pages(nbytes: int) -> mmap.mmap:
    """Zeroed pages of the system, which take no memory until they are written: a cache costs what is filled of it.

    torch.zeros writes every page. numpy asks Linux for huge pages of 2 MB, which one row fills: a cache that has its
    heads first would take most of its memory at the first token.
    """
    if sys.platform == "win32":
        return mmap.mmap(-1, nbytes)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return pages


_AS_THE_REFERENCE = StateLayout()


@dataclass(frozen=True)
class StateSpec:
    """Every state tensor of one exported model, in the order in which a step takes them.

    context: how many positions the KV cache holds
    """

    tensors: tuple[StateTensor, ...]
    context: int

    @classmethod
    def of(cls, config: ModelConfig, context: int, kv_dtype: str = "float32", layout: StateLayout = _AS_THE_REFERENCE,
           conv_dtype: str = "float32") -> StateSpec:
        """The state of `config` at a context of `context` tokens.

        conv: [1, hidden, taps - 1], the last columns of B*x (none where there is a single tap)
        key, value: [1, context, kv_heads, head_dim]; at `kv_dtype` int8 with a float32 scale and an int8 zero
            point for each position and head, [1, context, kv_heads, 1]
        layout: where a backend wants other shapes
        """
        tensors: list[StateTensor] = []
        heads, past = config.num_key_value_heads, config.conv_taps - 1
        rows = (1, heads, context) if layout.kv_heads_first else (1, context, heads)
        conv = (1, past, config.hidden_size) if layout.conv_channels_last else (1, config.hidden_size, past)

        def cache(layer: int, kind: str, width: int, dtype: str, initial: float = 0.0) -> StateTensor:
            name = f"past_key_values.{layer}.{kind}"
            return StateTensor(name, layer, kind, (*rows, width), dtype, APPEND, initial,
                               2 if layout.kv_heads_first else 1)

        for layer in range(config.num_layers):
            if layer in config.conv_layers:
                if config.conv_taps > 1:
                    tensors.append(StateTensor(f"past_conv.{layer}", layer, "conv", conv, conv_dtype, REPLACE))
                continue
            for part in ("key", "value"):
                tensors.append(cache(layer, part, config.head_dim, kv_dtype))
                if kv_dtype == "int8" and not layout.kv_heads_first:
                    tensors.append(cache(layer, f"{part}_scale", 1, "float32", 1.0))
                    tensors.append(cache(layer, f"{part}_zero_point", 1, "int8"))
        return cls(tuple(tensors), context)

    @property
    def needs_kv_scales(self) -> bool:
        """Whether the caches have 8 bits, and their scales are constants of the program."""
        kinds = {tensor.kind for tensor in self.tensors if tensor.dtype == "int8"}
        return "key" in kinds and "key_zero_point" not in kinds

    def for_reference(self, config: ModelConfig) -> StateSpec:
        """The layout in which the reference holds the same state: positions first, 8-bit rows where these are."""
        in_rows = any(tensor.kind == "key_scale" for tensor in self.tensors)
        return StateSpec.of(config, self.context, "int8" if in_rows else "float32")

    def of_layer(self, layer: int) -> list[int]:
        """Indices of the tensors that belong to `layer`."""
        return [i for i, tensor in enumerate(self.tensors) if tensor.layer == layer]

    def fresh(self) -> list[torch.Tensor]:
        """The state of a session at position 0."""
        return [tensor.fresh() for tensor in self.tensors]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole state."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def nbytes_of(self, *, conv: bool) -> int:
        """Bytes of the conv state, or of the KV cache."""
        return sum(tensor.nbytes for tensor in self.tensors if (tensor.kind == "conv") == conv)

    def to_dict(self) -> dict[str, Any]:
        """The layout as the manifest holds it."""
        return {"context": self.context, "tensors": [asdict(tensor) for tensor in self.tensors]}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> StateSpec:
        """Read the layout from a manifest. Raises BundleError where it is malformed."""
        try:
            tensors = tuple(StateTensor(**{**entry, "shape": tuple(entry["shape"])}) for entry in raw["tensors"])
            return cls(tensors, int(raw["context"]))
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(f"manifest.json: the state layout is malformed ({error})") from None
