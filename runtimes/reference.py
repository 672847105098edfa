"""The `torch` runtime: the network in float32, of float or quantized weights. What artifacts are held against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lfm_edge.checkpoint.checkpoint import Checkpoint
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.model.decoder import Decoder
from lfm_edge.model.lowering import Linear, Lowering
from lfm_edge.model.weights import Weights
from lfm_edge.session.session import Logits, Session
from lfm_edge.session.state import StateSpec

# In float32 a few roundings: what sums of some hundred terms differ by. Where a program computes in fewer bits, its
# sums are wider than that and its results are rounded: one rounding. Of 16-bit integers a value uses some tenths of the
# range; HTP v68 gives sums of their products to some 20 integers.
_ROUNDING = {"float32": 2.0 ** -21, "float16": 2.0 ** -11, "bfloat16": 2.0 ** -8,
             "int16": 2.0 ** -10, "int16 of v68": 2.0 ** -8}
_SCORED_AT_ONCE = 64  # positions whose logits over the whole vocabulary are held at once


class ReferenceSession(Session):
    """A session over the reference network.

    weights: float32, or quantized (then: the same integers as an artifact, float32 arithmetic)
    activations: how the target's backend rounds the inputs of linear layers (`quantization.activations`)
    chunk: most tokens a step takes; all at once by default
    """

    takes_embeddings = True

    def __init__(self, config: ModelConfig, weights: Weights, spec: StateSpec, *,
                 activations: str = "float", chunk: int | None = None) -> None:
        super().__init__(spec, config.vocab_size, chunk or spec.context)
        self.decoder = Decoder(config, weights, spec, Lowering(activations))
        self._jitter: list[RemovableHandle] = []

    def jitter(self, seed: int, arithmetic: str = "float32", times: float = 1.0) -> None:
        """From now on, disturb the input of every linear layer as much as a few roundings would, or times that.

        What that does to the logits is the model's own noise floor: no two correct implementations can be
        expected to agree more closely.
        """
        size = times * _ROUNDING[arithmetic]
        for handle in self._jitter:
            handle.remove()
        generator = torch.Generator().manual_seed(seed)

        def disturb(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            x, = inputs
            return (x * (1.0 + size * torch.randn(x.shape, generator=generator)),)

        self._jitter = [module.register_forward_pre_hook(disturb)
                        for module in self.decoder.modules() if isinstance(module, Linear)]

    @property
    def scored(self) -> int:
        return self.chunk

    def _step(self, tokens: list[int]) -> Logits:
        return self._scored_step(tokens, 1)[0]

    def _embedded_step(self, embeddings: NDArray[np.float32]) -> Logits:
        return self._logits(torch.from_numpy(embeddings)[None], 1)[0]

    def _scored_step(self, tokens: list[int], count: int) -> NDArray[np.float32]:
        return self._logits(self.decoder.embed_tokens(torch.tensor([tokens])), count)

    def _logits(self, x: Tensor, count: int) -> NDArray[np.float32]:
        """A step over embeddings, [1, T, hidden]: the logits after the last `count` of them, [count, vocab]."""
        with torch.no_grad():
            x, self.state = self.decoder.body(x, torch.tensor([self.position]), self.state, count)
            return self.decoder.head(x)[0].numpy()

    def score(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits of every position of `tokens`, float32 [len(tokens), vocab], from a fresh state.

        The session's own position and state stay as they are.
        """
        rows, state = [], self.spec.fresh()
        with torch.no_grad():
            for start in range(0, len(tokens), _SCORED_AT_ONCE):
                part = torch.tensor([list(tokens[start:start + _SCORED_AT_ONCE])])
                logits, state = self.decoder(part, torch.tensor([start]), state, scored=None)
                rows.append(logits[0].numpy())
        return np.concatenate(rows)


def float_weights(checkpoint: Checkpoint) -> Weights:
    """Every weight of a checkpoint in float32."""
    return {name: checkpoint.tensor(name).float() for name in checkpoint.names}
