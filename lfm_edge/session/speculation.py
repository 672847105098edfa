"""Prompt lookup: guesses at what comes next, taken from what the conversation has said already.

Answers often repeat stretches of their prompt: names, numbers, code, whole sentences. Where the last few tokens stand
earlier in the conversation, what followed them there is the guess (Saxena, "Prompt Lookup Decoding", 2023). The model
then takes the guess in one step and says of each token whether it would have come (Leviathan et al., "Fast Inference
from Transformers via Speculative Decoding", 2023). There is no second model, and nothing is learned.
"""

from __future__ import annotations

from collections.abc import Sequence

from lfm_edge.session.history import Embedded, Taken

_SUFFIXES = (4, 3, 2)  # lengths of what is looked up, the surest first


class PromptLookup:
    """Where each short run of tokens was last followed by something.

    never: tokens that are not guessed, as embeddings are not, nor what comes after them
    """

    def __init__(self, never: Sequence[int] = ()) -> None:
        self._never = frozenset(never)
        self._tokens: list[Taken] = []
        self._followed: dict[tuple[Taken, ...], int] = {}  # a run of tokens -> where its continuation begins
        self._trusts = True

    def extend(self, tokens: Sequence[Taken]) -> None:
        """Read on."""
        for token in tokens:
            end = len(self._tokens)
            for size in _SUFFIXES:
                if size <= end:
                    self._followed[tuple(self._tokens[end - size:])] = end
            self._tokens.append(token)

    def guess(self, most: int) -> list[int]:
        """At most `most` tokens that may come next; none where the last ones are new."""
        for size in _SUFFIXES if self._trusts else _SUFFIXES[:1]:
            start = self._followed.get(tuple(self._tokens[-size:]))
            if start is not None:
                guessed = self._tokens[start:start + max(most, 0)]
                return guessed[:next((index for index, token in enumerate(guessed)
                                      if token in self._never or isinstance(token, Embedded)), None)]
        return []

    def hear(self, right: bool) -> None:
        """Whether the first token of the last guess was right. Where it was not, only the surest kind comes next."""
        self._trusts = right
