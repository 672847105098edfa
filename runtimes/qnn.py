"""Sessions over NPU bundles: compiled graphs on a Snapdragon device, the same graphs on the simulator elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import onnxruntime

from lfm_edge.backends import htp, ort
from lfm_edge.backends.npu import DECODE, EMBEDDINGS, PREFILL, Arrays, NpuSession, graphs_of
from lfm_edge.backends.socs import SOCS, Soc
from lfm_edge.bundle.bundle import Bundle
from lfm_edge.errors import BundleError
from lfm_edge.session.session import Session

_SIMULATED = "{} ({}, HTP v{}), simulated on this host: the chip's own operators and roundings, not its speed"
_MACHINE = Path("/sys/devices/soc0/soc_id")


def open_session(bundle: Bundle, threads: int | None = None, soc: str | None = None) -> Session:
    """A session over the bundle's graphs. (The NPU takes no number of threads, and the target says so.)

    soc: one of the bundle's chips; without it the one of this device, or the first
    """
    chip = chip_of(bundle, soc)
    for name in bundle.artifact_names:
        if name.endswith(".onnx"):
            ort.check_graph(bundle, bundle.directory / name)
    host = Simulated(bundle.artifact, chip) if htp.is_simulated() else Device(bundle.artifact, chip)
    embed = Embedding(bundle.artifact / "embedding.onnx")
    manifest = bundle.manifest
    arithmetic = "int16 of v68" if chip.htp_arch == 68 else "int16"
    return NpuSession(manifest.config, manifest.state, manifest.options.prefill_chunk, embed, host.run, arithmetic,
                      host.remark)


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

    Raises BundleError where a graph is unreadable, or refers to data that the bundle does not list.
    """
    graphs = [bundle.artifact / "embedding.onnx", *sorted((bundle.artifact / "graphs").glob("*.onnx"))]
    return {digest for path in graphs for digest in ort.constants(bundle, path)}


class Embedding:
    """`embedding.onnx`, on the CPU."""

    def __init__(self, path: Path) -> None:
        self.program = ort.load_on_cpu(path, ort.session_options(threads=1))

    def __call__(self, tokens: list[int]) -> np.ndarray:
        """float32 [1, T, hidden]"""
        return self.program.run([EMBEDDINGS], {"input_ids": np.array([tokens], np.int64)})[0]


class Host(ABC):
    """Runs the parts of a program one after the other, each given what it asks for by name."""

    remark = ""

    @abstractmethod
    def programs(self, phase: str) -> list[onnxruntime.InferenceSession]:
        """The loaded graphs of `prefill` or `decode`. Raises NpuError."""

    def run(self, length: int, inputs: Arrays) -> Arrays:
        """One step of `length` tokens: the outputs by name."""
        values = dict(inputs)
        for program in self.programs(DECODE if length == 1 else PREFILL):
            names = [output.name for output in program.get_outputs()]
            given = {value.name: values[value.name] for value in program.get_inputs()}
            values |= dict(zip(names, program.run(names, given), strict=True))
        return values


class Simulated(Host):
    """The graphs that the binaries were compiled from, compiled once more for the simulator.

    It takes no binary in which two graphs share their weights.
    """

    def __init__(self, directory: Path, soc: Soc) -> None:
        self.graphs, self.soc = directory / "graphs", soc
        self.loaded: dict[str, list[onnxruntime.InferenceSession]] = {}
        self.remark = _SIMULATED.format(soc.name, soc.product, soc.htp_arch)

    def programs(self, phase: str) -> list[onnxruntime.InferenceSession]:
        if phase not in self.loaded:
            self.loaded[phase] = [htp.load(graph, self.soc) for graph in graphs_of(self.graphs)[phase]]
        return self.loaded[phase]


class Device(Host):
    """The context binaries, on the NPU itself. Prefill and decode are loaded together: they share their weights."""

    def __init__(self, directory: Path, soc: Soc) -> None:
        phases = graphs_of(directory / soc.name)
        self.loaded: dict[str, list[onnxruntime.InferenceSession]] = {phase: [] for phase in phases}
        for part in zip(*phases.values(), strict=True):
            for phase, graph in zip(phases, part, strict=True):
                program = htp.load(graph, soc, shared=len(phases) > 1, last=graph == part[-1])
                self.loaded[phase].append(program)

    def programs(self, phase: str) -> list[onnxruntime.InferenceSession]:
        return self.loaded[phase]
