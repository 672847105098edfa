"""Data-free symmetric rounding with a scale search.

Plain round-to-nearest takes `max|w| / 7` as a group's scale. A slightly different scale, which may clip
the largest weight or lean on the extra negative code, has a smaller squared error (the idea behind
llama.cpp's and HQQ's searches). We try a short grid, refine the best by least squares, and keep whatever
has the smallest error on the grid of scales: the numbers that bfloat16 and float16 both hold, from 2^-24 up.

A weight that *is* `ints * scale` on that grid comes out as it went in: its scale is always among the
candidates. Fine-tunes trained for quantization depend on it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from lfm_edge.errors import ExportError
from lfm_edge.quantization.recipe import Scheme
from lfm_edge.quantization.tensor import LARGEST_MULTIPLE, QuantizedTensor, are_multiples

# Fractions of max|w| / (2**(bits-1) - 0.5) to try, plain round-to-nearest among them. Below 1 clips the largest
# weight.
_GRID_4 = (1.0, 0.94, 0.88, 0.82, 0.76, 7.5 / 7)
_GRID_8 = (1.0, 0.97, 0.94, 0.9, 0.85, 127.5 / 127)
_REFINEMENTS = 2
# Fractions to try of the unit that puts a row's largest scale at the largest multiple.
_GRID_UNITS = (1.0, 0.92, 0.84, 0.76, 0.68)
_ELEMENTS_AT_ONCE = 1 << 18  # few enough for the cache, many enough that calls cost nothing
_SAMPLE_ROWS = 16
_SMALLEST_NORMAL = 2.0 ** -14  # of float16
SMALLEST_SCALE = 2.0 ** -24  # of float16 at all. Up to 2^-16 every multiple of it fits bfloat16 too
_COARSE = 8 * SMALLEST_SCALE  # below, a scale has less than four bits
_MOST_LOST = 0.25  # of a weight's norm, to scales that are too coarse: 4 bits alone cost about 0.1


def quantize_weight(name: str, weight: Tensor, scheme: Scheme) -> QuantizedTensor:
    """Quantize a matrix of a checkpoint. Raises ExportError where its numbers are too small for any scale.

    A few rows of such numbers among larger ones are no reason: next to those they are nothing.
    """
    quantized = quantize(weight, scheme)
    lost = _lost_to_coarse_scales(weight, quantized)
    if lost > _MOST_LOST:
        largest = float(weight.abs().max())
        raise ExportError(f"{name}: its largest number is {largest:.1g}, and {lost:.0%} of it is lost, as no scale is "
                          f"below {SMALLEST_SCALE:.1g}; is the checkpoint whole, or is a factor of this weight stored "
                          "apart?")
    return quantized


def quantize(weight: Tensor, scheme: Scheme) -> QuantizedTensor:
    """Quantize one matrix.

    weight: float32, bfloat16 or float16 [rows, cols]; a group size of the scheme must divide cols
    """
    rows, cols = weight.shape
    group = scheme.group_size or cols
    if cols % group:
        raise ExportError(f"{cols} columns are not a multiple of the group size {group}")
    exact = _is_quantized(weight, group, scheme.bits)
    ints = torch.empty(rows, cols, dtype=torch.int8)
    scales = torch.empty(rows, cols // group)
    step = max(1, _ELEMENTS_AT_ONCE // cols)

    def quantize_rows(start: int) -> None:
        chunk = weight[start:start + step]
        groups = chunk.reshape(-1, group)
        best = _quantize_groups(groups, scheme.bits, exact)
        if scheme.two_level:
            best = _in_multiples(groups.float(), *best, scheme.bits, rows=chunk.shape[0])
        ints[start:start + step] = best[0].view(chunk.shape)
        scales[start:start + step] = best[1].view(chunk.shape[0], -1)

    _side_by_side(quantize_rows, range(0, rows, step))
    return QuantizedTensor(ints, scales, scheme.bits)


def round_to_nearest(weight: Tensor, scheme: Scheme) -> QuantizedTensor:
    """Plain rounding with `max|w|` at the largest code: the baseline that the search is measured against."""
    rows, cols = weight.shape
    groups = weight.float().reshape(-1, scheme.group_size or cols)
    scales = _on_grid(groups.abs().amax(1, keepdim=True) / (2 ** (scheme.bits - 1) - 1), SMALLEST_SCALE)
    ints = _round(groups, scales, scheme.bits)
    return QuantizedTensor(ints.to(torch.int8).view(rows, cols), scales.view(rows, -1), scheme.bits)


def relative_error(weight: Tensor, quantized: QuantizedTensor) -> float:
    """||w - dequantize(q)|| / ||w||, the root-mean-square error relative to the weights."""
    weight = weight.float()
    return float((weight - quantized.dequantize()).norm() / weight.norm().clamp(min=1e-30))


def _side_by_side(work: Callable[[int], None], items: Sequence[int]) -> None:
    """Do work on each item, as many at once as torch has threads.

    Each with one thread: shared, an operation over so few numbers waits for its threads to wake up for longer than it
    computes (docs/internals/measurements.md).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(threads, len(items))) as pool:
            deque(pool.map(work, items), maxlen=0)  # and raise what it raised
    finally:
        torch.set_num_threads(threads)


