"""A hard limit on the memory of a process, enforced by the operating system.

The process puts the limit on itself once its runtime is imported, so the limit holds what comes on top of an empty
process, as every other figure of `bench` does: what was charged before stays charged to the group it came from.
"""

from __future__ import annotations

import itertools
import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lfm_edge.errors import LfmEdgeError

CGROUP2, CGROUP1, RLIMIT = "cgroup v2", "cgroup v1", "RLIMIT_DATA"

_OF_A_GROUP = ("memory above an empty process that the system cannot take back: anonymous memory, and the kernel's own "
               "for it; clean pages of files are given back before the process is killed")
COUNTS = {
    CGROUP2: _OF_A_GROUP, CGROUP1: _OF_A_GROUP,
    RLIMIT: "private writable mappings above an empty process, whether touched or not: the whole KV cache, and the "
            "stacks of threads; no pages of files",
}
# What each version calls the limit, the limit with swap, and the file with the count of kills.
_FILES = {CGROUP2: ("memory.max", "memory.swap.max", "memory.events"),
          CGROUP1: ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.oom_control")}

_numbers = itertools.count()


@dataclass(frozen=True)
class MemoryLimit:
    """One limit on one process.

    kind: what enforces it: a control group of its own, or, where none can be made, RLIMIT_DATA
    group: the directory of the control group; empty for RLIMIT_DATA
    """

    nbytes: int
    kind: str
    group: str = ""

    def enter(self) -> None:
        """Put this process under the limit, from here on."""
        if self.kind == RLIMIT:
            now = int(re.search(r"VmData:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
            resource.setrlimit(resource.RLIMIT_DATA, (now + self.nbytes, now + self.nbytes))
        else:
            (Path(self.group) / "cgroup.procs").write_text(str(os.getpid()))

    def was_hit(self, returncode: int) -> bool:
        """Whether the limit is what ended the process, which ended with `returncode`."""
        if self.kind == RLIMIT:
            return returncode != 0  # an allocation fails, and whoever asked for it ends the process in its own way
        kills = re.search(r"oom_kill (\d+)", (Path(self.group) / _FILES[self.kind][2]).read_text())
        return returncode != 0 and kills is not None and int(kills[1]) > 0


@contextmanager
def memory_limit(nbytes: int) -> Iterator[MemoryLimit]:
    """A limit for one process to enter: by a control group where this process may make one, else by RLIMIT_DATA.

    Raises LfmEdgeError where the system has neither.
    """
    if sys.platform != "linux":
        raise LfmEdgeError(f"--memory-limit: {sys.platform} enforces no limit on memory; run it on Linux")
    for kind, parent in _parents():
        group = parent / f"lfm-edge-{os.getpid()}-{next(_numbers)}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if _limited(group, kind, nbytes):
                yield MemoryLimit(nbytes, kind, str(group))
                return
        finally:
            with suppress(OSError):
                group.rmdir()
    yield MemoryLimit(nbytes, RLIMIT)


def _limited(group: Path, kind: str, nbytes: int) -> bool:
    """Whether the new group has taken the limit."""
    limit, swap, _ = _FILES[kind]
    try:
        (group / limit).write_text(str(nbytes))
    except OSError:
        return False
    with suppress(OSError):  # a system without swap need not have it
        (group / swap).write_text("0" if kind == CGROUP2 else str(nbytes))
    return True


def _parents() -> Iterator[tuple[str, Path]]:
    """Groups that a new one with a limit on memory may be made in: this process's own, then those around it."""
    mounts = [line.split(" - ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for line in sorted(Path("/proc/self/cgroup").read_text().splitlines()):  # "0::/path" is version 2
        _, controllers, path = line.split(":", 2)
        kind = CGROUP1 if controllers else CGROUP2
        if kind == CGROUP1 and "memory" not in controllers.split(","):
            continue
        for mount, system in mounts:
            root = Path(mount.split()[4])
            name, _, options = system.split(maxsplit=2)
            if name == ("cgroup2" if kind == CGROUP2 else "cgroup") and (
                    kind == CGROUP2 or "memory" in options.split(",")):
                own = root / path.lstrip("/")
                yield from ((kind, group) for group in (own, *own.parents)
                            if group.is_relative_to(root) and _can_hold(group, kind))


def _can_hold(group: Path, kind: str) -> bool:
    """Whether a group made in this one would have a limit on memory."""
    control = group / "cgroup.subtree_control"
    return group.is_dir() if kind == CGROUP1 else control.is_file() and "memory" in control.read_text().split()
