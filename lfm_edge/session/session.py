"""A session: one conversation's position and state, over any runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray

from lfm_edge.errors import BundleError, ContextFull, LfmEdgeError
from lfm_edge.session.history import Embedded, Taken, token_ids
from lfm_edge.session.saved import Message, Origin, SavedSession
from lfm_edge.session.state import APPEND, RING, Snapshot, StateSpec, StateTensor

Logits = NDArray[np.float32]
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Mark:
    """Where a session was, to go back to: all but the rows of its caches, which stay in the session.

    tokens, count: its list of them, of which the first so many were taken by then; replaced: what steps overwrite;
    before: what `take_back` would have gone back to
    """

    position: int
    tokens: list[Taken]
    count: int
    replaced: Any
    before: Mark | None


class Session(ABC):
    """One conversation.

    The two ways of giving tokens agree: `prefill(a + b)` leaves the session where `prefill(a)`, then
    `prefill(b)` or a `decode` for each token of b would. A call that raises leaves it unchanged, also where it is
    interrupted at any moment; or, where what was done cannot be undone, `broken`.

    broken: whether a call failed half-way and the state is of no use. Every call but `reset`, `restore` and `load`,
        which mend it, then raises LfmEdgeError
    vocab_size: logits that a step gives; chunk: most tokens that one step takes
    held: the tensors of the state that the session has; all of them, unless the program keeps some
    tokens: all that were taken since the last reset, `position` of them; an `Embedded` where an embedding was given
    takes_embeddings: whether embeddings can be given in place of tokens
    origin: what a state must come from for this session to go on with it; None where no bundle told
    arithmetic: the type that it computes in
    remark: what `verify` must say about who computes, where that is not what computes on the device
    scored: of how many of a step's last tokens `prefill_scored` tells the logits
    multiplies_unseen: whether a step multiplies cache rows past the position by zero, where others never read them:
        such rows must be finite, so they are cleared before it
    """

    arithmetic = "float32"
    remark = ""
    scored = 1
    takes_embeddings = False
    multiplies_unseen = False

    def __init__(self, spec: StateSpec, vocab_size: int, chunk: int,
                 held: tuple[StateTensor, ...] | None = None) -> None:
        self.spec = spec
        self.vocab_size = vocab_size
        self.chunk = chunk
        self.held = spec.tensors if held is None else held
        self.position = 0
        self.tokens: list[Taken] = []
        self.origin: Origin | None = None
        self.state = [tensor.fresh() for tensor in self.held]
        self.broken = False
        self._before: Mark | None = None
        self._reached = 0  # rows of the caches that may have been written
        self._marks: WeakSet[Mark] = WeakSet()  # those that `rewind` takes

    @property
    def holds_all(self) -> bool:
        """Whether all of the state is the session's, and none the program's."""
        return len(self.held) == len(self.spec.tensors)

    @abstractmethod
    def _step(self, tokens: list[int]) -> Logits:
        """Run at most `_room()` tokens at `self.position` and update `self.state`; logits of the last one."""

    def _scored_step(self, tokens: list[int], count: int) -> NDArray[np.float32]:
        """The same, of the last `count` tokens: float32 [count, vocab]. Where `scored` is more than 1."""
        raise LfmEdgeError("this session tells the logits of a step's last token only")

    def _embedded_step(self, embeddings: NDArray[np.float32]) -> Logits:
        """As `_step`, of embeddings in place of tokens, float32 [T, hidden]. Where `takes_embeddings`."""
        raise NotImplementedError

    def _room(self) -> int:
        """Most tokens that the next step takes."""
        return self.chunk

    def prefill(self, tokens: Sequence[int]) -> Logits:
        """Take any number of tokens, from the current position on.

        Returns float32 [vocab], the logits after the last token. Raises ContextFull where the context
        cannot hold them, LfmEdgeError for no tokens or an unknown one.
        """
        self._check_whole()
        tokens = [int(token) for token in tokens]
        self._check(tokens)
        return self._advance(tokens, lambda start, end: self._step(tokens[start:end]))

    def prefill_embeddings(self, tokens: Sequence[int], embeddings: NDArray[np.float32]) -> Logits:
        """Take embeddings that are not the table's, such as those of a picture's patches.

        tokens: what stands for each of them in the conversation; embeddings: float32 [T, hidden]
        Returns and raises as `prefill` does, and LfmEdgeError where the program takes tokens only.
        """
        self._check_whole()
        tokens, embeddings = [int(token) for token in tokens], np.asarray(embeddings, np.float32)
        self._check(tokens)
        if not self.takes_embeddings:
            raise LfmEdgeError("this program looks embeddings up itself: it takes tokens only")
        if embeddings.ndim != 2 or len(embeddings) != len(tokens):
            raise LfmEdgeError(f"embeddings of shape {list(embeddings.shape)} for {len(tokens)} tokens")
        taken = [Embedded.of(token, row) for token, row in zip(tokens, embeddings, strict=True)]
        return self._advance(taken, lambda start, end: self._embedded_step(embeddings[start:end]))

    def _advance(self, taken: Sequence[Taken], step: Callable[[int, int], Logits]) -> Logits:
        """Take all of it, `step` by step. step: given where its part begins and ends; the logits after that"""
        def steps() -> Logits:
            self._before, start, logits = None, 0, np.empty(0, np.float32)
            while start < len(taken):
                end = min(start + self._room(), len(taken))
                logits = step(start, end)
                self._take(taken[start:end])
                start = end
            return logits

        return self._change(steps, most=len(taken))

    def decode(self, token: int) -> Logits:
        """Take one more token. Returns float32 [vocab]; raises as `prefill` does."""
        return self.prefill([token])

    def prefill_scored(self, tokens: Sequence[int], count: int) -> NDArray[np.float32]:
        """Take at most `chunk` tokens as `prefill` does, in one step that `take_back` can undo.

        Returns float32 [count, vocab], the logits after each of the last `count` tokens, at most `scored`. Raises
        LfmEdgeError for more of either, or where the program keeps some of the state; else as `prefill`.
        """
        self._check_whole()
        self._check_holds_all("take a step back")
        tokens = [int(token) for token in tokens]
        self._check(tokens)
        if len(tokens) > self.chunk or not 1 <= count <= min(self.scored, len(tokens)):
            raise LfmEdgeError(f"logits of {count} of {len(tokens)} tokens: a step takes {self.chunk}, and tells the "
                               f"logits of the last {self.scored}")
        mark = self._mark(len(tokens))

        def step() -> NDArray[np.float32]:
            logits = self._scored_step(tokens, count)
            self._take(tokens)
            self._before = replace(mark, before=None)
            return logits

        return self._change(step, most=len(tokens), mark=mark)

    def take_back(self) -> None:
        """Undo the last `prefill_scored`, if nothing came after it. Raises LfmEdgeError where something did.

        It costs a copy of what the step replaced, as the conv state; rows of a cache past the position do not count.
        """
        self._check_whole()
        before = self._before
        if before is None:
            raise LfmEdgeError("there is no step to take back")

        def back() -> None:
            self._go_back(before)
            self._before = None

        self._change(back, mark=self._mark(None))

    def mark(self) -> Mark:
        """Where the session is, for `rewind`. Raises LfmEdgeError where the program keeps some of the state.

        Much cheaper than a snapshot, as cache rows stay where they are: it copies the conv state, and windows of
        sliding-window layers.
        """
        self._check_whole()
        self._check_holds_all("go back")
        mark = replace(self._mark(None), before=None)
        self._marks.add(mark)
        return mark

    def rewind(self, mark: Mark) -> None:
        """Go back to a mark, as often as wanted.

        Raises LfmEdgeError for one of another session, and where this one has been at an earlier position since.
        """
        self._check_whole()
        if mark not in self._marks:
            raise LfmEdgeError("the session has no such mark: it is another session's, or this one has gone back to "
                               "before it")
        self._change(lambda: self._go_back(mark), mark=self._mark(None))

    def snapshot(self) -> Snapshot:
        """A copy of the state, to go back to. Raises LfmEdgeError where the program keeps some of it."""
        self._check_whole()
        self._check_holds_all("snapshot")
        return Snapshot(self.spec, self.position, self._kept(), tuple(self.tokens))

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot, of this session or of another one of the same layout.

        Raises LfmEdgeError where the layouts differ, or the program keeps some of the state.
        """
        self._check_holds_all("restore")
        if snapshot.spec != self.spec:
            raise LfmEdgeError("the snapshot is of another model, context or KV type than this session")

        def put_back() -> None:
            self._put_back(snapshot.tensors, snapshot.position)
            self._stand(snapshot.position, list(snapshot.tokens))

        self._begin_with(put_back)

    def save(self, path: str | Path, messages: Sequence[Message] = ()) -> None:
        """Write the session to a file, from which `load` goes on. A file that is there is replaced in one move.

        messages: the conversation so far, for those who show it or go on with it
        Raises LfmEdgeError where the file cannot be written, or the program keeps some of the state.
        """
        self._check_whole()
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
        largest = max(token_ids(snapshot.tokens), default=0)
        if largest >= self.vocab_size:
            raise BundleError(f"{path}: token {largest} is outside the vocabulary of {self.vocab_size}")
        self.restore(snapshot)
        return list(saved.messages)

    def reset(self) -> None:
        """Begin anew: position 0, and the conv state empty. (Cache rows past the position do not count.)"""
        def empty() -> None:
            self._empty()
            self._stand(0, [])

        self._begin_with(empty)

    def stand_at(self, position: int) -> None:
        """Go to a position without computing what leads there: to measure there, not to get answers.

        The rows that the cache has are repeated up to it, so that as much of its memory is in use as after as many
        tokens. Where the program keeps the cache, only the position is set. Raises ContextFull past the context.
        """
        self._check_whole()
        if position > self.spec.context:
            raise ContextFull(f"position {position} is past the context of {self.spec.context}")

        def go() -> None:
            if position > self.position:
                self._repeat_rows(position)
            self._forget_marks(after=position)
            self.position, self._before = position, None

        self._change(go, most=max(position - self.position, 0), mark=self._mark(None))

    def _change(self, change: Callable[[], Result], most: int = 0, mark: Mark | None = None) -> Result:
        """Do what changes the session from its position on: wholly, or not at all, however it ends.

        most: rows of the caches that it may write past the position; mark: made just before, where there is one
        """
        mark = mark or self._mark(most)
        try:
            self.broken = True  # until it is done or undone: an interrupt may come between any two lines
            if most:
                self._clear_unseen()
                self._reached = self.position + most
            result = change()
            self.broken = False
            return result
        except BaseException:
            self.broken = True
            with suppress(Exception):  # what went wrong is raised; that it cannot be undone, the next call says
                self._go_back(mark)
                self.broken = False
            raise

    def _begin_with(self, change: Callable[[], None]) -> None:
        """Do what overwrites the whole session. Until that is done, it is broken."""
        self.broken = True
        change()
        self.broken = False

    def _mark(self, most: int | None) -> Mark:
        return Mark(self.position, self.tokens, len(self.tokens), self._replaced(most), self._before)

    def _go_back(self, mark: Mark) -> None:
        """Be again where the session was. Raises LfmEdgeError where the runtime cannot."""
        self._forget_marks(after=mark.position)
        self.position, self.tokens, self._before = mark.position, mark.tokens[:mark.count], mark.before
        self._replace(mark.replaced)

    def _stand(self, position: int, tokens: list[Taken]) -> None:
        """Where the state that is there now is of."""
        self._forget_marks(after=0)
        self.position, self.tokens, self._before = position, tokens, None
        self._reached = max(self._reached, position)

    def _forget_marks(self, after: int) -> None:
        """Rows past a position that the session goes to are overwritten from now on."""
        for mark in [mark for mark in self._marks if mark.position > after]:
            self._marks.discard(mark)

    def _take(self, tokens: Sequence[Taken]) -> None:
        """Count what a step has taken."""
        self.position += len(tokens)
        self.tokens += tokens

    def _replaced(self, most: int | None) -> Any:
        """Copies of what steps of `most` tokens overwrite, for `_replace`; None: of all that any step could."""
        return {index: self._read(index, self.position) for index, tensor in enumerate(self.held)
                if (tensor.update != APPEND if most is None else not tensor.survives(self.position, most))}

    def _replace(self, kept: Any) -> None:
        """Put that back, at the position again. Raises LfmEdgeError where the program keeps some of it."""
        names = {tensor.name for tensor in self.held}
        if any(tensor.update != APPEND and tensor.name not in names for tensor in self.spec.tensors):
            raise LfmEdgeError("the program keeps its conv state")
        for index, value in kept.items():
            self._write(index, value, self.position)

    def _empty(self) -> None:
        """Make the state that of a fresh session, but for rows of the caches."""
        for index, tensor in enumerate(self.held):
            if tensor.update != APPEND:
                self._write(index, tensor.kept(tensor.fresh(), 0), 0)

    def _clear_unseen(self) -> None:
        """Before a step: leave nothing in rows past the position, of what was undone or is of another conversation."""
        if self._reached > self.position:
            self._clear_rows(self.position, self._reached - self.position)

    def _clear_rows(self, start: int, count: int) -> None:
        for tensor, state in zip(self.held, self.state, strict=True):
            if tensor.update == APPEND and self.multiplies_unseen:
                state.narrow(tensor.axis, start, count).fill_(tensor.initial)
            if tensor.update == RING:  # whose masked rows every kernel multiplies by zero
                slots = tensor.slots_after(start, min(count, tensor.rows - tensor.row_count(start)))
                state.index_fill_(tensor.axis, slots, tensor.initial)

    def _repeat_rows(self, position: int) -> None:
        for tensor, state in zip(self.held, self.state, strict=True):
            if tensor.is_cache:
                tensor.repeat_rows(state, self.position, position)

    def _kept(self) -> tuple[torch.Tensor, ...]:
        """Copies of what the session has of every state tensor."""
        return tuple(self._read(index, self.position) for index in range(len(self.spec.tensors)))

    def _put_back(self, tensors: Sequence[torch.Tensor], position: int) -> None:
        """Take over what another session, or this one, had at `position`."""
        for index, kept in enumerate(tensors):
            self._write(index, kept, position)

    def _read(self, index: int, position: int) -> torch.Tensor:
        """A copy of what a session at `position` has of a state tensor."""
        return self.held[index].kept(self.state[index], position)

    def _write(self, index: int, kept: torch.Tensor, position: int) -> None:
        """Put that back. Nothing else is left in a window."""
        tensor, state = self.held[index], self.state[index]
        if tensor.window:
            state.fill_(tensor.initial)
        tensor.put_back(state, kept, position)

    def _known_origin(self) -> Origin:
        if self.origin is None:
            raise LfmEdgeError("only a session of a bundle can be saved or loaded: its manifest tells the model")
        return self.origin

    def _check_whole(self) -> None:
        if self.broken:
            mend = "reset it, or load a saved one" if self.holds_all else "reset it"
            raise LfmEdgeError("the session is broken: a call failed half-way, and its runtime cannot undo that; "
                               f"{mend}")

    def _check_holds_all(self, purpose: str) -> None:
        if not self.holds_all:
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
