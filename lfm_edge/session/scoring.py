"""What a session says of given tokens, and many prompts with their shared beginnings prefilled once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from lfm_edge.session.history import token_ids
from lfm_edge.session.sampling import check_finite
from lfm_edge.session.session import Logits, Mark, Session

Tokens = Sequence[int]
Way = TypeVar("Way")
_WORTH_A_MARK = 8  # tokens: a mark copies the conv state and cuts a step in two, which fewer do not repay


@dataclass(frozen=True)
class Visit:
    """A session stands at the end of a prompt.

    index: which prompt; logits: after its last token, None for an empty prompt
    prefilled: how many of its tokens were not in the session already
    """

    index: int
    logits: Logits | None
    prefilled: int


def visit(session: Session, prompts: Sequence[Tokens]) -> Iterator[Visit]:
    """Bring a session to the end of each prompt, in lexicographic order.

    What a prompt shares with those before it is not computed again, where the session can go back. Between two visits
    the session may be led on from where it stands, and rewound to there.

    prompts: all different. Raises as `Session.prefill` does.
    """
    order = sorted(range(len(prompts)), key=lambda index: tuple(prompts[index]))
    shared = [_shared(prompts[one], prompts[other]) for one, other in pairwise(order)]
    marks: list[Mark] = []
    for place, index in enumerate(order):
        prompt = prompts[index]
        kept = shared[place - 1] if place else 0
        marks = [mark for mark in marks if mark.position <= kept]
        if marks:
            session.rewind(marks[-1])
        else:
            session.reset()
        start, logits = session.position, None
        branches = _branches(shared, place, start) if session.holds_all else []
        for end in sorted({*branches, len(prompt)}):
            if end > session.position:
                logits = session.prefill(prompt[session.position:end])
            if end in branches:
                marks.append(session.mark())
        yield Visit(index, logits, len(prompt) - start)


def from_here(session: Session, ways: Iterable[Way]) -> Iterator[Way]:
    """Give one after the other, each with the session where it stands now, however far it has been led on since."""
    ways = list(ways)
    back = _way_back(session) if len(ways) > 1 else None
    for number, way in enumerate(ways):
        if number and back:
            back()
        yield way


def _way_back(session: Session) -> Callable[[], object]:
    """What brings the session back to where it is: a mark, or everything anew where the program keeps the state."""
    if session.holds_all:
        return partial(session.rewind, session.mark())
    tokens = token_ids(session.tokens)

    def again() -> None:
        session.reset()
        if tokens:
            session.prefill(tokens)

    return again


def _branches(shared: Sequence[int], place: int, start: int) -> list[int]:
    """Where prompts that come later leave this one, past `start`: the positions that are worth a mark.

    shared: how many tokens each prompt shares with the next
    """
    positions: list[int] = []
    for length in shared[place:]:
        if length < start + _WORTH_A_MARK:
            break
        if not positions or length < positions[-1]:
            positions.append(length)
    kept: list[int] = []
    for position in reversed(positions):
        if position >= (kept[-1] if kept else start) + _WORTH_A_MARK:
            kept.append(position)
    return kept


def _shared(one: Tokens, other: Tokens) -> int:
    """How many tokens two prompts begin with in common."""
    length = 0
    for left, right in zip(one, other):  # noqa: B905 - as far as the shorter one goes
        if left != right:
            break
        length += 1
    return length


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """float64 [..., vocab]"""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def loglikelihood(session: Session, logits: Logits, tokens: Tokens) -> tuple[float, bool]:
    """How likely `tokens` come next, as the sum of the logarithms of their probabilities, and whether each is the best.

    logits: after what the session has taken; it takes all of `tokens` but the last
    Raises as `Session.prefill` does, and LfmEdgeError where logits are not finite.
    """
    total, best = 0.0, True
    rows: NDArray[np.float32] = logits[None]
    start = 0
    while start < len(tokens):
        check_finite(rows)
        targets = np.asarray(tokens[start:start + len(rows)])
        chosen = log_softmax(rows[:len(targets)])  # [targets, vocab]
        total += float(chosen[np.arange(len(targets)), targets].sum())
        best &= bool((chosen.argmax(axis=-1) == targets).all())
        start += len(targets)
        if start < len(tokens):
            rows = _rows_after(session, tokens[start - 1:-1])
    return total, best


def _rows_after(session: Session, tokens: Tokens) -> NDArray[np.float32]:
    """Take as many of `tokens` as one step tells the logits of; float32 [count, vocab], the logits after each."""
    step = tokens[:max(min(session.scored, session.chunk), 1)]
    if len(step) == 1:  # also where the program keeps its state: such a session tells those of the last one only
        return session.prefill(step)[None]
    return session.prefill_scored(step, len(step))
