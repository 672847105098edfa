"""`bench`: rounds of bundles in turn, each in a fresh process, and what they say together.

Rounds of several bundles and thread counts alternate, so that a machine whose speed drifts is the same machine for
all of them; the read bandwidth that speeds are held against is measured between them.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lfm_edge.bundle import Bundle
from lfm_edge.errors import LfmEdgeError
from lfm_edge.harness.devices import Projection, project
from lfm_edge.harness.host import Host, provenance, usable_cores
from lfm_edge.harness.limit import COUNTS, memory_limit
from lfm_edge.harness.memory import Memory
from lfm_edge.harness.predict import Prediction, predict, remedies
from lfm_edge.harness.roofline import read_bandwidth, step_bytes
from lfm_edge.harness.round import Moment, OverTheLimit, Plan, Point, Round, run_round
from lfm_edge.harness.stats import Ratio, Spread

SCHEMA = "lfm-edge/bench/1"
ALL_FILLS = (1024, 4096, 16384, 32768)  # what `all` stands for, with the whole context, as far as that holds them


@dataclass(frozen=True)
class Settings:
    """What to measure.

    prompt_tokens: lengths to prefill, each followed by `generate_tokens` of decode
    fills: context fills to measure decode and memory at; empty for none, None for all usual ones
    threads: of the runtime, each in turn; empty for all cores
    repeat: rounds; sustained_s: seconds of decode without a pause, in one more process; 0 for none
    budget: bytes that the peak above an empty process may reach; memory_limit: what the system enforces, or None
    """

    prompt_tokens: tuple[int, ...] = (512,)
    generate_tokens: int = 64
    fills: tuple[int, ...] | None = ()
    threads: tuple[int, ...] = ()
    repeat: int = 3
    sustained_s: float = 0.0
    budget: int = 10**9
    memory_limit: int | None = None

    def plan(self, bundle: Bundle, threads: int | None) -> Plan:
        """One round of a bundle. Raises LfmEdgeError where it does not fit the bundle's context."""
        context, where = bundle.manifest.state.context, bundle.directory
        longest = max(self.prompt_tokens)
        if longest + self.generate_tokens > context:
            raise LfmEdgeError(f"{where}: {longest} prompt and {self.generate_tokens} generated tokens do not fit its "
                               f"context of {context}; give smaller --prompt-tokens or --generate-tokens")
        usual = (*(fill for fill in ALL_FILLS if fill < context), context)
        fills = self.fills if self.fills is not None else tuple(f for f in usual if f > self.generate_tokens)
        for fill in fills:
            if fill > context:
                raise LfmEdgeError(f"{where}: --fill {fill} is more than its context of {context}")
            if fill <= self.generate_tokens:
                raise LfmEdgeError(f"--fill {fill}: decoding {self.generate_tokens} tokens ends there, and a step of "
                                   "prefill comes before; give a larger one, or smaller --generate-tokens")
        return Plan(str(where), threads, self.prompt_tokens, self.generate_tokens, fills)


@dataclass(frozen=True)
class PointResult:
    """Speed with some context before, over all rounds; `kind` and `tokens` as in `round.Point`.

    prefill_tps, decode_tps: tokens per second; prefill_s: seconds of the prefill, which for a prompt is the time to
        the first token, warm
    step_bytes: that a decode step must read; limit_tps: decode if the machine's read bandwidth were all used
    projections: of phones; none where the model fits this machine's cache, whose speed is not that of memory
    """

    kind: str
    tokens: int
    prefill_tps: Spread
    prefill_s: Spread
    decode_tps: Spread
    step_bytes: int
    limit_tps: float
    fits_cache: bool
    projections: tuple[Projection, ...]

    @property
    def efficiency(self) -> float:
        """Share of the machine's read bandwidth that decode uses."""
        return self.decode_tps.median / self.limit_tps

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "efficiency": self.efficiency}


@dataclass(frozen=True)
class Benchmark:
    """All rounds of one bundle with one number of threads. Memory is above an empty process of the same runtime.

    threads: None where the runtime chooses them; first_token_s: after a load, cold
    moments: medians of the rounds, and the largest peak; predicted, at_full_context: by part, of the most that was
        filled and of the whole context
    sustained_tps: of each window of the sustained decode, in order
    remedies: what would bring it under the budget, where it is over; each entry is one way
    """

    bundle: str
    target: str
    threads: int | None
    load_s: Spread
    first_token_s: Spread
    points: tuple[PointResult, ...]
    moments: tuple[Moment, ...]
    baseline_bytes: int
    peak_bytes: int
    budget_bytes: int
    artifact_bytes: int
    state_bytes: int
    predicted: Prediction
    at_full_context: Prediction
    sustained_tps: tuple[float, ...]
    remedies: tuple[str, ...]
    rounds: tuple[Round, ...]

    @property
    def within_budget(self) -> bool:
        """Whether the peak above the empty process is at most the budget."""
        return self.peak_bytes <= self.budget_bytes

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "within_budget": self.within_budget,
                "points": [point.to_dict() for point in self.points],
                "predicted": _with_total(self.predicted), "at_full_context": _with_total(self.at_full_context)}


