"""What a decoder is made of: the kinds of layers, their weights, and what each weight is for."""

from __future__ import annotations

from dataclasses import dataclass

CONV = "conv"
ATTENTION = "full_attention"
SLIDING = "sliding_attention"

# What a weight is for: a recipe gives each role its bits.
LINEAR, TABLE, HEAD, GATE, PLAIN = "linear", "table", "head", "gate", "plain"


@dataclass(frozen=True)
class WeightEntry:
    """A tensor of a checkpoint. role: what it is for, which decides how it is quantized"""

    shape: tuple[int, ...]
    role: str


@dataclass(frozen=True)
class Rotation:
    """Rotary position embedding of one kind of attention layer.

    theta: base of the frequencies
    share: of the frequencies that rotate, the fastest ones; the others stand still. The pairs are those of the whole
        head, as with a share of 1 (transformers calls it `proportional`).
    """

    theta: float
    share: float = 1.0


@dataclass(frozen=True)
class AttentionNames:
    """What a family calls the tensors of an attention layer, where they differ."""

    out: str
    query_norm: str
    key_norm: str
    gate: str = "gate_proj"
