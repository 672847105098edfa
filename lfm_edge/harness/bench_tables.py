"""What `bench` shows on a terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from lfm_edge.harness.bench import Benchmark, BenchResult, LeftOut, PeerEntry, PointResult
from lfm_edge.harness.limit import COUNTS
from lfm_edge.harness.round import PROMPT
from lfm_edge.harness.stats import Spread
from lfm_edge.harness.tables import megabytes

PARTS = {"weights": "weights", "embedding": "embedding table", "kv_cache": "KV cache", "conv_state": "conv state",
         "activations": "activations, estimated", "runtime": "the runtime's own"}


def bench_tables(result: BenchResult, *, projections: bool = False) -> list[Table]:
    """Speed, memory, comparisons, peers, projections where asked for, and what has no figures."""
    tables = [_speed(result), _memory(result)] if result.benchmarks else []
    if result.comparisons:
        tables.append(_comparisons(result))
    if len(result.bundles) < len(result.benchmarks):
        tables.append(_peers(result))
    if projections and result.benchmarks:
        tables.append(_projections(result))
    for entries, title in ((result.not_measured, "not measured"), (result.over_limit, "ended by the memory limit")):
        if entries:
            tables.append(_left_out(entries, title))
    return tables


def leading_lines(result: BenchResult) -> list[str]:
    """For each bundle and number of threads whether it is within the budget, its speed and its peak."""
    lines = []
    for bench in result.benchmarks:
        first = bench.points[0]
        verdict = "" if bench.peer else "PASSED  " if bench.within_budget else "FAILED  "
        its = f", {threads_line(bench.threads)}" if len({other.threads for other in result.benchmarks}) > 1 else ""
        budget = "" if bench.peer else f" (budget {megabytes(bench.budget_bytes)})"
        if not bench.peer and bench.peak_bytes <= bench.budget_bytes < bench.full_context_bytes:
            budget = f", {megabytes(bench.full_context_bytes)} with the context full{budget}"
        lines.append(f"{verdict}{bench.bundle}{its}: prefill {first.prefill_tps.median:,.1f} tok/s, decode "
                     f"{first.decode_tps.median:,.1f} tok/s, peak {megabytes(bench.peak_bytes)}{budget}")
    return lines


def budget_lines(result: BenchResult) -> list[str]:
    """A line for each bundle that is over its limit or the budget, with what would help, or was not held against it."""
    lines = [entry.reason for entry in result.over_limit]
    lines += [budget_line(bench) for bench in result.bundles if not bench.within_budget]
    lines += [f"{entry.bundle}: {unchecked_line(result, entry)}" for entry in result.unchecked]
    return list(dict.fromkeys(lines))


def budget_line(bench: Benchmark) -> str:
    """By how much a bundle is over the budget, what takes most of it, and what would help."""
    only_full = bench.peak_bytes <= bench.budget_bytes
    predicted = bench.at_full_context if only_full else bench.predicted
    budget = f"the budget of {megabytes(bench.budget_bytes)}"
    found = f"peak memory {megabytes(bench.peak_bytes)} is over {budget}"
    if only_full:
        found = (f"peak memory {megabytes(bench.peak_bytes)} with {bench.predicted.filled:,} positions filled grows to "
                 f"{megabytes(bench.full_context_bytes)} at the full context of {predicted.filled:,}, over {budget}")
    help_ = " or ".join(bench.remedies)
    advice = f"an export with {help_} would bring it under" if help_ else \
        "no smaller context, int8 KV cache or 4-bit head would bring it under"
    return (f"{bench.bundle}: {found}; most of it: {PARTS[predicted.largest]}, "
            f"{megabytes(predicted.parts[predicted.largest])} of {megabytes(predicted.total)} predicted; {advice}")


def unchecked_line(result: BenchResult, entry: LeftOut) -> str:
    """What was asked for and not checked, and why."""
    settings = result.settings
    asked = [f"the {name} of {megabytes(size)}" for name, size in (
        ("budget", settings.budget), ("memory limit", settings.memory_limit)) if size is not None]
    return f"not measured, so {' and '.join(asked)} {'were' if len(asked) > 1 else 'was'} not checked: {entry.reason}"


def _speed(result: BenchResult) -> Table:
    """A column for each bundle and number of threads: medians, with the range of the rounds in brackets."""
    settings = result.settings
    table = _columns(result, f"speed: {settings.generate_tokens} generated tokens, {settings.repeat} "
                             f"round{'s' * (settings.repeat > 1)}, each in a fresh process")
    first = f"first token of {settings.prompt_tokens[0]}"
    _add(table, result, f"first load, to {first}", lambda r: _spread(Spread.of([r.first_load_s]), 2, "s"))
    _add(table, result, "load", lambda r: _spread(r.load_s, 2, "s"))
    _add(table, result, f"{first}, cold", lambda r: _spread(r.first_token_s, 2, "s"))
    if any(bench.baked for bench in result.benchmarks):
        _add(table, result, f"{first} after the baked prompt", lambda r: r.baked and
             f"{_spread(r.baked.with_s, 2, 's')}\n{_spread(r.baked.without_s, 2, 's')} without it")
    keys = dict.fromkeys((point.kind, point.tokens) for bench in result.benchmarks for point in bench.points)
    for kind, tokens in keys:
        at = f"after {tokens:,}" if kind == PROMPT else f"at {tokens:,} filled"
        if kind == PROMPT:
            _add_point(table, result, (kind, tokens), f"first token of {tokens:,}, warm",
                       lambda p: _spread(p.prefill_s, 2, "s"))
        _add_point(table, result, (kind, tokens), f"prefill {'of' if kind == PROMPT else 'at'} {tokens:,}",
                   lambda p: _spread(p.prefill_tps, 1, "tok/s"))
        _add_point(table, result, (kind, tokens), f"decode {at}", lambda p: _spread(p.decode_tps, 1, "tok/s"))
        _add_point(table, result, (kind, tokens), "  of this machine's limit", _of_the_limit)
    if result.settings.sustained_s:
        _add(table, result, f"decode over {result.settings.sustained_s:g} s, first and last tenth", _sustained)
    table.caption = f"read bandwidth of this machine: {bandwidth_line(result)}; {result.host.cpu}"
    table.caption_justify = "left"
    return table


def _memory(result: BenchResult) -> Table:
    """Anonymous and file-backed memory over time, the prediction by part, and the budget."""
    table = _columns(result, "memory above an empty process: anonymous + file-backed, medians")
    keys = dict.fromkeys((moment.after, moment.tokens) for bench in result.benchmarks for moment in bench.moments)
    for after, tokens in keys:
        name = f"after {after}" + (f", {tokens:,} filled" if tokens else "")
        _add(table, result, name, lambda r, key=(after, tokens): next(
            (f"{megabytes(m.memory.anonymous)} + {megabytes(m.memory.file_backed)}" for m in r.moments
             if (m.after, m.tokens) == key), ""))
    _add(table, result, "peak", lambda r: megabytes(r.peak_bytes))
    for part, name in PARTS.items():
        _add(table, result, f"  predicted: {name}",
             lambda r, part=part: megabytes(r.predicted.parts[part]) if r.predicted else "")
    _add(table, result, "predicted", _against_prediction)
    _add(table, result, "predicted at the full context", lambda r: r.at_full_context and (
        f"{megabytes(r.at_full_context.total)} ({r.at_full_context.filled:,} filled)"))
    _add(table, result, "peak, and the rest of the cache", lambda r: megabytes(r.full_context_bytes))
    _add(table, result, "artifact", lambda r: megabytes(r.artifact_bytes))
    _add(table, result, f"budget {megabytes(result.settings.budget_bytes)}", _budget)
    if result.limit_kind:
        table.caption_justify = "left"
        table.caption = (f"under a hard limit of {megabytes(result.settings.memory_limit)} by {result.limit_kind}: "
                         f"{COUNTS[result.limit_kind]}")
    return table


def _comparisons(result: BenchResult) -> Table:
    table = Table("", "threads", "", "ratio of medians", "95 % confidence", title="compared, rounds paired",
                  title_justify="left")
    for entry in result.comparisons:
        ratio = entry.ratio
        sure = "needs more than one round" if ratio.low is None else f"{ratio.low:.2f} to {ratio.high:.2f}"
        table.add_row(f"{entry.bundle}\nover {entry.over}", str(entry.threads or "its own"),
                      f"{entry.what}, {entry.kind} {entry.tokens:,}", f"{ratio.ratio:.2f}", sure)
    return table


def _peers(result: BenchResult) -> Table:
    """What each peer was built from and with, what that took, and what is not equal."""
    entries = {bench.bundle: bench.peer for bench in result.benchmarks if bench.peer}
    table = Table("", *map(escape, entries), title="peers", title_justify="left")
    rows: dict[str, Callable[[PeerEntry], str]] = {
        "versions": lambda peer: "\n".join(f"{package} {version}" for package, version in peer.versions.items()),
        "its builder was told": lambda peer: "\n".join(_told(peer.arguments)),
        "which took": lambda peer: f"{peer.build_s:,.0f} s, {megabytes(peer.build_peak_bytes)} at most",
        "a fill is": lambda peer: peer.filling,
        "not as the bundle": lambda peer: "\n".join(_not_equal(peer)) or "nothing"}
    for name, value in rows.items():
        table.add_row(name, *(escape(value(peer)) for peer in entries.values()))
    return table


def _not_equal(peer: PeerEntry) -> list[str]:
    """What differs; of several bundles with the name of each."""
    return [f"{Path(match.bundle).name}: {line}" if len(peer.matches) > 1 else line
            for match in peer.matches for line in match.differs]


def _told(arguments: dict[str, Any]) -> list[str]:
    """A line for each of a builder's arguments."""
    return [line for name, value in arguments.items()
            for line in (_told(value) if isinstance(value, dict) else [f"{name}={value}"])]


