"""How the network's boxes find their weights: by the checkpoint's own names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lfm_edge.model import leaves
from lfm_edge.quantization.tensor import QuantizedTensor

Weights = Mapping[str, "Tensor | QuantizedTensor"]


@dataclass(frozen=True)
class LayerWeights:
    """The weights under one prefix, for example `model.layers.3`.

    int8_activations: whether the linear layers round their inputs to 8 bits
    """

    weights: Weights
    prefix: str
    int8_activations: bool

    def tensor(self, name: str) -> Tensor:
        """A tensor that stays in float32."""
        weight = self.weights[f"{self.prefix}.{name}"]
        assert isinstance(weight, Tensor), f"{self.prefix}.{name} cannot be quantized"
        return weight

    def optional(self, name: str) -> Tensor | None:
        """A tensor that a model may lack, for example a bias."""
        return self.tensor(name) if f"{self.prefix}.{name}" in self.weights else None

    def linear(self, name: str) -> nn.Module:
        """The linear layer `name`, with its bias where there is one."""
        return leaves.linear(self.weights[f"{self.prefix}.{name}.weight"], self.optional(f"{name}.bias"),
                             self.int8_activations)

    def norm(self, name: str, eps: float) -> leaves.RMSNorm:
        """The RMSNorm `name`."""
        return leaves.RMSNorm(self.tensor(f"{name}.weight"), eps)
