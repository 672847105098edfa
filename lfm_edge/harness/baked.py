"""A baked prompt: does a session that starts from it go on as one that prefilled it, and what time does it save?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lfm_edge.bundle.bundle import Bundle
from lfm_edge.errors import LfmEdgeError
from lfm_edge.harness.parity import Agreement, compare
from lfm_edge.harness.stats import timed
from lfm_edge.session.saved import SavedSession
from lfm_edge.session.session import Logits, Session

FOLLOWING = 8  # tokens that are put after the prompt, to see whether its state is right


@dataclass(frozen=True)
class FirstTokenTimes:
    """Seconds from a prompt to the logits of its last token, the system prompt before it.

    system_tokens: of the system prompt
    with_s: the system prompt's state loaded from the bundle; without_s: the system prompt prefilled
    """

    system_tokens: int
    with_s: float
    without_s: float


def first_token_times(session: Session, bundle: Bundle, prompt: Sequence[int]) -> FirstTokenTimes | None:
    """Time to first token of a prompt, with and without the bundle's baked prompt before it.

    session: one over the bundle that has run already
    None where the context does not hold both. Raises LfmEdgeError where the bundle has no baked prompt.
    """
    system = _baked_tokens(bundle)
    if len(system) + len(prompt) > bundle.manifest.state.context:
        return None

    def loaded() -> None:
        session.load(bundle.baked_prompt)
        session.prefill(list(prompt))

    def prefilled() -> None:
        session.reset()
        session.prefill([*system, *prompt])

    return FirstTokenTimes(len(system), timed(loaded)[0], timed(prefilled)[0])


def baked_agreement(session: Session, bundle: Bundle, following: Sequence[int]) -> Agreement:
    """Hold a session that starts from the baked prompt against itself having prefilled the same tokens.

    following: tokens to put after the prompt; as many as fit the context are
    """
    system = _baked_tokens(bundle)
    rest = list(following)[:min(FOLLOWING, session.spec.context - len(system))]

    def go_on() -> list[Logits]:
        return [session.decode(token) for token in rest]

    session.load(bundle.baked_prompt)
    ours = go_on()
    session.reset()
    session.prefill(system)
    return compare("baked prompt", ours, go_on())


def _baked_tokens(bundle: Bundle) -> tuple[int, ...]:
    if bundle.baked_prompt is None:
        raise LfmEdgeError(f"{bundle.directory}: has no baked prompt; export --bake-prompt puts one in")
    return SavedSession.read(bundle.baked_prompt).snapshot.tokens
