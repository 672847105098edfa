"""A summary in Markdown, for a comment on a pull request, a CI system's summary page, or the README."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lfm_edge.harness.tables import megabytes
from lfm_edge.report.cells import Names, at, size
from lfm_edge.report.headline import Headline, headlines
from lfm_edge.report.results import ResultFile, checks

_COLUMNS = ("bundle", "target", "artifact", "verified", "KL, nats", "prefill", "decode", "peak memory", "budget")


def summary(results: Sequence[ResultFile]) -> str:
    """The verdict, what failed, and the table of targets."""
    names = Names(results)
    found = [check for file in results for check in checks(file.result)]
    failed = [check for check in found if check.passed is False]
    run = sum(check.passed is not None for check in found)
    lines = [f"### lfm-edge: {len(failed)} of {run} checks FAILED" if failed else f"### lfm-edge: {run} checks passed",
             ""]
    lines += [f"- ❌ {code(names.bundle(check.subject))} **{plain(check.name)}**: {plain(check.line)}"
              for check in failed]
    lines += [""] * bool(failed)
    return "\n".join([*lines, target_table(results)])


def target_table(results: Sequence[ResultFile]) -> str:
    """What runs where, how large, how right, how fast, in how much memory."""
    names = Names(results)
    rows = [_COLUMNS, ("---",) * len(_COLUMNS), *(_row(row, names) for row in headlines(results))]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def plain(text: str) -> str:
    """Text that Markdown and HTML leave as it is, on one line, whatever is in it."""
    return re.sub(r"[^\w ,.:;()+%/-]|_", lambda match: f"&#{ord(match[0])};", " ".join(text.split()), flags=re.ASCII)


def code(text: str) -> str:
    """A name, in a typewriter face; nothing in it is a mention or a link."""
    return f"<code>{plain(text)}</code>"


def _row(row: Headline, names: Names) -> tuple[str, ...]:
    bench, point, result = row.benchmark, row.first_point, row.verification
    name = names.series(bench) if bench else names.bundle(row.bundle)
    right = ("not verified", "") if result is None else (_count(row), f"{result.quality.kl_divergence:.4f}")
    if bench is None:
        why = "❌ over the memory limit" if row.over_limit else "❌ not measured" if row.unchecked else "not measured"
        return (code(name), code(row.kind), size(row.artifact_bytes), *right, "", "", why, "")
    speeds = ("", "") if point is None else (
        f"{point.prefill_tps.median:,.1f} tok/s, {point.tokens:,} tokens",
        f"{point.decode_tps.median:,.1f} tok/s, {at(point)}")
    budget = f"{'✅ within' if bench.within_budget else '❌ over'} {megabytes(bench.budget_bytes)}"
    return (code(name), code(row.kind), size(row.artifact_bytes), *right, *speeds, megabytes(bench.peak_bytes),
            "" if row.peer else budget)


def _count(row: Headline) -> str:
    found = [check.passed for check in checks(row.verification) if check.passed is not None]
    wrong = found.count(False)
    return f"❌ {wrong} of {len(found)} FAILED" if wrong else f"✅ {len(found)} of {len(found)}"
