"""Files as others lay them out, and as somebody writes them who means no good."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def in_hub_cache(directory: Path, root: Path, name: str = "maker/model", commit: str = COMMIT) -> Path:
    """Put the files of `directory` into a cache below `root` as huggingface_hub does; the snapshot.

    Its files are relative links into `blobs/`, which are named by their hash.
    """
    place = root / f"models--{name.replace('/', '--')}"
    snapshot = place / "snapshots" / commit
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        blob = place / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(path.read_bytes())
        link = snapshot / path.relative_to(directory)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / "main").write_text(commit)
    return snapshot


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the data after it."""
    length, = struct.unpack("<Q", content[:8])
    return json.loads(content[8:8 + length]), content[8 + length:]


def with_header(header: Any, data: bytes) -> bytes:
    """A safetensors file of these."""
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded + data


def signed(content: bytes) -> bytes:
    """A saved session whose own SHA-256 is right again, whatever was changed in it."""
    start = 8 + len(b'{"__metadata__":{"sha256":"')
    blank = content[:start] + b"0" * 64 + content[start + 64:]
    return blank[:start] + hashlib.sha256(blank).hexdigest().encode() + blank[start + 64:]


def rewrite_state(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the layout that a saved session says it has, and sign it again."""
    header, data = header_of(path.read_bytes())
    state = json.loads(header["__metadata__"]["state"])
    change(state)
    header["__metadata__"]["state"] = json.dumps(state)
    path.write_bytes(signed(with_header(header, data)))
