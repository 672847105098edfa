"""The leaves that hold weights: linear layers and the embedding, in float or quantized."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lfm_edge.model import ops
from lfm_edge.quantization.activations import fake_quantize_rows
from lfm_edge.quantization.tensor import QuantizedTensor


class Linear(nn.Module):
    """`x @ weight.T + bias` in float32.

    int8_activations: round each row of the input to 8 bits first (what the quantized reference does
        for a target whose backend does)
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, int8_activations: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.int8_activations = int8_activations

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 [..., cols] -> float32 [..., rows]"""
        if self.int8_activations:
            x = fake_quantize_rows(x)
        return F.linear(x, self.weight, self.bias)


class QuantizedLinear(nn.Module):
    """A linear layer that keeps its integers, so that a trace carries them to the backend."""

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None, int8_activations: bool) -> None:
        super().__init__()
        self.register_buffer("ints", weight.ints)
        self.register_buffer("scales", weight.scales)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.bits = weight.bits
        self.int8_activations = int8_activations

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 [..., cols] -> float32 [..., rows]"""
        return ops.quantized_linear(x, self.ints, self.scales, self.bias, self.bits, self.int8_activations)


class Embedding(nn.Module):
    """Rows of a float32 table."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: int64 [B, T] -> float32 [B, T, hidden]"""
        return F.embedding(tokens, self.weight)


class QuantizedEmbedding(nn.Module):
    """Rows of a quantized table."""

    def __init__(self, weight: QuantizedTensor) -> None:
        super().__init__()
        self.register_buffer("ints", weight.ints)
        self.register_buffer("scales", weight.scales)
        self.bits = weight.bits

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: int64 [B, T] -> float32 [B, T, hidden]"""
        return ops.quantized_embedding(tokens, self.ints, self.scales, self.bits)


class RMSNorm(nn.Module):
    """Root-mean-square layer normalization (Zhang & Sennrich, 2019) over the last dimension."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 [..., size] -> the same shape"""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def linear(weight: Tensor | QuantizedTensor, bias: Tensor | None, int8_activations: bool) -> nn.Module:
    """The linear leaf for `weight`, whichever form it has."""
    if isinstance(weight, QuantizedTensor):
        return QuantizedLinear(weight, bias, int8_activations)
    return Linear(weight, bias, int8_activations)


def embedding(weight: Tensor | QuantizedTensor) -> nn.Module:
    """The embedding leaf for `weight`, whichever form it has."""
    return QuantizedEmbedding(weight) if isinstance(weight, QuantizedTensor) else Embedding(weight)
