"""What a session has taken: tokens, and embeddings that stood in place of a token's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Embedded:
    """An embedding that was given, such as that of a patch of a picture: never equal to one of another content.

    token: the token that stands for it in a text; digest: SHA-256 of the embedding, as float32, in hexadecimal
    """

    token: int
    digest: str

    @classmethod
    def of(cls, token: int, embedding: NDArray[np.float32]) -> Embedded:
        """embedding: float32 [hidden]"""
        return cls(token, hashlib.sha256(np.ascontiguousarray(embedding, "<f4")).hexdigest())


Taken = int | Embedded


def token_ids(taken: Iterable[Taken]) -> list[int]:
    """The tokens, and those that stand for embeddings."""
    return [entry.token if isinstance(entry, Embedded) else entry for entry in taken]
