"""Quantized weights as ONNX and ONNX Runtime lay them out."""

from __future__ import annotations

import numpy as np

from lfm_edge.quantization.activations import column_block
from lfm_edge.quantization.tensor import QuantizedTensor


def block_codes(weight: QuantizedTensor) -> np.ndarray:
    """Codes plus half their range, unsigned, the even column in the low half of a byte: uint8 [rows, bytes].

    So MatMulNBits and GatherBlockQuantized take them.
    """
    codes = weight.ints.numpy().view(np.uint8) + np.uint8(2 ** (weight.bits - 1))
    return codes if weight.bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4


def block_scales(weight: QuantizedTensor) -> np.ndarray:
    """A scale for every block of those kernels, float32 [rows, blocks]; the blocks of a channel share its scale."""
    return np.repeat(weight.scales.numpy(), weight.group_size // column_block(weight), axis=1)


def transposed_codes(weight: QuantizedTensor) -> np.ndarray:
    """The codes of a weight [rows, cols] as ONNX stores [cols, rows]: int8, or int4, two in a byte, the first low."""
    codes = weight.ints.t().contiguous().numpy()
    if weight.bits == 8:
        return codes
    flat = codes.reshape(-1).view(np.uint8) & np.uint8(15)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return flat[::2] | flat[1::2] << np.uint8(4)