def _projections(result: BenchResult) -> Table:
    """Projections of the first point, a row a phone."""
    table = _columns(result, "PROJECTION, not measured: decode, if the phone reached the same share of its published "
                             "memory bandwidth as this machine")
    first = [bench.points[0].projections for bench in result.benchmarks]  # none of a peer
    if not any(first):
        table.add_row("none: the model fits this machine's cache")
    for device in dict.fromkeys((p.device, p.chip, p.bandwidth) for projected in first for p in projected):
        table.add_row(f"{device[0]} ({device[1]}, {device[2] / 1e9:.1f} GB/s)", *(
            next((f"{p.decode_tps:.0f} tok/s" for p in projected if p.device == device[0]), "") for projected in first))
    return table


def _left_out(entries: tuple[LeftOut, ...], title: str) -> Table:
    table = Table("bundle", "artifact", "state", "", title=title, title_justify="left")
    for entry in entries:
        kind = "a peer" if entry.peer else entry.target
        sizes = ("" if size is None else megabytes(size) for size in (entry.artifact_bytes, entry.state_bytes))
        table.add_row(f"{entry.bundle}\n({kind})", *sizes, entry.reason)
    return table


def _columns(result: BenchResult, title: str) -> Table:
    heads = (f"{bench.bundle}\n({'a peer' if bench.peer else bench.target}, {threads_line(bench.threads)})"
             for bench in result.benchmarks)
    return Table("", *heads, title=title, title_justify="left")


