"""Sessions over the NPU's programs: what the host does for each step.

A program takes embeddings instead of tokens, and is told where they stand by tables rather than by numbers:
rotations, a mask over the cache, and which columns and which token are the last valid ones. So it has no look-ups
but of columns. Its new keys and values are written into the caches here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.checkpoint.layers import ATTENTION, SLIDING
from lfm_edge.model.lowering import attention_kinds, rotary_angles
from lfm_edge.session.session import Logits, Session
from lfm_edge.session.state import StateSpec

EMBEDDINGS, COS, SIN, MASK, CONV_ROWS, LAST = "inputs_embeds", "cos", "sin", "past_mask", "conv_rows", "last"
# By the kind of layer: the rotations, and the mask over the cache.
TABLES = {ATTENTION: (COS, SIN, MASK), SLIDING: ("window_cos", "window_sin", "window_mask")}
LOGITS = "logits"
PREFILL, DECODE = "prefill", "decode"

# How rows [1, T, kv_heads, head_dim], as a program gives them, are turned to lie as in their cache.
_AS_CACHED = {"key": (0, 2, 3, 1), "value": (0, 2, 1, 3)}

Arrays = Mapping[str, np.ndarray]
Embed = Callable[[list[int]], np.ndarray]
Run = Callable[[int, Arrays], Arrays]


def hidden_name(part: int) -> str:
    """Of the activations that a part of a model hands to the next one."""
    return f"hidden.{part}"


def graph_name(phase: str, part: int, parts: int) -> str:
    """The file of one graph: `decode.onnx`, or `decode.0.onnx` where a model has several parts."""
    return f"{phase}.onnx" if parts == 1 else f"{phase}.{part}.onnx"


def graphs_of(directory: Path) -> dict[str, list[Path]]:
    """The graphs in a directory, part by part: of `prefill`, where there is one, and of `decode`."""
    phases = {phase: sorted(directory.glob(f"{phase}*.onnx"), key=lambda path: (len(path.name), path.name))
              for phase in (PREFILL, DECODE)}
    return {phase: graphs for phase, graphs in phases.items() if graphs}


class NpuSession(Session):
    """The state is ours. One token is a decode step, several are a prefill chunk, padded to its length.

    embed: tokens -> float32 [1, T, hidden]
    run: a length (1 or `chunk`) and the inputs of the program for it, by name -> its outputs, by name
    """

    def __init__(self, config: ModelConfig, spec: StateSpec, chunk: int, embed: Embed, run: Run,
                 arithmetic: str = "int16", remark: str = "") -> None:
        super().__init__(spec, config.vocab_size, chunk)
        self.arithmetic = arithmetic
        self.embed = embed
        self.run = run
        self.remark = remark
        self._taps = config.conv_taps
        self._rotations = {kind: rotations(config, kind, spec.context) for kind in attention_kinds(config)}
        self._window = next((tensor for tensor in spec.tensors if tensor.window), None)
        self._groups = config.num_attention_heads // config.num_key_value_heads
        self._kv_heads = config.num_key_value_heads

    def _step(self, tokens: list[int]) -> Logits:
        count = len(tokens)
        length = 1 if count == 1 else self.chunk
        embeddings = self.embed(tokens + [tokens[-1]] * (length - count))
        state = {tensor.name: value.numpy() for tensor, value in zip(self.spec.tensors, self.state, strict=True)}
        outputs = self.run(length, {EMBEDDINGS: embeddings, **self._place(length, count), **state})
        for tensor, value in zip(self.spec.tensors, self.state, strict=True):
            new = torch.from_numpy(outputs[tensor.next_name])
            new = new.permute(_AS_CACHED[tensor.kind]) if tensor.kind in _AS_CACHED else new
            tensor.update_with(value, new, self.position, count)
        return outputs[LOGITS][0, 0]

    def _place(self, length: int, count: int) -> dict[str, np.ndarray]:
        """Where the tokens of a step stand, `count` of `length` being valid."""
        # Padding may lie behind the context; what it is rotated by does not matter.
        rows = np.minimum(np.arange(self.position, self.position + length), self.spec.context - 1)
        place: dict[str, np.ndarray] = {}
        for kind, (cos, sin) in self._rotations.items():
            mask = self._window_mask(length) if kind == SLIDING else self._mask()
            place |= zip(TABLES[kind], (cos[rows][None, :, None], sin[rows][None, :, None], mask), strict=True)
        if length == 1:
            return place
        return place | {CONV_ROWS: np.arange(count, count + self._taps - 1, dtype=np.int32),
                        LAST: np.array([count - 1], np.int32)}

    def _mask(self) -> np.ndarray:
        """What is filled of the cache: 0, or -1 for hidden, float32 [1, 1, 1, context]."""
        return np.where(np.arange(self.spec.context) < self.position, 0, -1).astype(np.float32)[None, None, None]

    def _window_mask(self, length: int) -> np.ndarray:
        """What each token sees of the ring: 0, or -1 for hidden, float32 [1, kv_heads, G*T, rows]."""
        newest, slots = self.position - 1, np.arange(self._window.rows)
        held = newest - (newest - slots) % self._window.rows  # the position whose row stands in each slot
        distance = self.position + np.arange(length)[:, None] - held
        mask = np.where((held >= 0) & (distance < self._window.window), 0, -1).astype(np.float32)
        return np.tile(mask, (1, self._kv_heads, self._groups, 1))


def rotations(config: ModelConfig, kind: str, context: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of every position, float32 [context, head_dim]; the first half of the sines has its sign changed,

    so that a rotation is `x * cos + swap(x) * sin`, with the halves of x swapped.
    """
    angles = rotary_angles(config.rotation(kind), config.head_dim, context)
    sin = angles.sin()
    cos = angles.cos().repeat(1, 2)
    return cos.numpy(), torch.cat([-sin, sin], dim=1).numpy()
