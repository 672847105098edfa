"""Sections of the page on speed: against the context, compared, against the machine's limit, sustained, projected."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lfm_edge.harness.bench import Benchmark, BenchResult, Comparison, PointResult
from lfm_edge.harness.bench_tables import bandwidth_line, efficiency_line, threads_line
from lfm_edge.harness.devices import Projection
from lfm_edge.harness.round import PROMPT
from lfm_edge.harness.stats import Spread
from lfm_edge.report import charts
from lfm_edge.report.cells import (
    DASH,
    Cell,
    Figure,
    Files,
    Names,
    Section,
    Table,
    at,
    caption,
    commands,
    ranged,
    seconds,
    value,
)
from lfm_edge.report.charts import Bar, Dot, Series, Value


def against_context(files: Files, names: Names) -> Section:
    """Decode at each fill, prefill at each length."""
    blocks: list[Table | Figure] = []
    for file, result in files:
        decode = [_series(entry, names, lambda point: point.decode_tps) for entry in result.benchmarks]
        prefill = [_series(entry, names, lambda point: point.prefill_tps, PROMPT) for entry in result.benchmarks]
        blocks += [
            _over_lengths("Decode", decode, "positions of the context before it", caption(file)),
            _over_lengths("Prefill", prefill, "tokens, prefilled from an empty context", caption(file)),
            _points(result, names)]
    return Section("speed", "Speed against context",
                   "Medians of the rounds, each in a fresh process; whiskers reach from the slowest to the fastest "
                   "round. Bundles take turns, so that a machine whose speed drifts is the same machine for all.",
                   blocks, commands(files))


def _series(entry: Benchmark, names: Names, figure: Callable[[PointResult], Spread], kind: str = "") -> Series:
    """kind: of the points; all where none is given, and of a prompt and a fill of one length the fill"""
    points = {point.tokens: value(figure(point)) for point in entry.points if not kind or point.kind == kind}
    return Series(names.series(entry), names.index(entry.bundle, entry.threads), list(points.items()))


def _over_lengths(title: str, series: Sequence[Series], x_title: str, source: str) -> Figure:
    """Lines; bars where there is one length only."""
    lengths = {x for one in series for x, _ in one.points}
    if len(lengths) != 1:
        return Figure(title, [charts.lines(series, title=f"{title} speed against context", x_title=x_title,
                                           y_title="tokens per second", logarithmic=True)], source)
    rows = [Bar(one.name, [figure.value], f"{figure.value:,.1f} tok/s", one.index, whisker=figure)
            for one in series for _, figure in one.points]
    return Figure(f"{title}: {lengths.pop():,} {x_title}",
                  [charts.bars(rows, title=f"{title} speed", x_title="tokens per second")], source)


def _points(result: BenchResult, names: Names) -> Table:
    rows: list[Sequence[Cell]] = []
    for entry in result.benchmarks:
        rows.append((names.series(entry), "first load, with its first token", seconds(entry.first_load_s), "", ""))
        rows.append((names.series(entry), "load", ranged(entry.load_s, 2, "s"), "", ""))
        rows.append((names.series(entry), "first token, cold", ranged(entry.first_token_s, 3, "s"), "", ""))
        rows += [(names.series(entry), at(point), ranged(point.prefill_s, 3, "s") if point.kind == PROMPT else "",
                  ranged(point.prefill_tps, 1, "tok/s"), ranged(point.decode_tps, 1, "tok/s"))
                 for point in entry.points]
        if entry.baked:
            system = f"{entry.baked.system_tokens:,} tokens of system prompt"
            rows.append((names.series(entry), f"after {system}, baked", ranged(entry.baked.with_s, 3, "s"), "", ""))
            rows.append((names.series(entry), f"after {system}, prefilled", ranged(entry.baked.without_s, 3, "s"), "",
                         ""))
    return Table(("bundle", "", "time to first token", "prefill", "decode"), rows, text=frozenset({1}),
                 folded="Every point, with the range of the rounds")


def compared(files: Files, names: Names) -> Section:
    """Ratios with their confidence intervals."""
    blocks: list[Table | Figure] = []
    for file, result in files:
        groups: dict[str, list[Dot]] = {}
        for entry in result.comparisons:
            groups.setdefault(_compared(entry, names), []).append(Dot(
                _what(entry), _interval(entry), f"{entry.ratio.ratio:.2f}\u00d7",
                names.index(entry.bundle, entry.threads)))
        blocks.append(Figure("Ratios of speeds", charts.pairs(
            list(groups.items()), title="ratios of speeds", x_title="slower \u2190 1 \u2192 faster", one=True),
            caption(file)))
        blocks.append(Table(
            ("bundle", "over", "threads", "what", "ratio of medians", "95 % confidence", "rounds"),
            [(names.bundle(entry.bundle), names.bundle(entry.over), str(entry.threads or "its own"), _what(entry),
              f"{entry.ratio.ratio:.3f}", _confidence(entry), str(entry.ratio.rounds))
             for entry in result.comparisons], text=frozenset({1, 3}), folded="Every ratio"))
    return Section("compared", "Compared",
                   "Rounds are paired, and the interval is a percentile bootstrap over the pairs: where it does not "
                   "hold 1, there is a difference. Three rounds say little; use seven or more before you believe a "
                   "few percent.", blocks, commands(files))


def _compared(entry: Comparison, names: Names) -> str:
    its = f", {threads_line(entry.threads)}" if entry.threads else ""
    return f"{names.bundle(entry.bundle)} over {names.bundle(entry.over)}{its}"


def _what(entry: Comparison) -> str:
    return f"{entry.what}, {entry.kind} {entry.tokens:,}"


def _interval(entry: Comparison) -> Value:
    ratio = entry.ratio
    return Value(ratio.ratio, ratio.ratio if ratio.low is None else ratio.low,
                 ratio.ratio if ratio.high is None else ratio.high)


def _confidence(entry: Comparison) -> str:
    low, high = entry.ratio.low, entry.ratio.high
    return "needs more than one round" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def of_the_limit(files: Files, names: Names) -> Section:
    """Decode as a share of what the machine's memory allows."""
    blocks: list[Table | Figure] = []
    for file, result in files:
        points = [(entry, point) for entry in result.benchmarks for point in entry.points]
        rows = [Bar(f"{names.series(entry)}, {at(point)}", [point.efficiency.median], efficiency_line(point),
                    names.index(entry.bundle, entry.threads))
                for entry, point in points if not point.fits_cache and point.limit_tps]
        if rows:
            blocks.append(Figure("Share of the limit", [charts.bars(
                rows, title="Share of the read bandwidth", unit=0.01, x_title="% of what the memory allows",
                at_least=1.0)], f"read bandwidth {bandwidth_line(result)}; {caption(file)}"))
        cached = dict.fromkeys(names.series(entry) for entry, point in points if point.fits_cache)
        if cached:
            blocks.append(Figure("No limit by memory", [],
                                 f"{', '.join(cached)}: what a step reads fits the cache of the machine that measured "
                                 f"({caption(file)}), so its memory is no limit there."))
    return Section("limit", "Against the machine\u2019s limit",
                   "A decode step reads every weight once, so it cannot be faster than the read bandwidth over "
                   "weights, filled KV cache and conv state. What is missing to 100 % is the runtime\u2019s overhead.",
                   blocks, commands(files))


