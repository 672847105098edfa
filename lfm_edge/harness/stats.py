"""Times, medians with their spread, and how sure a ratio of medians is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

_RESAMPLES = 10_000
_CONFIDENCE = 0.95

Result = TypeVar("Result")


def timed(work: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds that it took, and what it gave."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians with its 95 % confidence interval, which a single round does not have.

    rounds: how many pairs it rests on; with few of them the interval is hardly more than their range
    """

    ratio: float
    low: float | None
    high: float | None
    rounds: int

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float], seed: int = 0) -> Ratio:
        """median(second) / median(first), of rounds that were measured in pairs.

        The interval is a percentile bootstrap (Efron) over pairs: what slowed the machine down slowed both halves of
        a pair, so they are drawn together.
        """
        pairs = np.array([first, second], np.float64)  # [2, rounds]
        rounds = pairs.shape[1]
        ratio = float(np.median(pairs[1]) / np.median(pairs[0]))
        if rounds < 2:
            return cls(ratio, None, None, rounds)
        drawn = pairs[:, np.random.default_rng(seed).integers(rounds, size=(_RESAMPLES, rounds))]
        medians = np.median(drawn, axis=2)  # [2, resamples]
        low, high = np.quantile(medians[1] / medians[0], [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
        return cls(ratio, float(low), float(high), rounds)
