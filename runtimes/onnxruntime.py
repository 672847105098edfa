"""Sessions over an ONNX graph with explicit state, by ONNX Runtime's CPU provider.

MatMulNBits packs its weights into a layout of the processor at hand. The first load on a machine keeps the packed
graph in the user's cache directory; later loads map it from there, and the weights take no anonymous memory. An entry
that is damaged, or does not load, is made anew; where that fails, the bundle's own graph is loaded.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import re
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from lfm_edge import cached
from lfm_edge.backends import ort
from lfm_edge.backends.mapped import MappedPages, loading
from lfm_edge.bundle.bundle import Bundle
from lfm_edge.errors import BundleError
from lfm_edge.files import cache_directory
from lfm_edge.session.session import Logits, Session
from lfm_edge.session.state import StateSpec

_GRAPH, _DATA = "model.onnx", "model.onnx_data"
_FORMAT = 2  # of a packed graph; another one is made where this has changed
_PAGE = 4096
_PIECE = 1 << 24  # bytes copied at once
_LOG = logging.getLogger(__name__)


def open_session(bundle: Bundle, threads: int | None = None) -> Session:
    """A session over the bundle's graph. threads: of this session; None for the cores of this machine"""
    ort.check_graph(bundle, bundle.artifact)
    for anew in (False, True):
        graph = packed_graph(bundle, anew)
        if graph == bundle.artifact:
            break
        with suppress(BundleError):  # it is whole, and ONNX Runtime does not take it: once more
            return _opened(bundle, graph, threads)
    return _opened(bundle, bundle.artifact, threads)


def _opened(bundle: Bundle, graph: Path, threads: int | None) -> Session:
    manifest = bundle.manifest
    with loading(graph.parent) as others:
        program = load(graph, threads)
        MappedPages.of(graph.parent).page_out()  # packing reads every scale, and what is packed has a copy of them
        table = _embedding_pages(graph, others).if_worth_forgetting
    session = OnnxSession(program, manifest.state, manifest.config.vocab_size, manifest.options.prefill_chunk)
    session.scored, session.table = manifest.decoder.scored, table
    return session


def stored_constants(bundle: Bundle) -> set[bytes]:
    """SHA-256 of every constant of the bundle's graph.

    Raises BundleError where the graph is unreadable, or refers to data that the bundle does not list.
    """
    return set(ort.constants(bundle, bundle.artifact))


def load(path: Path, threads: int | None = None, pack_into: Path | None = None) -> onnxruntime.InferenceSession:
    """Load a graph. pack_into: a directory to save it in, weights packed. Raises BundleError where that fails."""
    options = ort.session_options(threads=threads)
    if pack_into is not None:
        options.optimized_model_filepath = str(pack_into / _GRAPH)
        for name, value in (("save_external_prepacked_constant_initializers", "1"),
                            ("optimized_model_external_initializers_file_name", _DATA),
                            ("optimized_model_external_initializers_min_size_in_bytes", "1024")):
            options.add_session_config_entry(f"session.{name}", value)
    return ort.load_on_cpu(path, options)


def packed_graph(bundle: Bundle, anew: bool = False) -> Path:
    """The bundle's graph with its weights packed for this processor, made now where the cache has none that is whole.

    anew: also where it has. The bundle's own graph where the cache cannot be written, or packing went wrong.
    """
    place = packed_directory(bundle)
    if anew or not cached.is_whole(place):
        try:
            _pack(bundle, place)
        except (OSError, BundleError):  # ONNX Runtime's own for a full disk; whatever else it is comes up again
            return bundle.artifact
    packed = place / _GRAPH
    return packed if packed.is_file() and cached.is_whole(place) else bundle.artifact


def _pack(bundle: Bundle, place: Path) -> None:
    """Make the entry. Where a packed graph computes something else, it has none: that is not tried again."""
    with cached.work_directory(place) as work:
        saved, new = work / "saved", work / cached.NEW
        saved.mkdir()
        expected = _trial(bundle, load(bundle.artifact, pack_into=saved))
        _align(saved, new)
        if not np.array_equal(_trial(bundle, load(new / _GRAPH)), expected):
            shutil.rmtree(new)
            new.mkdir()
        cached.seal(new, of=str(bundle.directory.resolve()))
        cached.put_in_place(work, place)
    size = sum(path.stat().st_size for path in place.iterdir())
    if (place / _GRAPH).is_file():
        _LOG.info("%s: its weights, packed for this processor, are kept in %s (%s); `lfm-edge cache` shows and clears "
                  "what is there", bundle.directory, place, f"{size / 1e6:,.1f} MB")


def _trial(bundle: Bundle, program: onnxruntime.InferenceSession) -> Logits:
    """Logits of a short prompt and of one more token, which take different kernels."""
    manifest = bundle.manifest
    session = OnnxSession(program, manifest.state, manifest.config.vocab_size, manifest.options.prefill_chunk)
    prompt = [index % manifest.config.vocab_size for index in range(min(7, manifest.state.context - 1))]
    return np.concatenate([session.prefill(prompt), session.decode(0)])


