"""The decode loop over any session: sampling, stop tokens, text as it comes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lfm_edge.checkpoint.tokenizer import TextTokenizer
from lfm_edge.errors import BundleError, ContextFull, LfmEdgeError
from lfm_edge.files import read_text
from lfm_edge.session.saved import Message
from lfm_edge.session.session import Logits, Session
from lfm_edge.session.speculation import PromptLookup


def sample(logits: Logits, temperature: float, generator: np.random.Generator) -> int:
    """The next token: the best one at temperature 0, drawn from softmax(logits / temperature) above.

    logits: float32 [vocab]
    Raises LfmEdgeError where the best of them is no finite number.
    """
    if not np.isfinite(logits.max()):  # of NaN, too, there is a first best
        raise LfmEdgeError("the logits are not finite: numbers overflow in this program; export with another "
                           "--compute-dtype, such as float32")
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
    where the program cannot tell the logits of so many tokens, for a temperature or a seed below 0, and where logits
    are not finite.
    """
    if not 0 <= temperature < math.inf or seed < 0:
        raise LfmEdgeError(f"temperature {temperature}, seed {seed}: both must be at least 0, and finite")
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
    """The text of tokens for people as it becomes final: a character whose bytes are not all there yet waits."""
    ids: list[int] = []
    shown = 0
    for token in tokens:
        ids.append(token)
        text = tokenizer.shown(ids)
        ready = len(text) if not text.endswith("\ufffd") else len(text.rstrip("\ufffd"))
        if ready > shown:
            yield text[shown:ready]
            shown = ready
    rest = tokenizer.shown(ids)[shown:]
    if rest:
        yield rest


class Chat:
    """A conversation through a chat template, over one session.

    Each turn renders the whole conversation; where the session holds a prefix of it already, only the rest
    is prefilled. What the model said is kept with every marker, of tool calls too.

    baked: the saved session of a system prompt, from which every conversation starts
    tools: JSON schemas of the functions that the model may call
    Raises LfmEdgeError where the chat template does not show tools to the model.
    """

    def __init__(self, session: Session, tokenizer: TextTokenizer, stop: Sequence[int],
                 baked: Path | None = None, tools: Sequence[Any] | None = None) -> None:
        if tools is not None:
            check_shown(tools, tokenizer)
        self.session = session
        self.tokenizer = tokenizer
        self.stop = stop
        self.baked = baked
        self.tools = tools
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

    def answer(self, text: str, *, role: str = "user", max_tokens: int, temperature: float = 0.0, seed: int = 0,
               lookahead: int = 0) -> Iterator[str]:
        """Say something; the answer's text as it comes. The options are those of `generate`.

        role: `tool` for what a function gave that the model called
        Raises ContextFull where the conversation no longer fits, LfmEdgeError as `generate` does; it is then as it was
        before.
        """
        messages = [*self.messages, {"role": role, "content": text}]
        tokens = self.tokenizer.chat(messages, tools=self.tools)
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
        self.messages = [*messages, self.tokenizer.message(said)]

    def _start(self) -> list[Message]:
        """Bring the session to where a conversation starts; the messages that are part of it by then."""
        if self.baked is not None:
            return self.session.load(self.baked)
        self.session.reset()
        return []

    def _is_begun(self, tokens: list[int]) -> bool:
        """Whether the session holds a beginning of `tokens`, and not all of them. A given embedding is no token."""
        held = self.session.tokens
        return not self.session.broken and len(held) < len(tokens) and held == tokens[:len(held)]


def read_tools(path: Path) -> list[Any]:
    """JSON schemas of functions from a file that holds a list of them, or one.

    Raises LfmEdgeError where the file is missing, no JSON, or holds something else.
    """
    try:
        raw = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise LfmEdgeError(f"{path}: not JSON ({error})") from None
    tools = raw if isinstance(raw, list) else [raw]
    for tool in tools or [None]:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise LfmEdgeError(f"{path}: {json.dumps(tool)[:40]} is no function; expected a list of objects with name, "
                               "description and parameters")
    return tools


def check_shown(tools: Sequence[Any], tokenizer: TextTokenizer) -> None:
    """Raises LfmEdgeError where the chat template writes the same with `tools` as without."""
    asked = [{"role": "user", "content": "."}]
    if tokenizer.chat(asked, tools=tools) == tokenizer.chat(asked):
        raise LfmEdgeError("tools: the chat template of this bundle does not show them to the model; leave them out")