def _lost_to_coarse_scales(weight: Tensor, quantized: QuantizedTensor) -> float:
    """The error of the groups with the smallest scales, relative to the whole weight."""
    coarse = quantized.scales.reshape(-1) <= _COARSE
    if not coarse.any():
        return 0.0
    groups = weight.reshape(-1, quantized.group_size)[coarse].double()
    codes = quantized.ints.view(-1, quantized.group_size)[coarse]
    error = (codes * quantized.scales.reshape(-1, 1)[coarse].double() - groups).norm()
    return float(error / torch.linalg.vector_norm(weight, dtype=torch.float64))


def _on_grid(scales: Tensor, smallest: float) -> Tensor:
    """The nearest values that bfloat16 and float16 both hold, from `smallest` up, in float32."""
    multiples = (scales / SMALLEST_SCALE).round() * SMALLEST_SCALE
    return torch.where(scales < 2.0 ** -16, multiples, scales.bfloat16().float()).clamp(min=smallest)


def _round(groups: Tensor, scales: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
    """The nearest codes, in float32. groups: [n, group]; scales: [n, 1]"""
    limit = 2 ** (bits - 1)
    return torch.div(groups, scales, out=out).round_().clamp_(-limit, limit - 1)


def _quantize_groups(groups: Tensor, bits: int, exact: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of groups in any floating-point type. exact: they may be quantized already

    Scales are normal numbers of float16, but for groups too small for them that lose something by it: hardly a weight
    has any, and all others are rounded as they always were.
    """
    method = _recover if exact else _search
    ints, scales = method(groups, bits, _SMALLEST_NORMAL)
    low = (groups.abs().amax(1).float() < 2 ** (bits - 1) * _SMALLEST_NORMAL).nonzero()[:, 0]
    low = low[((ints[low] * scales[low]).to(groups.dtype) != groups[low]).any(1)]
    if len(low):
        ints[low], scales[low] = method(groups[low], bits, SMALLEST_SCALE)
    return ints, scales


def _search(groups: Tensor, bits: int, smallest: float) -> tuple[Tensor, Tensor]:
    """Codes and scales of the smallest squared error. groups: [n, group]; smallest: of the scales"""
    groups = groups.float()
    largest = groups.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 0.5)
    best_scales, best_errors = _on_grid(largest, smallest), torch.full_like(largest, torch.inf)
    codes, products = torch.empty_like(groups), torch.empty_like(groups)  # one buffer each, for all candidates

    def consider(scales: Tensor) -> None:
        nonlocal best_scales, best_errors
        _round(groups, scales, bits, out=codes)
        torch.mul(codes, scales, out=products).sub_(groups)
        errors = torch.linalg.vector_norm(products, dim=1, keepdim=True)
        better = errors < best_errors
        best_scales = torch.where(better, scales, best_scales)
        best_errors = torch.where(better, errors, best_errors)

    for fraction in _GRID_4 if bits == 4 else _GRID_8:
        consider(_on_grid(largest * fraction, smallest))
    for _ in range(_REFINEMENTS):
        # For fixed codes the best scale is the projection of the weights on them.
        _round(groups, best_scales, bits, out=codes)
        energy = torch.linalg.vector_norm(codes, dim=1, keepdim=True).square_()
        projection = torch.mul(groups, codes, out=products).sum(1, keepdim=True) / energy.clamp_(min=1.0)
        consider(_on_grid(torch.where(projection > 0, projection, best_scales), smallest))
    return _round(groups, best_scales, bits, out=codes).to(torch.int8), best_scales


def _in_multiples(groups: Tensor, ints: Tensor, scales: Tensor, bits: int, rows: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of the smallest squared error found where a row's scales are multiples of one unit.

    groups: float32 [n, group]; ints, scales: what is best without that condition; rows: of the weight
    """
    free = scales.view(rows, -1)
    kept = are_multiples(free)  # quantized so already
    largest = free.amax(1, keepdim=True) / LARGEST_MULTIPLE
    smallest = free.amin(1, keepdim=True).clamp(max=_SMALLEST_NORMAL)  # no unit need be below the smallest scale
    best_scales, best_errors = free.clone(), torch.full_like(largest, torch.inf)
    for fraction in _GRID_UNITS:
        unit = _short((largest * fraction).maximum(smallest))  # [rows, 1]
        chosen, errors = _nearest_multiples(groups, free, unit, bits)
        better = errors < best_errors
        best_scales = torch.where(better, chosen, best_scales)
        best_errors = torch.where(better, errors, best_errors)
    best_scales = torch.where(kept, free, best_scales).view(-1, 1)
    codes = _round(groups, best_scales, bits).to(torch.int8)
    return torch.where(kept.expand_as(free).reshape(-1, 1), ints, codes), best_scales


def _nearest_multiples(groups: Tensor, scales: Tensor, unit: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The multiple of `unit` below or above each scale, whichever errs less, and each row's squared error.

    groups: float32 [n, group]; scales: float32 [rows, n / rows]; unit: float32 [rows, 1]
    """
    below = (scales / unit).floor()
    tried = [(below + step).clamp(1, LARGEST_MULTIPLE) * unit for step in (0, 1)]
    errors = [(_round(groups, one.view(-1, 1), bits) * one.view(-1, 1) - groups).square().sum(1).view(scales.shape)
              for one in tried]
    first = errors[0] <= errors[1]
    return torch.where(first, *tried), torch.where(first, *errors).sum(1, keepdim=True)


def _short(units: Tensor) -> Tensor:
    """The nearest values of four significant bits: times a multiple they are on the grid of scales."""
    steps = torch.ldexp(torch.ones_like(units), torch.frexp(units).exponent - 4).clamp(min=SMALLEST_SCALE)
    return (units / steps).round() * steps


def _candidates(groups: Tensor, bits: int, smallest: float) -> Iterator[Tensor]:
    """Every scale that `groups`, were they quantized already, could have been quantized with.

    The largest |w| is `k * scale` for one of the codes k. Where the weights were rounded on being stored,
    max|w| / k may be a neighbour of the scale on the grid.
    """
    largest = groups.float().abs().amax(1, keepdim=True)
    for code in range(2 ** (bits - 1), 0, -1):
        scales = _on_grid(largest / code, smallest)
        yield scales
        if groups.dtype != torch.float32:
            bits_of = scales.bfloat16().view(torch.int16)
            yield _on_grid((bits_of + 1).view(torch.bfloat16).float(), smallest)
            yield _on_grid((bits_of - 1).view(torch.bfloat16).float(), smallest)


def _recover(groups: Tensor, bits: int, smallest: float) -> tuple[Tensor, Tensor]:
    """Codes and scales of groups that are quantized already: those that give back the stored values.

    A group that is not falls back on the search.
    """
    ints, scales = _search(groups, bits, smallest)
    found = torch.zeros(groups.shape[0], 1, dtype=torch.bool)
    for candidate in _candidates(groups, bits, smallest):
        codes = _round(groups.float(), candidate, bits)
        same = ((codes * candidate).to(groups.dtype) == groups).all(1, keepdim=True) & ~found
        ints = torch.where(same, codes.to(torch.int8), ints)
        scales = torch.where(same, candidate, scales)
        found |= same
        if found.all():
            break
    return ints, scales


def _is_quantized(weight: Tensor, group: int, bits: int) -> bool:
    """Whether the weight looks quantized in this scheme already, judged by some of its rows."""
    rows = torch.linspace(0, weight.shape[0] - 1, min(_SAMPLE_ROWS, weight.shape[0])).long()
    groups = weight[rows].reshape(-1, group)
    ints, scales = _quantize_groups(groups, bits, exact=True)
    return bool(((ints.float() * scales).to(weight.dtype) == groups).all())
