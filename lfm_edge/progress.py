"""Progress of long work, for people."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress


class Progress:
    """What long work tells about itself; this one tells nobody."""

    def stage(self, name: str, total: int | None = None) -> None:
        """A named step begins, of `total` parts where that is known."""

    def advance(self) -> None:
        """One part of the current step is done."""


class LineProgress(Progress):
    """One plain line when a stage begins, with the seconds since the start."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.start = time.monotonic()

    def stage(self, name: str, total: int | None = None) -> None:
        self.console.print(f"[{time.monotonic() - self.start:6.1f} s] {name}", markup=False, highlight=False)


class BarProgress(Progress):
    """A bar for each stage."""

    def __init__(self, console: Console) -> None:
        self.bars = RichProgress(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                                 TimeElapsedColumn(), console=console)
        self.total = 0

    def __enter__(self) -> BarProgress:
        self.bars.start()
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        """Stop. The bar of a stage that ended in a failure stays where it was."""
        if failure is None:
            self._finish()
        with contextlib.suppress(OSError):  # of a terminal that was closed
            self.bars.stop()

    def stage(self, name: str, total: int | None = None) -> None:
        self._finish()
        self.bars.add_task(name, total=total)

    def advance(self) -> None:
        if self.bars.tasks:
            self.bars.advance(self.bars.tasks[-1].id)

    def _finish(self) -> None:
        if self.bars.tasks:
            task = self.bars.tasks[-1]
            self.bars.update(task.id, total=task.total or 1, completed=task.total or 1)
            self.bars.stop_task(task.id)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the logs and warnings of a backend, which are about its own insides, off the terminal."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


@contextlib.contextmanager
def native_messages_hidden() -> Iterator[None]:
    """Keep what native libraries print about the processor, while they start, off standard output and error."""
    sys.stdout.flush()
    sys.stderr.flush()
    nothing = os.open(os.devnull, os.O_WRONLY)
    kept = {stream: os.dup(stream) for stream in (1, 2)}
    for stream in kept:
        os.dup2(nothing, stream)
    try:
        yield
    finally:
        for stream, copy in kept.items():
            os.dup2(copy, stream)
            os.close(copy)
        os.close(nothing)
