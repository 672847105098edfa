"""What a backend fuses, as torch custom ops with an eager meaning.

Each op enters the traced graph as one node `lfm_edge::NAME`. An exporter lowers it with its own small
table; run eagerly, the op below *is* the reference. All of them are functional: a state goes in, the
next state comes out, nothing is changed in place.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lfm_edge.quantization.activations import fake_quantize_rows
from lfm_edge.quantization.tensor import dequantize


@torch.library.custom_op("lfm_edge::quantized_linear", mutates_args=())
def quantized_linear(x: Tensor, ints: Tensor, scales: Tensor, bias: Tensor | None,
                     bits: int, int8_activations: bool) -> Tensor:
    """`x @ dequantize(ints, scales).T + bias`.

    x: float32 [..., cols]; ints: int8 [rows, cols]; scales: float32 [rows, groups]; bias: float32 [rows]
    bits: width that the integers fit in, 4 or 8
    int8_activations: round each row of x to 8 bits first, as the backend does
    Returns float32 [..., rows].
    """
    if int8_activations:
        x = fake_quantize_rows(x)
    return F.linear(x, dequantize(ints, scales), bias)


@quantized_linear.register_fake
def _(x, ints, scales, bias, bits, int8_activations):
    return x.new_empty((*x.shape[:-1], ints.shape[0]))


@torch.library.custom_op("lfm_edge::quantized_embedding", mutates_args=())
def quantized_embedding(tokens: Tensor, ints: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Rows `tokens` of the dequantized table.

    tokens: int64 [B, T]; ints: int8 [vocab, hidden]; scales: float32 [vocab, groups]
    Returns float32 [B, T, hidden].
    """
    rows = dequantize(ints[tokens.flatten()], scales[tokens.flatten()])
    return rows.view(*tokens.shape, ints.shape[1])


@quantized_embedding.register_fake
def _(tokens, ints, scales, bits):
    return scales.new_empty((*tokens.shape, ints.shape[1]))


@torch.library.custom_op("lfm_edge::causal_conv", mutates_args=())
def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution over time that continues from `state`.

    x: float32 [B, T, H]; weight: float32 [H, 1, taps]; bias: float32 [H]
    state: float32 [B, H, taps - 1], the columns of x before this step
    Returns y float32 [B, T, H] and the next state.
    """
    columns = torch.cat([state, x.transpose(1, 2)], dim=2)  # [B, H, taps - 1 + T]
    y = F.conv1d(columns, weight, bias, groups=weight.shape[0])  # [B, H, T]
    return y.transpose(1, 2).contiguous(), columns[:, :, columns.shape[2] - state.shape[2]:].clone()


@causal_conv.register_fake
def _(x, weight, bias, state):
    return torch.empty_like(x), torch.empty_like(state)


def _attend(query: Tensor, key: Tensor, value: Tensor, position: int, scale: float) -> Tensor:
    """Causal grouped-query attention of rows `position ..` over the cache rows before them.

    query: float32 [B, T, heads, D]; key, value: float32 [B, position + T, kv_heads, D]
    """
    length, filled = query.shape[1], key.shape[1]
    visible = torch.ones(length, filled, dtype=torch.bool).tril(diagonal=position)
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
        attn_mask=visible, scale=scale, enable_gqa=True)  # [B, heads, T, D]
    return out.transpose(1, 2).contiguous()


def _write(cache: Tensor, rows: Tensor, position: int) -> Tensor:
    """A copy of `cache` with `rows` at `position` along dimension 1."""
    cache = cache.clone()
    cache[:, position:position + rows.shape[1]] = rows
    return cache


@torch.library.custom_op("lfm_edge::cached_attention", mutates_args=())
def cached_attention(query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor,
                     position: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Write the new keys and values at `position`, then attend causally over everything up to them.

    query: float32 [B, T, heads, D]; key, value: float32 [B, T, kv_heads, D], rotated already
    key_cache, value_cache: float32 [B, context, kv_heads, D]
    Returns the attention output [B, T, heads, D] and both caches.
    """
    key_cache, value_cache = _write(key_cache, key, position), _write(value_cache, value, position)
    end = position + query.shape[1]
    return _attend(query, key_cache[:, :end], value_cache[:, :end], position, scale), key_cache, value_cache


@cached_attention.register_fake
def _(query, key, value, key_cache, value_cache, position, scale):
    return torch.empty_like(query), torch.empty_like(key_cache), torch.empty_like(value_cache)


@torch.library.custom_op("lfm_edge::cached_attention_int8", mutates_args=())
def cached_attention_int8(
    query: Tensor, key: Tensor, value: Tensor,
    key_cache: Tensor, key_scale: Tensor, key_zero_point: Tensor,
    value_cache: Tensor, value_scale: Tensor, value_zero_point: Tensor,
    position: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`cached_attention` over caches of 8-bit rows, asymmetric for each position and head.

    key_cache, value_cache: int8 [B, context, kv_heads, D]; *_scale: float32, *_zero_point: int8
    [B, context, kv_heads, 1]. The queries are rounded to 8 bits as well, as the kernels do.
    Returns the attention output and the six caches, in the order of the arguments.
    """
    caches = []
    for rows, cache, scales, zeros in ((key, key_cache, key_scale, key_zero_point),
                                       (value, value_cache, value_scale, value_zero_point)):
        ints, row_scales, row_zeros = quantize_rows_per_token(rows)
        caches += [_write(cache, ints, position), _write(scales, row_scales, position), _write(zeros, row_zeros, position)]
    end = position + query.shape[1]
    floats = [(ints[:, :end].float() - zeros[:, :end].float()) * scales[:, :end]
              for ints, scales, zeros in (caches[:3], caches[3:])]
    ints, scales, zeros = quantize_rows_per_token(query)
    query = (ints.float() - zeros.float()) * scales
    return _attend(query, *floats, position, scale), *caches


@cached_attention_int8.register_fake
def _(query, key, value, key_cache, key_scale, key_zero_point, value_cache, value_scale, value_zero_point,
      position, scale):
    return (torch.empty_like(query), torch.empty_like(key_cache), torch.empty_like(key_scale),
            torch.empty_like(key_zero_point), torch.empty_like(value_cache), torch.empty_like(value_scale),
            torch.empty_like(value_zero_point))


def quantize_rows_per_token(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize every row to 8 bits as torch's `quantized_decomposed` per-token ops define it.

    x: float32 [..., D]. Returns int8 [..., D], float32 scales and int8 zero points [..., 1].
    """
    scales, zeros = torch.ops.quantized_decomposed.choose_qparams_per_token_asymmetric.default(x, torch.int8)
    ints = torch.ops.quantized_decomposed.quantize_per_token.default(x, scales, zeros, -128, 127, torch.int8)
    return ints, scales.float(), zeros.to(torch.int8)