@dataclass(frozen=True)
class Comparison:
    """A speed of one bundle over that of another, at the same point and with the same threads, rounds paired."""

    bundle: str
    over: str
    threads: int | None
    what: str
    kind: str
    tokens: int
    ratio: Ratio


@dataclass(frozen=True)
class LeftOut:
    """A bundle without figures, and why; its sizes are what they are anywhere."""

    bundle: str
    target: str
    reason: str
    artifact_bytes: int
    state_bytes: int

    @classmethod
    def of(cls, bundle: Bundle, reason: str) -> LeftOut:
        """What to say of a bundle."""
        return cls(str(bundle.directory), bundle.manifest.target, reason, bundle.artifact_bytes,
                   bundle.manifest.state.nbytes)


@dataclass(frozen=True)
class BenchResult:
    """All that one run of `bench` found.

    not_measured: bundles for other machines; over_limit: bundles that the hard limit ended
    limit_kind: what enforced the hard limit; empty for none
    read_bandwidth: bytes per second, the best of the run, for each number of threads
    """

    settings: Settings
    host: Host
    benchmarks: tuple[Benchmark, ...]
    comparisons: tuple[Comparison, ...]
    not_measured: tuple[LeftOut, ...]
    over_limit: tuple[LeftOut, ...]
    read_bandwidth: dict[int, float]
    limit_kind: str = ""

    @property
    def passed(self) -> bool:
        """Whether every measured bundle lives within its limit and the budget."""
        return not self.over_limit and all(result.within_budget for result in self.benchmarks)

    def to_dict(self, command: str = "") -> dict[str, Any]:
        """For JSON, by the schema of docs/benchmarks.md. command: that made it"""
        return {
            **provenance(SCHEMA, command), "passed": self.passed, "settings": asdict(self.settings),
            "read_bandwidth": {str(threads): value for threads, value in self.read_bandwidth.items()},
            "memory_limit": {"bytes": self.settings.memory_limit, "kind": self.limit_kind,
                             "counts": COUNTS[self.limit_kind]} if self.limit_kind else None,
            "benchmarks": [result.to_dict() for result in self.benchmarks],
            "comparisons": [asdict(entry) for entry in self.comparisons],
            "not_measured": [asdict(entry) for entry in self.not_measured],
            "over_limit": [asdict(entry) for entry in self.over_limit],
        }


def bench(bundles: Sequence[Bundle], settings: Settings | None = None, *,
          progress: Callable[[str], None] = lambda name: None) -> BenchResult:
    """Measure bundles in turn.

    Raises LfmEdgeError where what is asked does not fit a bundle's context, or a round fails. A round that the hard
    limit ends does not raise: its bundle is in `over_limit`.
    """
    settings = settings or Settings()
    not_measured = tuple(LeftOut.of(bundle, _elsewhere(bundle)) for bundle in bundles
                         if not bundle.target.is_measured_here)
    run = _Run([bundle for bundle in bundles if bundle.target.is_measured_here], settings, progress)
    run.warm_up()
    for number in range(settings.repeat):
        run.measure(number)
    run.sustain()
    benchmarks = tuple(run.summary(series) for series in run.series)
    return BenchResult(settings, run.host, benchmarks, tuple(_compare(run.series)), not_measured,
                       tuple(run.over_limit), run.bandwidth, run.limit_kind)


@dataclass
class _Series:
    """Rounds of one bundle with one number of threads, as they come."""

    bundle: Bundle
    plan: Plan
    rounds: list[Round] = field(default_factory=list)
    sustained_tps: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        threads = f", {self.plan.threads} threads" if self.plan.threads else ""
        return f"{self.bundle.directory.name}{threads}"

    def points(self) -> dict[tuple[str, int], list[Point]]:
        """The points of all rounds, by kind and tokens."""
        return {(made[0].kind, made[0].tokens): list(made)
                for made in zip(*(entry.points for entry in self.rounds), strict=True)}


