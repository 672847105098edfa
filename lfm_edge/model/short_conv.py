"""The double-gated short convolution (LFM2 Technical Report, arXiv 2511.23404)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.model.weights import LayerWeights


class ShortConv(nn.Module):
    """`out_proj(C * causal_conv(B * x))`, with B, C and x three slices of one projection.

    The state is the last `taps - 1` columns of `B * x`; a convolution of one tap has none.
    """

    def __init__(self, weights: LayerWeights, kind: str, config: ModelConfig) -> None:
        super().__init__()
        self.in_proj = weights.split_linear("conv.in_proj", parts=3)
        self.conv = weights.lowering.causal_conv(weights.tensor("conv.conv.weight"), weights.optional("conv.conv.bias"))
        self.out_proj = weights.linear("conv.out_proj")
        self.hidden_size = config.hidden_size

    def forward(self, x: Tensor, place: Any, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """x: float32 [B, T, H]; place: where the tokens stand; state: one [B, H, taps - 1], or none -> the same"""
        gate_in, gate_out, x = self.in_proj(x)  # each [B, T, H]
        past = state[0] if state else x.new_zeros(x.shape[0], self.hidden_size, 0)
        x, past = self.conv(gate_in * x, past, place)
        return self.out_proj(gate_out * x), [past] if state else []
