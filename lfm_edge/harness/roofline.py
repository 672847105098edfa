"""How fast decode could be: a step reads every weight once, so memory bandwidth sets its limit.

Williams, Waterman and Patterson, "Roofline: an insightful visual performance model" (2009); at one token a step the
arithmetic is far below what a processor can do, and the slope of the roof is all that counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from lfm_edge.bundle.manifest import Manifest
from lfm_edge.harness.predict import scale_count, stored_bytes
from lfm_edge.harness.stats import timed
from lfm_edge.quantization.recipe import EMBEDDING
from lfm_edge.targets import RUNTIMES

_SMALLEST_BUFFER = 2**28
_CACHES = 8  # how many times the last cache the buffer is
_PASSES = 4
_COLUMNS = 4096


def read_bandwidth(threads: int, cache_bytes: int = 0) -> float:
    """Bytes per second that this machine reads from memory: the best of several passes, read in three ways.

    cache_bytes: of the last cache; the buffer is far larger
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        count = max(_SMALLEST_BUFFER, _CACHES * cache_bytes) // 4 // _COLUMNS * _COLUMNS
        floats = torch.ones(count)
        integers, matrix, vector = floats.view(torch.int64), floats.view(-1, _COLUMNS), torch.ones(_COLUMNS)
        ways: tuple[Callable[[], torch.Tensor], ...] = (floats.sum, integers.sum, lambda: matrix @ vector)
        return floats.nbytes / min(timed(way)[0] for way in ways for _ in range(_PASSES))
    finally:
        torch.set_num_threads(before)


def step_bytes(manifest: Manifest, filled: float) -> int:
    """Bytes that one decode step must read, with `filled` positions before it.

    Every weight, as the target's runtime has it packed, but of an embedding table that is not the head as well one row
    only; the filled part of the KV cache; the conv state.
    """
    config, footprint = manifest.config, RUNTIMES[manifest.runtime].footprint
    width = getattr(torch, manifest.options.compute_dtype).itemsize
    total = 0.0
    for name, entry in config.weights().items():
        shape, scheme = entry.shape, manifest.recipe.scheme(name, entry)
        if scheme is None:
            total += math.prod(shape) * width
        elif name != EMBEDDING or config.tie_embedding:
            total += stored_bytes(shape, scheme, footprint) + footprint.packed_bytes * scale_count(shape, scheme)
    if not config.tie_embedding:
        total += config.hidden_size * manifest.recipe.head.bits / 8
    return round(total + manifest.state.filled_bytes(filled) + manifest.state.nbytes_of(conv=True))
