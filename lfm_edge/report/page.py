"""The report as one page. `report.html` beside this file lays it out; all that comes from a result is escaped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files as package_files

from jinja2 import Environment
from markupsafe import Markup

import lfm_edge
from lfm_edge.harness.bench import BenchResult
from lfm_edge.harness.bench_tables import megabytes
from lfm_edge.harness.evaluation import Evaluation
from lfm_edge.harness.verify import Verification
from lfm_edge.report import charts, memory, speed, truth
from lfm_edge.report.cells import (
    DASH,
    Cell,
    Files,
    Names,
    Section,
    Table,
    at,
    failed,
    none,
    ok,
    seconds,
    size,
    two_lines,
    when,
)
from lfm_edge.report.headline import Headline, headlines
from lfm_edge.report.results import FoundSensitivity, ResultFile, checks


def render(results: Sequence[ResultFile]) -> str:
    """The page of some results, as HTML."""
    names = Names(results)
    rows = headlines(results)
    found = [check for file in results for check in checks(file.result)]
    made = [_section(results, names, *entry) for entry in _SECTIONS]
    sections = [*made, _not_measured(results, rows, names), _hosts(results)]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((package_files(__package__) / "report.html").read_text("utf-8"))
    return template.render(
        sections=[section for section in sections if section is not None], results=results,
        headline=_headline(rows, names) if rows else None, version=lfm_edge.__version__,
        failed=[(names.bundle(check.subject), check) for check in found if check.passed is False],
        passed=sum(check.passed is True for check in found), skipped=sum(check.passed is None for check in found),
        made=max(map(when, results)), hosts=list(dict.fromkeys(map(_host, results))))


def _section(results: Sequence[ResultFile], names: Names, kind: type, wanted: Callable[..., bool],
             make: Callable[[Files, Names], Section]) -> Section | None:
    """A section of the results of a kind that have what it shows; None where there are none."""
    files = [(file, file.result) for file in results if isinstance(file.result, kind) and wanted(file.result)]
    return make(files, names) if files else None


_SECTIONS: tuple[tuple[type, Callable[..., bool], Callable[[Files, Names], Section]], ...] = (
    (BenchResult, lambda result: bool(result.benchmarks), speed.against_context),
    (BenchResult, lambda result: bool(result.comparisons), speed.compared),
    (BenchResult, lambda result: bool(result.benchmarks), speed.of_the_limit),
    (BenchResult, lambda result: any(entry.sustained_tps for entry in result.benchmarks), speed.sustained),
    (BenchResult, lambda result: bool(result.benchmarks), memory.by_part),
    (BenchResult, lambda result: bool(result.benchmarks), memory.over_time),
    (Verification, lambda _: True, truth.parity),
    (Verification, lambda _: True, truth.quality),
    (Evaluation, lambda _: True, truth.evaluation),
    (FoundSensitivity, lambda _: True, truth.sensitivity),
    (BenchResult, lambda result: any(map(speed.projected, result.benchmarks)), speed.projections),
)


def _headline(rows: Sequence[Headline], names: Names) -> Table:
    """What runs where, how large, how right, how fast, in how much memory."""
    return Table(
        ("bundle", "runs on", "artifact", "verified", "prefill", "decode", "first token", "peak memory"),
        [(two_lines(names.series(row.benchmark) if row.benchmark else names.bundle(row.bundle), row.kind),
          row.runs_on or DASH, size(row.artifact_bytes), _verified(row.verification), *_speeds(row), _peak(row))
         for row in rows], text=frozenset({1, 3}))


def _verified(result: Verification | None) -> Cell:
    if result is None:
        return none("not verified")
    run = [check for check in checks(result) if check.passed is not None]
    wrong = sum(not check.passed for check in run)
    cost = f"KL {result.quality.kl_divergence:.4f}"
    return two_lines(failed(f"{wrong} of {len(run)} FAILED") if wrong else ok(f"{len(run)} of {len(run)}"), cost)


def _speeds(row: Headline) -> tuple[Cell, Cell, Cell]:
    point = row.first_point
    if row.benchmark is None or point is None:
        return none(DASH), none(DASH), none(DASH)
    return (two_lines(f"{point.prefill_tps.median:,.1f} tok/s", f"of {point.tokens:,}"),
            two_lines(f"{point.decode_tps.median:,.1f} tok/s", at(point)),
            two_lines(seconds(point.prefill_s.median), f"cold {seconds(row.benchmark.first_token_s.median)}"))


def _peak(row: Headline) -> Cell:
    bench = row.benchmark
    if bench is None:
        if row.over_limit:
            return failed("over the limit")
        return failed("not measured") if row.unchecked else none("not measured")
    share = bench.full_context_bytes / bench.budget_bytes if bench.budget_bytes else 1.0
    said = f"{share:.0%} of {megabytes(bench.budget_bytes)} at the full context"
    if row.peer:
        return two_lines(megabytes(bench.peak_bytes), said)
    return two_lines(
        Markup("{} {}").format(megabytes(bench.peak_bytes), charts.meter(share, over=not bench.within_budget)),
        ok(said) if bench.within_budget else failed(said))


def _not_measured(results: Sequence[ResultFile], rows: Sequence[Headline], names: Names) -> Section | None:
    found = list(dict.fromkeys((names.bundle(bundle), what, why) for bundle, what, why in _missing(results, rows)))
    table = Table(("bundle", "what", "why"), found, text=frozenset({1, 2}))
    return Section("missing", "Not measured, and why", "", [table]) if found else None


def _missing(results: Sequence[ResultFile], rows: Sequence[Headline]) -> Iterator[tuple[str, str, str]]:
    """Bundle, what of it there is no figure of, and why."""
    for row in rows:
        if row.benchmark is None:
            yield row.bundle, "speed and memory", row.reason
        if row.verification is None and not row.peer:
            yield row.bundle, "parity and quality", "no result of verify was given"
    for result in (file.result for file in results):
        if isinstance(result, Verification):
            if result.remark:
                yield result.bundle, "what the device itself computes", result.remark
            yield from ((result.bundle, f"parity: {phase}", reason) for phase, reason in result.skipped.items())
            if not result.tasks:
                yield result.bundle, "exact answers", "the checkpoint ships no tasks"
        elif isinstance(result, BenchResult):
            yield from _missing_of(result)


def _missing_of(result: BenchResult) -> Iterator[tuple[str, str, str]]:
    settings = result.settings
    for entry in result.benchmarks:
        if settings.fills == ():
            yield entry.bundle, "speed and memory with a filled context", "bench ran without --fill"
        if not settings.sustained_s:
            yield entry.bundle, "sustained decode", "bench ran without --sustained"
        if entry.points and all(point.fits_cache for point in entry.points):
            yield (entry.bundle, "share of the memory bandwidth, projections of phones",
                   "the model fits the cache of the machine that measured")
    for comparison in result.comparisons:
        if comparison.ratio.low is None:
            yield comparison.bundle, "confidence of its ratios", "one round has none; bench --repeat 7 does"


def _hosts(results: Sequence[ResultFile]) -> Section:
    packages = list(dict.fromkeys(name for file in results for name in file.provenance.versions))
    tables = [
        Table(("result", "made", "processor", "cores", "memory", "last cache", "system", "Python"),
              [(file.name, when(file), host.cpu, str(host.cores), megabytes(host.memory_bytes),
                megabytes(host.cache_bytes) if host.cache_bytes else DASH, host.system, host.python)
               for file in results for host in [file.provenance.host]], text=frozenset({1, 2, 6, 7})),
        Table(("result", *packages), [
            (file.name, *(file.provenance.versions.get(name, DASH) for name in packages)) for file in results])]
    every = list(dict.fromkeys(file.provenance.command for file in results if file.provenance.command))
    return Section("hosts", "Host and versions", "", tables, every)


def _host(file: ResultFile) -> str:
    host = file.provenance.host
    return f"{host.cpu}, {host.cores} cores, {host.memory_bytes / 1e9:,.0f} GB"
