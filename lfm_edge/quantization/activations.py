"""Dynamic 8-bit activations: how each backend rounds the input of a linear layer at run time.

- `float`: not at all.
- `int8 rows`: XNNPACK's `qd8` kernels, one asymmetric range for each row.
- `int8 blocks`: MatMulNBits at accuracy level 4 (MLAS on x86-64), one symmetric scale for each row and block
  of columns, the blocks being those of the weight.
- `q8_0`: ggml's kernels on CPUs, one symmetric scale for each row and 32 columns, kept in float16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lfm_edge.quantization.tensor import QuantizedTensor

ACTIVATIONS = ("float", "int8 rows", "int8 blocks", "q8_0")
_GGML_BLOCK = 32
_CHANNEL_BLOCKS = (128, 64, 32, 16)


def rounding(activations: str, weight: QuantizedTensor) -> Callable[[Tensor], Tensor] | None:
    """How the input of a linear layer with this weight is rounded; None for not at all."""
    if activations == "int8 rows":
        return fake_quantize_rows
    if activations == "int8 blocks":
        return partial(fake_quantize_blocks, block=column_block(weight))
    if activations == "q8_0":
        return partial(fake_quantize_blocks, block=_GGML_BLOCK, scale_dtype=torch.float16)
    return None


def column_block(weight: QuantizedTensor) -> int:
    """Columns that a blockwise kernel takes together: the weight's own groups, or of a channel some that divide it.

    0 where no block does.
    """
    if weight.group_size in _CHANNEL_BLOCKS:
        return weight.group_size
    return next((block for block in _CHANNEL_BLOCKS if weight.group_size % block == 0), 0)


def fake_quantize(x: Tensor, scales: Tensor) -> Tensor:
    """Round to 8 bits and back, symmetric, by scales that are given. x and scales: float32, broadcast"""
    return (x / scales).round().clamp(-128.0, 127.0) * scales


def fake_quantize_rows(x: Tensor) -> Tensor:
    """Round each row to 8 bits and back: asymmetric, from the row's own range, zero always exact.

    x: float32 [..., cols] -> the same shape. The zero point is the one of the end of the range whose
    rounding error is smaller, nudged to an integer: XNNPACK's rule for dynamically quantized inputs.
    """
    low = x.amin(-1, keepdim=True).clamp(max=0.0)
    high = x.amax(-1, keepdim=True).clamp(min=0.0)
    span = high - low
    inverse = torch.where(span == 0, torch.ones_like(span), 255.0 / span)
    low_error, high_error = -128.0 + low * inverse, 127.0 + high * inverse
    zero = torch.where(low_error + high_error > 0, -128.0 - low * inverse, 127.0 - high * inverse)
    zero = zero.clamp(-128.0, 127.0).round()
    ints = (x * inverse).round().add(zero).clamp(-128.0, 127.0)
    return (ints - zero) * (1.0 / inverse)


def fake_quantize_blocks(x: Tensor, block: int, scale_dtype: torch.dtype = torch.float32) -> Tensor:
    """Round to 8 bits and back: symmetric, a scale for each row and `block` columns, the largest value at 127.

    x: float32 [..., cols] -> the same shape
    scale_dtype: that scales are kept in; the codes are chosen before a scale is rounded to it
    """
    blocks = x.unflatten(-1, (-1, block))
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest == 0, torch.zeros_like(largest), 127.0 / largest)
    return ((blocks * inverse).round() * (largest / 127.0).to(scale_dtype).float()).flatten(-2)
