"""The double-gated short convolution of LFM2 (LFM2 Technical Report, arXiv 2511.23404)."""

from __future__ import annotations

from torch import Tensor, nn

from lfm_edge.model import ops
from lfm_edge.model.weights import LayerWeights


class ShortConv(nn.Module):
    """`out_proj(C * causal_conv(B * x))`, with B, C and x three slices of one projection.

    The state is the last `taps - 1` columns of `B * x`; a convolution of one tap has none.
    """

    def __init__(self, weights: LayerWeights) -> None:
        super().__init__()
        self.in_proj = weights.linear("conv.in_proj")
        self.out_proj = weights.linear("conv.out_proj")
        self.weight = nn.Parameter(weights.tensor("conv.conv.weight"), requires_grad=False)  # [H, 1, taps]
        bias = weights.optional("conv.conv.bias")
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """x: float32 [B, T, H]; state: one float32 [B, H, taps - 1], or none -> the same"""
        gate_in, gate_out, x = self.in_proj(x).chunk(3, dim=-1)  # each [B, T, H]
        x = gate_in * x
        if state:
            x, *state = ops.causal_conv(x, self.weight, self.bias, state[0])
        else:
            x = x * self.weight[:, 0, 0]
            x = x if self.bias is None else x + self.bias
        return self.out_proj(gate_out * x), state
