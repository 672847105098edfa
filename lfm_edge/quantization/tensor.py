"""A quantized weight: the same integers and scales for every target."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass, field
from typing import BinaryIO

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantizedTensor:
    """Symmetric quantized weight: `ints * scales`, one scale for every `group_size` input columns.

    ints: int8 [rows, cols], in [-2**(bits-1), 2**(bits-1) - 1]
    scales: float32 [rows, cols // group_size], each positive and exactly representable in bfloat16
    bits: 4 or 8
    pages: of the file that it is in, where it is in one

    On that grid every dequantized weight is exact in float32, and the scales pack without loss into the
    formats of all targets.
    """

    ints: Tensor
    scales: Tensor
    bits: int
    pages: tuple[mmap.mmap, ...] = field(default=(), repr=False, compare=False)

    @property
    def shape(self) -> torch.Size:
        """[rows, cols]"""
        return self.ints.shape

    @property
    def group_size(self) -> int:
        """Input columns that share a scale; the whole row where quantization is per channel."""
        return self.ints.shape[1] // self.scales.shape[1]

    def __getitem__(self, rows: Tensor | slice | list[int]) -> QuantizedTensor:
        """Some of the rows."""
        return QuantizedTensor(self.ints[rows], self.scales[rows], self.bits)

    def moved_to(self, file: BinaryIO) -> QuantizedTensor:
        """The same weight at the end of a file, open for reading and writing, and in memory only while it is used."""
        (ints, first), (scales, second) = (_mapped(tensor, file) for tensor in (self.ints, self.scales))
        return QuantizedTensor(ints, scales, self.bits, (first, second))

    def release(self) -> None:
        """Take a weight that is in a file out of this process's memory; it is read again when it is used again."""
        for mapped in self.pages if hasattr(mmap, "MADV_DONTNEED") else ():  # Windows has none
            mapped.madvise(mmap.MADV_DONTNEED)

    def dequantize(self) -> Tensor:
        """float32 [rows, cols]"""
        return dequantize(self.ints, self.scales)

    def two_level_scales(self) -> tuple[Tensor, Tensor]:
        """The scales as multiples of one unit for each row: uint8 [rows, groups] and float32 [rows], exactly.

        Raises ValueError where they are not.
        """
        units = _units(self.scales)
        if units.isnan().any():
            raise ValueError("the scales of a row are not multiples of one unit")
        return (self.scales / units).to(torch.uint8), units[:, 0]


def _mapped(tensor: Tensor, file: BinaryIO) -> tuple[Tensor, mmap.mmap]:
    """A copy of a tensor at the end of a file, and the mapping that it is seen through."""
    offset = -(-file.seek(0, os.SEEK_END) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
    file.seek(offset)
    file.write(tensor.contiguous().numpy().data)
    file.flush()
    mapped = mmap.mmap(file.fileno(), tensor.nbytes, offset=offset)
    return torch.frombuffer(mapped, dtype=tensor.dtype).view(tensor.shape), mapped


LARGEST_MULTIPLE = 15  # of a unit of scales: what fits four bits, as block expansion on NPUs has it


def are_multiples(scales: Tensor) -> Tensor:
    """Whether each row's scales are multiples of one unit: float32 [rows, groups] -> bool [rows, 1]"""
    return ~_units(scales).isnan()


def _units(scales: Tensor) -> Tensor:
    """A unit for each row of which every scale is a multiple, 1 to 15, exactly; NaN where there is none.

    float32 [rows, groups] -> float32 [rows, 1]
    """
    largest = scales.amax(1, keepdim=True)
    units = torch.full_like(largest, torch.nan)
    for multiple in range(LARGEST_MULTIPLE, 0, -1):
        unit = largest / multiple
        counts = (scales / unit).round()
        fits = ((counts >= 1) & (counts * unit == scales)).all(1, keepdim=True)
        units = torch.where(fits, unit, units)
    return units


def dequantize(ints: Tensor, scales: Tensor) -> Tensor:
    """`ints * scales` with each scale spread over its group.

    ints: int8 [rows, cols]; scales: float32 [rows, groups] -> float32 [rows, cols]
    """
    rows, cols = ints.shape
    groups = scales.shape[1]
    return (ints.view(rows, groups, cols // groups).float() * scales.unsqueeze(2)).view(rows, cols)
