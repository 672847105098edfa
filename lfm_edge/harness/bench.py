"""`bench`: rounds of bundles, and of peers, in turn, each in a fresh process, and what they say together.

Rounds of all that is measured and of several thread counts alternate, so that a machine whose speed drifts is the same
machine for all of them; the read bandwidth that speeds are held against is measured between them.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lfm_edge.bundle.bundle import Bundle
from lfm_edge.bundle.manifest import Manifest
from lfm_edge.cores import usable_cores
from lfm_edge.errors import LfmEdgeError
from lfm_edge.harness.baked import FirstTokenTimes
from lfm_edge.harness.devices import Projection, project
from lfm_edge.harness.host import Host, provenance
from lfm_edge.harness.limit import COUNTS, memory_limit
from lfm_edge.harness.memory import Memory
from lfm_edge.harness.peers import PEERS, peer_named
from lfm_edge.harness.peers.building import prepare
from lfm_edge.harness.peers.peer import Built, Peer, differences, traits_of
from lfm_edge.harness.predict import Prediction, predict, remedies
from lfm_edge.harness.roofline import read_bandwidth, step_bytes
from lfm_edge.harness.round import Moment, OverTheLimit, Plan, Point, Round, run_round
from lfm_edge.harness.stats import Ratio, Spread

SCHEMA = "lfm-edge/bench/2"
DEFAULT_BUDGET = 10**9
ALL_FILLS = (1024, 4096, 16384, 32768)  # what `all` stands for, with the whole context, as far as that holds them


@dataclass(frozen=True)
class Settings:
    """What to measure.

    prompt_tokens: lengths to prefill, each followed by `generate_tokens` of decode
    fills: context fills to measure decode and memory at; empty for none, None for all usual ones
    threads: of the runtime, each in turn; empty for all cores
    repeat: rounds; sustained_s: seconds of decode without a pause, in one more process; 0 for none
    budget: bytes that a bundle may take above an empty process with its whole context filled; None for 1 GB
    memory_limit: what the system enforces, or None
        A bundle that cannot be measured here does not pass where one of these two is given: nobody has checked it.
    against: names of peers; `NAME=BUNDLE` is one that matches this bundle and is held against all of them
    model: where the checkpoint is that peers are built from, if not where bundles say
    """

    prompt_tokens: tuple[int, ...] = (512,)
    generate_tokens: int = 64
    fills: tuple[int, ...] | None = ()
    threads: tuple[int, ...] = ()
    repeat: int = 3
    sustained_s: float = 0.0
    budget: int | None = None
    memory_limit: int | None = None
    against: tuple[str, ...] = ()
    model: str | None = None

    @property
    def budget_bytes(self) -> int:
        """The budget, given or not."""
        return DEFAULT_BUDGET if self.budget is None else self.budget

    @property
    def demands_measuring(self) -> bool:
        """Whether something was asked for that only a measurement can answer with yes."""
        return self.budget is not None or self.memory_limit is not None

    def plan(self, subject: Subject, threads: int | None) -> Plan:
        """One round of it. Raises LfmEdgeError where that does not fit its context."""
        context, where = subject.context, subject.directory
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
        return Plan(str(where), threads, self.prompt_tokens, self.generate_tokens, fills, chunk=subject.chunk,
                    baked=True)


@dataclass(frozen=True)
class Match:
    """A bundle that a peer's artifact is held against, and in what the two differ."""

    bundle: str
    differs: tuple[str, ...]


@dataclass(frozen=True)
class PeerEntry:
    """What is to be said of a peer that was measured.

    directory: in the cache; arguments: what its builder was told
    build_s, build_peak_bytes: what that took, when it was run
    filling: how a fill is reached: `rows repeated`, `position set` or `computed`
    """

    name: str
    directory: str
    versions: dict[str, str]
    arguments: dict[str, Any]
    build_s: float
    build_peak_bytes: int
    filling: str
    matches: tuple[Match, ...]


