"""How a target wants its state to lie. Without torch, so that `lfm-edge targets` needs none."""

from __future__ import annotations

from dataclasses import dataclass

REPLACE = "replace"
APPEND, RING, SLIDE, SHIFT = "append", "ring", "slide", "shift"  # of caches: where a position's row stands
EXPLICIT, INTERNAL = "explicit", "internal"  # who keeps the state: the caller, or the program
UPDATES = (REPLACE, APPEND, RING, SLIDE, SHIFT)


@dataclass(frozen=True)
class StateLayout:
    """How a backend wants its state to lie.

    kv_heads_first: caches are [1, kv_heads, context, head_dim] instead of [1, context, kv_heads, head_dim]; at
        int8 their scales are constants of the program, one for each channel
    keys_transposed: caches of keys are [1, kv_heads, head_dim, context], where the heads come first
    conv_channels_last: conv states are [1, taps - 1, hidden] instead of [1, hidden, taps - 1]
    window: how the caches of sliding-window layers are kept, as `StateTensor.update` says it
    """

    kv_heads_first: bool = False
    keys_transposed: bool = False
    conv_channels_last: bool = False
    window: str = APPEND
