"""How the network's boxes find their weights: by the checkpoint's own names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lfm_edge.model.lowering import Lowering, Weight

Weights = Mapping[str, Weight]


@dataclass(frozen=True)
class LayerWeights:
    """The weights under one prefix, for example `model.layers.3`, and the lowering that takes them."""

    weights: Weights
    prefix: str
    lowering: Lowering

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
        return self.lowering.linear(self.weights[f"{self.prefix}.{name}.weight"], self.optional(f"{name}.bias"))

    def linears(self, *names: str) -> nn.Module:
        """The linear layers `names`, which are given the same input."""
        return self.lowering.linears([self.weights[f"{self.prefix}.{name}.weight"] for name in names],
                                     [self.optional(f"{name}.bias") for name in names])

    def split_linear(self, name: str, parts: int) -> nn.Module:
        """The linear layer `name`, whose output is `parts` tensors side by side."""
        return self.lowering.split_linear(
            self.weights[f"{self.prefix}.{name}.weight"], self.optional(f"{name}.bias"), parts)

    def norm(self, name: str, eps: float) -> nn.Module:
        """The RMSNorm `name`."""
        return self.lowering.norm(self.tensor(f"{name}.weight"), eps)