@dataclass(frozen=True)
class Subject:
    """What is measured: a bundle, or what a peer has built.

    name: a bundle's path, a peer's name; label: short, for progress; target: None for a peer without one
    chunk: tokens of a step of prefill at a fill
    manifest: None where no prediction can be made
    """

    name: str
    label: str
    directory: Path
    target: str | None
    context: int
    chunk: int
    takes_threads: bool
    artifact_bytes: int | None
    state_bytes: int
    manifest: Manifest | None
    peer: PeerEntry | None = None

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Subject:
        """A bundle."""
        manifest = bundle.manifest
        return cls(str(bundle.directory), bundle.directory.name, bundle.directory, manifest.target,
                   manifest.state.context, manifest.options.prefill_chunk, bundle.runtime.takes_threads,
                   bundle.artifact_bytes, manifest.state.nbytes, manifest)

    @classmethod
    def of_peer(cls, name: str, built: Built, matched: Sequence[Bundle]) -> Subject:
        """A peer's artifact, to be held against these bundles."""
        peer, manifest = PEERS[built.peer], built.manifest
        theirs = peer.traits(built)
        matches = tuple(Match(str(bundle.directory), tuple(differences(theirs, traits_of(bundle.manifest))))
                        for bundle in matched)
        entry = PeerEntry(built.peer, str(built.directory), built.versions, built.arguments, built.build_s,
                          built.build_peak_bytes, peer.filling, matches)
        return cls(name, name, built.directory, manifest and manifest.target, built.config.max_position_embeddings,
                   matched[0].manifest.options.prefill_chunk, peer.takes_threads, built.artifact_bytes,
                   peer.state(built).nbytes, manifest, entry)

    def is_matched_by(self, other: Subject) -> bool:
        """Whether `other` is a peer's artifact that is held against this bundle."""
        return other.peer is not None and self.name in (match.bundle for match in other.peer.matches)


@dataclass(frozen=True)
class PointResult:
    """Speed with some context before, over all rounds; `kind` and `tokens` as in `round.Point`.

    prefill_tps, decode_tps: tokens per second; prefill_s: seconds of the prefill, which for a prompt is the time to
        the first token, warm
    step_bytes: that a decode step must read; limit_tps: decode if the machine's read bandwidth were all used, as it
        was beside the rounds; efficiency: the share of it that decode reached, round by round; None, with `fits_cache`,
        for a peer whose artifact is not known so well
    projections: of phones; none where the model fits this machine's cache, whose speed is not that of memory
    """

    kind: str
    tokens: int
    prefill_tps: Spread
    prefill_s: Spread
    decode_tps: Spread
    step_bytes: int | None
    limit_tps: float | None
    efficiency: Spread | None
    fits_cache: bool | None
    projections: tuple[Projection, ...]


@dataclass(frozen=True)
class BakedTimes:
    """Seconds to the first token of a prompt after a system prompt of so many tokens: loaded, or prefilled."""

    system_tokens: int
    with_s: Spread
    without_s: Spread


