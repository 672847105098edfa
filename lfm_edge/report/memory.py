"""Sections of the page on memory: by part, and over time."""

from __future__ import annotations

from lfm_edge.harness.bench import Benchmark, BenchResult
from lfm_edge.harness.bench_tables import PARTS, megabytes
from lfm_edge.harness.limit import COUNTS
from lfm_edge.report import charts
from lfm_edge.report.cells import DASH, Cell, Figure, Files, Names, Section, Table, caption, commands, size, two_lines
from lfm_edge.report.charts import Bar, Line

_MB = 1e6
_KINDS, _PEAK = ("anonymous", "file-backed"), "peak since the moment before"


def by_part(files: Files, names: Names) -> Section:
    """The prediction, the measured peak and the budget."""
    blocks: list[Table | Figure] = []
    for file, result in files:
        rows = [Bar(names.series(entry), _predicted(entry),
                    f"peak {megabytes(entry.peak_bytes)}", mark=entry.peak_bytes) for entry in result.benchmarks]
        budgets = dict.fromkeys(entry.budget_bytes for entry in result.benchmarks)
        blocks.append(Figure("Predicted by part, and the measured peak", [charts.bars(
            rows, title="Memory by part, measured peak and budget", unit=_MB, x_title="MB above an empty process",
            part_names=list(PARTS.values()), mark_name="measured peak",
            limits=[Line(budget, f"budget {megabytes(budget)}") for budget in budgets])], caption(file)))
        blocks.append(_parts(result, names))
    return Section("memory", "Memory by part",
                   "What the manifest alone predicts, with as many positions filled as were measured. The tick is the "
                   "measured peak, load included. With the rest of the cache, it is held against the budget.",
                   blocks, commands(files))


def _parts(result: BenchResult, names: Names) -> Table:
    rows = {name: [size(entry.predicted and entry.predicted.parts[part]) for entry in result.benchmarks]
            for part, name in PARTS.items()}
    rows |= {"predicted": [size(entry.predicted and entry.predicted.total) for entry in result.benchmarks],
             "measured peak": [_against_prediction(entry) for entry in result.benchmarks],
             "predicted at the full context": [_at_full_context(entry) for entry in result.benchmarks],
             "peak, and the rest of the cache": [_with_full_cache(entry) for entry in result.benchmarks],
             "artifact": [megabytes(entry.artifact_bytes) for entry in result.benchmarks],
             "state at the full context": [megabytes(entry.state_bytes) for entry in result.benchmarks],
             "empty process, not counted": [megabytes(entry.baseline_bytes) for entry in result.benchmarks]}
    limit = "" if not result.limit_kind else (
        f"Measured under a hard limit of {megabytes(result.settings.memory_limit or 0)} by {result.limit_kind}: "
        f"{COUNTS.get(result.limit_kind, '')}")
    return Table(("", *map(names.series, result.benchmarks)), [(name, *cells) for name, cells in rows.items()],
                 caption=limit, folded="Every part")


def _predicted(entry: Benchmark) -> list[int]:
    """Bytes of each part; none of a peer, of which no manifest tells."""
    return [entry.predicted.parts[part] if entry.predicted else 0 for part in PARTS]


def _against_prediction(entry: Benchmark) -> Cell:
    total, peak = entry.predicted and entry.predicted.total, megabytes(entry.peak_bytes)
    return two_lines(peak, f"{entry.peak_bytes / total - 1:+.0%} of predicted") if total else peak


def _at_full_context(entry: Benchmark) -> Cell:
    full = entry.at_full_context
    if full is None:
        return DASH
    return two_lines(megabytes(full.total), f"{full.filled:,} filled")


def _with_full_cache(entry: Benchmark) -> Cell:
    over = "over the budget" if entry.peer is None and not entry.within_budget else ""
    return two_lines(megabytes(entry.full_context_bytes), over) if over else megabytes(entry.full_context_bytes)


def over_time(files: Files, names: Names) -> Section:
    """Anonymous and file-backed memory after each step of a round."""
    blocks: list[Table | Figure] = []
    for file, result in files:
        highest = max((moment.memory.peak for entry in result.benchmarks for moment in entry.moments), default=0)
        made = [charts.bars(
            _moments(entry), heading=names.series(entry), title=f"{names.series(entry)}: memory over time",
            x_title="MB above an empty process", unit=_MB, part_names=_KINDS, mark_name=_PEAK, at_least=highest,
            width=charts.HALF) for entry in result.benchmarks]
        key = charts.legend(list(zip(_KINDS, range(2), strict=True)), parts=True, mark=_PEAK)
        blocks.append(Figure("After each step of a round, from the top down", [*made, key], caption(file)))
    return Section("time", "Memory over time",
                   "Anonymous memory is the process\u2019s own; file-backed pages the system can take back at any "
                   "time. Medians of the rounds, and the largest peak.", blocks, commands(files))


def _moments(entry: Benchmark) -> list[Bar]:
    return [Bar(f"{moment.after}, {moment.tokens:,} filled" if moment.tokens else moment.after,
                [moment.memory.anonymous, moment.memory.file_backed], mark=moment.memory.peak)
            for moment in entry.moments]
