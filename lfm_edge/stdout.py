"""Standard output of the command line: a reader that has gone away, or a full disk, ends the program in good order."""

from __future__ import annotations

import errno
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

CLOSED = 141  # what a shell says of a program whose reader has gone away: 128 and SIGPIPE


class _Descriptor(io.FileIO):
    """Descriptor 1. What cannot be written ends the program, by SystemExit, and what comes after is thrown away."""

    def __init__(self, complain: Callable[[str], None]) -> None:
        super().__init__(1, "w", closefd=False)
        self._complain = complain
        self._lost = False

    def write(self, data: Any) -> int | None:
        if self._lost:
            return memoryview(data).nbytes
        try:
            return super().write(data)
        except OSError as error:
            self._lost = True
            if error.errno == errno.EPIPE:
                raise SystemExit(CLOSED) from None
            self._complain(f"standard output: cannot be written ({error.strerror})")
            raise SystemExit(2) from None


@contextmanager
def checked_stdout(complain: Callable[[str], None]) -> Iterator[None]:
    """Let `sys.stdout` end the program where it cannot be written: 141 where nobody reads any more, else 2 and a line.

    All of it is written when the block ends, however it ends. What the terminal's encoding lacks is written as an
    escape, so that any path and any answer can be shown.
    """
    before = sys.stdout
    if before is None:  # closed before the program started; a file of ours would get its number
        complain("standard output: is closed; give /dev/null to throw it away")
        raise SystemExit(2)
    before.flush()
    sys.stdout = _text(_Descriptor(complain), before)
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        finally:
            sys.stdout = before


def _text(descriptor: _Descriptor, like: TextIO) -> TextIO:
    return io.TextIOWrapper(io.BufferedWriter(descriptor), like.encoding, "backslashreplace",
                            line_buffering=descriptor.isatty())
