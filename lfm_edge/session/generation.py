"""The decode loop over any session: sampling, stop tokens, text as it comes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lfm_edge.checkpoint.tokenizer import TextTokenizer
from lfm_edge.errors import BundleError, ContextFull, LfmEdgeError
from lfm_edge.files import read_text
from lfm_edge.session.history import token_ids
from lfm_edge.session.sampling import Sampling
from lfm_edge.session.saved import Message
from lfm_edge.session.session import Session
from lfm_edge.session.speculation import PromptLookup

GREEDY = Sampling()


def generate(session: Session, prompt: Sequence[int], *, max_tokens: int, stop: Sequence[int] = (),
             sampling: Sampling = GREEDY, seed: int = 0, lookahead: int = 0) -> Iterator[int]:
    """Prefill `prompt` at the session's position, then give one token after the other.

    sampling: how each is chosen; what repeats is what occurs in the whole conversation
    lookahead: most tokens to guess from the conversation so far and check in one step. The tokens are the same
        without, but for logits that differ by no more than the roundings of a step of another length.

    Ends at a stop token (which is not given), after `max_tokens`, or when the context is full. When the iterator ends,
    the session has taken every token given and no other; closed early, at least all but the last. Raises LfmEdgeError
    where the program cannot tell the logits of so many tokens, for a seed below 0, and where logits are not finite.
    """
    if seed < 0:
        raise LfmEdgeError(f"seed is {seed}; it must be at least 0")
    if lookahead and lookahead >= session.scored:
        raise LfmEdgeError(f"a lookahead of {lookahead}: " + (
            "this program tells the logits of a step's last token only" if session.scored == 1 else
            f"at most {session.scored - 1}, as this program tells the logits of {session.scored} tokens of a step"))
    return _generate(session, list(prompt), max_tokens, stop, sampling, np.random.default_rng(seed), lookahead)


def _generate(session: Session, prompt: list[int], max_tokens: int, stop: Sequence[int], sampling: Sampling,
              generator: np.random.Generator, lookahead: int) -> Iterator[int]:
    rows = session.prefill(prompt)[None]  # logits of what comes after none, one, two ... of the guesses
    before, given, guesses = len(session.tokens), [], []
    room, seen = session.spec.context - session.position, set(token_ids(session.tokens))
    lookup = PromptLookup(never=stop)
    lookup.extend(session.tokens if lookahead else [])
    try:
        while True:
            right = 0
            for row, guess in zip(rows, [*guesses, None], strict=True):
                token = sampling.next_token(row, seen, generator)
                if token in stop or len(given) == max_tokens:
                    return
                given.append(token)
                seen.add(token)
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


def text_pieces(decode: Callable[[Sequence[int]], str], tokens: Iterator[int]) -> Iterator[str]:
    """The text of tokens as it becomes final: a character whose bytes are not all there yet waits.

    decode: how tokens become text, such as `TextTokenizer.shown` for people

    Only the last tokens are decoded for each new one: those since a character ended with a token, and those from there
    to the time before, on which their spelling may depend.
    """
    window: list[int] = []
    begun = given = 0  # tokens of the window before its last end of a character; characters of its text already given
    for token in tokens:
        window.append(token)
        text = decode(window)
        ready = len(text.rstrip("\ufffd"))
        if ready > given:
            yield text[given:ready]
            given = ready
            if ready == len(text):
                window = window[begun:]
                begun, given = len(window), len(decode(window))
    rest = decode(window)[given:]
    if rest:
        yield rest


class Chat:
    """A conversation through a chat template, over one session.

    Each turn renders the whole conversation; where the session holds a prefix of it already, only the rest
    is prefilled. What the model said is kept with every marker, of tool calls too.

    baked: the saved session of a system prompt, from which every conversation starts
    system: a system prompt, with which every conversation starts
    tools: JSON schemas of the functions that the model may call
    options: the chat template's own switches, such as one for thinking
    Raises LfmEdgeError where the chat template does not show a system prompt or tools to the model, or has no such
    switch, and where there are two system prompts.
    """

    def __init__(self, session: Session, tokenizer: TextTokenizer, stop: Sequence[int], baked: Path | None = None, *,
                 system: str | None = None, tools: Sequence[Any] | None = None,
                 options: Mapping[str, Any] | None = None) -> None:
        if baked is not None and system is not None:
            raise LfmEdgeError("a system prompt was given, and the bundle starts after one of its own; leave one out")
        self.options = dict(options or {})
        tokenizer.check_options(self.options)
        if tools is not None:
            check_shown(tools, tokenizer)
        self.system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        if system is not None:
            check_system(self.system, tokenizer)
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

    def answer(self, text: str, *, role: str = "user", max_tokens: int, sampling: Sampling = GREEDY, seed: int = 0,
               lookahead: int = 0) -> Iterator[str]:
        """Say something; the answer's text as it comes. The options are those of `generate`.

        role: `tool` for what a function gave that the model called
        Raises ContextFull where the conversation no longer fits, LfmEdgeError as `generate` does; it is then as it was
        before.
        """
        messages = [*self.messages, {"role": role, "content": text}]
        tokens = self.tokenizer.chat(messages, tools=self.tools, options=self.options)
        if len(tokens) > self.session.spec.context:
            raise ContextFull(f"the conversation is {len(tokens)} tokens long, the context holds "
                              f"{self.session.spec.context}")
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
                          sampling=sampling, seed=seed, lookahead=lookahead)
        yield from text_pieces(self.tokenizer.shown, remember(stream))
        self.messages = [*messages, self.tokenizer.message(said)]

    def _start(self) -> list[Message]:
        """Bring the session to where a conversation starts; the messages that are part of it by then."""
        if self.baked is not None:
            return self.session.load(self.baked)
        self.session.reset()
        return list(self.system)

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


def check_system(system: Sequence[Message], tokenizer: TextTokenizer) -> None:
    """Raises LfmEdgeError where the chat template writes the same with a system prompt as without."""
    asked: list[Message] = [{"role": "user", "content": "."}]
    if tokenizer.chat([*system, *asked]) == tokenizer.chat(asked):
        raise LfmEdgeError("the chat template of this bundle does not show a system prompt to the model; leave it out")


def check_shown(tools: Sequence[Any], tokenizer: TextTokenizer) -> None:
    """Raises LfmEdgeError where the chat template writes the same with `tools` as without."""
    asked = [{"role": "user", "content": "."}]
    if tokenizer.chat(asked, tools=tools) == tokenizer.chat(asked):
        raise LfmEdgeError("tools: the chat template of this bundle does not show them to the model; leave them out")
