"""Reading files that came from somewhere else, and writing files that are whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from lfm_edge.errors import LfmEdgeError


def cache_directory() -> Path:
    """Where lfm-edge keeps what it can make again: in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lfm-edge"


def read_json_object(path: Path, failure: type[LfmEdgeError]) -> dict[str, Any]:
    """The JSON object in `path`. Raises `failure` where there is no file, no JSON, or no object."""
    if not path.is_file():
        raise failure(f"{path}: no such file")
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise failure(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise failure(f"{path}: expected an object at the top level")
    return value


def read_text(path: Path) -> str:
    """A text file of the user's, without a byte-order mark. Raises LfmEdgeError where there is no text in it."""
    try:
        content = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LfmEdgeError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise LfmEdgeError(f"{path}: cannot be read ({error.strerror})") from None
    if not content.strip():
        raise LfmEdgeError(f"{path}: is empty")
    return content


def text(value: Any) -> str:
    """A value of a JSON file that must be text. Raises ValueError where it is something else."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    return value


def check_outputs(outputs: Mapping[str, Path | None], inputs: Sequence[Path]) -> None:
    """Raises LfmEdgeError where a file would be written over one that is read, or two over each other.

    outputs: by the option that names them, `-` for standard output; a terminal or a pipe may be named twice
    """
    written: dict[str, Path] = {}
    for option, path in outputs.items():
        if path in (None, Path("-")) or _is_stream(path):
            continue
        if any(_is_same(path, source) for source in inputs):
            raise LfmEdgeError(f"{option} {path}: would be written over a file that is read; give another one")
        for other, place in written.items():
            if _is_same(path, place):
                raise LfmEdgeError(f"{option} {path}: {other} is the same file; give another one")
        written[option] = path


def _is_stream(path: Path) -> bool:
    """Whether it is a terminal, a pipe, or a device."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)  # however it is spelled
    except OSError:
        return one.resolve() == other.resolve()


def whole_number(value: Any, at_least: int = 0) -> int:
    """A value of a JSON file that must be an integer. Raises ValueError where it is something else, or smaller."""
    if type(value) is not int or value < at_least:
        raise ValueError(f"{value!r} is no whole number from {at_least} on")
    return value


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def one_of(known: tuple[Any, ...], value: Any) -> Any:
    """A value of a JSON file that must be one of these, all of one type. Raises ValueError where it is another one."""
    if type(value) is not type(known[0]) or value not in known:
        raise ValueError(f"{value!r} is none of {', '.join(map(str, known))}")
    return value


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write and read, beside `path`, which takes its place when the block ends well.

    What is there already and is no file (a terminal, a pipe) is written as it is. Raises LfmEdgeError where the system
    does not let it be written.
    """
    place = path.resolve()  # a link stays a link
    try:
        if _is_stream(place):
            with place.open("wb") as file:
                yield file
            return
        partial = place.with_name(f".partial-{secrets.token_hex(8)}")  # another thread may write it as well
        try:
            with partial.open("x+b") as file:
                yield file
            partial.replace(place)
        finally:
            with suppress(OSError):  # it is in its place, or could not be made
                partial.unlink()
    except OSError as error:
        raise LfmEdgeError(f"{path}: cannot be written ({error.strerror or error})") from None


def write_text(path: Path, content: str) -> None:
    """Write a text file, whole or not at all. Raises LfmEdgeError where it cannot be written."""
    with replacing(path) as file:
        file.write(content.encode())