class _Run:
    """The rounds of one `bench`, as they are made."""

    def __init__(self, bundles: Sequence[Bundle], settings: Settings, progress: Callable[[str], None]) -> None:
        self.settings, self.progress, self.host = settings, progress, Host.here()
        self.threads = settings.threads or (usable_cores(),)
        self.series = [_Series(bundle, settings.plan(bundle, threads if bundle.target.takes_threads else None))
                       for threads in self.threads for bundle in bundles
                       if bundle.target.takes_threads or threads == self.threads[0]]
        self.over_limit: list[LeftOut] = []
        self.bandwidth = dict.fromkeys(self.threads, 0.0)
        self.limit_kind = ""
        if settings.memory_limit is not None:
            with memory_limit(settings.memory_limit) as limit:
                self.limit_kind = limit.kind

    def warm_up(self) -> None:
        """Load every bundle once, without a limit: what a first load on a machine makes, later ones find."""
        for bundle in {series.bundle.directory: series.bundle for series in self.series}.values():
            self.progress(f"{bundle.directory.name}, loaded once")
            run_round(Plan(str(bundle.directory), None, (1,), 1))

    def measure(self, number: int) -> None:
        """One round of each series, in turn."""
        for threads in self.threads if self.series else ():
            self.progress(f"read bandwidth with {threads} threads")
            measured = read_bandwidth(threads, self.host.cache_bytes)
            self.bandwidth[threads] = max(self.bandwidth[threads], measured)
        for series in tuple(self.series):
            self.progress(f"{series.name}, round {number + 1} of {self.settings.repeat}")
            self._round(series, series.plan, lambda made, series=series: series.rounds.append(made))

    def sustain(self) -> None:
        """The sustained decode of each series, where one is asked for."""
        for series in tuple(self.series) if self.settings.sustained_s else ():
            self.progress(f"{series.name}, {self.settings.sustained_s:g} s of decode")
            plan = Plan(series.plan.directory, series.plan.threads, series.plan.prompts[:1], series.plan.generate,
                        sustained_s=self.settings.sustained_s)
            self._round(series, plan, lambda made, series=series: setattr(series, "sustained_tps", made.sustained_tps))

    def _round(self, series: _Series, plan: Plan, keep: Callable[[Round], None]) -> None:
        try:
            keep(run_round(plan, self.settings.memory_limit))
        except OverTheLimit as error:  # there is no median of rounds of which some were ended
            self.series.remove(series)
            self.over_limit.append(LeftOut.of(series.bundle, str(error)))

    def summary(self, series: _Series) -> Benchmark:
        """What the rounds of a series say together."""
        bundle, rounds = series.bundle, series.rounds
        manifest, peak = bundle.manifest, max(made.peak_bytes for made in rounds)
        filled = max(moment.tokens for moment in rounds[0].moments)
        over = peak - self.settings.budget
        return Benchmark(
            bundle=str(bundle.directory), target=manifest.target, threads=series.plan.threads,
            load_s=Spread.of([made.load_s for made in rounds]),
            first_token_s=Spread.of([made.first_token_s for made in rounds]),
            points=tuple(self._point(bundle, series.plan.threads, points) for points in series.points().values()),
            moments=tuple(map(_moment, zip(*(made.moments for made in rounds), strict=True))),
            baseline_bytes=_median(made.baseline.resident for made in rounds), peak_bytes=peak,
            budget_bytes=self.settings.budget, artifact_bytes=bundle.artifact_bytes, state_bytes=manifest.state.nbytes,
            predicted=predict(manifest, bundle.artifact_bytes, filled),
            at_full_context=predict(manifest, bundle.artifact_bytes, manifest.state.context),
            sustained_tps=series.sustained_tps,
            remedies=tuple(remedies(manifest, filled, over)) if over > 0 else (), rounds=tuple(rounds))

    def _point(self, bundle: Bundle, threads: int | None, points: Sequence[Point]) -> PointResult:
        first, decode = points[0], Spread.of([point.decode_tps for point in points])
        needed = step_bytes(bundle.manifest, first.mean_fill)
        limit = self.bandwidth[threads or self.threads[0]] / needed
        fits = needed <= self.host.cache_bytes
        return PointResult(
            kind=first.kind, tokens=first.tokens, prefill_tps=Spread.of([point.prefill_tps for point in points]),
            prefill_s=Spread.of([point.prefill_s for point in points]), decode_tps=decode, step_bytes=needed,
            limit_tps=limit, fits_cache=fits, projections=() if fits else project(needed, decode.median / limit))


def _moment(moments: Sequence[Moment]) -> Moment:
    """The same moment of all rounds."""
    memories = [moment.memory for moment in moments]
    return Moment(moments[0].after, moments[0].tokens, Memory(
        _median(memory.anonymous for memory in memories), _median(memory.file_backed for memory in memories),
        max(memory.peak for memory in memories)))


def _compare(series: Sequence[_Series]) -> list[Comparison]:
    """Each further bundle over the first, at the points and the numbers of threads that they share."""
    found = []
    for threads in dict.fromkeys(entry.plan.threads for entry in series):
        first, *others = (entry for entry in series if entry.plan.threads == threads)
        for other in others:
            mine, theirs = first.points(), other.points()
            found += [Comparison(str(other.bundle.directory), str(first.bundle.directory), threads, what, kind, tokens,
                                 Ratio.of([getattr(point, f"{what}_tps") for point in mine[kind, tokens]],
                                          [getattr(point, f"{what}_tps") for point in theirs[kind, tokens]]))
                      for kind, tokens in mine if (kind, tokens) in theirs for what in ("prefill", "decode")]
    return found


def _median(values: Any) -> int:
    return int(statistics.median(values))


def _with_total(prediction: Prediction) -> dict[str, int]:
    return {**asdict(prediction), "total": prediction.total}


def _elsewhere(bundle: Bundle) -> str:
    return (f"runs on {bundle.target.runs_on}; what computes it on {sys.platform} tells nothing about its speed and "
            "memory. Run this command there")
