"""Parity: does the artifact compute what the quantized reference computes?

A session of the artifact is led through calls, phase by phase, along one text. The logits of every call are compared
with those that the reference gives at that place of the text, which it reads once, from the beginning, without any of
these calls. The reference has the same integers and rounds activations the same way, so what is left between them is
the order of float32 sums, and a tight tolerance catches whatever else is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lfm_edge.session.generation import generate
from lfm_edge.session.scoring import log_softmax
from lfm_edge.session.session import Logits, Session
from lfm_edge.session.state import StateSpec
from lfm_edge.targets import Thresholds

Steps = Sequence[Logits]
DECODE = "decode"


@dataclass(frozen=True)
class Agreement:
    """How close two runs of one phase are.

    logit_error: largest |a - r| over all positions, in standard deviations of the reference's logits
    cosine: smallest cosine between the logits of one position
    kl_divergence: largest KL(reference || artifact) of one position, in nats
    top1_agreement: share of positions whose best token is the same
    """

    phase: str
    positions: int
    logit_error: float
    cosine: float
    kl_divergence: float
    top1_agreement: float

    def within(self, limits: Limits) -> bool:
        """Whether the logits are as close as they must be in this phase. (NaN is not.)"""
        limit = limits.of_phase(self.phase)
        return self.logit_error <= limit.logit_error and self.kl_divergence <= limit.kl_divergence


@dataclass(frozen=True)
class Limit:
    """How close the logits of one phase must be, in the units of `Agreement`."""

    logit_error: float
    kl_divergence: float

    @classmethod
    def of(cls, thresholds: Thresholds, floor: Agreement) -> Limit:
        """The target's thresholds, or a multiple of the model's noise floor in this phase where that is higher.

        KL divergence grows with the square of the logits' error, and so does its multiple.
        """
        factor = thresholds.noise_factor
        return cls(max(thresholds.logit_error, factor * floor.logit_error),
                   max(thresholds.kl_divergence, factor ** 2 * floor.kl_divergence))


@dataclass(frozen=True)
class Limits:
    """How close an artifact must be: each phase by its own limit.

    typical_error: of the median over all positions of all phases
    """

    phases: dict[str, Limit]
    typical_error: float

    @classmethod
    def of(cls, thresholds: Thresholds, floor: Sequence[Agreement], typical_floor: float) -> Limits:
        """From the noise floor, phase by phase, and the median of the noise."""
        return cls({row.phase: Limit.of(thresholds, row) for row in floor},
                   max(thresholds.typical_error, thresholds.noise_factor * typical_floor))

    def of_phase(self, phase: str) -> Limit:
        """Its limit. What is decoded besides, an answer or what follows a baked prompt, has that of `decode`."""
        return self.phases[phase if phase in self.phases else DECODE]


@dataclass(frozen=True)
class GreedyAgreement:
    """How an artifact's greedy answer looks to the reference, which is led along the same tokens.

    exact: tokens that are the reference's best; ties: others whose logit is closer to the best one than two
    logits within the limit can be told apart
    """

    tokens: int
    exact: int
    ties: int

    @property
    def passed(self) -> bool:
        """Whether every token is one of both."""
        return self.exact + self.ties == self.tokens


def kl_divergence(reference: Logits, other: Logits) -> np.ndarray:
    """KL(reference || other) of each row, in nats. Both: [..., vocab]"""
    p, q = log_softmax(reference), log_softmax(other)
    return (np.exp(p) * (p - q)).sum(-1)


def compare(phase: str, artifact: Steps, reference: Steps) -> Agreement:
    """Hold the logits of one phase against the reference's."""
    ours, theirs = np.stack(artifact), np.stack(reference)  # [positions, vocab]
    if not np.isfinite(ours).all():
        return Agreement(phase, len(ours), float("inf"), 0.0, float("inf"), 0.0)
    error = float(_errors(ours, theirs).max())
    divergence = float(max(kl_divergence(theirs, ours).max(), 0.0))
    agreement = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    return Agreement(phase, len(ours), error, float(_cosines(ours, theirs).min()), divergence, agreement)


