"""The `torch` runtime: the network in float32, of float or quantized weights. What artifacts are held against."""

from __future__ import annotations

import torch

from lfm_edge.checkpoint import Checkpoint
from lfm_edge.config import ModelConfig
from lfm_edge.model.decoder import Decoder
from lfm_edge.model.lowering import Lowering
from lfm_edge.model.weights import Weights
from lfm_edge.session import Logits, Session
from lfm_edge.state import StateSpec


class ReferenceSession(Session):
    """A session over the reference network.

    weights: float32, or quantized (then: the same integers as an artifact, float32 arithmetic)
    int8_activations: round the inputs of linear layers as the target's backend does
    chunk: most tokens a step takes; all at once by default
    """

    def __init__(self, config: ModelConfig, weights: Weights, spec: StateSpec, *,
                 int8_activations: bool = False, chunk: int | None = None) -> None:
        super().__init__(spec, config.vocab_size, chunk or spec.context)
        self.decoder = Decoder(config, weights, spec, Lowering(int8_activations))

    def _step(self, tokens: list[int]) -> Logits:
        with torch.inference_mode():
            logits, following = self.decoder(torch.tensor([tokens]), torch.tensor([self.position]), self.state)
        self.state = [tensor.clone() for tensor in following]
        return logits[0, -1].numpy()


def float_weights(checkpoint: Checkpoint) -> Weights:
    """Every weight of a checkpoint in float32."""
    return {name: checkpoint.tensor(name).float() for name in checkpoint.names}
