"""Pages of files that a runtime's loader has mapped into this process, and letting go of them (madvise(2), proc(5)).

A runtime that maps a file never lets go of what it has read of it: those pages count as this process's memory, though
they are clean. Where /proc does not tell what is mapped, nothing is found, and nothing is let go of.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_MADV_DONTNEED, _MADV_PAGEOUT = 4, 21  # Linux's; `mmap` names the first only, and cannot advise on others' mappings
_LOADING = threading.Lock()

WORTH_FORGETTING = 1 << 24  # bytes: letting go takes some 0.05 ms, which the steps of a small model would feel


@dataclass(frozen=True)
class MappedPages:
    """Ranges of this process's addresses, each (first, length), whole pages."""

    ranges: tuple[tuple[int, int], ...] = ()

    @property
    def if_worth_forgetting(self) -> MappedPages:
        """These, or none where they are few."""
        return self if sum(length for _, length in self.ranges) >= WORTH_FORGETTING else MappedPages()

    @classmethod
    def of(cls, path: Path, part: tuple[int, int] | None = None, but: MappedPages | None = None) -> MappedPages:
        """What is mapped of a file, or of the files in a directory.

        part: of the file, (first byte, how many); but: what is left out, as it is another's
        """
        if not _MAPS.is_file():
            return cls()
        path, found = path.resolve(), []
        for line in _MAPS.read_text().splitlines():
            addresses, _, skipped, _, _, *name = line.split(maxsplit=5)
            if not name or path not in (Path(name[0]), Path(name[0]).parent):
                continue
            start, end = (int(address, 16) for address in addresses.split("-"))
            if part is not None:
                first = part[0] - int(skipped, 16)  # counted from the mapping's start
                start, end = start + max(first, 0) // mmap.PAGESIZE * mmap.PAGESIZE, min(end, start + first + part[1])
            if start < end and not (but and but._has_any_of(start, end)):
                found.append((start, end - start))
        return cls(tuple(found))

    def unlock(self) -> None:
        """Let go of what a loader has locked in memory (mlock(2)), which could not be let go of otherwise."""
        for first, length in self.ranges:
            _libc().munlock(ctypes.c_void_p(first), ctypes.c_size_t(length))

    def forget(self) -> None:
        """Take them out of this process's memory. The system's cache keeps them; a page that was changed is lost."""
        self._advise(_MADV_DONTNEED)

    def page_out(self) -> None:
        """Give clean pages back to the system, which reads the file again when one is used; keep changed ones."""
        self._advise(_MADV_PAGEOUT)

    def _has_any_of(self, start: int, end: int) -> bool:
        return any(first < end and start < first + length for first, length in self.ranges)

    def _advise(self, advice: int) -> None:
        for first, length in self.ranges:
            _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), advice)


@contextmanager
def loading(path: Path) -> Iterator[MappedPages]:
    """For a load of a file, or of the files in a directory: what was mapped of them before. One load at a time.

    Only what a session has mapped itself may it let go of later: once another one is closed, its addresses are taken by
    something else.
    """
    with _LOADING:
        yield MappedPages.of(path)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
