"""From logits to the next token: the filters of transformers' `generate`, in its order.

    repetition penalty -> temperature -> top-k -> top-p -> min-p -> draw

A model's makers say what suits it in generation_config.json. Where that does not ask for sampling, the best token is
taken, as transformers does; the repetition penalty counts either way.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfm_edge.errors import LfmEdgeError

Logits = NDArray[np.float32]
_TOP_K = 50  # transformers' own, where generation_config.json asks for sampling and names none


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults take the best one.

    temperature: 0 takes the best token; the higher, the more random
    top_k: only so many of the best are drawn from; 0 for all
    top_p: only the fewest best that together have this probability; 1 for all
    min_p: only those that have at least this share of the best one's probability; 0 for all
    repetition_penalty: what divides the logits of tokens that have occurred (Keskar et al., 2019); 1 for none
    Raises LfmEdgeError for a value that is none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, right, wanted in (
                ("temperature", 0 <= self.temperature < math.inf, "at least 0, and finite"),
                ("top_k", self.top_k >= 0, "at least 0"),
                ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
                ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
                ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0, and finite")):
            if not right:
                raise LfmEdgeError(f"{name} is {getattr(self, name)}; it must be {wanted}")

    @classmethod
    def of_generation_config(cls, raw: dict[str, Any]) -> Sampling:
        """What a checkpoint's generation_config.json asks for. Raises LfmEdgeError where a value of it is none."""
        given = {field.name: raw[field.name] for field in fields(cls) if raw.get(field.name) is not None}
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or (
                    name == "top_k" and not isinstance(value, int)):
                raise LfmEdgeError(f"generation_config.json: {name} is {value!r}; expected a number")
        if raw.get("do_sample") is not True:
            return cls(repetition_penalty=given.get("repetition_penalty", 1.0))
        try:
            return cls(**{"temperature": 1.0, "top_k": _TOP_K} | given)
        except LfmEdgeError as error:
            raise LfmEdgeError(f"generation_config.json: {error}") from None

    def changed(self, **given: float | int | None) -> Sampling:
        """The same with what is not None. A filter without a temperature asks for one of 1 where there is none yet."""
        given = {name: value for name, value in given.items() if value is not None}
        filters = given.keys() & {"top_k", "top_p", "min_p"}
        if filters and not self.temperature:
            given = {"temperature": 1.0} | given
        return replace(self, **given)

    def next_token(self, logits: Logits, seen: Collection[int], generator: np.random.Generator) -> int:
        """The next token.

        logits: float32 [vocab]; seen: the tokens that have occurred in the conversation
        Raises LfmEdgeError where the best of the logits is no finite number.
        """
        check_finite(logits)
        scores = self._penalized(logits, seen)
        if self.temperature == 0.0:
            return int(scores.argmax())
        tokens, shares = self.candidates(scores)
        return int(tokens[generator.choice(len(shares), p=shares)])

    def candidates(self, scores: Logits) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The tokens that may be drawn, the best first, and their probabilities, float64.

        scores: float32 [vocab], after the repetition penalty
        """
        tokens = self._best(scores)
        scaled = scores[tokens].astype(np.float64) / self.temperature
        if self.top_k:  # as transformers has it, those that equal the last one stay as well
            scaled = scaled[:np.count_nonzero(scaled >= scaled[min(self.top_k, len(scaled)) - 1])]
        shares = _softmax(scaled)
        if self.top_p < 1.0:
            before = np.cumsum(shares) - shares
            scaled = scaled[:max(np.count_nonzero(before < self.top_p), 1)]
            shares = _softmax(scaled)
        if self.min_p:
            scaled = scaled[:np.count_nonzero(shares >= self.min_p * shares[0])]
            shares = _softmax(scaled)
        return tokens[:len(shares)], shares

    def _best(self, scores: Logits) -> NDArray[np.int64]:
        """Tokens by falling score: all of them, or with a top-k no fewer than that takes."""
        if not self.top_k or self.top_k >= len(scores):
            return np.argsort(-scores, kind="stable")
        least = np.partition(scores, -self.top_k)[-self.top_k]
        tokens = np.flatnonzero(scores >= least)
        return tokens[np.argsort(-scores[tokens], kind="stable")]

    def _penalized(self, logits: Logits, seen: Collection[int]) -> Logits:
        if self.repetition_penalty == 1.0:
            return logits
        tokens, penalty = np.fromiter(seen, np.int64), np.float32(self.repetition_penalty)
        scores, of_seen = logits.copy(), logits[tokens]
        scores[tokens] = np.where(of_seen < 0, of_seen * penalty, of_seen / penalty)
        return scores


def check_finite(logits: NDArray[np.float32]) -> None:
    """Raises LfmEdgeError where the best of the logits, [..., vocab], is no finite number. (NaN is the best of all.)"""
    if not np.isfinite(logits.max(axis=-1)).all():
        raise LfmEdgeError("the logits are not finite: numbers overflow in this program; export with another "
                           "--compute-dtype, such as float32")


def _softmax(scaled: NDArray[np.float64]) -> NDArray[np.float64]:
    """scaled: by falling size"""
    weights = np.exp(scaled - scaled[0])
    return weights / weights.sum()
