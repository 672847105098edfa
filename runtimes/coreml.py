"""Sessions over a Core ML package: by Core ML itself on a Mac, by the evaluator of `runtimes.mil` elsewhere."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import numpy as np
import torch

from lfm_edge.bundle.bundle import Bundle
from lfm_edge.errors import BundleError
from lfm_edge.session.layout import EXPLICIT
from lfm_edge.session.session import Logits, Session
from lfm_edge.session.state import APPEND
from runtimes.mil import MilProgram

_PREFILL, _DECODE = "prefill", "decode"
_EVALUATED = ("the saved program, evaluated operator by operator in numpy as MIL defines it: "
              "not the arithmetic of the Neural Engine or of an Apple GPU")

Features = dict[str, np.ndarray]


def open_session(bundle: Bundle, threads: int | None = None) -> Session:
    """A session over the bundle's package. (Core ML takes no number of threads, and the target says so.)"""
    host = Predicted(bundle.artifact) if sys.platform == "darwin" else Evaluated(_program(bundle), bundle.artifact)
    return CoreMlSession(bundle, host)


def stored_constants(bundle: Bundle) -> set[bytes]:
    """SHA-256 of every quantized weight in the package, as what it dequantizes to, in float32."""
    return {hashlib.sha256(values.tobytes()).digest() for _, values in _program(bundle).constants()}


def _program(bundle: Bundle) -> MilProgram:
    return MilProgram.load(bundle.artifact, listed={bundle.directory / name for name in bundle.artifact_names})


class Host(Protocol):
    """Runs the functions of a package; keeps the states that are the program's own."""

    remark: str

    def run(self, function: str, features: Mapping[str, np.ndarray]) -> Features:
        """Outputs by name. Raises BundleError where the package cannot be run."""

    def clear(self) -> None:
        """Begin with fresh states."""


class Evaluated:
    """The package, evaluated in numpy."""

    remark = _EVALUATED

    def __init__(self, program: MilProgram, package: Path) -> None:
        self.functions = program.functions
        if _DECODE not in self.functions:
            raise BundleError(f"{package}: has no function '{_DECODE}'")
        self.states = {name: np.zeros(kind.shape, kind.dtype)
                       for name, kind in self.functions[_DECODE].states.items()}

    def run(self, function: str, features: Mapping[str, np.ndarray]) -> Features:
        """Outputs by name."""
        return self.functions[function].run(features, self.states)

    def clear(self) -> None:
        """Begin with fresh states."""
        for state in self.states.values():
            state.fill(0)


class Predicted:
    """The package, run by Core ML on this Mac, on whatever processors it chooses."""

    remark = ""

    def __init__(self, package: Path) -> None:
        import coremltools as ct

        self.package, self.ct = package, ct
        self.models: dict[str, Any] = {}
        self.state: Any = None
        self._model(_DECODE)

    def run(self, function: str, features: Mapping[str, np.ndarray]) -> Features:
        """Outputs by name."""
        return self._model(function).predict(dict(features), state=self.state)

    def clear(self) -> None:
        """Begin with fresh states."""
        if self.state is not None:
            self.state = self._model(_DECODE).make_state()

    def _model(self, function: str) -> Any:
        """The function, compiled when it is first needed."""
        if function not in self.models:
            try:
                with patch.object(os.path, "expandvars", str):  # a `$NAME` in the path is no variable
                    model = self.ct.models.MLModel(str(self.package), function_name=function)
            except Exception as error:  # Core ML's errors come as exceptions of any class
                raise BundleError(f"{self.package}: Core ML cannot load it ({error})") from None
            if self.state is None and "stateType" in str(model.get_spec().description):
                self.state = model.make_state()
            self.models[function] = model
        return self.models[function]


class CoreMlSession(Session):
    """The state is ours, but for the caches where the program keeps those. New rows of our caches are written here.

    One token is a `decode`, several are a `prefill`, padded to its length.
    """

    multiplies_unseen = True

    def __init__(self, bundle: Bundle, host: Host) -> None:
        manifest = bundle.manifest
        explicit = manifest.options.state == EXPLICIT
        held = tuple(tensor for tensor in manifest.state.tensors if explicit or tensor.update != APPEND)
        super().__init__(manifest.state, manifest.config.vocab_size, manifest.options.prefill_chunk, held)
        self.host = host
        self.arithmetic = manifest.options.compute_dtype
        self.remark = host.remark

    def _room(self) -> int:
        # A program that keeps its caches writes the rows of its padding as well, for which there must be room.
        fits = self.held == self.spec.tensors or self.position + self.chunk <= self.spec.context
        return self.chunk if fits else 1

    def _empty(self) -> None:
        super()._empty()
        self.host.clear()  # the program multiplies rows past the position by zero, which must be finite

    def _step(self, tokens: list[int]) -> Logits:
        features = {_feature(tensor.name): state.numpy() for tensor, state in zip(self.held, self.state, strict=True)}
        outputs = self._run(tokens, features)
        for tensor, state in zip(self.held, self.state, strict=True):
            new = torch.from_numpy(outputs[_feature(tensor.next_name)])
            tensor.update_with(state, new, self.position, len(tokens))
        return outputs["logits"][0, 0].astype(np.float32)

    def _run(self, tokens: list[int], state: Features) -> Features:
        features = {"position": np.array([self.position], np.int32), **state}
        if len(tokens) == 1:
            return self.host.run(_DECODE, {"tokens": np.array([tokens], np.int32), **features})
        padded = tokens + [0] * (self.chunk - len(tokens))
        return self.host.run(_PREFILL, {"tokens": np.array([padded], np.int32),
                                        "valid": np.array([len(tokens)], np.int32), **features})


def _feature(name: str) -> str:
    return name.replace(".", "_")