def _errors(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Largest |a - r| of each position, in standard deviations. Both: [positions, vocab]"""
    return np.abs(ours - theirs).max(-1) / theirs.std(-1)


def _cosines(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """The cosine of each position. Both: [positions, vocab]"""
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    return (ours * theirs).sum(-1) / (np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1))


def compare_all(artifact: Mapping[str, Steps], reference: Mapping[str, Steps]) -> tuple[list[Agreement], float]:
    """Hold the logits of every phase against the reference's: phase by phase, and the median error over all."""
    return ([compare(phase, artifact[phase], reference[phase]) for phase in reference],
            _typical_error(artifact, reference))


def _typical_error(artifact: Mapping[str, Steps], reference: Mapping[str, Steps]) -> float:
    """The median error over all positions of all phases; NaN where a logit is."""
    return float(np.median(np.concatenate([_errors(np.stack(artifact[phase]), np.stack(reference[phase]))
                                           for phase in reference])))


def worst(draws: Sequence[Agreement]) -> Agreement:
    """The largest errors of several comparisons of one phase."""
    return Agreement(draws[0].phase, draws[0].positions, max(row.logit_error for row in draws),
                     min(row.cosine for row in draws), max(row.kl_divergence for row in draws),
                     min(row.top1_agreement for row in draws))


def full_prefill(session: Session, tokens: Sequence[int]) -> Steps:
    """The prompt in one call, which the session cuts into chunks itself."""
    session.reset()
    return [session.prefill(tokens[:_prompt_length(tokens)])]


def chunked_prefill(session: Session, tokens: Sequence[int]) -> Steps:
    """The prompt in calls of uneven lengths, single tokens among them."""
    session.reset()
    steps, start, length = [], 0, 1
    while start < _prompt_length(tokens):
        end = min(start + length, _prompt_length(tokens))
        steps.append(session.prefill(tokens[start:end]))
        start, length = end, length * 3 if length < 60 else 1
    return steps


def decode(session: Session, tokens: Sequence[int]) -> Steps:
    """A prompt, then the rest token by token."""
    session.reset()
    session.prefill(tokens[:_prompt_length(tokens)])
    return [session.decode(token) for token in tokens[_prompt_length(tokens):]]


def after_reset(session: Session, tokens: Sequence[int]) -> Steps:
    """A new conversation after another one: nothing of the first may be left."""
    session.reset()
    session.prefill(tokens[-_prompt_length(tokens) // 2:])
    session.reset()
    return [session.prefill(tokens[:1]), *(session.decode(token) for token in tokens[1:6])]


def after_restore(session: Session, tokens: Sequence[int]) -> Steps:
    """A snapshot, other tokens, and back: the conversation goes on as if nothing had been between."""
    half = _half(tokens)
    session.reset()
    session.prefill(tokens[:half])
    snapshot = session.snapshot()
    session.prefill(tokens[-7:][:session.spec.context - half])
    session.restore(snapshot)
    following = tokens[half:][:8]
    return [session.prefill(following[:3]), *(session.decode(token) for token in following[3:])]


def lookahead(session: Session, tokens: Sequence[int]) -> Steps:
    """Wrong guesses that are taken back, then right ones: the logits of every token of one step."""
    half = _half(tokens)
    session.reset()
    session.prefill(tokens[:half])
    following = tokens[half:][:min(session.scored, session.chunk, 8)]
    wrong = tokens[-len(following):]
    session.prefill_scored(wrong, len(wrong))
    session.take_back()
    return list(session.prefill_scored(following, len(following)))


PHASES: dict[str, Callable[[Session, Sequence[int]], Steps]] = {
    "full prefill": full_prefill, "chunked prefill": chunked_prefill, DECODE: decode,
    "after reset": after_reset, "after restore": after_restore, "lookahead": lookahead,
}
NEEDS_SNAPSHOT = frozenset({"after restore"})
NEEDS_SCORES = frozenset({"lookahead"})  # of more tokens than a step's last


def run_phases(session: Session, tokens: Sequence[int], phases: Sequence[str]) -> dict[str, Steps]:
    """Lead a session through phases; the logits that each call gave. tokens: the text, at least 2 of it"""
    return {phase: PHASES[phase](session, tokens) for phase in phases}


class _Places(Session):
    """A session without a model, which tells of each logit vector after which token of the text it is."""

    def __init__(self, like: Session) -> None:
        super().__init__(StateSpec((), like.spec.context), like.vocab_size, like.chunk)
        self.scored = like.scored

    def _step(self, tokens: list[int]) -> Logits:
        return self._scored_step(tokens, 1)[0]

    def _scored_step(self, tokens: list[int], count: int) -> Logits:
        end = self.position + len(tokens)
        return np.arange(end - count, end)


def places(session: Session, tokens: Sequence[int], phases: Sequence[str]) -> dict[str, list[int]]:
    """Of the logits that `run_phases` gives, phase by phase: after which token of the text each are."""
    return {phase: [int(place) for place in steps]
            for phase, steps in run_phases(_Places(session), tokens, phases).items()}


def greedy_tokens(session: Session, prompt: Sequence[int], count: int) -> list[int]:
    """What a session answers under greedy decoding, from a fresh state."""
    session.reset()
    return list(generate(session, prompt, max_tokens=count))


def follow(reference: Session, prompt: Sequence[int], answer: Sequence[int]) -> Steps:
    """Lead the reference along an answer; the logits from which it would have chosen each token."""
    reference.reset()
    return [reference.prefill(prompt), *(reference.decode(token) for token in answer[:-1])]


def judge_greedy(answer: Sequence[int], reference: Steps, limits: Limits) -> GreedyAgreement:
    """Whether the reference, led along a greedy answer, would have chosen the same tokens."""
    short = [(logits.max() - logits[token]) / logits.std() for token, logits in zip(answer, reference, strict=True)]
    exact = sum(bool(gap == 0) for gap in short)
    within = sum(bool(gap <= 2 * limits.of_phase(DECODE).logit_error) for gap in short)
    return GreedyAgreement(len(answer), exact, within - exact)


def _prompt_length(tokens: Sequence[int]) -> int:
    """How much of the tokens is prompt: most, with 16 (or a quarter, or 1) left to decode."""
    return len(tokens) - max(1, min(16, len(tokens) // 4))


def _half(tokens: Sequence[int]) -> int:
    """Half of the prompt, at least a token."""
    return max(1, _prompt_length(tokens) // 2)