@dataclass(frozen=True)
class Benchmark:
    """All rounds of a bundle or a peer with one number of threads. Memory is above an empty process of its runtime.

    bundle: its path, or the peer's name; target: None for a peer, but where its artifact is a bundle
    threads: None where the runtime chooses them
    first_load_s: the load before the rounds and the first prompt's prefill: with all that a runtime makes once on a
        machine, where it has not been made before
    load_s: to a session; first_token_s: the first prompt's prefill after a load, cold
    moments: medians of the rounds, and the largest peak; predicted, at_full_context: by part, of the most that was
        filled and of the whole context; None where no manifest tells
    peak_bytes: the most that was measured
    peer: None for a bundle of the user's
    sustained_tps: of each window of the sustained decode, in order
    remedies: what would bring it under the budget, where it is over; each entry is one way
    baked: the first prompt after the baked one, where there is one
    """

    bundle: str
    target: str | None
    threads: int | None
    first_load_s: float
    load_s: Spread
    first_token_s: Spread
    points: tuple[PointResult, ...]
    moments: tuple[Moment, ...]
    baseline_bytes: int
    peak_bytes: int
    budget_bytes: int
    artifact_bytes: int
    state_bytes: int
    predicted: Prediction | None
    at_full_context: Prediction | None
    sustained_tps: tuple[float, ...]
    remedies: tuple[str, ...]
    rounds: tuple[Round, ...]
    peer: PeerEntry | None = None
    baked: BakedTimes | None = None

    @property
    def full_context_bytes(self) -> int:
        """The peak with the whole context filled: what was measured, and the rows of the cache that were not filled.

        Those are counted from the layout of the state: none where the runtime takes them all at once, or for a peer.
        """
        if self.predicted is None or self.at_full_context is None:
            return self.peak_bytes
        most_filled = max((moment.memory.peak for moment in self.moments if moment.tokens == self.predicted.filled),
                          default=self.peak_bytes)
        return max(self.peak_bytes, most_filled + self.at_full_context.kv_cache - self.predicted.kv_cache)

    @property
    def within_budget(self) -> bool:
        """Whether it is at most the budget above the empty process, with the whole context filled."""
        return self.full_context_bytes <= self.budget_bytes

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "full_context_bytes": self.full_context_bytes, "within_budget": self.within_budget,
                "predicted": _with_total(self.predicted), "at_full_context": _with_total(self.at_full_context)}


@dataclass(frozen=True)
class Comparison:
    """A speed of a bundle over that of another or of a peer, at one point, with the same threads, rounds paired."""

    bundle: str
    over: str
    threads: int | None
    what: str
    kind: str
    tokens: int
    ratio: Ratio


@dataclass(frozen=True)
class LeftOut:
    """A bundle or a peer without figures, and why; its sizes are what they are anywhere. None: it was not built."""

    bundle: str
    target: str | None
    reason: str
    artifact_bytes: int | None
    state_bytes: int | None
    peer: bool = False

    @classmethod
    def of(cls, subject: Subject, reason: str) -> LeftOut:
        """What to say of it."""
        return cls(subject.name, subject.target, reason, subject.artifact_bytes, subject.state_bytes,
                   subject.peer is not None)


@dataclass(frozen=True)
class BenchResult:
    """All that one run of `bench` found.

    not_measured: those for other machines; over_limit: those that the hard limit ended
    limit_kind: what enforced the hard limit; empty for none
    read_bandwidth: bytes per second, measured before and after every round, for each number of threads
    """

    settings: Settings
    host: Host
    benchmarks: tuple[Benchmark, ...]
    comparisons: tuple[Comparison, ...]
    not_measured: tuple[LeftOut, ...]
    over_limit: tuple[LeftOut, ...]
    read_bandwidth: dict[int, Spread]
    limit_kind: str = ""

    @property
    def passed(self) -> bool:
        """Whether every bundle lives within its limit and the budget, and was measured where either was asked for.

        Peers need not.
        """
        return (all(entry.peer for entry in self.over_limit) and all(result.within_budget for result in self.bundles)
                and not self.unchecked)

    @property
    def unchecked(self) -> list[LeftOut]:
        """Bundles that were to keep to a budget or a limit, and cannot be measured here."""
        return [entry for entry in self.not_measured if not entry.peer] if self.settings.demands_measuring else []

    @property
    def bundles(self) -> list[Benchmark]:
        """The results that are not of peers."""
        return [result for result in self.benchmarks if result.peer is None]

    def to_dict(self, command: str = "") -> dict[str, Any]:
        """For JSON, by the schema of docs/reference/bench.md. command: that made it"""
        return {
            **provenance(SCHEMA, command), "passed": self.passed, "settings": asdict(self.settings),
            "read_bandwidth": {str(threads): asdict(rate) for threads, rate in self.read_bandwidth.items()},
            "memory_limit": {"bytes": self.settings.memory_limit, "kind": self.limit_kind,
                             "counts": COUNTS[self.limit_kind]} if self.limit_kind else None,
            "benchmarks": [result.to_dict() for result in self.benchmarks],
            "comparisons": [asdict(entry) for entry in self.comparisons],
            "not_measured": [asdict(entry) for entry in self.not_measured],
            "over_limit": [asdict(entry) for entry in self.over_limit],
        }


