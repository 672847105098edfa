"""One round of `bench`: what runs in the fresh process, and the process itself.

The child is told a `Plan` as JSON in its argument and answers with lines of JSON: what it begins to do, so that the
parent knows where it was if it is killed, and at the end the `Round`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lfm_edge.bundle.bundle import Bundle
from lfm_edge.calibration.sample import sample_tokens
from lfm_edge.checkpoint.tokenizer import TextTokenizer
from lfm_edge.errors import LfmEdgeError
from lfm_edge.harness.baked import FirstTokenTimes, first_token_times
from lfm_edge.harness.limit import MemoryLimit, memory_limit
from lfm_edge.harness.memory import Memory, forbid_locking, read_memory, reset_peak
from lfm_edge.harness.peers import PEERS
from lfm_edge.harness.peers.peer import PEER_FILE, Built
from lfm_edge.harness.stats import timed
from lfm_edge.session.session import Logits, Session

PROMPT, FILL = "prompt", "fill"
_WINDOWS = 10  # of a sustained decode, at most; none is shorter than a second
_SHORTEST_WINDOW = 1.0


@dataclass(frozen=True)
class Plan:
    """What a round measures.

    threads: of the runtime; None leaves them to it
    prompts: lengths to prefill from an empty context, each followed by `generate` decoded tokens
    fills: context fills at which a step of prefill and `generate` tokens of decode end
    chunk: most tokens of that step; the session's own where None is given
    sustained_s: seconds to decode without a pause; 0 for not at all
    baked: whether the time to first token after a baked prompt is measured, where the bundle has one
    """

    directory: str
    threads: int | None
    prompts: tuple[int, ...]
    generate: int
    fills: tuple[int, ...] = ()
    sustained_s: float = 0.0
    chunk: int | None = None
    baked: bool = False

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Plan:
        """Read it back from JSON."""
        return cls(**{**raw, "prompts": tuple(raw["prompts"]), "fills": tuple(raw["fills"])})


@dataclass(frozen=True)
class Point:
    """Speed with some context before.

    kind: `prompt` (`tokens` were prefilled from an empty context, and decoding follows) or `fill` (the last step of
        prefill and the decoding together end at `tokens`)
    prefill_tokens, prefill_s: prefill, to the logits of the last token; decode_tokens, decode_s: decode
    """

    kind: str
    tokens: int
    prefill_tokens: int
    prefill_s: float
    decode_tokens: int
    decode_s: float

    @property
    def prefill_tps(self) -> float:
        """Tokens per second of the prefill."""
        return self.prefill_tokens / self.prefill_s

    @property
    def decode_tps(self) -> float:
        """Tokens per second of the decode."""
        return self.decode_tokens / self.decode_s

    @property
    def mean_fill(self) -> float:
        """Positions that a step of the decode found filled, on average."""
        return self.tokens + (self.decode_tokens / 2 if self.kind == PROMPT else -self.decode_tokens / 2)


@dataclass(frozen=True)
class Moment:
    """Memory above the empty process after something was done, with `tokens` positions of the context filled.

    Its peak is that of the time since the moment before.
    """

    after: str
    tokens: int
    memory: Memory


@dataclass(frozen=True)
class Round:
    """What one fresh process measured.

    load_s: from nothing to a session, weights packed; first_token_s: the first prompt's prefill after that, cold
    baseline: memory of the process with its runtime imported and nothing loaded
    sustained_tps: tokens per second of each window of the sustained decode
    baked: of the first prompt, where the bundle has a baked one and the context holds both
    """

    load_s: float
    first_token_s: float
    points: tuple[Point, ...]
    moments: tuple[Moment, ...]
    baseline: Memory
    sustained_tps: tuple[float, ...] = ()
    baked: FirstTokenTimes | None = None

    @property
    def peak_bytes(self) -> int:
        """Most memory above the empty process at any time."""
        return max(moment.memory.peak for moment in self.moments)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Round:
        """Read it back from JSON."""
        points = tuple(Point(**point) for point in raw["points"])
        moments = tuple(Moment(**{**moment, "memory": Memory(**moment["memory"])}) for moment in raw["moments"])
        return cls(raw["load_s"], raw["first_token_s"], points, moments, Memory(**raw["baseline"]),
                   tuple(raw["sustained_tps"]), raw["baked"] and FirstTokenTimes(**raw["baked"]))


class OverTheLimit(LfmEdgeError):
    """A measuring process did not live within its hard memory limit."""


def run_round(plan: Plan, limit_bytes: int | None = None) -> Round:
    """Measure in a fresh process, under a hard limit of memory above an empty process where one is given.

    Raises OverTheLimit where the limit ended it, LfmEdgeError where anything else did.
    """
    if limit_bytes is None:
        return _in_child(plan, None)
    with memory_limit(limit_bytes) as limit:
        return _in_child(plan, limit)


def _in_child(plan: Plan, limit: MemoryLimit | None) -> Round:
    arguments = json.dumps({"plan": asdict(plan), "limit": asdict(limit) if limit else None})
    finished = subprocess.run([sys.executable, "-m", "lfm_edge.harness.round", arguments], capture_output=True,
                              text=True, check=False)
    answers = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
    if answers and "round" in answers[-1]:
        return Round.from_dict(answers[-1]["round"])
    doing = answers[-1]["begins"] if answers else "start"
    if limit and limit.was_hit(finished.returncode):
        raise OverTheLimit(f"{plan.directory}: does not live within {limit.nbytes / 1e6:,.1f} MB: the system ended it "
                           f"by {limit.kind} at: {doing}")
    reason = (finished.stderr.strip().splitlines() or ["no output"])[-1]
    raise LfmEdgeError(f"{plan.directory}: the measuring process ended with {finished.returncode} at: {doing} "
                       f"({reason})")


class _Recorder:
    """Notes memory, and says what begins."""

    def __init__(self) -> None:
        reset_peak()
        self.baseline = read_memory()
        self.moments: list[Moment] = []

    def begin(self, what: str) -> None:
        print(json.dumps({"begins": what}), flush=True)

    def note(self, after: str, tokens: int) -> None:
        self.moments.append(Moment(after, tokens, read_memory().above(self.baseline)))
        reset_peak()


@dataclass(frozen=True)
class _Program:
    """What a round measures: a bundle, or what a peer has built (bundle: None)."""

    tokenizer: TextTokenizer
    vocab_size: int
    import_runtime: Callable[[], Any]
    open_session: Callable[[], Session]
    bundle: Bundle | None = None


def _opened(plan: Plan) -> _Program:
    directory = Path(plan.directory)
    if (directory / PEER_FILE).is_file():
        built = Built.read(directory)
        peer = PEERS[built.peer]
        return _Program(built.tokenizer(), built.config.vocab_size, peer.import_runtime,
                        lambda: peer.open_session(built, plan.threads, plan.chunk or 1))
    bundle = Bundle.open(directory, check=False)  # the parent has checked it; reading it would warm the cache
    return _Program(bundle.tokenizer(), bundle.manifest.config.vocab_size, bundle.runtime.module,
                    lambda: bundle.session(plan.threads), bundle)


def measure_round(plan: Plan, limit: MemoryLimit | None = None) -> Round:
    """One round, in this process, which should be fresh."""
    program = _opened(plan)
    prompt = sample_tokens(program.tokenizer, program.vocab_size, max(plan.prompts))
    program.import_runtime()
    forbid_locking()
    recorder = _Recorder()
    if limit:
        limit.enter()
    recorder.begin("load")
    load_s, session = timed(program.open_session)
    recorder.note("load", 0)
    recorder.begin("first prefill")
    first_token_s, _ = timed(lambda: session.prefill(prompt[:plan.prompts[0]]))
    recorder.note("first prefill", session.position)
    points = [_at_prompt(session, prompt[:length], plan.generate, recorder) for length in plan.prompts]
    points += [_at_fill(session, prompt, fill, plan, recorder) for fill in plan.fills]
    sustained = _sustained(session, prompt[:plan.prompts[0]], plan, recorder) if plan.sustained_s else ()
    baked = None
    if plan.baked and program.bundle and program.bundle.baked_prompt:
        recorder.begin("first token after the baked prompt")
        baked = first_token_times(session, program.bundle, prompt[:plan.prompts[0]])
    return Round(load_s, first_token_s, tuple(points), tuple(recorder.moments), recorder.baseline, sustained, baked)


def _at_prompt(session: Session, prompt: list[int], generate: int, recorder: _Recorder) -> Point:
    session.reset()
    recorder.begin(f"prefill of {len(prompt)} tokens")
    return _point(session, PROMPT, len(prompt), prompt, generate, recorder)


def _at_fill(session: Session, prompt: list[int], fill: int, plan: Plan, recorder: _Recorder) -> Point:
    """One step of prefill and the decode, which end with `fill` positions filled."""
    part = prompt[:min(plan.chunk or session.chunk, fill - plan.generate)]
    recorder.begin(f"fill of {fill} tokens")
    session.stand_at(fill - plan.generate - len(part))
    reset_peak()  # what it takes to get there is not measured
    return _point(session, FILL, fill, part, plan.generate, recorder)


def _point(session: Session, kind: str, tokens: int, part: list[int], generate: int, recorder: _Recorder) -> Point:
    prefill_s, logits = timed(lambda: session.prefill(part))
    recorder.note("prefill", session.position)
    decode_s, _ = timed(lambda: _decode(session, logits, generate))
    recorder.note("decode", session.position)
    return Point(kind, tokens, len(part), prefill_s, generate, decode_s)


def _sustained(session: Session, prompt: list[int], plan: Plan, recorder: _Recorder) -> tuple[float, ...]:
    """Tokens per second of each window, decoding on and on over the same positions."""
    recorder.begin("sustained decode")
    session.reset()
    logits = session.prefill(prompt)
    start, window = session.position, max(plan.sustained_s / _WINDOWS, min(plan.sustained_s, _SHORTEST_WINDOW))
    speeds = []
    for _ in range(round(plan.sustained_s / window)):
        spent, tokens = 0.0, 0
        while spent < window:
            if session.position == start + plan.generate:
                session.stand_at(start)  # what it decodes does not matter, only that it does
            seconds, logits = timed(lambda last=logits: session.decode(int(last.argmax())))
            spent += seconds
            tokens += 1
        speeds.append(tokens / spent)
    recorder.note("sustained decode", session.position)
    return tuple(speeds)


def _decode(session: Session, logits: Logits, count: int) -> Logits:
    for _ in range(count):
        logits = session.decode(int(logits.argmax()))
    return logits


def _main() -> None:
    task = json.loads(sys.argv[1])
    limit = MemoryLimit(**task["limit"]) if task["limit"] else None
    print(json.dumps({"round": asdict(measure_round(Plan.from_dict(task["plan"]), limit))}))


if __name__ == "__main__":
    _main()
