"""Reading files that came from somewhere else."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

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
