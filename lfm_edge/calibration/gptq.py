"""Calibrated rounding: GPTQ (Frantar et al., 2023), from the scales of the data-free search.

The nearest codes keep a layer's weights close. GPTQ keeps close what the layer makes of its inputs: it rounds one
column after the other, those with the largest inputs first, and adds to each beforehand what best makes up for the
errors so far, given the second moments `H = X^T X` of the inputs on some text.

With `H = U D U^T`, U unit upper triangular, column k is rounded from `w_k + (W - Q)[:, :k] @ U[:k, k]`: QuIP's form
of GPTQ (Chee et al., 2023, who prove the two equal), which takes one factorization and no inverse.

The inputs come from layers that are rounded already, with activations in floating point, so that every target has
the same integers. All of it is in float64: `verify` does it again, perhaps where sums have another order. In
float64 they then differ by some 1e-13, and hardly one of 1e9 weights is that close to the middle of two codes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lfm_edge.calibration.walk import Walk
from lfm_edge.checkpoint.checkpoint import Checkpoint
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.errors import BundleError, ExportError
from lfm_edge.files import read_json_object
from lfm_edge.model.lowering import Lowering, Weight
from lfm_edge.quantization.recipe import Scheme
from lfm_edge.quantization.rounding import quantize_weight
from lfm_edge.quantization.tensor import QuantizedTensor

WINDOWS_FILE = "calibration.json"
WINDOW, MOST_TOKENS = 256, 4096  # of the text that weights are rounded by
DAMPING = 0.01  # of the mean of H's diagonal, added to all of it, as the paper has it
_COLUMNS_AT_ONCE = 128  # whose feedback to all later columns is one matrix product

Schemes = Mapping[str, Scheme | None]


def quantize_with_text(checkpoint: Checkpoint, schemes: Schemes, windows: Tensor, progress: Callable[[str], None],
                       keep: Callable[[QuantizedTensor], QuantizedTensor]) -> dict[str, Weight]:
    """Every weight of the model by its scheme; the linear layers are rounded by what reaches them.

    windows: int64 [B, T], the text; progress: called with the name of each weight when it is done
    keep: called with each weight when its layer is done: the same weight, where it is kept
    One decoder layer at a time is in floating point. Raises ExportError where activations are not finite.
    """
    weights: dict[str, Weight] = {}
    for name in (name for name in schemes if not name.startswith("model.layers.")):
        value = checkpoint.tensor(name)
        weights[name] = (value.float() if schemes[name] is None
                         else keep(quantize_weight(name, value, schemes[name])))
        progress(name)
    walk = Walk(checkpoint.config, windows, torch.float64)
    x = walk.embed(weights)
    for index in range(checkpoint.config.num_layers):
        layer = {name: checkpoint.tensor(name) for name in schemes if name.startswith(f"model.layers.{index}.")}
        lowering = _RoundingLowering(layer, schemes, progress)
        x, _ = walk.layer(index, layer, lowering)(x)
        weights |= {name: keep(weight) for name, weight in lowering.rounded.items()}
        for name, value in layer.items():
            if name not in lowering.rounded:  # no linear layer, or one that no token of the text has come to
                scheme = schemes[name]
                weights[name] = value.float() if scheme is None else keep(quantize_weight(name, value, scheme))
                progress(name)
    return {name: weights[name] for name in schemes}


class Feedback:
    """In which order the columns of a weight are rounded, and what each takes over of the errors before it.

    order: int64 [cols], by falling size of the inputs; shares: float64 [cols, cols], U above, in that order
    """

    def __init__(self, order: Tensor, shares: Tensor) -> None:
        self.order = order
        self.shares = shares

    @classmethod
    def of(cls, inputs: Tensor) -> Feedback:
        """From what reaches the layer, float64 [tokens, cols]. Raises ExportError where it is not finite."""
        moments = inputs.T @ inputs
        diagonal = moments.diagonal()
        order = diagonal.argsort(descending=True, stable=True)
        diagonal += (DAMPING * diagonal.mean()).clamp(min=torch.finfo(torch.float64).tiny)
        # H = U D U^T is the Cholesky factorization of H turned around, its columns divided by the diagonal.
        backwards = order.flip(0)
        lower, failed = torch.linalg.cholesky_ex(moments[backwards][:, backwards])
        if failed:
            raise ExportError("--rounding gptq: the model's activations on the calibration text are not finite")
        shares = lower.flip(0, 1)
        return cls(order, shares.div_(shares.diagonal().clone()))


def gptq(weight: Tensor, start: QuantizedTensor, feedback: Feedback) -> QuantizedTensor:
    """The weight with the scales of `start`, its codes chosen column by column.

    weight: [rows, cols] in any floating-point type; columns stay in their places
    """
    limit = 2 ** (start.bits - 1)
    order, shares = feedback.order, feedback.shares
    nearest = start.dequantize()
    # A weight that was quantized already, and rounded again on being stored, is what it was before that.
    weight = torch.where(nearest.to(weight.dtype) == weight, nearest, weight.float())
    wanted = weight.double().T[order]  # [cols, rows]: a column is one piece of memory
    scales = start.scales.double().T.contiguous()  # [groups, rows]
    groups = (order // start.group_size).tolist()
    errors, ints = torch.zeros_like(wanted), torch.empty_like(start.ints)
    for first in range(0, len(order), _COLUMNS_AT_ONCE):
        last = min(first + _COLUMNS_AT_ONCE, len(order))
        targets = wanted[first:last] + shares[:first, first:last].T @ errors[:first]
        for column in range(first, last):
            scale = scales[groups[column]]
            target = targets[column - first] + shares[first:column, column] @ errors[first:column]
            codes = (target / scale).round_().clamp_(-limit, limit - 1)
            errors[column] = wanted[column] - codes * scale
            ints[:, order[column]] = codes.to(torch.int8)
    return QuantizedTensor(ints, start.scales, start.bits)


class _RoundingLowering(Lowering):
    """Linear layers that round their weights by the first inputs they get, and go on with the rounded ones.

    So a layer is rounded by running it once, and each of its weights has seen the rounding of those before it.
    """

    def __init__(self, weights: Mapping[str, Tensor], schemes: Schemes, progress: Callable[[str], None]) -> None:
        super().__init__()
        self.names = {id(weight): name for name, weight in weights.items()}
        self.schemes = schemes
        self.progress = progress
        self.rounded: dict[str, QuantizedTensor] = {}

    def linear(self, weight: Weight, bias: Tensor | None) -> nn.Module:
        return _RoundingLinear(self, [weight], [bias])

    def linears(self, weights: list[Weight], biases: list[Tensor | None]) -> nn.Module:
        return _RoundingLinears(self, weights, biases)

    def round(self, weight: Tensor, feedback: Feedback) -> Tensor:
        """float64, as the quantized weight has it."""
        name = self.names[id(weight)]
        self.rounded[name] = gptq(weight, quantize_weight(name, weight, self.schemes[name]), feedback)
        self.progress(name)
        return self.rounded[name].dequantize().double()


class _RoundingLinears(nn.Module):
    """Linear layers of one input, which therefore share their feedback."""

    def __init__(self, lowering: _RoundingLowering, weights: list[Tensor], biases: list[Tensor | None]) -> None:
        super().__init__()
        self.lowering = lowering
        self.weights = weights
        self.biases = biases

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: float64 [B, T, cols] -> one tensor for each, float64 [B, T, rows]"""
        feedback = Feedback.of(x.flatten(0, -2))
        return tuple(F.linear(x, self.lowering.round(weight, feedback), None if bias is None else bias.double())
                     for weight, bias in zip(self.weights, self.biases, strict=True))


