"""What an exporter gets, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lfm_edge.backends.socs import Soc
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.model.weights import Weights
from lfm_edge.quantization.recipe import Recipe
from lfm_edge.quantization.tensor import QuantizedTensor
from lfm_edge.session.state import StateSpec


@dataclass(frozen=True)
class ExportJob:
    """All that an exporter needs.

    compute_dtype: of activations and of all that is not quantized, one of the target's
    state_mode: `explicit` (the caller owns the state) or `internal` (the program does)
    prefill_chunk: most tokens that one step takes
    prompts: tokens to measure activations on, where the target's have constant scales
    socs: the chips to compile for, where the target is compiled
    source, licence: of the checkpoint, as it has them
    """

    config: ModelConfig
    weights: Weights
    recipe: Recipe
    state: StateSpec
    compute_dtype: str
    state_mode: str
    prefill_chunk: int
    prompts: tuple[list[int], ...] = ()
    socs: tuple[Soc, ...] = ()
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

    path: the file that the runtime loads; lowering: what `inspect` shows about the exporter's work
    usage: Markdown for the bundle's README, how each client loads it
    activation_ranges: of activations with constant scales, lowest and highest number by the name of the value
    scored: of how many of a step's last tokens it gives the logits
    """

    path: str
    lowering: dict[str, Any]
    usage: str
    activation_ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    scored: int = 1
