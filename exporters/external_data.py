"""External data of ONNX graphs: files of constants beside them, each constant once and on pages of its own."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

INLINE_BYTES = 1024  # smaller constants stay in the graph
_ALIGNMENT = 4096  # whole pages, so that a runtime or a compiler can map them


class Place(NamedTuple):
    """Where a constant is: the name of its file, and bytes."""

    location: str
    offset: int
    length: int


class ExternalData:
    """Writes `path`, and `path_1`, `path_2` ... where one file would be larger than `largest` bytes."""

    def __init__(self, path: Path, largest: float = float("inf")) -> None:
        self.path = path
        self.largest = largest
        self.files: list[BinaryIO] = []
        self.places: dict[Hashable, Place] = {}

    def __enter__(self) -> ExternalData:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files:
            file.close()

    def place(self, key: Hashable, make: Callable[[], np.ndarray]) -> Place:
        """Where the constant of this key is. make: gives it, the first time that the key comes"""
        if key not in self.places:
            data = np.ascontiguousarray(make())
            start = -(-self.files[-1].tell() // _ALIGNMENT) * _ALIGNMENT if self.files else 0
            if not self.files or start + data.nbytes > self.largest:
                start = 0
                name = self.path.name + (f"_{len(self.files)}" if self.files else "")
                self.files.append(self.path.with_name(name).open("wb"))
            self.files[-1].seek(start)
            self.files[-1].write(data.data)
            self.places[key] = Place(Path(self.files[-1].name).name, start, data.nbytes)
        return self.places[key]
