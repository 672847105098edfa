"""The programs of a bundle: what each takes and gives, as its manifest tells an app."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from lfm_edge.files import one_of, text, whole_number
from lfm_edge.session.layout import APPEND
from lfm_edge.session.state import StateTensor

DECODER = "decoder"  # takes tokens and the state, gives logits and the next state
KINDS = (DECODER,)
TOKENS = "T"  # in a shape: the number of tokens of a step
_LARGEST_DIMENSION = 1 << 48
_DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint16", "uint8", "bool")


@dataclass(frozen=True)
class Value:
    """An input or an output of a program.

    shape: of each dimension its size, or the name of one that differs from step to step
    optional: whether it may be left out, or is not there in a program for a single token
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    optional: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As the manifest holds it."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape),
                **({"optional": True} if self.optional else {})}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Value:
        """Read it from a manifest. Raises ValueError, LookupError or TypeError where it is none."""
        return cls(text(raw["name"]), one_of(_DTYPES, raw["dtype"]), tuple(_dimension(size) for size in raw["shape"]),
                   one_of((True, False), raw.get("optional", False)))


def _dimension(size: Any) -> int | str:
    if isinstance(size, str):
        return size
    if whole_number(size) > _LARGEST_DIMENSION:
        raise ValueError(f"a dimension of {size}")
    return size


@dataclass(frozen=True)
class Part:
    """One program of a bundle. A text bundle has one, its decoder.

    kind: what it is for, one of KINDS
    artifact: the file, or the package of files, that the runtime loads; files: all that belong to the part
    inputs, outputs: in the order in which the program has them
    precision: of the weights and of what is computed, for people
    lowering: what the exporter tells about its work (delegates, operators left out)
    activation_ranges: of activations with constant scales, lowest and highest number by the name of the value
    scored: of how many of a step's last tokens it gives the logits
    """

    name: str
    kind: str
    artifact: str
    files: tuple[str, ...] = ()
    inputs: tuple[Value, ...] = ()
    outputs: tuple[Value, ...] = ()
    precision: Mapping[str, str] = field(default_factory=dict)
    lowering: Mapping[str, Any] = field(default_factory=dict)
    activation_ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    scored: int = 1

    def to_dict(self) -> dict[str, Any]:
        """As the manifest holds it."""
        return {"name": self.name, "kind": self.kind, "artifact": self.artifact, "files": list(self.files),
                "inputs": [value.to_dict() for value in self.inputs],
                "outputs": [value.to_dict() for value in self.outputs], "precision": dict(self.precision),
                "scored": self.scored, "lowering": dict(self.lowering),
                "activation_ranges": dict(self.activation_ranges)}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Part:
        """Read it from a manifest. Raises ValueError, LookupError, TypeError or AttributeError where it is none."""
        ranges = {name: (float(low), float(high)) for name, (low, high) in raw["activation_ranges"].items()}
        return cls(text(raw["name"]), one_of(KINDS, raw["kind"]), plain_path(raw["artifact"]),
                   tuple(plain_path(name) for name in raw["files"]),
                   tuple(Value.from_dict(value) for value in raw["inputs"]),
                   tuple(Value.from_dict(value) for value in raw["outputs"]),
                   {name: text(value) for name, value in raw["precision"].items()},
                   dict(raw["lowering"].items()), ranges, whole_number(raw["scored"], at_least=1))


def plain_path(name: Any) -> str:
    """A path in a manifest, which must stay inside the bundle, and have one spelling. Raises ValueError."""
    path = PurePosixPath(str(name))
    if not isinstance(name, str) or not name or path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ValueError(f"'{name}' leads out of the bundle")
    if str(path) != name or not name.isprintable():
        raise ValueError(f"'{name}' is no plain path of a file")
    return name


def files_of(artifact: str, listed: Mapping[str, Any]) -> tuple[str, ...]:
    """The listed files that an artifact consists of, in order: itself, or all of its package.

    A graph that has a folder to itself may have data in that folder only: all of that is the artifact's.
    """
    path = PurePosixPath(artifact)
    place = path.parent if len(path.parts) > 1 else path
    return tuple(sorted(name for name in listed if PurePosixPath(name).is_relative_to(place)))


def state_values(tensors: Iterable[StateTensor], name: Callable[[str], str] = str) -> tuple[Value, ...]:
    """The state as a program takes it. name: how the program spells the name of a tensor"""
    return tuple(Value(name(tensor.name), tensor.dtype, tensor.shape) for tensor in tensors)


def static_values(tensors: Sequence[StateTensor], chunk: int, dtype: str, vocab_size: int,
                  name: Callable[[str], str] = str) -> tuple[tuple[Value, ...], tuple[Value, ...]]:
    """Inputs and outputs of a static program: of a cache that the host writes it gives only the step's rows.

    tensors: of the state, as far as it comes and goes; chunk: tokens of the longest step; dtype: of the logits
    """
    def shape(tensor: StateTensor) -> tuple[int | str, ...]:
        rows = tensor.axis if tensor.update == APPEND else None
        return tuple(TOKENS if axis == rows else size for axis, size in enumerate(tensor.shape))

    valid = (Value("valid", "int32", (1,), optional=True),) if chunk > 1 else ()
    step = (Value("tokens", "int32", (1, TOKENS)), Value("position", "int32", (1,)), *valid)
    following = (Value(name(tensor.next_name), tensor.dtype, shape(tensor)) for tensor in tensors)
    return (*step, *state_values(tensors, name)), (Value("logits", dtype, (1, 1, vocab_size)), *following)
