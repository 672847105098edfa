"""ONNX graphs and ONNX Runtime, as every part that loads one needs them."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import onnx
import onnx_ir
import onnxruntime
from google.protobuf.message import Message

from lfm_edge.errors import BundleError

if TYPE_CHECKING:
    from lfm_edge.bundle.bundle import Bundle

_BINARY = "ep_cache_context"  # of a node that holds a compiled graph: it, or the name of the file with it


def session_options(entries: dict[str, str] | None = None, threads: int | None = None) -> onnxruntime.SessionOptions:
    """Options of a session. threads: None for the cores of this machine; entries: of its configuration"""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 4  # what goes wrong is raised as well
    for name, value in (entries or {}).items():
        options.add_session_config_entry(name, value)
    return options


def load_on_cpu(path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """Load a graph on the CPU. Raises BundleError where that fails."""
    try:
        with _linked_data(path, options):
            return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the binding raises a class of its own for each status
        raise BundleError(f"{path}: ONNX Runtime cannot load it ({error})") from None


def check_graph(bundle: Bundle, path: Path) -> None:
    """Raises BundleError where a graph is unreadable, or refers to a file that the bundle does not list.

    The manifest's hashes say nothing of such a file, and ONNX Runtime would read it.
    """
    for location in _locations(_read(path)):
        name = PurePosixPath(path.relative_to(bundle.directory).parent.as_posix(), location)
        if str(name) not in bundle.manifest.files or "\\" in location:
            raise BundleError(f"{path}: refers to data in '{location}', which the manifest does not list")


def constants(bundle: Bundle, path: Path) -> Iterator[bytes]:
    """SHA-256 of every constant of a graph, in it or in external data.

    Raises BundleError where the graph is unreadable, or refers to data that the bundle does not list.
    """
    check_graph(bundle, path)
    try:
        for value in onnx_ir.load(path).graph.initializers.values():
            yield hashlib.sha256(_content(value.const_value, path.parent)).digest()
    except Exception as error:  # protobuf and mmap raise what they like on damaged files
        raise _unreadable(path, error) from None


def _content(tensor: onnx_ir.TensorProtocol, folder: Path) -> bytes:
    """The bytes of a constant. (onnx_ir refuses external data behind a link.)"""
    if not isinstance(tensor, onnx_ir.ExternalTensor):
        return tensor.tobytes()
    with (folder / tensor.location).open("rb") as file:
        file.seek(tensor.offset or 0)
        content = file.read(tensor.length or tensor.nbytes)
    if len(content) < tensor.nbytes:
        raise ValueError(f"{tensor.location} ends within {tensor.name}")
    return content


@contextmanager
def _linked_data(path: Path, options: onnxruntime.SessionOptions) -> Iterator[None]:
    """For a load: hand over external data behind links, as ONNX Runtime takes no path out of the graph's directory.

    It follows a graph that is a link itself, so that one in the cache of the hub's client, beside its data, is fine.
    """
    allowed = (path.parent.resolve(), path.resolve().parent)
    links = [name for name in dict.fromkeys(_locations(_read(path))) if (path.parent / name).is_symlink()
             and not any((path.parent / name).resolve().is_relative_to(place) for place in allowed)]
    maps = [_mapped(path.parent / name) for name in links]
    if links:
        options.add_external_initializers_from_files_in_memory(links, maps, [len(content) for content in maps])
    yield  # with the maps alive: ONNX Runtime reads them while it loads, and does not hold them


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read(path: Path) -> onnx.ModelProto:
    """A graph without its external data. Raises BundleError where it is unreadable."""
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf raises what it likes on damaged files
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> BundleError:
    return BundleError(f"{path}: not a readable ONNX graph ({error})")


def _locations(message: Message) -> Iterator[str]:
    """Every file that a part of a model refers to: of data, and of compiled graphs."""
    if isinstance(message, onnx.TensorProto):
        yield from (entry.value for entry in message.external_data if entry.key == "location")
        return
    if isinstance(message, onnx.NodeProto) and message.op_type == "EPContext":
        values = {attribute.name: attribute for attribute in message.attribute}
        if _BINARY in values and "embed_mode" in values and not values["embed_mode"].i:
            yield values[_BINARY].s.decode(errors="replace")
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in (value,) if isinstance(value, Message) else value:
                yield from _locations(part)
