"""A session: one conversation's position and state, over any runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lfm_edge.errors import BundleError, ContextFull, LfmEdgeError
from lfm_edge.saved import Message, Origin, SavedSession
from lfm_edge.state import APPEND, Snapshot, StateSpec, StateTensor

Logits = NDArray[np.float32]


class Session(ABC):
    """One conversation.

    The two ways of giving tokens agree: `prefill(a + b)` leaves the session where `prefill(a)`, then
    `prefill(b)` or a `decode` for each token of b would. A call that raises leaves it unchanged.

    vocab_size: logits that a step gives; chunk: most tokens that one step takes
    held: the tensors of the state that the session has; all of them, unless the program keeps some
    tokens: all that were taken since the last reset, `position` of them
    origin: what a state must come from for this session to go on with it; None where no bundle told
    arithmetic: the type that it computes in
    remark: what `verify` must say about who computes, where that is not what computes on the device
    scored: of how many of a step's last tokens `prefill_scored` tells the logits
    """

    arithmetic = "float32"
    remark = ""
    scored = 1

    def __init__(self, spec: StateSpec, vocab_size: int, chunk: int,
                 held: tuple[StateTensor, ...] | None = None) -> None:
        self.spec = spec
        self.vocab_size = vocab_size
        self.chunk = chunk
        self.held = spec.tensors if held is None else held
        self.position = 0
        self.tokens: list[int] = []
        self.origin: Origin | None = None
        self.state = [tensor.fresh() for tensor in self.held]
        self._before: tuple[int, dict[int, torch.Tensor]] | None = None

    @abstractmethod
    def _step(self, tokens: list[int]) -> Logits:
        """Run at most `_room()` tokens at `self.position` and update `self.state`; logits of the last one."""

    def _scored_step(self, tokens: list[int], count: int) -> NDArray[np.float32]:
        """The same, of the last `count` tokens: float32 [count, vocab]. Where `scored` is more than 1."""
        raise LfmEdgeError("this session tells the logits of a step's last token only")

    def _room(self) -> int:
        """Most tokens that the next step takes."""
        return self.chunk

    def prefill(self, tokens: Sequence[int]) -> Logits:
        """Take any number of tokens, from the current position on.

        Returns float32 [vocab], the logits after the last token. Raises ContextFull where the context
        cannot hold them, LfmEdgeError for no tokens or an unknown one.
        """
        tokens = [int(token) for token in tokens]
        self._check(tokens)
        self._before = None
        logits = np.empty(0, np.float32)
        while tokens:
            part, tokens = tokens[:self._room()], tokens[self._room():]
            logits = self._step(part)
            self.position += len(part)
            self.tokens += part
        return logits

    def decode(self, token: int) -> Logits:
        """Take one more token. Returns float32 [vocab]; raises as `prefill` does."""
        return self.prefill([token])

    def prefill_scored(self, tokens: Sequence[int], count: int) -> NDArray[np.float32]:
        """Take at most `chunk` tokens as `prefill` does, in one step that `take_back` can undo.

        Returns float32 [count, vocab], the logits after each of the last `count` tokens, at most `scored`. Raises
        LfmEdgeError for more of either, or where the program keeps some of the state; else as `prefill`.
        """
        self._check_holds_all("take a step back")
        tokens = [int(token) for token in tokens]
        self._check(tokens)
        if len(tokens) > self.chunk or not 1 <= count <= min(self.scored, len(tokens)):
            raise LfmEdgeError(f"logits of {count} of {len(tokens)} tokens: a step takes {self.chunk}, and tells the "
                               f"logits of the last {self.scored}")
        replaced = {index: self._read(index, self.position) for index, tensor in enumerate(self.held)
                    if tensor.update != APPEND}
        logits = self._scored_step(tokens, count)
        self._before = self.position, replaced
        self.position += len(tokens)
        self.tokens += tokens
        return logits

    def take_back(self) -> None:
        """Undo the last `prefill_scored`, if nothing came after it. Raises LfmEdgeError where something did.

        It costs a copy of the conv state; rows of a cache past the position are never read.
        """
        if self._before is None:
            raise LfmEdgeError("there is no step to take back")
        position, replaced = self._before
        for index, kept in replaced.items():
            self._write(index, kept, position)
        del self.tokens[len(self.tokens) - (self.position - position):]
        self.position, self._before = position, None

    def snapshot(self) -> Snapshot:
        """A copy of the state, to go back to. Raises LfmEdgeError where the program keeps some of it."""
        self._check_holds_all("snapshot")
        return Snapshot(self.spec, self.position, self._kept(), tuple(self.tokens))

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot, of this session or of another one of the same layout.

        Raises LfmEdgeError where the layouts differ, or the program keeps some of the state.
        """
        self._check_holds_all("restore")
        if snapshot.spec != self.spec:
            raise LfmEdgeError("the snapshot is of another model, context or KV type than this session")
        self._put_back(snapshot.tensors, snapshot.position)
        self.position, self.tokens, self._before = snapshot.position, list(snapshot.tokens), None

    def save(self, path: str | Path, messages: Sequence[Message] = ()) -> None:
        """Write the session to a file, from which `load` goes on. A file that is there is replaced in one move.

        messages: the conversation so far, for those who show it or go on with it
        Raises LfmEdgeError where the file cannot be written, or the program keeps some of the state.
        """
        self._check_holds_all("save a session")
        if len(self.tokens) != self.position:  # somebody has set the position, as measurements do
            raise LfmEdgeError(f"the session is at {self.position} and has taken {len(self.tokens)} tokens")
        SavedSession(self._known_origin(), self.snapshot(), tuple(messages)).write(Path(path))

    def load(self, path: str | Path) -> list[Message]:
        """Go on from a file that `save` wrote, in this session's layout; the messages that were saved with it.

        Raises BundleError where the file is damaged, is of another model or KV type, or does not fit the context;
        LfmEdgeError where the program keeps some of the state. The session is then unchanged.
        """
        self._check_holds_all("load a session")
        saved = SavedSession.read(Path(path))
        try:
            saved.origin.check_suits(self._known_origin())
            snapshot = saved.snapshot.converted(self.spec)
        except BundleError as error:
            raise BundleError(f"{path}: {error}") from None
        if max(snapshot.tokens, default=0) >= self.vocab_size:
            raise BundleError(f"{path}: token {max(snapshot.tokens)} is outside the vocabulary of {self.vocab_size}")
        self.restore(snapshot)
        return list(saved.messages)

    def reset(self) -> None:
        """Begin anew: position 0, and the conv state empty. (Cache rows past the position are never read.)"""
        for index, tensor in enumerate(self.held):
            if tensor.update != APPEND:
                self._write(index, tensor.fresh(), 0)
        self.position, self.tokens, self._before = 0, [], None

    def stand_at(self, position: int) -> None:
        """Go to a position without computing what leads there: to measure there, not to get answers.

        The rows that the cache has are repeated up to it, so that as much of its memory is in use as after as many
        tokens. Where the program keeps the cache, only the position is set. Raises ContextFull past the context.
        """
        if position > self.spec.context:
            raise ContextFull(f"position {position} is past the context of {self.spec.context}")
        if position > self.position:
            self._repeat_rows(position)
        self.position, self._before = position, None

    def _repeat_rows(self, position: int) -> None:
        for tensor, state in zip(self.held, self.state, strict=True):
            filled = max(self.position, 1)
            while tensor.update == APPEND and filled < position:
                count = min(filled, position - filled)
                state.narrow(tensor.axis, filled, count).copy_(state.narrow(tensor.axis, 0, count))
                filled += count

    def _kept(self) -> tuple[torch.Tensor, ...]:
        """Copies of what the session has of every state tensor."""
        return tuple(self._read(index, self.position) for index in range(len(self.spec.tensors)))

    def _put_back(self, tensors: Sequence[torch.Tensor], position: int) -> None:
        """Take over what another session, or this one, had at `position`."""
        for index, kept in enumerate(tensors):
            self._write(index, kept, position)

    def _read(self, index: int, position: int) -> torch.Tensor:
        """A copy of what a session at `position` has of a state tensor."""
        return self.held[index].filled(self.state[index], position).clone()

    def _write(self, index: int, kept: torch.Tensor, position: int) -> None:
        """Put that back."""
        self.held[index].filled(self.state[index], position).copy_(kept)

    def _known_origin(self) -> Origin:
        if self.origin is None:
            raise LfmEdgeError("only a session of a bundle can be saved or loaded: its manifest tells the model")
        return self.origin

    def _check_holds_all(self, purpose: str) -> None:
        if len(self.held) < len(self.spec.tensors):
            raise LfmEdgeError("this bundle keeps its state inside the program; "
                               f"export with --state explicit to {purpose}")

    def _check(self, tokens: list[int]) -> None:
        if not tokens:
            raise LfmEdgeError("no tokens were given")
        wrong = next((token for token in tokens if not 0 <= token < self.vocab_size), None)
        if wrong is not None:
            raise LfmEdgeError(f"token {wrong} is outside the vocabulary of {self.vocab_size}")
        if self.position + len(tokens) > self.spec.context:
            raise ContextFull(f"{len(tokens)} more tokens do not fit: the session is at {self.position} "
                              f"of a context of {self.spec.context}")
