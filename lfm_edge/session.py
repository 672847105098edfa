"""A session: one conversation's position and state, over any runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lfm_edge.errors import ContextFull, LfmEdgeError
from lfm_edge.state import APPEND, StateSpec, StateTensor

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Snapshot:
    """The state of a session at one position: copies, independent of the session they came from.

    Of a KV cache only the filled rows are kept.
    """

    spec: StateSpec
    position: int
    tensors: tuple[torch.Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that the snapshot holds."""
        return sum(tensor.nbytes for tensor in self.tensors)


class Session(ABC):
    """One conversation.

    The two ways of giving tokens agree: `prefill(a + b)` leaves the session where `prefill(a)`, then
    `prefill(b)` or a `decode` for each token of b would. A call that raises leaves it unchanged.

    vocab_size: logits that a step gives; chunk: most tokens that one step takes
    held: the tensors of the state that the session has; all of them, unless the program keeps some
    arithmetic: the type that it computes in
    remark: what `verify` must say about who computes, where that is not what computes on the device
    """

    arithmetic = "float32"
    remark = ""

    def __init__(self, spec: StateSpec, vocab_size: int, chunk: int,
                 held: tuple[StateTensor, ...] | None = None) -> None:
        self.spec = spec
        self.vocab_size = vocab_size
        self.chunk = chunk
        self.held = spec.tensors if held is None else held
        self.position = 0
        self.state = [tensor.fresh() for tensor in self.held]

    @abstractmethod
    def _step(self, tokens: list[int]) -> Logits:
        """Run at most `_room()` tokens at `self.position` and update `self.state`; logits of the last one."""

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
        logits = np.empty(0, np.float32)
        while tokens:
            part, tokens = tokens[:self._room()], tokens[self._room():]
            logits = self._step(part)
            self.position += len(part)
        return logits

    def decode(self, token: int) -> Logits:
        """Take one more token. Returns float32 [vocab]; raises as `prefill` does."""
        return self.prefill([token])

    def snapshot(self) -> Snapshot:
        """A copy of the state, to go back to. Raises LfmEdgeError where the program keeps some of it."""
        self._check_holds_all("snapshot")
        kept = tuple(self._read(index, self.position) for index in range(len(self.spec.tensors)))
        return Snapshot(self.spec, self.position, kept)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot, of this session or of another one of the same layout.

        Raises LfmEdgeError where the layouts differ, or the program keeps some of the state.
        """
        self._check_holds_all("restore")
        if snapshot.spec != self.spec:
            raise LfmEdgeError("the snapshot is of another model, context or KV type than this session")
        for index, kept in enumerate(snapshot.tensors):
            self._write(index, kept, snapshot.position)
        self.position = snapshot.position

    def reset(self) -> None:
        """Begin anew: position 0, and the conv state empty. (Cache rows past the position are never read.)"""
        for tensor, state in zip(self.held, self.state, strict=True):
            if tensor.update != APPEND:
                state.fill_(tensor.initial)
        self.position = 0

    def stand_at(self, position: int) -> None:
        """Go to a position without computing what leads there: to measure there, not to get answers.

        The rows that the cache has are repeated up to it, so that as much of its memory is in use as after as many
        tokens. Where the program keeps the cache, only the position is set. Raises ContextFull past the context.
        """
        if position > self.spec.context:
            raise ContextFull(f"position {position} is past the context of {self.spec.context}")
        self._repeat_rows(position)
        self.position = position

    def _repeat_rows(self, position: int) -> None:
        for tensor, state in zip(self.held, self.state, strict=True):
            filled = max(self.position, 1)
            while tensor.update == APPEND and filled < position:
                count = min(filled, position - filled)
                state.narrow(tensor.axis, filled, count).copy_(state.narrow(tensor.axis, 0, count))
                filled += count

    def _read(self, index: int, position: int) -> torch.Tensor:
        """A copy of what a session at `position` has of a state tensor."""
        return self.spec.tensors[index].filled(self.state[index], position).clone()

    def _write(self, index: int, kept: torch.Tensor, position: int) -> None:
        """Put that back."""
        self.spec.tensors[index].filled(self.state[index], position).copy_(kept)

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
