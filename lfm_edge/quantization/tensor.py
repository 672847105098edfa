"""A quantized weight: the same integers and scales for every target."""

from __future__ import annotations

import gc
import mmap
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantizedTensor:
    """Symmetric quantized weight: `ints * scales`, one scale for every `group_size` input columns.

    ints: int8 [rows, cols], in [-2**(bits-1), 2**(bits-1) - 1]
    scales: float32 [rows, cols // group_size], each positive and exactly representable in bfloat16
    bits: 4 or 8
    pages: those that it is on, where it is in a file

    On that grid every dequantized weight is exact in float32, and the scales pack without loss into the
    formats of all targets.
    """

    ints: Tensor
    scales: Tensor
    bits: int
    pages: tuple[Pages, ...] = field(default=(), repr=False, compare=False)

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

    def moved_to(self, file: WeightsFile) -> QuantizedTensor:
        """The same weight in a file, and in memory only while it is used."""
        (ints, first), (scales, second) = file.write(self.ints), file.write(self.scales)
        return QuantizedTensor(ints, scales, self.bits, (first, second))

    def release(self) -> None:
        """Take a weight that is in a file out of this process's memory; it is read again when it is used again."""
        for pages in self.pages:
            pages.release()

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


@dataclass(frozen=True)
class Pages:
    """Whole pages of a mapped file. start, length: bytes"""

    mapped: mmap.mmap
    start: int
    length: int

    def release(self) -> None:
        """Take them out of memory, where the system can be told to."""
        if hasattr(mmap, "MADV_DONTNEED"):  # Windows has none
            self.mapped.madvise(mmap.MADV_DONTNEED, self.start, self.length)


class WeightsFile:
    """Holds weights on the disk in place of memory: a file without a name, in a directory that is given.

    Each mapping takes a file descriptor, of which a process has 256 on macOS. So the file is mapped in long pieces, one
    after the other, and not by the weight.
    """

    def __init__(self, directory: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - closed in __exit__
        self._pieces: list[mmap.mmap] = []
        self._end = self._used = 0  # bytes: of the file, and of its last piece

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: TracebackType | None) -> None:
        """Close the file, and its mappings with it: a piece is mapped for as long as a weight in it is used."""
        self._pieces.clear()
        while error is not None:
            traceback.clear_frames(error.__traceback__)  # they hold weights
            error = error.__context__
        gc.collect()  # traces of the network hold some as well, and refer to themselves
        self._file.close()

    def write(self, tensor: Tensor) -> tuple[Tensor, Pages]:
        """A copy of a tensor in the file, seen through a mapping, and the pages that it is on."""
        if not self._pieces or self._used + tensor.nbytes > len(self._pieces[-1]):
            self._add_piece(max(_PIECE, _whole(tensor.nbytes, mmap.ALLOCATIONGRANULARITY)))
        piece, start = self._pieces[-1], self._used
        self._file.seek(self._end - len(piece) + start)
        self._file.write(tensor.contiguous().numpy().data)  # through the mapping, a full disk would be a signal
        self._file.flush()
        self._used += _whole(tensor.nbytes, mmap.PAGESIZE)
        copy = torch.frombuffer(piece, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
        return copy, Pages(piece, start, tensor.nbytes)

    def _add_piece(self, nbytes: int) -> None:
        """Map the file further than it goes so far; what is not written takes no place on the disk."""
        self._file.truncate(self._end + nbytes)
        self._pieces.append(mmap.mmap(self._file.fileno(), nbytes, offset=self._end))
        self._end, self._used = self._end + nbytes, 0


_PIECE = 1 << 27  # bytes: 8 billion weights are in some 70


def _whole(nbytes: int, unit: int) -> int:
    return -(-nbytes // unit) * unit


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