def _add(table: Table, result: BenchResult, name: str, value: Callable[[Benchmark], str]) -> None:
    table.add_row(name, *map(value, result.benchmarks))


def _add_point(table: Table, result: BenchResult, key: tuple[str, int], name: str,
               value: Callable[[PointResult], str]) -> None:
    """A row of one point; empty for bundles that have it not."""
    _add(table, result, name, lambda r: next((value(p) for p in r.points if (p.kind, p.tokens) == key), ""))


def threads_line(count: int | None) -> str:
    """A number of threads."""
    return "threads its own choice" if count is None else f"{count} thread{'s' * (count > 1)}"


def bandwidth_line(result: BenchResult) -> str:
    """How fast the machine read beside the rounds, for each number of threads."""
    return ", ".join(f"{rate.median / 1e9:.1f} GB/s ({rate.low / 1e9:.1f} to {rate.high / 1e9:.1f}) with "
                     f"{threads_line(threads)}" for threads, rate in result.read_bandwidth.items())


def efficiency_line(point: PointResult) -> str:
    """What share of its limit decode reached, and how the limit comes about; of a point that has one."""
    share = point.efficiency
    return (f"{share.median:.0%} ({share.low:.0%} to {share.high:.0%}) of {point.limit_tps:,.0f} tok/s, "
            f"{megabytes(point.step_bytes)} a token")


def _of_the_limit(point: PointResult) -> str:
    if point.limit_tps is None:
        return ""
    if point.fits_cache:
        return "-: the model fits its cache"
    return efficiency_line(point)


def _sustained(bench: Benchmark) -> str:
    first, last = bench.sustained_tps[0], bench.sustained_tps[-1]
    return f"{first:,.1f} then {last:,.1f} tok/s ({last / first - 1:+.0%})"


def _against_prediction(bench: Benchmark) -> str:
    if bench.predicted is None:
        return ""
    predicted = bench.predicted.total
    return (f"predicted {megabytes(predicted)}, measured {megabytes(bench.peak_bytes)} "
            f"({bench.peak_bytes / predicted - 1:+.0%})")


def _budget(bench: Benchmark) -> str:
    if bench.within_budget:
        return "[green]within[/]"
    return f"[red]over[/] by {megabytes(bench.full_context_bytes - bench.budget_bytes)}" + (
        " at the full context" if bench.peak_bytes <= bench.budget_bytes else "")


def _spread(spread: Spread, digits: int, unit: str) -> str:
    """The median, and the range where there was more than one round; short times in milliseconds."""
    median, low, high = spread.median, spread.low, spread.high
    if unit == "s" and median < 0.1:
        median, low, high, digits, unit = 1e3 * median, 1e3 * low, 1e3 * high, 1, "ms"
    shown = f"{median:,.{digits}f} {unit}"
    return shown if low == high else f"{shown} ({low:,.{digits}f} to {high:,.{digits}f})"
