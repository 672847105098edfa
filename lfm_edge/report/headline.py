"""The first table of every report: what runs where, how large, how right, how fast, in how much memory.

The page, the Markdown summary and the README's figures all show these rows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from lfm_edge.harness.bench import Benchmark, BenchResult, LeftOut, PointResult
from lfm_edge.harness.verify import Verification
from lfm_edge.report.results import MEASURED, MEMORY_LIMIT, Check, ResultFile, checks, entries, entry_checks, is_peer
from lfm_edge.targets import TARGETS

NOT_BENCHED = "no result of bench"


@dataclass(frozen=True)
class Headline:
    """One bundle with one number of threads, in all results that were given.

    benchmark: None where it was not measured, and `reason` says why
    verification: None where no result of `verify` was given
    checks: all that was held against a limit; target, artifact_bytes: None for a peer that has none, or was not built
    peer: whether it is no bundle, but what another exporter has built
    """

    bundle: str
    target: str | None
    artifact_bytes: int | None
    verification: Verification | None
    benchmark: Benchmark | None
    reason: str
    checks: tuple[Check, ...]
    peer: bool = False

    @property
    def kind(self) -> str:
        """The target's name, or that it is a peer."""
        return "a peer" if self.peer else self.target or ""

    @property
    def runs_on(self) -> str:
        """Where the target runs; nothing for one that is not in the table."""
        return TARGETS[self.target].runs_on if self.target in TARGETS else ""

    @property
    def first_point(self) -> PointResult | None:
        """Speed at the first prompt."""
        return self.benchmark.points[0] if self.benchmark and self.benchmark.points else None

    @property
    def over_limit(self) -> bool:
        """Whether the system ended it, as it took more memory than the hard limit."""
        return any(check.passed is False and check.name == MEMORY_LIMIT for check in self.checks)


    @property
    def unchecked(self) -> bool:
        """Whether it was to keep to a budget or a limit, and was not measured."""
        return any(check.passed is False and check.name == MEASURED for check in self.checks)


def headlines(files: Sequence[ResultFile]) -> list[Headline]:
    """A row for each bundle and number of threads, in the order in which they come; of several verifications of one
    bundle the last counts.
    """
    verified = {same(file.result.bundle): file.result for file in files if isinstance(file.result, Verification)}
    rows: list[Headline] = []
    for result in (file.result for file in files if isinstance(file.result, BenchResult)):
        rows += [_row(result, entry, verified.get(same(entry.bundle))) for entry in entries(result)]
    seen = {same(row.bundle) for row in rows}
    rows += [Headline(one.bundle, one.target, one.artifact_bytes, one, None, NOT_BENCHED, tuple(checks(one)))
             for bundle, one in verified.items() if bundle not in seen]
    return rows


def same(bundle: str) -> str:
    """A bundle's path, however it was written."""
    return os.path.normpath(bundle)


def _row(result: BenchResult, entry: Benchmark | LeftOut, verification: Verification | None) -> Headline:
    found = (*entry_checks(result, entry), *(checks(verification) if verification else ()))
    measured, reason = (None, entry.reason) if isinstance(entry, LeftOut) else (entry, "")
    return Headline(entry.bundle, entry.target, entry.artifact_bytes, verification, measured, reason, found,
                    is_peer(entry))
