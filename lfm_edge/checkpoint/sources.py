"""Where the checkpoints of this user's exports lie: a record in the user's cache, by the checkpoint's SHA-256.

A manifest names its checkpoint without saying where that lies: a bundle is published, and what it says is not to be
followed. The record lets `verify` find it on the machine that exported.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from lfm_edge.errors import LfmEdgeError
from lfm_edge.files import cache_directory, read_json_object, write_text


def remember(sha256: str, place: str) -> None:
    """Record where the checkpoint of this SHA-256 lies. Where the cache cannot be written, nothing is recorded.

    place: as `open_checkpoint` takes it, from whatever directory
    """
    with suppress(OSError, LfmEdgeError):
        record = _record(sha256)
        record.parent.mkdir(parents=True, exist_ok=True)
        write_text(record, json.dumps({"model": place}) + "\n")


def place_of(sha256: str) -> str | None:
    """Where the checkpoint of this SHA-256 lay when it was exported from; None where nothing is recorded."""
    with suppress(LfmEdgeError):
        place = read_json_object(_record(sha256), LfmEdgeError).get("model")
        return place if isinstance(place, str) else None
    return None


def _record(sha256: str) -> Path:
    return cache_directory() / "checkpoints" / f"{sha256}.json"