def sustained(files: Files, names: Names) -> Section:
    """Decode without a pause."""
    blocks: list[Table | Figure] = []
    for file, result in files:
        kept = [entry for entry in result.benchmarks if entry.sustained_tps]
        blocks.append(Figure("Decode without a pause", [charts.lines(
            [Series(names.series(entry), names.index(entry.bundle, entry.threads),
                    [((place + 1) * result.settings.sustained_s / len(entry.sustained_tps), Value.alone(speed))
                     for place, speed in enumerate(entry.sustained_tps)]) for entry in kept],
            title="Sustained decode", x_title="seconds", y_title="tokens per second")], caption(file)))
        blocks.append(Table(("bundle", "first window", "last window", "change"), [
            (names.series(entry), f"{entry.sustained_tps[0]:,.1f} tok/s", f"{entry.sustained_tps[-1]:,.1f} tok/s",
             _change(entry.sustained_tps[0], entry.sustained_tps[-1])) for entry in kept]))
    return Section("sustained", "Sustained", "Whether decode slows down while it goes on and on.", blocks,
                   commands(files))


def _change(first: float, last: float) -> str:
    return f"{last / first - 1:+.0%}" if first else DASH


def projected(entry: Benchmark) -> tuple[Projection, ...]:
    """The projections that are shown: of the first point."""
    return entry.points[0].projections if entry.points else ()


def projections(files: Files, names: Names) -> Section:
    """Phones, by their published bandwidths."""
    blocks: list[Table | Figure] = []
    for file, result in files:
        made = [(entry, one) for entry in result.benchmarks for one in projected(entry)]
        phones = {one.device: one for _, one in made}
        rows = [Bar(f"{device}, {names.series(entry)}", [one.decode_tps], f"{one.decode_tps:,.0f} tok/s",
                    names.index(entry.bundle, entry.threads), faint=True)
                for device in phones for entry, one in made if one.device == device]
        blocks.append(Figure("PROJECTION, not measured: decode", [charts.bars(
            rows, title="PROJECTION: decode on phones", x_title="tokens per second, PROJECTION")], caption(file)))
        blocks.append(Table(("phone", "chip", "published bandwidth", "source"), [
            (one.device, one.chip, f"{one.bandwidth / 1e9:.1f} GB/s", one.source) for one in phones.values()],
            text=frozenset({1, 3}), folded="Where the bandwidths are from"))
    return Section("projections", "PROJECTION, not measured",
                   "What phones would decode if they reached the same share of their published memory bandwidth as "
                   "the machine that measured. No phone ran any of this: phones share their memory with the display "
                   "and the camera, and throttle.", blocks, commands(files), projection=True)
