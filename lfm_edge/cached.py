"""What lfm-edge keeps in the user's cache: every entry whole, or known not to be and made again.

An entry is a directory KIND/NAME below `cache_directory()`. Its seal is written last and tells size, times and SHA-256
of each of its files, so that damage is noticed. While an entry is made it is `new` in a work directory beside its
place, whose name begins with a dot and whose `lock` is held (flock(2)) by the one who makes it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfm_edge import locks
from lfm_edge.files import cache_directory, sha256

SEAL, LOCK, NEW = "seal.json", "lock", "new"
READY, MAKING, LEFT = "ready", "being made", "left by a process that ended"
UNUSED_DAYS = 90  # after which an entry goes when another one of its kind is made
_OLD_WORK_SECONDS = 3600  # of older versions, which hold no lock
_DAY = 86_400.0
_WHAT = {"onnxruntime": "ONNX weights packed for a processor", "peers": "built by bench --against"}


@dataclass(frozen=True)
class Entry:
    """Something in the cache. of: whose it is, as far as that is known; used: when it was last, in seconds since 1970

    state: `ready`, `being made` or `left by a process that ended`
    """

    path: Path
    what: str
    of: str
    nbytes: int
    used: float
    state: str

    def to_dict(self) -> dict[str, Any]:
        """The entry in JSON's types."""
        used = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.used))
        return {"path": str(self.path), "what": self.what, "of": self.of, "bytes": self.nbytes, "last_used": used,
                "state": self.state}


def entries(unused_days: float = 0) -> list[Entry]:
    """All that can be made again, the longest unused first. (Where checkpoints lie, which nobody else knows, cannot.)

    unused_days: only what has not been used for so long
    """
    found = [_entry(path) for kind in _WHAT for path in _inside(cache_directory() / kind) if path.suffix != ".lock"]
    return sorted((entry for entry in found if time.time() - entry.used >= unused_days * _DAY),
                  key=lambda entry: (entry.used, entry.path))


def remove(chosen: Sequence[Entry]) -> list[Entry]:
    """Remove entries, but those that are being made. Gives those that are gone.

    A process that has mapped a file of one keeps what it has.
    """
    for entry in chosen:
        if entry.state != MAKING:
            _remove(entry.path)
    return [entry for entry in chosen if not os.path.lexists(entry.path)]


def seal(directory: Path, of: str = "") -> None:
    """Write the seal of a directory that is to be an entry, once all of it is on the disk. of: whose it is

    After a crash a file may otherwise have its size, and zeros for content.
    """
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path != directory / SEAL]
    for path in paths:
        _flush(path)
    files = {path.relative_to(directory).as_posix(): {**_stamp(path), "sha256": sha256(path)} for path in paths}
    _write_seal(directory, {"of": of, "files": files})


def is_whole(directory: Path) -> bool:
    """Whether an entry is as it was sealed; it counts as used now.

    A file whose times are others is read as a whole, and where it is the same its new times are sealed.
    """
    try:
        sealed = json.loads((directory / SEAL).read_text())
        changed = False
        for name, entry in sealed["files"].items():
            stamp = _stamp(directory / name)
            if stamp != {key: entry[key] for key in stamp}:
                if stamp["bytes"] != entry["bytes"] or sha256(directory / name) != entry["sha256"]:
                    return False
                entry.update(stamp)
                changed = True
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False
    with suppress(OSError):  # where it cannot be written it is read again the next time
        if changed:
            _write_seal(directory, sealed)
        else:
            os.utime(directory / SEAL)
    return True


@contextmanager
def work_directory(place: Path) -> Iterator[Path]:
    """A directory to make the entry in that is to be at `place`, and what it takes; removed in the end.

    What was left by others of its kind goes first. Raises OSError where the cache cannot be written.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    remove([entry for entry in map(_entry, _inside(place.parent)) if entry.state == LEFT])
    work = Path(tempfile.mkdtemp(prefix=".partial-", dir=place.parent))
    lock = None
    try:
        lock = os.open(work / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        locks.take(lock)
        locks.sign(lock)
        yield work
    finally:
        if lock is not None:
            os.close(lock)  # an open file that is removed lives on under another name, on some file systems
        shutil.rmtree(work, ignore_errors=True)


def put_in_place(work: Path, place: Path) -> None:
    """Move `new` of a work directory, which is sealed, to its place. What is there, damaged or as good, goes.

    Entries of its kind go as well that have not been used for 90 days. Raises OSError where that cannot be done.
    """
    with suppress(FileNotFoundError):
        place.rename(work / "old")
    (work / NEW).rename(place)
    _flush(place.parent)
    kind = [_entry(path) for path in _inside(place.parent) if path != place]
    remove([entry for entry in kind if time.time() - entry.used >= UNUSED_DAYS * _DAY])


def _entry(path: Path) -> Entry:
    what, of, used = _WHAT.get(path.parent.name, path.parent.name), "", _modified(path)
    if path.name.startswith("."):
        return Entry(path, what, of, _size(path), used, LEFT if _is_left(path, used) else MAKING)
    if path.is_file():
        return Entry(path, "log of a build that failed", of, _size(path), used, READY)
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        of, used = str(json.loads((path / SEAL).read_text())["of"]), _modified(path / SEAL)
    return Entry(path, what, of, _size(path), used, READY)


def _is_left(work: Path, modified: float) -> bool:
    """Whether nobody works there: its lock is free, and of this machine, as others' locks may be unknown here."""
    try:
        lock = os.open(work / LOCK, os.O_RDWR)
    except OSError:
        return time.time() - modified > _OLD_WORK_SECONDS
    try:
        return locks.is_abandoned(lock)
    except OSError:
        return False
    finally:
        os.close(lock)


def _inside(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _size(path: Path) -> int:
    """Bytes of a file, or of the files in a directory. Some may go while they are counted."""
    total = 0
    for part in (path, *path.rglob("*")):
        with suppress(OSError):
            total += part.lstat().st_size if part.is_file() else 0
    return total


def _modified(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return time.time()


def _stamp(path: Path) -> dict[str, int]:
    """What tells that a file may have been written. (The second time cannot be set by a program.)"""
    status = path.stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}



def _write_seal(directory: Path, content: dict[str, Any]) -> None:
    """Whole or not at all, and on the disk before the entry is in its place."""
    partial = directory / f".{SEAL}-{uuid.uuid4().hex}"
    try:
        partial.write_text(json.dumps(content, indent=2) + "\n")
        _flush(partial)
        partial.replace(directory / SEAL)
    finally:
        partial.unlink(missing_ok=True)
    _flush(directory)


def _flush(path: Path) -> None:
    """Have the system write a file, or the names in a directory, to the disk (fsync(2))."""
    if path.is_dir() and os.name == "nt":  # which opens no directories
        return
    file = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(file)
    finally:
        os.close(file)
