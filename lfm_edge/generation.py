"""The decode loop over any session: sampling, stop tokens, text as it comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lfm_edge.errors import BundleError, ContextFull, LfmEdgeError
from lfm_edge.saved import Message
from lfm_edge.session import Logits, Session
from lfm_edge.speculation import PromptLookup
from lfm_edge.tokenizer import TextTokenizer


def sample(logits: Logits, temperature: float, generator: np.random.Generator) -> int:
    """The next token: the best one at temperature 0, drawn from softmax(logits / temperature) above.

    logits: float32 [vocab]
    """
    if temperature == 0.0:
        return int(logits.argmax())
    scaled = (logits - logits.max()).astype(np.float64) / temperature
    weights = np.exp(scaled)
    return int(generator.choice(len(weights), p=weights / weights.sum()))


def generate(session: Session, prompt: Sequence[int], *, max_tokens: int, stop: Sequence[int] = (),
             temperature: float = 0.0, seed: int = 0, lookahead: int = 0) -> Iterator[int]:
    """Prefill `prompt` at the session's position, then give one token after the other.

    lookahead: most tokens to guess from the conversation so far and check in one step. The tokens are the same
        without, but for logits that differ by no more than the roundings of a step of another length.

    Ends at a stop token (which is not given), after `max_tokens`, or when the context is full. When the iterator ends,
    the session has taken every token given and no other; closed early, at least all but the last. Raises LfmEdgeError
    where the program cannot tell the logits of so many tokens.
    """
    if lookahead and lookahead >= session.scored:
        raise LfmEdgeError(f"a lookahead of {lookahead}: " + (
            "this program tells the logits of a step's last token only" if session.scored == 1 else
            f"at most {session.scored - 1}, as this program tells the logits of {session.scored} tokens of a step"))
    return _generate(session, list(prompt), max_tokens, stop, temperature, np.random.default_rng(seed), lookahead)


def _generate(session: Session, prompt: list[int], max_tokens: int, stop: Sequence[int], temperature: float,
              generator: np.random.Generator, lookahead: int) -> Iterator[int]:
    rows = session.prefill(prompt)[None]  # logits of what comes after none, one, two ... of the guesses
    before, given, guesses = len(session.tokens), [], []
    room = session.spec.context - session.position
    lookup = PromptLookup(never=stop)
    lookup.extend(session.tokens if lookahead else [])
    try:
        while True:
            right = 0
            for row, guess in zip(rows, [*guesses, None], strict=True):
                token = sample(row, temperature, generator)
                if token in stop or len(given) == max_tokens:
                    return
                given.append(token)
                yield token
                if len(given) > room:
                    return
                lookup.extend([token] if lookahead else [])
                if token != guess:
                    break
                right += 1
            if guesses:
                lookup.hear(right > 0)
            if right < len(guesses):
                session.take_back()  # with the wrong guess the right ones, which come again with what follows them
            step = given[len(session.tokens) - before:]
            most = min(lookahead + 1 - len(step), max_tokens - len(given) - 1, room - len(given))
            guesses = lookup.guess(most)
            rows = session.prefill_scored(step + guesses, len(guesses) + 1) if guesses else session.prefill(step)[None]
    finally:
        taken = session.tokens[before:]
        if taken != given[:len(taken)]:
            session.take_back()
            session.prefill(given[len(session.tokens) - before:])


def text_pieces(tokenizer: TextTokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """The text of tokens as it becomes final: a character whose bytes are not all there yet waits."""
    ids: list[int] = []
    shown = 0
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        ready = len(text) if not text.endswith("\ufffd") else len(text.rstrip("\ufffd"))
        if ready > shown:
            yield text[shown:ready]
            shown = ready
    rest = tokenizer.decode(ids)[shown:]
    if rest:
        yield rest


class Chat:
    """A conversation through a chat template, over one session.

    Each turn renders the whole conversation; where the session holds a prefix of it already, only the rest
    is prefilled.

    baked: the saved session of a system prompt, from which every conversation starts
    """

    def __init__(self, session: Session, tokenizer: TextTokenizer, stop: Sequence[int],
                 baked: Path | None = None) -> None:
        self.session = session
        self.tokenizer = tokenizer
        self.stop = stop
        self.baked = baked
        self.messages: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Begin a new conversation."""
        self.messages = self._start()

    def save(self, path: Path) -> None:
        """Write the conversation to a file. Raises LfmEdgeError as `Session.save` does."""
        self.session.save(path, self.messages)

    def load(self, path: Path) -> None:
        """Go on with a saved conversation.

        Raises LfmEdgeError as `Session.load` does, and for a session that is of no conversation.
        """
        messages = self.session.load(path)
        if self.session.tokens and not messages:
            self.reset()
            raise BundleError(f"{path}: a saved session without a conversation; `chat` cannot go on with it")
        self.messages = messages

    @contextmanager
    def kept_in(self, file: Path | None) -> Iterator[bool]:
        """Go on with the conversation in a file, if there is one, and save it there however the block ends.

        Gives whether there was one. A file that is not there is written at once: what cannot be saved is refused
        before anything is said. What is saved is the conversation after its last whole turn; where an interrupted
        answer has left a broken session, without its state, which is then computed when the conversation goes on.
        """
        if file is None:
            yield False
            return
        goes_on = file.exists()
        if goes_on:
            self.load(file)
        else:
            self.save(file)
        try:
            yield goes_on
        finally:
            if self.session.broken:
                self._start()
            self.save(file)

    def answer(self, text: str, *, max_tokens: int, temperature: float = 0.0, seed: int = 0,
               lookahead: int = 0) -> Iterator[str]:
        """Say something; the answer's text as it comes. The options are those of `generate`.

        Raises ContextFull where the conversation no longer fits; it is then as it was before.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        tokens = self.tokenizer.chat(messages)
        if len(tokens) > self.session.spec.context:
            raise ContextFull(f"the conversation is {len(tokens)} tokens long, the context holds "
                              f"{self.session.spec.context}; /reset begins anew")
        if not self._is_begun(tokens):
            self._start()
        if not self._is_begun(tokens):
            self.session.reset()
        said: list[int] = []

        def remember(stream: Iterator[int]) -> Iterator[int]:
            for token in stream:
                said.append(token)
                yield token

        stream = generate(self.session, tokens[self.session.position:], max_tokens=max_tokens, stop=self.stop,
                          temperature=temperature, seed=seed, lookahead=lookahead)
        yield from text_pieces(self.tokenizer, remember(stream))
        self.messages = [*messages, {"role": "assistant", "content": self.tokenizer.decode(said)}]

    def _start(self) -> list[Message]:
        """Bring the session to where a conversation starts; the messages that are part of it by then."""
        if self.baked is not None:
            return self.session.load(self.baked)
        self.session.reset()
        return []

    def _is_begun(self, tokens: list[int]) -> bool:
        """Whether the session holds a beginning of `tokens`, and not all of them."""
        held = self.session.tokens
        return not self.session.broken and len(held) < len(tokens) and held == tokens[:len(held)]
