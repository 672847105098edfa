"""What a backend supplies to the network: how each fused piece is computed.

The network (`decoder`, `attention`, `short_conv`) is written once and asks a `Lowering` for its pieces.
The one below is the reference: plain torch in float32, functional over the state. An exporter derives
from it and overrides the pieces that its backend has an operator for; `torch.export` then traces the
same network into that backend's terms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.checkpoint.layers import CONV, Rotation
from lfm_edge.quantization.activations import fake_quantize, rounding
from lfm_edge.quantization.tensor import QuantizedTensor
from lfm_edge.session.state import StateSpec

Weight = Tensor | QuantizedTensor


class Lowering:
    """The reference pieces.

    activations: how linear layers with quantized weights round their input first, as the target's backend
        does (see `quantization.activations`)
    """

    def __init__(self, activations: str = "float") -> None:
        self.activations = activations

    def positions(self, config: ModelConfig, state: StateSpec) -> nn.Module:
        """position int64 [1] and a number of tokens -> where they stand, as `rotary` and `attention` want it"""
        return Positions(config, state.context)

    def linear(self, weight: Weight, bias: Tensor | None) -> nn.Module:
        """[..., cols] -> [..., rows]"""
        round_input = rounding(self.activations, weight) if isinstance(weight, QuantizedTensor) else None
        return Linear(_dense(weight), bias, round_input)

    def split_linear(self, weight: Weight, bias: Tensor | None, parts: int) -> nn.Module:
        """[..., cols] -> `parts` tensors [..., rows / parts]"""
        return SplitLinear(self.linear(weight, bias), parts)

    def linears(self, weights: list[Weight], biases: list[Tensor | None]) -> nn.Module:
        """Several linear layers of one input: [..., cols] -> a tensor for each, [..., rows]"""
        return Linears([self.linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)])

    def embedding(self, weight: Weight) -> nn.Module:
        """tokens int64 [B, T] -> [B, T, hidden]"""
        return Embedding(_dense(weight))

    def norm(self, weight: Tensor, eps: float) -> nn.Module:
        """RMSNorm over the last dimension"""
        return RMSNorm(weight, eps)

    def rotary(self, head_dim: int, kind: str) -> nn.Module:
        """x [B, T, heads, D] and where it stands -> x rotated, as layers of that kind do it"""
        return Rotary(kind)

    def causal_conv(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """x [B, T, H], state [B, H, taps - 1], where the tokens stand -> y [B, T, H], next state"""
        return CausalConv(weight, bias)

    def attention(self, scale: float, kv_scales: tuple[Tensor, Tensor] | None, window: int) -> nn.Module:
        """query, key, value [B, T, heads, D], caches, where they stand -> [B, T, heads, D], next caches

        kv_scales: of an 8-bit cache with constant scales, float32 [kv_heads, D] of keys and of values
        window: how many positions each token sees, itself among them; 0 for all before it
        """
        return CachedAttention(scale, kv_scales, window)

    def last_tokens(self) -> nn.Module:
        """x [B, T, H], where the tokens stand, a count -> the last so many of them"""
        return LastTokens()


def _dense(weight: Weight) -> Tensor:
    return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight


def frozen(tensor: Tensor | None) -> nn.Parameter | None:
    """A parameter without gradient, or None."""
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)


class Place(NamedTuple):
    """Where the tokens of a step stand.

    start: number of tokens before them
    rotations: cos and sin, float32 [T, 1, D] each, of each token, by the kind of layer
    """

    start: int
    rotations: dict[str, tuple[Tensor, Tensor]]


class Positions(nn.Module):
    """Rotary tables of the whole context (half-rotation layout), and the rows of one step."""

    def __init__(self, config: ModelConfig, context: int) -> None:
        super().__init__()
        self.tables = nn.ModuleDict({kind: RotaryTable(config.rotation(kind), config.head_dim, context)
                                     for kind in attention_kinds(config)})
        self.context = context

    def forward(self, position: Tensor, length: int) -> Place:
        """position: int64 [1]; length: tokens of the step"""
        start = position.item()
        torch._check(start >= 0)
        torch._check(start + length <= self.context)
        return Place(start, {kind: table(start, length) for kind, table in self.tables.items()})


class RotaryTable(nn.Module):
    """cos and sin of every position."""

    def __init__(self, rotation: Rotation, head_dim: int, context: int) -> None:
        super().__init__()
        angles = rotary_angles(rotation, head_dim, context)
        angles = torch.cat([angles, angles], dim=-1)  # [context, D]
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """float32 [length, 1, D] each"""
        cos, sin = (table.narrow(0, start, length).unsqueeze(1) for table in (self.cos, self.sin))
        return cos, sin


def attention_kinds(config: ModelConfig) -> list[str]:
    """The kinds of layer with attention that a model has, each once."""
    return list(dict.fromkeys(kind for kind in config.layer_types if kind != CONV))


def rotary_angles(rotation: Rotation, head_dim: int, context: int) -> Tensor:
    """The angle of every position and frequency, float32 [context, D / 2].

    They are float32 products, as in the published implementation: a more exact table would be a different
    model at long contexts.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rotation.theta ** exponents
    frequencies[int(rotation.share * head_dim // 2):] = 0.0
    return torch.arange(context, dtype=torch.float32)[:, None] * frequencies


class Linear(nn.Module):
    """`x @ weight.T + bias` in float32, of an input rounded to 8 bits where the backend does that."""

    def __init__(self, weight: Tensor, bias: Tensor | None, round_input: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.weight = frozen(weight)
        self.bias = frozen(bias)
        self.round_input = round_input

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 [..., cols] -> float32 [..., rows]"""
        if self.round_input is not None:
            x = self.round_input(x)
        return F.linear(x, self.weight, self.bias)


class Linears(nn.ModuleList):
    """Linear layers side by side, each given the same input."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: float32 [..., cols] -> one tensor for each, float32 [..., rows]"""
        return tuple(linear(x) for linear in self)


class SplitLinear(nn.Module):
    """One linear layer whose output is several tensors side by side."""

    def __init__(self, linear: nn.Module, parts: int) -> None:
        super().__init__()
        self.linear = linear
        self.parts = parts

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: float32 [..., cols] -> `parts` tensors, float32 [..., rows / parts]"""
        return self.linear(x).chunk(self.parts, dim=-1)


class Embedding(nn.Module):
    """Rows of a float32 table."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = frozen(weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: int64 [B, T] -> float32 [B, T, hidden]"""
        return F.embedding(tokens, self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square layer normalization (Zhang & Sennrich, 2019) over the last dimension."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = frozen(weight)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 [..., size] -> the same shape"""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Rotary(nn.Module):
    """Rotary position embedding (Su et al., 2021) in the half-rotation layout."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, place: Place) -> Tensor:
        """x: float32 [B, T, heads, D] -> the same shape"""
        cos, sin = place.rotations[self.kind]
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin


class CausalConv(nn.Module):
    """Depthwise causal convolution over time that continues from a state."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = frozen(weight)  # [H, 1, taps]
        self.bias = frozen(bias)  # [H]

    def forward(self, x: Tensor, state: Tensor, place: Any) -> tuple[Tensor, Tensor]:
        """x: float32 [B, T, H]; state: float32 [B, H, taps - 1], the columns of x before these"""
        columns = torch.cat([state, x.transpose(1, 2)], dim=2)  # [B, H, taps - 1 + T]
        y = F.conv1d(columns, self.weight, self.bias, groups=self.weight.shape[0])  # [B, H, T]
        return y.transpose(1, 2), columns[:, :, x.shape[1]:]


class LastTokens(nn.Module):
    """The last tokens of a step, all where there are fewer."""

    def forward(self, x: Tensor, place: Any, count: int) -> Tensor:
        """x: float32 [B, T, H] -> float32 [B, min(count, T), H]"""
        return x[:, -count:]


class CachedAttention(nn.Module):
    """Write new keys and values at `position`, then attend causally over everything up to them.

    The caches are float32 (`key, value`), or 8-bit rows, asymmetric for each position and head
    (`key, scale, zero point, value, scale, zero point`). With 8-bit rows the queries are rounded to
    8 bits as well, as kernels that multiply integers do.

    kv_scales: round what goes into float32 caches to 8 bits by these constant scales
    window: how many positions each token sees, itself among them; 0 for all before it
    """

    def __init__(self, scale: float, kv_scales: tuple[Tensor, Tensor] | None = None, window: int = 0) -> None:
        super().__init__()
        self.scale = scale
        self.kv_scales = kv_scales
        self.window = window

    def forward(self, query: Tensor, key: Tensor, value: Tensor, state: list[Tensor],
                place: Place) -> tuple[Tensor, list[Tensor]]:
        """query: float32 [B, T, heads, D]; key, value: float32 [B, T, kv_heads, D], rotated already"""
        position = place.start
        end = position + query.shape[1]
        if self.kv_scales is not None:
            key, value = (fake_quantize(rows, by) for rows, by in zip((key, value), self.kv_scales, strict=True))
        if len(state) == 2:
            state = [_written(cache, rows, position) for cache, rows in zip(state, (key, value), strict=True)]
            filled = [cache[:, :end] for cache in state]
        else:
            rows = (*quantize_rows(key), *quantize_rows(value))
            state = [_written(cache, new, position) for cache, new in zip(state, rows, strict=True)]
            filled = [dequantize_rows(*(part[:, :end] for part in state[first:first + 3])) for first in (0, 3)]
            query = dequantize_rows(*quantize_rows(query))
        return _attend(query, *filled, position, self.scale, self.window), state


def _attend(query: Tensor, key: Tensor, value: Tensor, position: int, scale: float, window: int) -> Tensor:
    """Causal grouped-query attention of the rows from `position` on, through a window where that is not 0.

    query: float32 [B, T, heads, D]; key, value: float32 [B, position + T, kv_heads, D]
    """
    visible = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril(diagonal=position)
    if window:
        visible = visible.triu(diagonal=position - window + 1)
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
                                         attn_mask=visible, scale=scale, enable_gqa=True)  # [B, heads, T, D]
    return out.transpose(1, 2)


def _written(cache: Tensor, rows: Tensor, position: int) -> Tensor:
    """A copy of `cache` with `rows` at `position` along dimension 1."""
    cache = cache.clone()
    cache[:, position:position + rows.shape[1]] = rows
    return cache


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize each row to 8 bits, asymmetric, as torch's `quantized_decomposed` per-token ops define it.

    x: float32 [..., D] -> int8 [..., D], float32 scales [..., 1], int8 zero points [..., 1]
    """
    from torch.ao.quantization.fx import _decomposed  # noqa: F401 - registers the ops

    per_token = torch.ops.quantized_decomposed
    scales, zeros = per_token.choose_qparams_per_token_asymmetric.default(x, torch.int8)
    ints = per_token.quantize_per_token.default(x, scales, zeros, -128, 127, torch.int8)
    return ints, scales.float(), zeros.to(torch.int8)


def dequantize_rows(ints: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The inverse of `quantize_rows`, float32 [..., D]."""
    return (ints.float() - zeros.float()) * scales
