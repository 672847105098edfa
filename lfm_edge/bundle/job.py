"""What an exporter gets, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lfm_edge.bundle.options import ExportOptions
from lfm_edge.bundle.parts import Value
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.model.weights import Weights
from lfm_edge.quantization.recipe import Recipe
from lfm_edge.quantization.tensor import QuantizedTensor
from lfm_edge.session.state import StateSpec


@dataclass(frozen=True)
class ExportJob:
    """All that an exporter needs.

    options: what was chosen, nothing of it left open
    prompts: tokens to measure activations on, where the target's have constant scales
    source, licence: of the checkpoint, as it has them
    """

    config: ModelConfig
    weights: Weights
    recipe: Recipe
    state: StateSpec
    options: ExportOptions
    prompts: tuple[list[int], ...] = ()
    source: str = ""
    licence: str = "unknown"

    def release_weights(self) -> None:
        """Take all quantized weights out of memory until they are used again."""
        for weight in self.weights.values():
            if isinstance(weight, QuantizedTensor):
                weight.release()


@dataclass(frozen=True)
class Artifact:
    """What an exporter wrote.

    path: the file that the runtime loads; files: others that belong to it and do not stand in its package
    inputs, outputs: of the program, in its order
    lowering: what `inspect` shows about the exporter's work
    usage: Markdown for the bundle's README, how each client loads it
    activation_ranges: of activations with constant scales, lowest and highest number by the name of the value
    scored: of how many of a step's last tokens it gives the logits
    """

    path: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    lowering: dict[str, Any]
    usage: str
    files: tuple[str, ...] = ()
    activation_ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    scored: int = 1