def bench(bundles: Sequence[Bundle], settings: Settings | None = None, *,
          progress: Callable[[str], None] = lambda name: None) -> BenchResult:
    """Measure bundles in turn, and peers with them; what these need is built first.

    Raises LfmEdgeError where what is asked does not fit a bundle's context, a peer is unknown, is not installed or
    cannot build, or a round fails. A round that the hard limit ends does not raise: it is in `over_limit`.
    """
    settings = settings or Settings()
    raced = [bundle for bundle in bundles if bundle.runtime.is_measured_here]
    races = [_race(entry, raced) for entry in dict.fromkeys(settings.against)]
    subjects = [Subject.of_bundle(bundle) for bundle in raced]
    for subject in subjects:
        settings.plan(subject, None)  # raises before anything is built
    left_out = [LeftOut.of(Subject.of_bundle(bundle), _elsewhere(bundle.target.runs_on)) for bundle in bundles
                if not bundle.runtime.is_measured_here]
    left_out += [LeftOut(peer.name, None, _elsewhere(" and ".join(peer.measured_on)), None, None, peer=True)
                 for peer in dict.fromkeys(peer for peer, _ in races) if not peer.is_measured_here]
    subjects += _peers([race for race in races if race[0].is_measured_here], raced, settings.model, progress)
    run = _Run(subjects, settings, progress)
    run.warm_up()
    for number in range(settings.repeat):
        run.measure(number)
    run.sustain()
    benchmarks = tuple(run.summary(series) for series in run.series)
    return BenchResult(settings, run.host, benchmarks, tuple(_compare(run.series)), tuple(left_out),
                       tuple(run.over_limit), run.read_bandwidth, run.limit_kind)


def _race(entry: str, bundles: Sequence[Bundle]) -> tuple[Peer, Bundle | None]:
    """The peer of `NAME` or `NAME=BUNDLE`, and the one bundle that it is to match. Raises LfmEdgeError for others."""
    name, given, path = entry.partition("=")
    peer = peer_named(name)
    like = next((bundle for bundle in bundles if given and bundle.directory == Path(path)), None)
    if given and like is None:
        raise LfmEdgeError(f"--against {entry}: {path} is none of the bundles that are measured")
    return peer, like


def _peers(races: Sequence[tuple[Peer, Bundle | None]], bundles: Sequence[Bundle], model: str | None,
           progress: Callable[[str], None]) -> list[Subject]:
    """Each peer's artifacts for these bundles: one where what it can do comes to the same for all of them."""
    for peer, like in races:
        for bundle in [like] if like else bundles:
            peer.asked(bundle.manifest)  # raises before anything is built
    found = []
    for peer, like in races:
        built: dict[Path, tuple[Built, list[Bundle]]] = {}
        for bundle in [like] if like else bundles:
            made = prepare(peer, bundle, model, progress)
            built.setdefault(made.directory, (made, []))[1].append(bundle)
        for made, matched in built.values():
            name = peer.name if len(built) == 1 and not like else f"{peer.name} like {matched[0].directory.name}"
            found.append(Subject.of_peer(name, made, bundles if like else matched))
    return found


@dataclass
class _Series:
    """Rounds of one bundle or peer with one number of threads, as they come.

    bandwidth: bytes per second that the machine read beside each of them
    """

    subject: Subject
    plan: Plan
    first_load_s: float = 0.0
    rounds: list[Round] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)
    sustained_tps: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        threads = f", {self.plan.threads} threads" if self.plan.threads else ""
        return f"{self.subject.label}{threads}"

    def points(self) -> dict[tuple[str, int], list[Point]]:
        """The points of all rounds, by kind and tokens."""
        return {(made[0].kind, made[0].tokens): list(made)
                for made in zip(*(entry.points for entry in self.rounds), strict=True)}


