"""Memory of a process, as Linux (proc(5); Android's kernel has the same files) or macOS accounts for it."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from lfm_edge.errors import LfmEdgeError

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_CAPABILITY_VERSION_3 = 0x20080522
_CAP_IPC_LOCK = 14
_RUSAGE_INFO_V4 = 4  # of proc_pid_rusage (libproc.h): a 16-byte UUID, then 64-bit fields, of which these:
_RESIDENT, _FOOTPRINT, _LARGEST_FOOTPRINT = 6, 7, 28
_RUSAGE_FIELDS = 64  # more than there are
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True)
class Memory:
    """Bytes of physical memory of this process.

    anonymous: heap and other memory of its own; file_backed: clean or shared pages of files; peak: the
    largest sum of both since the start, or since `reset_peak`

    On macOS, as on iOS, what counts is the footprint: `anonymous` and `peak` are that, memory of the GPU included,
    and `peak` counts from the start.
    """

    anonymous: int
    file_backed: int
    peak: int

    @property
    def resident(self) -> int:
        """Both kinds together."""
        return self.anonymous + self.file_backed

    def above(self, baseline: Memory) -> Memory:
        """What came on top of an earlier reading."""
        return Memory(self.anonymous - baseline.anonymous, self.file_backed - baseline.file_backed,
                      self.peak - baseline.resident)


def read_memory() -> Memory:
    """This process's memory now. Raises LfmEdgeError where the system does not tell."""
    if sys.platform == "darwin":
        return _read_rusage()
    if not _STATUS.is_file():
        raise LfmEdgeError(f"bench reads {_STATUS}, which {sys.platform} does not have; run it on Linux or macOS")
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)

    def kilobytes(name: str) -> int:
        return int(fields[name].split()[0]) * 1024

    return Memory(kilobytes("RssAnon"), kilobytes("RssFile") + kilobytes("RssShmem"), kilobytes("VmHWM"))


def _read_rusage() -> Memory:
    fields = (ctypes.c_uint64 * (2 + _RUSAGE_FIELDS))()
    if ctypes.CDLL(None).proc_pid_rusage(os.getpid(), _RUSAGE_INFO_V4, fields) != 0:
        raise LfmEdgeError("proc_pid_rusage does not tell the memory of this process")
    values = fields[2:]
    footprint = values[_FOOTPRINT]
    return Memory(footprint, max(values[_RESIDENT] - footprint, 0), values[_LARGEST_FOOTPRINT])


def reset_peak() -> None:
    """Let `peak` count from here on, where the system allows it."""
    if _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")


def forbid_locking() -> None:
    """Let this process lock no memory, as an app on a phone may not.

    ExecuTorch's loader asks to lock a program's constants and goes on where it may not. Root may: the whole
    embedding table would then be resident, and counted, though a step reads a few rows of it.
    """
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
    if sys.platform != "linux":
        return  # elsewhere the limit binds everyone
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)  # of this process: capabilities(7), capget(2)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, for the lower and the upper 32
    if libc.capget(header, sets) != 0:
        raise LfmEdgeError(f"capget failed ({os.strerror(ctypes.get_errno())})")
    sets[0] &= ~(1 << _CAP_IPC_LOCK)
    if libc.capset(header, sets) != 0:
        raise LfmEdgeError(f"capset failed ({os.strerror(ctypes.get_errno())})")


def parse_bytes(text: str) -> int:
    """Bytes of `1GB`, `800 MB`, `512MiB` or a plain number. Raises LfmEdgeError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise LfmEdgeError(f"'{text}' is no size; write for example 1GB, 800MB or 512MiB")
    size = int(float(match[1]) * _UNITS[match[2]])
    if not match[2] and size < 10**6:
        raise LfmEdgeError(f"'{text}' is {size} bytes; write the unit as well, for example 1GB, 800MB or 512MiB")
    return size
