"""Texts on their way through the network, one decoder layer at a time: no more of the model need be in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.model.decoder import DecoderLayer
from lfm_edge.model.lowering import Lowering, Weight
from lfm_edge.model.weights import LayerWeights, Weights
from lfm_edge.quantization.recipe import EMBEDDING
from lfm_edge.quantization.tensor import QuantizedTensor
from lfm_edge.session.state import StateSpec

Step = Callable[[Tensor], tuple[Tensor, list[Tensor]]]


class Walk:
    """Windows of text and what each decoder layer makes of them, every window from a fresh state.

    windows: int64 [B, T]
    dtype: that the layers compute in
    """

    def __init__(self, config: ModelConfig, windows: Tensor, dtype: torch.dtype = torch.float32) -> None:
        self.config = config
        self.windows = windows
        self.dtype = dtype
        count, length = windows.shape
        self._spec = StateSpec.of(config, length)
        self._place = Lowering().positions(config, self._spec)(torch.tensor([0]), length)
        self._state = [tensor.to(dtype).expand(count, *tensor.shape[1:]) for tensor in self._spec.fresh()]

    def embed(self, weights: Weights) -> Tensor:
        """[B, T, hidden], without the rest of the table in floating point."""
        table = weights[EMBEDDING]
        if isinstance(table, QuantizedTensor):
            return table[self.windows.flatten()].dequantize().view(*self.windows.shape, -1).to(self.dtype)
        return table[self.windows].to(self.dtype)

    def layer(self, index: int, weights: Mapping[str, Weight], lowering: Lowering) -> Step:
        """Layer `index`, made of `weights`: x [B, T, hidden] -> the next layer's x, and the layer's state."""
        made = LayerWeights(weights, f"model.layers.{index}", lowering)
        layer = DecoderLayer(made, self.config.layer_types[index], self.config).to(self.dtype)
        state = [self._state[i] for i in self._spec.of_layer(index)]
        return lambda x: layer(x, self._place, state)
