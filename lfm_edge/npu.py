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

from lfm_edge.config import ModelConfig
from lfm_edge.model.lowering import rotary_angles
from lfm_edge.session import Logits, Session
from lfm_edge.state import StateSpec

EMBEDDINGS, COS, SIN, MASK, CONV_ROWS, LAST = "inputs_embeds", "cos", "sin", "past_mask", "conv_rows", "last"
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
        self._cos, self._sin = rotations(config, spec.context)

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
        mask = np.where(np.arange(self.spec.context) < self.position, 0, -1)
        place = {COS: self._cos[rows][None, :, None], SIN: self._sin[rows][None, :, None],
                 MASK: mask.astype(np.float32)[None, None, None]}
        if length == 1:
            return place
        return place | {CONV_ROWS: np.arange(count, count + self._taps - 1, dtype=np.int32),
                        LAST: np.array([count - 1], np.int32)}


def rotations(config: ModelConfig, context: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of every position, float32 [context, head_dim]; the first half of the sines has its sign changed,

    so that a rotation is `x * cos + swap(x) * sin`, with the halves of x swapped.
    """
    angles = rotary_angles(config, context)
    sin = angles.sin()
    cos = angles.cos().repeat(1, 2)
    return cos.numpy(), torch.cat([-sin, sin], dim=1).numpy()
