"""A session in a file: what it has written of its state, the tokens it has taken, and what model they belong to.

One safetensors file. Its tensors are those of the state by their names in the manifest, caches cut to the filled
rows, and `tokens`, int32 [position]. Its metadata tells the rest (docs/reference/state-and-sessions.md); the first
entry is the SHA-256 of the whole file, computed with zeros in its own place, so that any damage is found.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from lfm_edge.checkpoint.tokenizer import Message
from lfm_edge.errors import BundleError
from lfm_edge.files import replacing, text, whole_number
from lfm_edge.session.history import Embedded, Taken, token_ids
from lfm_edge.session.state import Snapshot, StateSpec

FORMAT, VERSION, VERSION_WITH_EMBEDDINGS = "lfm-edge session", "1", "2"
TOKENS = "tokens"

_BEGINNING = b'{"__metadata__":{"sha256":"'
_DIGEST_AT, _DIGEST_SIZE = 8 + len(_BEGINNING), 64
_SPELLINGS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32",
              "int16": "I16", "uint16": "U16", "int8": "I8", "uint8": "U8"}


@dataclass(frozen=True)
class Origin:
    """What the numbers of a state come from: sessions of one origin can go on with each other's.

    weights_sha256: of the quantized weights, as the manifest has it
    kv_scales_sha256: of the file with the scales of an 8-bit cache, where those are constants of the program
    """

    weights_sha256: str
    kv_scales_sha256: str = ""

    def check_suits(self, here: Origin) -> None:
        """Raises BundleError where a session of `here` cannot go on with what this is the origin of."""
        if self.weights_sha256 != here.weights_sha256:
            raise BundleError(f"is of another model or recipe: its weights are {self.weights_sha256[:12]}..., "
                              f"this bundle's {here.weights_sha256[:12]}...")
        if self.kv_scales_sha256 != here.kv_scales_sha256:
            raise BundleError("its KV cache is of another type, or has other scales, than this bundle's")


@dataclass(frozen=True)
class SavedSession:
    """What a file holds. messages: the conversation that the tokens are of, where there is one"""

    origin: Origin
    snapshot: Snapshot
    messages: tuple[Message, ...] = ()

    def write(self, path: Path) -> None:
        """Write the file beside its place and move it there. Raises LfmEdgeError where that cannot be done."""
        with replacing(path) as file:
            self._write(file)

    def _write(self, file: BinaryIO) -> None:
        """Wider types come first, so that each tensor begins at a multiple of its size."""
        snapshot = self.snapshot
        tensors = {tensor.name: value for tensor, value in zip(snapshot.spec.tensors, snapshot.tensors, strict=True)}
        tensors[TOKENS] = torch.tensor(token_ids(snapshot.tokens), dtype=torch.int32)
        ordered = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
        embedded = {index: entry.digest for index, entry in enumerate(snapshot.tokens) if isinstance(entry, Embedded)}
        header: dict[str, Any] = {"__metadata__": {
            "sha256": "0" * _DIGEST_SIZE, "format": FORMAT,
            "version": VERSION_WITH_EMBEDDINGS if embedded else VERSION, "position": str(snapshot.position),
            "weights_sha256": self.origin.weights_sha256, "kv_scales_sha256": self.origin.kv_scales_sha256,
            "state": json.dumps(snapshot.spec.to_dict()), "messages": json.dumps(self.messages),
            **({"embedded": json.dumps(embedded)} if embedded else {})}}
        end = 0
        for name, value in ordered:
            start, end = end, end + value.nbytes
            header[name] = {"dtype": _SPELLINGS[str(value.dtype).removeprefix("torch.")], "shape": list(value.shape),
                            "data_offsets": [start, end]}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for _, value in ordered:
            file.write(value.contiguous().flatten().view(torch.uint8).numpy().data)
        digest = _digest(file)
        file.seek(_DIGEST_AT)
        file.write(digest)

    @classmethod
    def read(cls, path: Path) -> SavedSession:
        """Read a file that `write` wrote. Raises BundleError where it is none, or damaged.

        Files are not trusted. One that is made to deceive can hold any numbers, but only those that it says it does.
        """
        try:
            with path.open("rb") as file:
                _check_digest(file)
            with safe_open(str(path), framework="pt") as tensors:
                return _parsed(tensors)
        except OSError as error:
            raise BundleError(f"{path}: cannot be read ({error.strerror or error})") from None
        except BundleError as error:
            raise BundleError(f"{path}: {error}") from None
        except Exception as error:  # json, torch and safetensors raise what they like on files made to confuse them
            raise BundleError(f"{path}: malformed ({type(error).__name__}: {_first_line(error)})") from None


def _parsed(file: Any) -> SavedSession:
    metadata = file.metadata()
    if metadata["format"] != FORMAT:
        raise BundleError("not a saved session")
    if metadata["version"] not in (VERSION, VERSION_WITH_EMBEDDINGS):
        raise BundleError(f"format version {metadata['version']}; this lfm-edge reads {VERSION} and "
                          f"{VERSION_WITH_EMBEDDINGS}")
    spec, position = StateSpec.from_dict(json.loads(metadata["state"])), int(metadata["position"])
    values = tuple(file.get_tensor(tensor.name) for tensor in spec.tensors)
    for tensor, value in zip(spec.tensors, values, strict=True):
        if str(value.dtype) != f"torch.{tensor.dtype}" or value.shape != tensor.kept_shape(position):
            raise ValueError(f"{tensor.name} is not what the layout says")
    tokens = file.get_tensor(TOKENS)
    if tokens.dtype != torch.int32 or tokens.shape != (position,) or (tokens < 0).any():
        raise ValueError("the tokens are not those of the position")
    messages = json.loads(metadata["messages"])
    if not isinstance(messages, list):
        raise ValueError("the messages are no list")
    messages = tuple(_message(entry) for entry in messages)
    origin = Origin(metadata["weights_sha256"], metadata["kv_scales_sha256"])
    taken: list[Taken] = tokens.tolist()
    if metadata["version"] == VERSION_WITH_EMBEDDINGS:
        for index, digest in json.loads(metadata["embedded"]).items():
            taken[whole_number(int(index))] = Embedded(tokens[int(index)].item(), text(digest))
    return SavedSession(origin, Snapshot(spec, position, values, tuple(taken)), messages)


def _message(raw: dict[str, Any]) -> Message:
    """tokens: what the model said, where its text alone does not tell"""
    message: Message = {"role": text(raw["role"]), "content": text(raw["content"])}
    if "tokens" not in raw:
        return message
    tokens = raw["tokens"]
    if not isinstance(tokens, list) or any(type(token) is not int or not 0 <= token < 2**31 for token in tokens):
        raise ValueError("the tokens of a message are no list of tokens")
    return {**message, "tokens": tokens}


def _check_digest(file: BinaryIO) -> None:
    """Raises BundleError where the file does not begin as ours do, or is not as it was written."""
    file.seek(8)
    if file.read(len(_BEGINNING)) != _BEGINNING:
        raise BundleError("not a saved session")
    if file.read(_DIGEST_SIZE) != _digest(file):
        raise BundleError("changed since it was saved (SHA-256 differs from its own)")


def _digest(file: BinaryIO) -> bytes:
    """SHA-256 of a whole file, with zeros where the digest itself stands, in hexadecimal."""
    file.seek(0)
    hasher = hashlib.sha256(file.read(_DIGEST_AT) + b"0" * _DIGEST_SIZE)
    file.seek(_DIGEST_AT + _DIGEST_SIZE)
    while piece := file.read(1 << 20):
        hasher.update(piece)
    return hasher.hexdigest().encode()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