class _RoundingLinear(_RoundingLinears):
    """A single one."""

    def forward(self, x: Tensor) -> Tensor:
        """x: float64 [B, T, cols] -> float64 [B, T, rows]"""
        return super().forward(x)[0]


def write_windows(windows: Tensor, directory: Path) -> None:
    """Put the text of a calibrated rounding into a bundle, for `verify`: it does the same again."""
    lines = ",\n  ".join(json.dumps(window) for window in windows.tolist())
    (directory / WINDOWS_FILE).write_text(f'{{"windows": [\n  {lines}\n]}}\n')


def read_windows(directory: Path, config: ModelConfig) -> Tensor:
    """The text of a bundle's calibrated rounding, int64 [B, T]. Raises BundleError where there is none."""
    path = directory / WINDOWS_FILE
    try:
        windows = torch.tensor(read_json_object(path, BundleError)["windows"])
    except (LookupError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise BundleError(f"{path}: malformed ({type(error).__name__})") from None
    if windows.dtype != torch.int64 or windows.ndim != 2 or not windows.numel():
        raise BundleError(f"{path}: malformed (windows of tokens of one length are expected)")
    if windows.min() < 0 or windows.max() >= config.vocab_size:
        raise BundleError(f"{path}: tokens outside of the model's vocabulary")
    return windows