class _Run:
    """The rounds of one `bench`, as they are made."""

    def __init__(self, subjects: Sequence[Subject], settings: Settings, progress: Callable[[str], None]) -> None:
        self.settings, self.progress, self.host = settings, progress, Host.here()
        self.threads = settings.threads or (usable_cores(),)
        self.series = [_Series(subject, settings.plan(subject, threads if subject.takes_threads else None))
                       for threads in self.threads for subject in subjects
                       if subject.takes_threads or threads == self.threads[0]]
        self.over_limit: list[LeftOut] = []
        self.bandwidth: dict[int, list[float]] = defaultdict(list)
        self.limit_kind = ""
        if settings.memory_limit is not None:
            with memory_limit(settings.memory_limit) as limit:
                self.limit_kind = limit.kind

    def warm_up(self) -> None:
        """Load everything once, without a limit: what a first load on a machine makes, later ones find."""
        first: dict[Path, float] = {}
        for series in self.series:
            subject = series.subject
            if subject.directory not in first:
                self.progress(f"{subject.label}, loaded once")
                made = run_round(Plan(str(subject.directory), series.plan.threads, series.plan.prompts[:1], 1))
                first[subject.directory] = made.load_s + made.first_token_s
            series.first_load_s = first[subject.directory]

    def measure(self, number: int) -> None:
        """One round of each series, in turn, between two looks at how fast the machine reads: that drifts as well."""
        for series in tuple(self.series):
            self.progress(f"{series.name}, round {number + 1} of {self.settings.repeat}")
            before = self._read_bandwidth(series)
            self._round(series, series.plan, lambda made, series=series: series.rounds.append(made))
            series.bandwidth.append((before + self._read_bandwidth(series)) / 2)

    def _read_bandwidth(self, series: _Series) -> float:
        threads = series.plan.threads or self.threads[0]
        measured = read_bandwidth(threads, self.host.cache_bytes)
        self.bandwidth[threads].append(measured)
        return measured

    @property
    def read_bandwidth(self) -> dict[int, Spread]:
        """All that was measured, for each number of threads."""
        return {threads: Spread.of(rates) for threads, rates in self.bandwidth.items()}

    def sustain(self) -> None:
        """The sustained decode of each series, where one is asked for."""
        for series in tuple(self.series) if self.settings.sustained_s else ():
            self.progress(f"{series.name}, {self.settings.sustained_s:g} s of decode")
            plan = Plan(series.plan.directory, series.plan.threads, series.plan.prompts[:1], series.plan.generate,
                        sustained_s=self.settings.sustained_s, chunk=series.plan.chunk)
            self._round(series, plan, lambda made, series=series: setattr(series, "sustained_tps", made.sustained_tps))

    def _round(self, series: _Series, plan: Plan, keep: Callable[[Round], None]) -> None:
        try:
            keep(run_round(plan, self.settings.memory_limit))
        except OverTheLimit as error:  # there is no median of rounds of which some were ended
            self.series.remove(series)
            self.over_limit.append(LeftOut.of(series.subject, str(error)))

    def summary(self, series: _Series) -> Benchmark:
        """What the rounds of a series say together."""
        subject, rounds = series.subject, series.rounds
        manifest, peak = subject.manifest, max(made.peak_bytes for made in rounds)
        filled = max(moment.tokens for moment in rounds[0].moments)
        result = Benchmark(
            bundle=subject.name, target=subject.target, threads=series.plan.threads,
            first_load_s=series.first_load_s, load_s=Spread.of([made.load_s for made in rounds]),
            first_token_s=Spread.of([made.first_token_s for made in rounds]),
            points=tuple(self._point(manifest, series.bandwidth, points) for points in series.points().values()),
            moments=tuple(map(_moment, zip(*(made.moments for made in rounds), strict=True))),
            baseline_bytes=_median(made.baseline.resident for made in rounds), peak_bytes=peak,
            budget_bytes=self.settings.budget_bytes, artifact_bytes=subject.artifact_bytes,
            state_bytes=subject.state_bytes,
            predicted=manifest and predict(manifest, subject.artifact_bytes, filled),
            at_full_context=manifest and predict(manifest, subject.artifact_bytes, subject.context),
            sustained_tps=series.sustained_tps, remedies=(), rounds=tuple(rounds),
            peer=subject.peer, baked=_baked([made.baked for made in rounds if made.baked]))
        if manifest is None or result.within_budget:
            return result
        over = result.full_context_bytes - result.budget_bytes
        return replace(result, remedies=tuple(remedies(manifest, subject.context, over)))

    def _point(self, manifest: Manifest | None, bandwidth: Sequence[float], points: Sequence[Point]) -> PointResult:
        """bandwidth: beside each of the rounds that the points are of"""
        first = points[0]
        needed = manifest and step_bytes(manifest, first.mean_fill)
        reached = needed and Spread.of([point.decode_tps * needed / rate
                                        for point, rate in zip(points, bandwidth, strict=True)])
        fits = needed and needed <= self.host.cache_bytes
        return PointResult(
            kind=first.kind, tokens=first.tokens, prefill_tps=Spread.of([point.prefill_tps for point in points]),
            prefill_s=Spread.of([point.prefill_s for point in points]),
            decode_tps=Spread.of([point.decode_tps for point in points]), step_bytes=needed,
            limit_tps=needed and statistics.median(bandwidth) / needed, efficiency=reached, fits_cache=fits,
            projections=project(needed, reached.median) if needed and not fits else ())


