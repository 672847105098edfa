"""A new directory at its place: written beside it, under a lock, and renamed when it is whole.

While NAME is being written, two things lie beside it. `.NAME.lock` is held (flock(2)) by the one who writes it: locks
end with the process that holds them, however it ends, and two threads exclude each other as two processes do.
`.NAME.partial-XXXXXXXX` is the work directory, which holds a lock of its own; `new` in it is what will be NAME, and
`old` what was there before, moved aside. Where a system has no such locks, nothing that another export left is removed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lfm_edge import locks
from lfm_edge.errors import ExportError

_NEW, _OLD, _LOCK = "new", "old", "lock"
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR)  # what rename(2) says of a place that is
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXT = re.compile("|".join(map(os.strerror, _FULL)), re.IGNORECASE)  # as native libraries pass it on
_UNWRITABLE = (*_TAKEN, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EIO, errno.EBUSY,
               errno.EFBIG, errno.ELOOP, errno.EXDEV, errno.ESTALE, errno.EINVAL, errno.ENODEV, errno.EMFILE)
_LONGEST = 200  # bytes of a name that leave room for what is put behind it: most systems take 255
_TRIES = 100


@contextmanager
def new_directory(output: Path, force: bool, is_bundle: Callable[[Path], bool]) -> Iterator[Path]:
    """A directory beside `output` to write into; renamed to `output` when the block ends well.

    Its parent is a work directory of ours: what is put there beside it is removed in the end. When the block does not
    end well, nothing is left and what was at `output` is as it was. force: replace what `is_bundle` there, at that
    moment. Nothing else is ever replaced or removed, but an empty directory.

    Raises ExportError where `output` is taken, or is being written by another, cannot be written, or the disk is full.
    """
    with _told_in_one_line(output):
        output = _place(output)
        _check_replaceable(output, force, is_bundle)
        output.parent.mkdir(parents=True, exist_ok=True)
        with _held(output.with_name(f"{_hidden(output)}.lock"), output):
            _clear_abandoned(output)
            _check_replaceable(output, force, is_bundle)  # what a killed export had moved aside may be back
            with _work_directory(output) as work:
                yield work / _NEW
                _put_in_place(work, output, force, is_bundle)


def _place(output: Path) -> Path:
    """Where a directory can be renamed to. A link stays a link; what it leads to is replaced."""
    try:
        place = output.resolve()
    except RuntimeError:  # of Python 3.12 and older
        raise ExportError(f"{output}: is a link that leads to itself") from None
    if place.is_mount() or str(place) in _mounted():
        raise ExportError(f"{output}: is a mount point, which cannot be replaced; give a directory in it, such as "
                          f"{output / 'bundle'}")
    here = Path.cwd()
    if here.is_relative_to(place):
        raise ExportError(f"{output}: the current directory is {'it' if here == place else 'in it'}; give the name of "
                          "a new directory")
    return place


def _mounted() -> set[str]:
    """Mount points, as Linux lists them: one of the same disk looks like any directory (mount --bind)."""
    listed = Path("/proc/self/mountinfo")
    if not listed.is_file():
        return set()
    lines = listed.read_bytes().splitlines()
    return {os.fsdecode(re.sub(rb"\\(\d{3})", lambda code: bytes([int(code[1], 8)]), line.split()[4]))
            for line in lines}


def _check_replaceable(output: Path, force: bool, is_bundle: Callable[[Path], bool]) -> None:
    try:
        output.lstat()
    except (FileNotFoundError, NotADirectoryError):  # the latter is told of when its parents are made
        return
    if _is_empty(output):
        return
    if not force:
        raise ExportError(f"{output}: exists already; give --force to replace it")
    if not is_bundle(output):
        raise ExportError(f"{output}: is not a bundle; --force replaces bundles only")


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _put_in_place(work: Path, output: Path, force: bool, is_bundle: Callable[[Path], bool]) -> None:
    """Rename what is new to its place. rename(2) decides whether that is free: but for an empty directory it must be.

    Where it does not end well, the end of the work directory puts back what was moved aside.
    """
    new, old = work / _NEW, work / _OLD
    try:
        new.rename(output)
        return
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
    taken = ExportError(f"{output}: something else appeared there during the export; it is untouched, and nothing was "
                        "written")
    if not force or not (_is_empty(output) or is_bundle(output)):
        raise taken
    output.rename(old)
    if not (_is_empty(old) or is_bundle(old)):  # it became something else between the look and the rename
        raise taken
    try:
        new.rename(output)
    except OSError as error:
        raise taken if error.errno in _TAKEN else error from None


@contextmanager
def _work_directory(output: Path) -> Iterator[Path]:
    """A directory beside `output`, locked, with `new` in it; removed in the end."""
    work, lock = Path(tempfile.mkdtemp(prefix=f"{_hidden(output)}.partial-", dir=output.parent)), None
    try:
        lock = os.open(work / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        locks.take(lock)
        locks.sign(lock)
        (work / _NEW).mkdir()
        yield work
    finally:
        _remove(work, output, lock)


def _remove(work: Path, output: Path, lock: int | None) -> None:
    """Remove a work directory whose lock is ours, after putting back what it has moved aside for nothing."""
    try:
        if (work / _NEW).exists() and os.path.lexists(work / _OLD):
            _put_back(work / _OLD, output)
        for path in work.iterdir():
            if path.name != _LOCK:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    finally:
        if lock is not None:
            os.close(lock)  # an open file that is removed lives on under another name, on some file systems
    shutil.rmtree(work, ignore_errors=True)


def _put_back(old: Path, output: Path) -> None:
    """Raises ExportError, and leaves it where it is, where its place is taken."""
    try:
        if old.is_dir() and not old.is_symlink():
            old.rename(output)
        else:
            output.hardlink_to(old)  # a rename would replace a file
            old.unlink()
    except OSError as error:
        raise ExportError(f"{output}: something else appeared there during the export; what was there before is now "
                          f"{old} ({error.strerror})") from None


def _clear_abandoned(output: Path) -> None:
    """Remove work directories of exports to `output` that were killed; put back what one had moved aside.

    One is abandoned where its lock is free and was made on this machine: the locks of others may be unknown here.
    """
    mine = re.compile(re.escape(f"{_hidden(output)}.partial-") + r"[^.-]{8}")
    with suppress(PermissionError):
        for work in [path for path in output.parent.iterdir() if mine.fullmatch(path.name)]:
            with suppress(OSError, ExportError):
                _remove_if_abandoned(work, output)


def _remove_if_abandoned(work: Path, output: Path) -> None:
    if _is_empty(work):  # killed before it had a lock
        work.rmdir()
        return
    lock = os.open(work / _LOCK, os.O_RDWR)
    try:
        abandoned = locks.is_abandoned(lock)
    except BaseException:
        os.close(lock)
        raise
    if abandoned:
        _remove(work, output, lock)
    else:
        os.close(lock)


def _hidden(output: Path) -> str:
    """How the names of what lies beside `output` begin."""
    name = os.fsencode(output.name)
    return f".{output.name if len(name) <= _LONGEST else hashlib.sha256(name).hexdigest()}"


# Locks


@contextmanager
def _held(path: Path, output: Path) -> Iterator[None]:
    """Hold a lock file, which is removed in the end. Raises ExportError where another export holds it."""
    try:
        lock = _take(path)
    except BlockingIOError:
        raise ExportError(f"{output}: another export is writing it; wait for its end, or give another --output"
                          ) from None
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: whoever opened it before sees that it is gone
        os.close(lock)


def _take(path: Path) -> int:
    """Raises BlockingIOError where another holds it."""
    for _ in range(_TRIES):
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locks.take(lock)
            if os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        except FileNotFoundError:  # the one before removed it
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
    raise BlockingIOError(errno.EAGAIN, "always held", str(path))


# Errors


@contextmanager
def _told_in_one_line(output: Path) -> Iterator[None]:
    """Failures of the system, from whichever library, as ExportError."""
    try:
        yield
    except Exception as error:
        if any(map(_says_full, _chain(error))):
            raise ExportError(f"{output}: no space left on the disk; nothing was written") from None
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            raise ExportError(f"{error.filename or output}: cannot be written ({error.strerror})") from None
        raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _says_full(error: BaseException) -> bool:
    return getattr(error, "errno", None) in _FULL or bool(_FULL_TEXT.search(str(error)))
