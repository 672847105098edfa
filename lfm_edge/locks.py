"""Locks of open files, which end with the process that holds them, however it ends (flock(2))."""

from __future__ import annotations

import errno
import os
import platform
import uuid
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def take(file: int) -> bool:
    """Lock an open file; False where the system has no locks. Raises BlockingIOError where another holds it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def sign(file: int) -> None:
    """Write into a locked file whose lock it is."""
    os.write(file, _machine().encode())


def is_abandoned(file: int) -> bool:
    """Whether whoever signed a file is gone: its lock is free, and was taken on this machine, as other machines' locks

    may be unknown here. The lock is then ours. Raises BlockingIOError where it is held.
    """
    return take(file) and not set(os.read(file, 1000).decode(errors="replace").split()).isdisjoint(_machine().split())


def _machine() -> str:
    """The running kernel, which the containers of a machine share, and the machine that it runs on."""
    boot = _BOOT.read_text().strip() if _BOOT.is_file() else ""
    return f"{boot} {platform.node()}/{uuid.getnode():x}"
