"""The explicit state of a session: which tensors there are, their shapes, and how a step changes them.

A step takes every tensor of the `StateSpec` as an input and gives each one's next value. The host owns
the memory, so a session can be snapshotted, restored and saved without asking the backend.
"""

from __future__ import annotations

import math
import mmap
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.checkpoint.layers import CONV
from lfm_edge.errors import BundleError, LfmEdgeError
from lfm_edge.files import one_of, text, whole_number
from lfm_edge.session.history import Taken
from lfm_edge.session.layout import APPEND, REPLACE, RING, SHIFT, SLIDE, UPDATES, StateLayout

KINDS = ("conv", "key", "value", "key_scale", "value_scale", "key_zero_point", "value_zero_point")
DTYPES = ("float32", "float16", "bfloat16", "int8")
MOST_BYTES = 1 << 40  # of a state that is read from a file
_REPEATED = 64  # rows that are repeated at once


@dataclass(frozen=True)
class StateTensor:
    """One tensor of the state.

    kind: conv | key | value | key_scale | value_scale | key_zero_point | value_zero_point
    update: what a step does to it. `replace`: gives a whole new value. The others are caches, with a row for each
        position along dimension `axis`:
        `append`: the row of position p stands at p
        `ring`: at p modulo the number of rows; what it replaces is older than any window that a step looks through
        `slide`: the rows that are left stand together at the beginning, oldest first; where they no longer fit, the
            oldest are dropped, as many at once as there are rows more than the window, and one
        `shift`: the newest row stands at the end; the step gives the whole new value
    initial: the value that every element has in a fresh session
    window: how many of the last positions are ever looked at; 0 for all
    """

    name: str
    layer: int
    kind: str
    shape: tuple[int, ...]
    dtype: str
    update: str
    initial: float = 0.0
    axis: int = 1
    window: int = 0

    @property
    def next_name(self) -> str:
        """The output that gives its next value, or the step's rows of it."""
        return self.name.replace("past_key_values", "present").replace("past_conv", "present_conv")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The element type, as torch knows it."""
        return getattr(torch, self.dtype)

    @property
    def is_cache(self) -> bool:
        """Whether it has a row for each position, rather than one value that stands for all of them."""
        return self.update != REPLACE

    @property
    def rows(self) -> int:
        """Of a cache: how many it has room for."""
        return self.shape[self.axis]

    def row_count(self, position: int) -> int:
        """Of a cache: how many rows count for a session at `position`."""
        return min(position, self.window or position)

    def slots(self, position: int) -> torch.Tensor:
        """Of a cache: where the rows that count for a session at `position` stand, the oldest first. int64 [rows]"""
        return self._slots(position - self.row_count(position), position, position)

    def slots_after(self, position: int, count: int) -> torch.Tensor:
        """Of a cache: where a step of `count` tokens at `position` writes its rows. int64 [count]"""
        return self._slots(position, position + count, position + count)

    def _slots(self, first: int, end: int, position: int) -> torch.Tensor:
        """Where the rows of positions `first` to `end` stand once `position` tokens are taken."""
        places = torch.arange(first, end)
        if self.update == RING:
            return places % self.rows
        if self.update == SLIDE:
            return places - (position - self._resident(position))
        return places - (position - self.rows) if self.update == SHIFT else places

    def _resident(self, position: int) -> int:
        """Of `slide`: how many rows are left (ONNX Runtime's GroupQueryAttention with a windowed cache)."""
        if position <= self.rows:
            return position
        evicted = self.rows - self.window + 1
        return position - evicted * -(-(position - self.rows) // evicted)

    def kept(self, value: torch.Tensor, position: int) -> torch.Tensor:
        """A copy of what of its value counts for a session at `position`; of a cache, the rows, the oldest first."""
        return value.index_select(self.axis, self.slots(position)) if self.is_cache else value.clone()

    def put_back(self, value: torch.Tensor, kept: torch.Tensor, position: int) -> None:
        """Write what `kept` gave at `position` into a value."""
        if self.is_cache:
            value.index_copy_(self.axis, self.slots(position), kept)
        else:
            value.copy_(kept)

    def update_with(self, value: torch.Tensor, new: torch.Tensor, position: int, count: int) -> None:
        """Take over what a step of `count` tokens at `position` gave: the next value, or rows, of which `count` count.

        Rows past those are padding.
        """
        if self.update in (REPLACE, SHIFT):
            value.copy_(new)
        else:
            value.index_copy_(self.axis, self.slots_after(position, count), new.narrow(self.axis, 0, count))

    def repeat_rows(self, value: torch.Tensor, taken: int, position: int) -> None:
        """Of a cache that has the rows of `taken` positions: the last of them again and again, up to `position`.

        In pieces, so that no more memory is in use afterwards than the rows take.
        """
        have = max(taken, 1)
        source = value.index_select(self.axis, self.slots(have)[-_REPEATED:])
        count = source.shape[self.axis]
        for start in range(position - self.row_count(position) if self.window else taken, position, count):
            end = min(start + count, position)
            value.index_copy_(self.axis, self._slots(start, end, position), source.narrow(self.axis, 0, end - start))

    def survives(self, position: int, count: int) -> bool:
        """Whether all that counts at `position` stands where it stood after a step of `count` tokens."""
        if self.update == APPEND:
            return True
        if self.update == RING:
            return self.row_count(position) + count <= self.rows
        return self.update == SLIDE and self._resident(position + count) == self._resident(position) + count

    def kept_shape(self, position: int) -> tuple[int, ...]:
        """The shape of what `kept` gives."""
        if not self.is_cache:
            return self.shape
        return (*self.shape[:self.axis], self.row_count(position), *self.shape[self.axis + 1:])

    def converted(self, value: torch.Tensor, to: StateTensor, position: int) -> torch.Tensor:
        """What `kept` gave at `position`, in the layout and the floating-point type of another backend.

        Caches differ in where their positions stand, conv states in which of their two sizes is last. Raises
        BundleError where more than that is different: 8-bit caches are not made of others, nor others of them.
        """
        same = (self.kind, self.is_cache, self.window, len(self.shape)) == (
            to.kind, to.is_cache, to.window, len(to.shape))
        if same and self.is_cache:
            value = value.movedim(self.axis, to.axis)
        elif same and value.shape != to.shape:
            value = value.mT  # [1, hidden, taps - 1] <-> [1, taps - 1, hidden]
        if not same or value.shape != to.kept_shape(position):
            raise BundleError(f"{to.name} is a {self.kind} of {list(self.shape)} there and a {to.kind} of "
                              f"{list(to.shape)} here")
        if self.dtype != to.dtype and not (self.torch_dtype.is_floating_point and to.torch_dtype.is_floating_point):
            raise BundleError(f"{to.name} is {self.dtype} there and {to.dtype} here")
        return value.to(to.torch_dtype).contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes that this tensor takes."""
        return math.prod(self.shape) * self.torch_dtype.itemsize

    def fresh(self) -> torch.Tensor:
        """The tensor of a session at position 0. Raises LfmEdgeError where the system does not give the memory."""
        try:
            if self.initial == 0 and self.nbytes > 0:
                return torch.frombuffer(_zeroed_pages(self.nbytes), dtype=self.torch_dtype).view(self.shape)
            return torch.full(self.shape, self.initial, dtype=self.torch_dtype)
        except (OSError, RuntimeError, MemoryError, OverflowError):
            raise LfmEdgeError(f"{self.name}: this machine has no {self.nbytes:,} bytes of memory for it; export with "
                               "a smaller --context") from None


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
           conv_dtype: str = "float32", chunk: int = 1) -> StateSpec:
        """The state of `config` at a context of `context` tokens.

        conv: [1, hidden, taps - 1], the last columns of B*x (none where there is a single tap)
        key, value: [1, rows, kv_heads, head_dim]; at `kv_dtype` int8 with a float32 scale and an int8 zero
            point for each position and head, [1, rows, kv_heads, 1]. There are as many rows as the context has
            positions, or, in layers that look through a window, as many as the layout needs
        layout: where a backend wants other shapes; chunk: most tokens that one step takes
        """
        tensors: list[StateTensor] = []
        for layer, kind in enumerate(config.layer_types):
            if kind == CONV:
                tensors += _conv_state(config, layer, layout, conv_dtype)
            else:
                tensors += _caches(config, layer, context, kv_dtype, layout, chunk)
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

    def filled_bytes(self, position: float) -> int:
        """Bytes of what is filled of the KV caches after so many tokens."""
        return round(sum(tensor.nbytes * min(position / tensor.rows, 1.0)
                         for tensor in self.tensors if tensor.is_cache))

    def to_dict(self) -> dict[str, Any]:
        """The layout as the manifest holds it."""
        return {"context": self.context,
                "tensors": [{key: value for key, value in asdict(tensor).items() if key != "window" or value}
                            for tensor in self.tensors]}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> StateSpec:
        """Read the layout from a manifest or a saved session.

        Raises ValueError where it is malformed, has a tensor of a kind or type that is not known or the same twice, or
        would take more than MOST_BYTES.
        """
        try:
            spec = cls(tuple(_tensor(entry) for entry in raw["tensors"]), whole_number(raw["context"], at_least=1))
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f"the state layout is malformed ({error})") from None
        if len({tensor.name for tensor in spec.tensors}) < len(spec.tensors):
            raise ValueError("the state layout has two tensors of one name")
        if spec.nbytes > MOST_BYTES:
            raise ValueError(f"the state layout has {spec.nbytes:,} bytes")
        return spec


def _tensor(raw: dict[str, Any]) -> StateTensor:
    """One entry of a layout, each value of the kind that it must be. Raises ValueError, KeyError or TypeError."""
    tensor = StateTensor(text(raw["name"]), whole_number(raw["layer"]), one_of(KINDS, raw["kind"]),
                         tuple(whole_number(size) for size in raw["shape"]), one_of(DTYPES, raw["dtype"]),
                         one_of(UPDATES, raw["update"]), float(raw.get("initial", 0.0)),
                         whole_number(raw.get("axis", 1)), whole_number(raw.get("window", 0)))
    if not math.isfinite(tensor.initial):
        raise ValueError(f"{tensor.name} begins with {tensor.initial}")
    if not 2 <= len(tensor.shape) <= 4 or tensor.axis >= len(tensor.shape):
        raise ValueError(f"{tensor.name} has {len(tensor.shape)} dimensions, and positions along number {tensor.axis}")
    if tensor.update in (RING, SLIDE, SHIFT) and not tensor.window >= 1:
        raise ValueError(f"{tensor.name} is a {tensor.update} without a window")
    if tensor.update == SLIDE and tensor.rows < tensor.window:
        raise ValueError(f"{tensor.name} has {tensor.rows} rows for a window of {tensor.window}")
    return tensor


def _conv_state(config: ModelConfig, layer: int, layout: StateLayout, dtype: str) -> list[StateTensor]:
    hidden, past = config.hidden_size, config.conv_taps - 1
    shape = (1, past, hidden) if layout.conv_channels_last else (1, hidden, past)
    return [StateTensor(f"past_conv.{layer}", layer, "conv", shape, dtype, REPLACE)] if past else []


def _caches(config: ModelConfig, layer: int, context: int, dtype: str, layout: StateLayout,
            chunk: int) -> list[StateTensor]:
    window = config.window_of(layer)
    update = layout.window if window else APPEND
    heads, rows = config.num_key_value_heads, _cache_rows(update, context, window, chunk)
    tensors: list[StateTensor] = []

    def add(kind: str, width: int, dtype: str, initial: float = 0.0) -> None:
        shape, axis = ((1, heads, rows, width), 2) if layout.kv_heads_first else ((1, rows, heads, width), 1)
        if layout.keys_transposed and kind == "key":
            shape, axis = (1, heads, width, rows), 3
        tensors.append(StateTensor(f"past_key_values.{layer}.{kind}", layer, kind, shape, dtype, update, initial, axis,
                                   window))

    for part in ("key", "value"):
        add(part, config.head_dim, dtype)
        if dtype == "int8" and not layout.kv_heads_first:
            add(f"{part}_scale", 1, "float32", 1.0)
            add(f"{part}_zero_point", 1, "int8")
    return tensors


def _cache_rows(update: str, context: int, window: int, chunk: int) -> int:
    """How many rows a cache has. A ring has those of a window and of a step: a step can then always be taken back."""
    if update == APPEND:
        return context
    if update == SHIFT:
        return min(window, context)
    rows = min(window + chunk, context)
    return max(rows, window) if update == SLIDE else rows  # GroupQueryAttention wants room for a whole window


@dataclass(frozen=True)
class Snapshot:
    """The state of a session at one position: copies, independent of the session they came from.

    Of a KV cache only the filled rows are kept.

    tokens: all that the session has taken, `position` of them; an `Embedded` where an embedding was given
    """

    spec: StateSpec
    position: int
    tensors: tuple[torch.Tensor, ...]
    tokens: tuple[Taken, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes that the state takes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def converted(self, to: StateSpec) -> Snapshot:
        """The same for a session of another context, layout or floating-point type.

        Raises BundleError where the context is too small, or the state is of other tensors.
        """
        if self.position > to.context:
            raise BundleError(f"the session is {self.position} tokens long, the context here holds {to.context}")
        theirs = {tensor.name: (tensor, value) for tensor, value in zip(self.spec.tensors, self.tensors, strict=True)}
        odd = theirs.keys() ^ {tensor.name for tensor in to.tensors}
        if odd:
            raise BundleError(f"only one of the two has a state tensor {min(odd)}: the KV types differ")
        tensors = []
        for wanted in to.tensors:
            tensor, value = theirs[wanted.name]
            tensors.append(tensor.converted(value, wanted, self.position))
        return Snapshot(to, self.position, tuple(tensors), self.tokens)
