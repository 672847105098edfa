"""What the page is made of: sections of tables and figures, names of bundles, and figures in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from markupsafe import Markup

from lfm_edge.harness.bench import Benchmark, BenchResult, PointResult
from lfm_edge.harness.bench_tables import threads_line
from lfm_edge.harness.round import PROMPT
from lfm_edge.harness.stats import Spread
from lfm_edge.harness.tables import megabytes
from lfm_edge.harness.verify import Verification
from lfm_edge.report.charts import Value
from lfm_edge.report.headline import same
from lfm_edge.report.results import ResultFile

DASH = "\u2013"

Cell = str | Markup
Files = Sequence[tuple[ResultFile, Any]]  # results of one kind, and the files that they are from


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first of each row names it.

    text: columns, besides the first, that hold words; folded: what it is called where it is folded away
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: Cell = ""
    text: frozenset[int] = frozenset()
    folded: str = ""


@dataclass(frozen=True)
class Figure:
    """A chart, or several side by side, under a title."""

    title: str
    charts: Sequence[Markup]
    caption: Cell = ""


@dataclass(frozen=True)
class Section:
    """A part of the page. commands: that make its figures again; projection: nothing in it was measured"""

    anchor: str
    title: str
    text: Cell
    blocks: Sequence[Table | Figure]
    commands: Sequence[str] = ()
    projection: bool = False


class Names:
    """Short names and colours: a bundle has the same in every chart of the page."""

    def __init__(self, results: Sequence[ResultFile]) -> None:
        pairs: dict[tuple[str, int | None], None] = {}
        for result in (file.result for file in results if isinstance(file.result, BenchResult)):
            pairs |= dict.fromkeys((same(entry.bundle), entry.threads) for entry in result.benchmarks)
        measured = {bundle for bundle, _ in pairs}
        pairs |= dict.fromkeys((same(file.result.bundle), None) for file in results
                               if isinstance(file.result, Verification) and same(file.result.bundle) not in measured)
        self._order = list(pairs)
        self._threads = Counter(bundle for bundle, _ in pairs)
        self._last_parts = Counter(PurePath(bundle).name for bundle in self._threads)

    def bundle(self, bundle: str) -> str:
        """The last part of a bundle's path where that tells it from the others."""
        last = PurePath(same(bundle)).name
        return last if last and self._last_parts[last] <= 1 else same(bundle)

    def series(self, entry: Benchmark) -> str:
        """A bundle, and its threads where there are several numbers of them."""
        several = self._threads[same(entry.bundle)] > 1
        return self.bundle(entry.bundle) + (f", {threads_line(entry.threads)}" if several else "")

    def index(self, bundle: str, threads: int | None = None) -> int:
        """Of the colour and the mark: those of the bundle with so many threads, or of its first entry."""
        places = {key: place for place, key in reversed(list(enumerate(self._order)))}
        first = next((place for place, (one, _) in enumerate(self._order) if one == same(bundle)), len(self._order))
        return places.get((same(bundle), threads), first)


def commands(files: Files) -> list[str]:
    """That make these results again, each once."""
    return list(dict.fromkeys(file.provenance.command for file, _ in files if file.provenance.command))


def caption(file: ResultFile) -> str:
    """Where and when the figures were made."""
    host = file.provenance.host
    return f"{host.cpu}, {host.cores} cores, {when(file)}"


def when(file: ResultFile) -> str:
    """To the minute."""
    return file.provenance.made[:16].replace("T", " ") + " UTC"


def value(spread: Spread) -> Value:
    """For a chart."""
    return Value(spread.median, spread.low, spread.high)


def ranged(spread: Spread, digits: int, unit: str) -> Markup:
    """A median, and the range of the rounds."""
    return two_lines(f"{spread.median:,.{digits}f} {unit}", f"{spread.low:,.{digits}f} to {spread.high:,.{digits}f}")


def size(count: int | None) -> str:
    """Bytes; a dash where there are none to tell."""
    return DASH if count is None else megabytes(count)


def seconds(duration: float) -> str:
    """Short ones in milliseconds."""
    return f"{duration:,.2f} s" if duration >= 1 else f"{1e3 * duration:,.0f} ms"


def at(point: PointResult) -> str:
    """Where in the context a point's decode is."""
    return f"after {point.tokens:,}" if point.kind == PROMPT else f"{point.tokens:,} filled"


def two_lines(first: Cell, second: Cell) -> Markup:
    """A figure, and something smaller below it."""
    return Markup("{} <small>{}</small>").format(first, second)


def verdict(passed: bool) -> Markup:
    """Of a check."""
    return ok("ok") if passed else failed("FAILED")


def ok(text: str) -> Markup:
    """Something that is as it must be."""
    return Markup('<span class="ok">\u2713 {}</span>').format(text)


def failed(text: str) -> Markup:
    """Something that is not."""
    return Markup('<span class="bad">\u2715 {}</span>').format(text)


def none(text: str) -> Markup:
    """Something that there is no figure of."""
    return Markup('<span class="none">{}</span>').format(text)
