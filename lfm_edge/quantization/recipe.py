"""Which weight gets how many bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lfm_edge.errors import ExportError
from lfm_edge.quantization.activations import ACTIVATIONS

GROUP_SIZES = (32, 64, 128)
HEAD_BITS = (4, 8)

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Scheme:
    """How one weight is quantized: `bits` wide, with a scale for every `group_size` columns (None: per row).

    two_level: the scales of a row are multiples, 1 to 15, of one unit (block expansion, in Qualcomm's words)
    """

    bits: int
    group_size: int | None
    two_level: bool = False


@dataclass(frozen=True)
class Recipe:
    """The bits of a whole model.

    body: scheme of the linear layers
    head: scheme of the embedding and the head, which a tied model shares
    activations: how the backend rounds the inputs of linear layers, one of `activations.ACTIVATIONS`
    """

    body: Scheme
    head: Scheme
    activations: str

    def scheme(self, name: str, shape: tuple[int, ...]) -> Scheme | None:
        """The scheme of a weight, or None where it stays in float32 (norms, biases, depthwise convolutions).

        Raises ExportError where the group size does not divide the weight's columns.
        """
        if len(shape) != 2:
            return None
        scheme = self.head if name in (EMBEDDING, HEAD) else self.body
        if scheme.group_size is not None and shape[1] % scheme.group_size:
            raise ExportError(f"{name}: {shape[1]} columns are not a multiple of the group size {scheme.group_size}")
        return scheme

    def to_dict(self) -> dict[str, Any]:
        """The recipe as the manifest holds it."""
        def entry(scheme: Scheme) -> dict[str, Any]:
            return {"bits": scheme.bits, "group_size": scheme.group_size or "channel", "two_level": scheme.two_level}

        return {"body": entry(self.body), "head": entry(self.head),
                "activations": self.activations}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Recipe:
        """Read the recipe from a manifest."""
        def scheme(entry: dict[str, Any]) -> Scheme:
            return Scheme(entry["bits"], None if entry["group_size"] == "channel" else entry["group_size"],
                          entry.get("two_level", False))

        if raw["activations"] not in ACTIVATIONS:
            raise ValueError(f"activations is {raw['activations']!r}; known are {', '.join(ACTIVATIONS)}")
        return cls(scheme(raw["body"]), scheme(raw["head"]), raw["activations"])


PER_CHANNEL_8 = Scheme(8, None)


def recipe(bits: int, group_size: int, head_bits: int, activations: str, two_level: bool = False) -> Recipe:
    """The `q4` or `q8` recipe: `bits` in the linear layers, `head_bits` in embedding and head.

    two_level: of the 4-bit scheme
    """
    schemes = {4: Scheme(4, group_size, two_level), 8: PER_CHANNEL_8}
    return Recipe(schemes[bits], schemes[head_bits], activations)