def _baked(times: Sequence[FirstTokenTimes]) -> BakedTimes | None:
    if not times:
        return None
    return BakedTimes(times[0].system_tokens, Spread.of([made.with_s for made in times]),
                      Spread.of([made.without_s for made in times]))


def _moment(moments: Sequence[Moment]) -> Moment:
    """The same moment of all rounds."""
    memories = [moment.memory for moment in moments]
    return Moment(moments[0].after, moments[0].tokens, Memory(
        _median(memory.anonymous for memory in memories), _median(memory.file_backed for memory in memories),
        max(memory.peak for memory in memories)))


def _compare(series: Sequence[_Series]) -> list[Comparison]:
    """Each further bundle over the first, and each over the peers that match it.

    At the points and the numbers of threads that they share.
    """
    found = []
    for threads in dict.fromkeys(entry.plan.threads for entry in series):
        here = [entry for entry in series if entry.plan.threads == threads]
        bundles = [entry for entry in here if entry.subject.peer is None]
        pairs = [(bundles[0], other) for other in bundles[1:]]
        pairs += [(peer, bundle) for bundle in bundles for peer in here if bundle.subject.is_matched_by(peer.subject)]
        for first, other in pairs:
            mine, theirs = first.points(), other.points()
            found += [Comparison(other.subject.name, first.subject.name, threads, what, kind, tokens,
                                 Ratio.of([getattr(point, f"{what}_tps") for point in mine[kind, tokens]],
                                          [getattr(point, f"{what}_tps") for point in theirs[kind, tokens]]))
                      for kind, tokens in mine if (kind, tokens) in theirs for what in ("prefill", "decode")]
    return found


def _median(values: Any) -> int:
    return int(statistics.median(values))


def _with_total(prediction: Prediction | None) -> dict[str, int] | None:
    return prediction and {**asdict(prediction), "total": prediction.total}


def _elsewhere(where: str) -> str:
    return (f"runs on {where}; what computes it on {sys.platform} tells nothing about its speed and "
            "memory. Run this command there")
