"""Which weight gets how many bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lfm_edge.checkpoint.layers import GATE, HEAD, LINEAR, PLAIN, TABLE, WeightEntry
from lfm_edge.errors import ExportError
from lfm_edge.files import read_json_object
from lfm_edge.quantization.activations import ACTIVATIONS

GROUP_SIZES = (32, 64, 128)
HEAD_BITS = (4, 8)
NEAREST, GPTQ = "nearest", "gptq"
ROUNDINGS = (NEAREST, GPTQ)

EMBEDDING = "model.embed_tokens.weight"
UNTIED_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Scheme:
    """How one weight is quantized: `bits` wide, with a scale for every `group_size` columns (None: per row).

    two_level: the scales of a row are multiples, 1 to 15, of one unit (block expansion, in Qualcomm's words)
    """

    bits: int
    group_size: int | None
    two_level: bool = False


PER_CHANNEL_8 = Scheme(8, None)


@dataclass(frozen=True)
class Recipe:
    """The bits of a whole model.

    body: scheme of the linear layers
    head: scheme of the embedding and the head, which a tied model shares
    activations: how the backend rounds the inputs of linear layers, one of `activations.ACTIVATIONS`
    mixed: schemes of linear layers that have another one than the rest, by the weight's name
    rounding: `nearest` (each weight to the nearest code) or `gptq` (by what the layer makes of a text)
    """

    body: Scheme
    head: Scheme
    activations: str
    mixed: Mapping[str, Scheme] = field(default_factory=dict)
    rounding: str = NEAREST

    def scheme(self, name: str, entry: WeightEntry) -> Scheme | None:
        """The scheme of a weight by its role, or None where it stays in float32.

        A gate has 8 bits whatever the others have: it is small, and decides for a whole head. Raises ExportError where
        the group size does not divide the weight's columns.
        """
        if entry.role == PLAIN:
            return None
        of_role = {TABLE: self.head, HEAD: self.head, GATE: PER_CHANNEL_8}
        scheme = of_role.get(entry.role) or self.mixed.get(name, self.body)
        if scheme.group_size is not None and entry.shape[1] % scheme.group_size:
            raise ExportError(f"{name}: {entry.shape[1]} columns are not a multiple of the group size "
                              f"{scheme.group_size}")
        return scheme

    def schemes(self, entries: Mapping[str, WeightEntry]) -> dict[str, Scheme | None]:
        """The scheme of every weight of a model, as `ModelConfig.weights` lists them.

        Raises ExportError where a group size does not divide, or a weight of `mixed` is no linear layer of the model.
        """
        for name in self.mixed:
            if name not in entries or entries[name].role != LINEAR:
                raise ExportError(f"the recipe names {name}, which is not a linear layer of this model")
        return {name: self.scheme(name, entry) for name, entry in entries.items()}

    @property
    def linear_bits(self) -> str:
        """What the linear layers have, for people: `4`, or `4 and 8`."""
        return " and ".join(map(str, sorted({self.body.bits, *(scheme.bits for scheme in self.mixed.values())})))

    def to_dict(self) -> dict[str, Any]:
        """The recipe as the manifest holds it."""
        def entry(scheme: Scheme) -> dict[str, Any]:
            return {"bits": scheme.bits, "group_size": scheme.group_size or "channel", "two_level": scheme.two_level}

        return {"body": entry(self.body), "head": entry(self.head),
                "activations": self.activations, "rounding": self.rounding,
                "mixed": {name: entry(scheme) for name, scheme in self.mixed.items()}}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Recipe:
        """Read the recipe from a manifest. Raises ValueError, KeyError or TypeError where it is none of ours."""
        if raw["activations"] not in ACTIVATIONS:
            raise ValueError(f"activations is {raw['activations']!r}; known are {', '.join(ACTIVATIONS)}")
        rounding = raw.get("rounding", NEAREST)
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding is {rounding!r}; known are {', '.join(ROUNDINGS)}")
        mixed = {name: _scheme(entry) for name, entry in raw.get("mixed", {}).items()}
        return cls(_scheme(raw["body"]), _scheme(raw["head"]), raw["activations"], mixed, rounding)


def _scheme(raw: dict[str, Any]) -> Scheme:
    """A scheme of a manifest, which must be one that `recipe` gives."""
    bits, two_level = raw["bits"], raw.get("two_level", False)
    group_size = None if raw["group_size"] == "channel" else raw["group_size"]
    if type(bits) is not int or bits not in HEAD_BITS:
        raise ValueError(f"{bits!r} bits; known are 4 and 8")
    if group_size is not None and (type(group_size) is not int or group_size not in GROUP_SIZES):
        raise ValueError(f"group_size is {group_size!r}; known are channel, {', '.join(map(str, GROUP_SIZES))}")
    if (bits == 8) != (group_size is None) or not isinstance(two_level, bool) or (bits == 8 and two_level):
        raise ValueError(f"{bits} bits with group_size {raw['group_size']!r} and two_level {two_level!r}")
    return Scheme(bits, group_size, two_level)


def recipe(bits: int, group_size: int, head_bits: int, activations: str, two_level: bool = False,
           rounding: str = NEAREST, mixed: Mapping[str, int] | None = None) -> Recipe:
    """The `q4` or `q8` recipe: `bits` in the linear layers, `head_bits` in embedding and head.

    two_level: of the 4-bit scheme; mixed: bits of the linear layers that have others, by the weight's name
    """
    schemes = {4: Scheme(4, group_size, two_level), 8: PER_CHANNEL_8}
    return Recipe(schemes[bits], schemes[head_bits], activations,
                  {name: schemes[its] for name, its in (mixed or {}).items() if its != bits}, rounding)


@dataclass(frozen=True)
class MixedBits:
    """The bits of each weight of one model, as `sensitivity` chooses them and `export --recipe` takes them.

    group_size: columns that share a 4-bit scale; head_bits: of embedding and head
    linear_bits: 4 or 8 of each linear layer, by the weight's name; those not named have the target's
    """

    group_size: int
    head_bits: int
    linear_bits: Mapping[str, int]

    def bits_of(self, name: str) -> int:
        """4 or 8. Raises KeyError for a linear layer that is not named."""
        return self.head_bits if name in (EMBEDDING, UNTIED_HEAD) else self.linear_bits[name]

    def to_dict(self) -> dict[str, Any]:
        """The file, as JSON."""
        return {"group_size": self.group_size, "head_bits": self.head_bits, "linear_bits": dict(self.linear_bits)}

    @classmethod
    def read(cls, path: Path) -> MixedBits:
        """Read a file of that kind. Raises ExportError where it is none."""
        raw = read_json_object(path, ExportError)
        group_size, head_bits, linear_bits = (raw.get(key) for key in ("group_size", "head_bits", "linear_bits"))
        if type(group_size) is not int or group_size not in GROUP_SIZES:
            raise ExportError(f"{path}: group_size is {group_size!r}; it must be 32, 64 or 128")
        if type(head_bits) is not int or head_bits not in HEAD_BITS:
            raise ExportError(f"{path}: head_bits is {head_bits!r}; it must be 4 or 8")
        if not isinstance(linear_bits, dict):
            raise ExportError(f"{path}: linear_bits is missing")
        for name, bits in linear_bits.items():
            if type(bits) is not int or bits not in (4, 8):
                raise ExportError(f"{path}: {name} has {bits!r} bits; it must be 4 or 8")
        return cls(group_size, head_bits, linear_bits)
