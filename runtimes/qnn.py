"""Sessions over NPU bundles: compiled graphs on a Snapdragon device, the same graphs on the simulator elsewhere."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from lfm_edge import htp
from lfm_edge.bundle import Bundle
from lfm_edge.errors import BundleError
from lfm_edge.npu import EMBEDDINGS, Arrays, NpuSession, graphs_of
from lfm_edge.session import Session
from lfm_edge.socs import SOCS, Soc

_SIMULATED = "{} ({}, HTP v{}), simulated on this host: the chip's own operators and roundings, not its speed"
_MACHINE = Path("/sys/devices/soc0/soc_id")


def open_session(bundle: Bundle, threads: int | None = None, soc: str | None = None) -> Session:
    """A session over the bundle's graphs. (The NPU takes no number of threads, and the target says so.)

    soc: one of the bundle's chips; without it the one of this device, or the first
    """
    chip = chip_of(bundle, soc)
    host = Simulated(bundle.artifact, chip) if htp.is_simulated() else Device(bundle.artifact, chip)
    embed = Embedding(bundle.artifact / "embedding.onnx")
    manifest = bundle.manifest
    arithmetic = "int16 of v68" if chip.htp_arch == 68 else "int16"
    return NpuSession(manifest.config, manifest.state, manifest.prefill_chunk, embed, host.run, arithmetic, host.remark)


def chips(bundle: Bundle) -> list[Soc]:
    """The chips that a bundle was compiled for."""
    return [soc for soc in SOCS.values() if (bundle.artifact / soc.name).is_dir()]


def chip_of(bundle: Bundle, name: str | None) -> Soc:
    """The chip to run for. Raises BundleError where the bundle is not compiled for it."""
    compiled = chips(bundle)
    if not compiled:
        raise BundleError(f"{bundle.directory}: is compiled for no chip")
    if name is None:
        here = int(_MACHINE.read_text()) if _MACHINE.is_file() else None
        return next((soc for soc in compiled if soc.machine_id == here), compiled[0])
    found = next((soc for soc in compiled if soc.name == name), None)
    if found is None:
        raise BundleError(f"{bundle.directory}: is compiled for {', '.join(soc.name for soc in compiled)}, "
                          f"not for {name}")
    return found


def stored_constants(bundle: Bundle) -> set[bytes]:
    """SHA-256 of every constant in the bundle's graphs. (What they were compiled to cannot be read.)

    Raises BundleError where a graph is unreadable, or refers to data outside its directory.
    """
    found: set[bytes] = set()
    for path in [bundle.artifact / "embedding.onnx", *sorted((bundle.artifact / "graphs").glob("*.onnx"))]:
        try:
            graph = onnx.load(path, load_external_data=False).graph
            found.update(hashlib.sha256(data).digest() for data in _stored(graph, path))
        except BundleError:
            raise
        except Exception as error:  # protobuf raises what it likes on damaged files
            raise BundleError(f"{path}: not a readable ONNX graph ({error})") from None
    return found


def _stored(graph: onnx.GraphProto, path: Path) -> Iterator[bytes]:
    for tensor in graph.initializer:
        if not tensor.external_data:
            yield tensor.raw_data
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        if Path(entry["location"]).name != entry["location"]:
            raise BundleError(f"{path}: refers to {entry['location']}, which is not beside it")
        with (path.parent / entry["location"]).open("rb") as file, \
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            yield view[int(entry["offset"]):int(entry["offset"]) + int(entry["length"])]


class Embedding:
    """`embedding.onnx`, on the CPU."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4  # what goes wrong is raised as well
        try:
            self.program = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the binding raises a class of its own for each status
            raise BundleError(f"{path}: ONNX Runtime cannot load it ({error})") from None

    def __call__(self, tokens: list[int]) -> np.ndarray:
        """float32 [1, T, hidden]"""
        return self.program.run([EMBEDDINGS], {"input_ids": np.array([tokens], np.int64)})[0]


class Host:
    """Runs the parts of a program one after the other, each given what it asks for by name."""

    remark = ""

    def __init__(self, directory: Path, soc: Soc) -> None:
        self.directory = directory
        self.soc = soc
        self.loaded: dict[str, list[onnxruntime.InferenceSession]] = {}

    def load(self, phase: str) -> list[onnxruntime.InferenceSession]:
        """The graphs of `prefill` or `decode`. Raises NpuError."""
        raise NotImplementedError

    def run(self, length: int, inputs: Arrays) -> Arrays:
        """One step of `length` tokens: the outputs by name."""
        phase = "decode" if length == 1 else "prefill"
        if phase not in self.loaded:
            self.loaded[phase] = self.load(phase)
        values = dict(inputs)
        for program in self.loaded[phase]:
            names = [output.name for output in program.get_outputs()]
            given = {value.name: values[value.name] for value in program.get_inputs()}
            values |= dict(zip(names, program.run(names, given), strict=True))
        return values


class Simulated(Host):
    """The graphs that the binaries were compiled from, compiled once more, for the simulator: it takes no binary

    in which two graphs share their weights.
    """

    def __init__(self, directory: Path, soc: Soc) -> None:
        super().__init__(directory, soc)
        self.remark = _SIMULATED.format(soc.name, soc.product, soc.htp_arch)

    def load(self, phase: str) -> list[onnxruntime.InferenceSession]:
        return [htp.load(graph, self.soc) for graph in graphs_of(self.directory / "graphs", phase)]


class Device(Host):
    """The context binaries, on the NPU itself. Prefill and decode are loaded together: they share their weights."""

    def __init__(self, directory: Path, soc: Soc) -> None:
        super().__init__(directory, soc)
        phases = [phase for phase in ("prefill", "decode") if graphs_of(directory / soc.name, phase)]
        self.loaded = {phase: [] for phase in phases}
        for part in zip(*(graphs_of(directory / soc.name, phase) for phase in phases), strict=True):
            for phase, graph in zip(phases, part, strict=True):
                program = htp.load(graph, soc, shared=len(phases) > 1, last=phase == phases[-1])
                self.loaded[phase].append(program)
