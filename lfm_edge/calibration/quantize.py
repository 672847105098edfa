"""A whole checkpoint, quantized once, by a recipe."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lfm_edge.calibration.gptq import quantize_with_text
from lfm_edge.checkpoint.checkpoint import Checkpoint
from lfm_edge.errors import ExportError
from lfm_edge.quantization.recipe import GPTQ, Recipe
from lfm_edge.quantization.rounding import quantize_weight
from lfm_edge.quantization.tensor import QuantizedTensor, WeightsFile


def quantize_checkpoint(checkpoint: Checkpoint, recipe: Recipe, progress: Callable[[str], None] = lambda name: None,
                        windows: Tensor | None = None, file: WeightsFile | None = None,
                        ) -> dict[str, Tensor | QuantizedTensor]:
    """Every weight of the model, quantized or in float32 as the recipe says, read one at a time.

    progress: called with the name of each weight when it is done
    windows: the text of a calibrated rounding, int64 [B, T]
    file: holds the quantized weights where one is given, in place of memory
    Raises CheckpointError for unreadable weights, ExportError where the recipe does not fit the shapes.
    """
    schemes = recipe.schemes(checkpoint.config.weights())  # refuse before the work

    def keep(weight: QuantizedTensor) -> QuantizedTensor:
        return weight.moved_to(file) if file else weight

    if recipe.rounding == GPTQ:
        if windows is None:
            raise ExportError("a gptq recipe needs the text that it was calibrated with")
        return quantize_with_text(checkpoint, schemes, windows, progress, keep)
    weights: dict[str, Tensor | QuantizedTensor] = {}
    for name, scheme in schemes.items():
        value = checkpoint.tensor(name)
        weights[name] = value.float() if scheme is None else keep(quantize_weight(name, value, scheme))
        progress(name)
    return weights
