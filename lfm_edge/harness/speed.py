"""Speed and memory of a bundle, each round in a fresh process, bundles taken in turn.

A round imports the runtime, notes its own memory (the baseline), loads the bundle, answers one prompt
cold, and then times prefill and decode. Rounds of several bundles alternate, so that a machine whose speed
drifts is the same machine for all of them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lfm_edge.bundle import Bundle
from lfm_edge.errors import LfmEdgeError
from lfm_edge.harness.memory import Memory, forbid_locking, read_memory, reset_peak
from lfm_edge.sample import sample_tokens


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Round:
    """One fresh process.

    load_s: from nothing to a session, weights packed; first_token_s: the prompt's prefill, cold
    prefill_tps, decode_tps: tokens per second, warm
    loaded, peak: memory above the process with its runtime imported and nothing loaded
    """

    load_s: float
    first_token_s: float
    prefill_tps: float
    decode_tps: float
    loaded: Memory
    peak: Memory
    baseline: Memory


@dataclass(frozen=True)
class Benchmark:
    """All rounds of one bundle."""

    bundle: str
    target: str
    prompt_tokens: int
    generate_tokens: int
    threads: int
    load_s: Spread
    first_token_s: Spread
    prefill_tps: Spread
    decode_tps: Spread
    peak_bytes: int
    anonymous_bytes: int
    file_backed_bytes: int
    baseline_bytes: int
    artifact_bytes: int
    state_bytes: int
    budget_bytes: int

    @property
    def within_budget(self) -> bool:
        """Whether the peak above the empty process is at most the budget."""
        return self.peak_bytes <= self.budget_bytes

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "within_budget": self.within_budget}


@dataclass(frozen=True)
class NotMeasured:
    """A bundle whose speed and memory this machine cannot tell, and why; its sizes are what they are anywhere."""

    bundle: str
    target: str
    reason: str
    artifact_bytes: int
    state_bytes: int

    @classmethod
    def of(cls, bundle: Bundle) -> NotMeasured:
        """What to say of a bundle whose target is not measured here."""
        reason = (f"runs on {bundle.target.runs_on}; what computes it on {sys.platform} tells nothing about its speed "
                  "and memory. Run this command there")
        return cls(str(bundle.directory), bundle.manifest.target, reason, bundle.artifact_bytes,
                   bundle.manifest.state.nbytes)


def bench(bundles: Sequence[Bundle], *, prompt_tokens: int = 512, generate_tokens: int = 64, threads: int | None = None,
          repeat: int = 3, budget: int = 10**9, progress: Callable[[str], None] = lambda name: None) -> list[Benchmark]:
    """Measure bundles in turn, `repeat` rounds each.

    threads: of the runtime; None for all cores of this machine
    budget: bytes that the peak above an empty process may reach
    Raises LfmEdgeError where the prompt and the answer do not fit a bundle's context, or a round fails.
    """
    threads = threads or os.cpu_count() or 1
    for bundle in bundles:
        context = bundle.manifest.state.context
        if prompt_tokens + generate_tokens > context:
            raise LfmEdgeError(f"{bundle.directory}: {prompt_tokens} prompt and {generate_tokens} generated tokens do "
                               f"not fit its context of {context}; give smaller --prompt-tokens or --generate-tokens")
    for bundle in bundles:
        progress(f"{bundle.directory.name}, loaded once")  # what a first load on a machine makes, later ones find
        _in_child(bundle, "-c", "from lfm_edge.bundle import Bundle; "
                                f"Bundle.open({str(bundle.directory)!r}, check=False).session()")
    rounds: list[list[Round]] = [[] for _ in bundles]
    for number in range(repeat):
        for bundle, results in zip(bundles, rounds, strict=True):
            progress(f"{bundle.directory.name}, round {number + 1} of {repeat}")
            results.append(_round_in_child(bundle, prompt_tokens, generate_tokens, threads))
    return [_summary(bundle, results, prompt_tokens, generate_tokens, threads, budget)
            for bundle, results in zip(bundles, rounds, strict=True)]


def _round_in_child(bundle: Bundle, prompt_tokens: int, generate_tokens: int, threads: int) -> Round:
    lines = _in_child(bundle, "-m", "lfm_edge.harness.speed", str(bundle.directory.resolve()),
                      str(prompt_tokens), str(generate_tokens), str(threads)).splitlines()
    if not lines:
        raise LfmEdgeError(f"{bundle.directory}: the measuring process printed nothing")
    raw = json.loads(lines[-1])
    return Round(**{**raw, **{name: Memory(**raw[name]) for name in ("loaded", "peak", "baseline")}})


def _in_child(bundle: Bundle, *arguments: str) -> str:
    """Standard output of a fresh Python process."""
    finished = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if finished.returncode:
        reason = (finished.stderr.strip().splitlines() or ["no output"])[-1]
        raise LfmEdgeError(f"{bundle.directory}: the measuring process ended with {finished.returncode}: {reason}")
    return finished.stdout.strip()


def measure_round(directory: Path, prompt_tokens: int, generate_tokens: int, threads: int) -> Round:
    """One round, in this process, which should be fresh."""
    bundle = Bundle.open(directory, check=False)  # the caller has checked it; reading it here would warm the cache
    prompt = sample_tokens(bundle.tokenizer(), bundle.manifest.config.vocab_size, prompt_tokens)
    bundle.target.runtime()
    forbid_locking()
    reset_peak()
    baseline = read_memory()
    start = time.perf_counter()
    session = bundle.session(threads if bundle.target.takes_threads else None)
    loaded_at = time.perf_counter()
    loaded = read_memory().above(baseline)
    session.prefill(prompt)
    first_at = time.perf_counter()
    session.reset()
    warm_from = time.perf_counter()
    logits = session.prefill(prompt)
    prefilled_at = time.perf_counter()
    for _ in range(generate_tokens):
        logits = session.decode(int(logits.argmax()))
    decoded_at = time.perf_counter()
    return Round(
        load_s=loaded_at - start, first_token_s=first_at - loaded_at,
        prefill_tps=prompt_tokens / (prefilled_at - warm_from),
        decode_tps=generate_tokens / (decoded_at - prefilled_at),
        loaded=loaded, peak=read_memory().above(baseline), baseline=baseline)


def _summary(bundle: Bundle, rounds: list[Round], prompt_tokens: int, generate_tokens: int, threads: int,
             budget: int) -> Benchmark:
    return Benchmark(
        bundle=str(bundle.directory), target=bundle.manifest.target, prompt_tokens=prompt_tokens,
        generate_tokens=generate_tokens, threads=threads,
        load_s=Spread.of([r.load_s for r in rounds]), first_token_s=Spread.of([r.first_token_s for r in rounds]),
        prefill_tps=Spread.of([r.prefill_tps for r in rounds]), decode_tps=Spread.of([r.decode_tps for r in rounds]),
        peak_bytes=max(r.peak.peak for r in rounds),
        anonymous_bytes=int(statistics.median(r.peak.anonymous for r in rounds)),
        file_backed_bytes=int(statistics.median(r.peak.file_backed for r in rounds)),
        baseline_bytes=int(statistics.median(r.baseline.resident for r in rounds)),
        artifact_bytes=bundle.artifact_bytes, state_bytes=bundle.manifest.state.nbytes, budget_bytes=budget)


def _main() -> None:
    directory, prompt_tokens, generate_tokens, threads = sys.argv[1:]
    result = measure_round(Path(directory), int(prompt_tokens), int(generate_tokens), int(threads))
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    _main()