def _align(saved: Path, aligned: Path) -> None:
    """Copy a graph that ONNX Runtime has saved, every piece of its data at the beginning of a page.

    A packed weight holds several arrays, each on a boundary of 64 bytes counted from where memory was when it was
    packed. ONNX Runtime 1.31 writes them to any offset and finds other arrays when it maps them back.
    """
    aligned.mkdir()
    model = onnx.load(saved / _GRAPH, load_external_data=False)
    with (saved / _DATA).open("rb") as source, (aligned / _DATA).open("wb") as out:

        def move(offset: int, length: int) -> int:
            start = out.seek(-(-out.tell() // _PAGE) * _PAGE)
            source.seek(offset)
            for piece in iter(lambda: source.read(min(_PIECE, offset + length - source.tell())), b""):
                out.write(piece)
            return start

        for tensor in model.graph.initializer:
            entries = {entry.key: entry for entry in tensor.external_data}
            if "offset" in entries:
                entries["offset"].value = str(move(int(entries["offset"].value), int(entries["length"].value)))
            for key, entry in entries.items():
                if key.startswith("prepacked"):  # NAME|offset;length;flag|offset;length;flag ...
                    name, *blobs = entry.value.split("|")
                    parts = [blob.split(";") for blob in blobs]
                    entry.value = "|".join([name, *(f"{move(int(offset), int(length))};{length};{flag}"
                                                    for offset, length, flag in parts)])
    (aligned / _GRAPH).write_bytes(model.SerializeToString())


def packed_directory(bundle: Bundle) -> Path:
    """Where the packed graph is kept: a place for each graph, version of ONNX Runtime and kind of processor.

    What a graph names as its data lies beside it, under any name.
    """
    parts = [(name, bundle.manifest.files[name]["sha256"]) for name in bundle.artifact_names]
    key = [_FORMAT, bundle.manifest.decoder.artifact, parts, onnxruntime.__version__, _processor()]
    return cache_directory() / "onnxruntime" / hashlib.sha256(repr(key).encode()).hexdigest()[:32]


def _processor() -> tuple[str, ...]:
    """What the choice of kernels depends on: the instruction set and its extensions."""
    described = Path("/proc/cpuinfo")
    if not described.is_file():
        return platform.machine(), platform.processor()
    lines = re.findall(r"^(?:flags|Features)\s*:.*$", described.read_text(), flags=re.MULTILINE)
    return (platform.machine(), *sorted(set(lines)))


def _embedding_pages(graph: Path, others: MappedPages) -> MappedPages:
    """What is mapped of the graph's embedding table, and not by others."""
    model = onnx.load(graph, load_external_data=False)
    tables = {node.input[0] for node in model.graph.node if node.op_type == "GatherBlockQuantized"}
    for tensor in model.graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if tensor.name in tables and where:
            part = int(where["offset"]), int(where["length"])
            return MappedPages.of(graph.parent / where["location"], part, others)
    return MappedPages()


class OnnxSession(Session):
    """The state is ours. Past and present KV are bound to the same memory, so a step copies no cache.

    A conv state cannot be read and written in one place: each has two buffers, which take turns.

    table: the embedding's pages, let go of after each step where they are many; a lookup maps what lies around its
        row as well
    """

    table = MappedPages()

    def __init__(self, program: onnxruntime.InferenceSession, spec: StateSpec, vocab_size: int, chunk: int) -> None:
        self.program = program
        super().__init__(spec, vocab_size, chunk)
        self._logits = np.empty((1, 1, vocab_size), np.float32)
        self._mask = np.ones((1, spec.context), np.int64)

    @property
    def state(self) -> list[torch.Tensor]:
        """The buffers whose turn it is to be read."""
        return self._buffers[self._turn]

    @state.setter
    def state(self, tensors: list[torch.Tensor]) -> None:
        others = [state if tensor.is_cache else tensor.fresh()
                  for tensor, state in zip(self.spec.tensors, tensors, strict=True)]
        self._buffers = tensors, others
        self._bindings = self._bind(tensors, others), self._bind(others, tensors)
        self._turn = 0  # one number, so that they cannot be interrupted half-way in taking turns

    def _bind(self, past: list[torch.Tensor], present: list[torch.Tensor]) -> onnxruntime.IOBinding:
        binding = self.program.io_binding()
        outputs = [output.name for output in self.program.get_outputs()]
        for tensor, old, new, name in zip(self.spec.tensors, past, present, outputs[1:], strict=True):
            element = np.dtype(tensor.dtype)
            binding.bind_input(tensor.name, "cpu", 0, element, tensor.shape, old.data_ptr())
            binding.bind_output(name, "cpu", 0, element, tensor.shape, new.data_ptr())
        return binding

    def _step(self, tokens: list[int]) -> Logits:
        return self._scored_step(tokens, 1)[0]

    def _scored_step(self, tokens: list[int], count: int) -> NDArray[np.float32]:
        ids, scored = np.array([tokens], np.int64), np.array([count], np.int64)
        binding = self._bindings[self._turn]
        if self.scored > 1:
            binding.bind_input("num_logits_to_keep", "cpu", 0, np.int64, scored.shape, scored.ctypes.data)
        if count == 1:
            binding.bind_output("logits", "cpu", 0, np.float32, self._logits.shape, self._logits.ctypes.data)
        else:
            binding.bind_output("logits")  # no memory of ours: it has another shape than the graph says
        binding.bind_input("input_ids", "cpu", 0, np.int64, ids.shape, ids.ctypes.data)
        binding.bind_input("attention_mask", "cpu", 0, np.int64, (1, self.position + len(tokens)),
                           self._mask.ctypes.data)
        self.program.run_with_iobinding(binding)
        self.table.forget()
        self._turn = 1 - self._turn
        return self._logits[0].copy() if count == 1 else binding.get_outputs()[-1].numpy()[0]
