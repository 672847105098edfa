"""The decode loop over any session: sampling, stop tokens, text as it comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from lfm_edge.errors import ContextFull
from lfm_edge.session import Logits, Session
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
             temperature: float = 0.0, seed: int = 0) -> Iterator[int]:
    """Prefill `prompt` at the session's position, then give one token after the other.

    Ends at a stop token (which is not given), after `max_tokens`, or when the context is full. Every token
    given is in the session's state when the next one is asked for, or when the iterator ends; a stop token
    is not.
    """
    generator = np.random.default_rng(seed)
    logits = session.prefill(prompt)
    for _ in range(max_tokens):
        token = sample(logits, temperature, generator)
        if token in stop:
            return
        yield token
        if session.position == session.spec.context:
            return
        logits = session.decode(token)


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
    """

    def __init__(self, session: Session, tokenizer: TextTokenizer, stop: Sequence[int]) -> None:
        self.session = session
        self.tokenizer = tokenizer
        self.stop = stop
        self.messages: list[dict[str, str]] = []
        self.held: list[int] = []

    def reset(self) -> None:
        """Begin a new conversation."""
        self.session.reset()
        self.messages, self.held = [], []

    def answer(self, text: str, *, max_tokens: int, temperature: float = 0.0, seed: int = 0) -> Iterator[str]:
        """Say something; the answer's text as it comes.

        Raises ContextFull where the conversation no longer fits; it is then as it was before.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        tokens = self.tokenizer.chat(messages)
        if len(tokens) > self.session.spec.context:
            raise ContextFull(f"the conversation is {len(tokens)} tokens long, the context holds "
                              f"{self.session.spec.context}; /reset begins anew")
        if self.held != tokens[:len(self.held)] or len(self.held) == len(tokens):
            self.session.reset()
            self.held = []
        said: list[int] = []

        def remember(stream: Iterator[int]) -> Iterator[int]:
            for token in stream:
                said.append(token)
                yield token

        stream = generate(self.session, tokens[len(self.held):], max_tokens=max_tokens, stop=self.stop,
                          temperature=temperature, seed=seed)
        yield from text_pieces(self.tokenizer, remember(stream))
        self.held = [*tokens, *said][:self.session.position]
        self.messages = [*messages, {"role": "assistant", "content": self.tokenizer.decode(said)}]
