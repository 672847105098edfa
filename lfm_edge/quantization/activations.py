"""Dynamic 8-bit activations, as XNNPACK computes them for its `qd8` kernels."""

from __future__ import annotations

import torch
from torch import Tensor


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
