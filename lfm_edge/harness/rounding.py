"""Are the weights the checkpoint's, but for what rounding costs? Each is held against the checkpoint's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lfm_edge.checkpoint.checkpoint import Checkpoint
from lfm_edge.model.weights import Weights
from lfm_edge.quantization.recipe import GPTQ
from lfm_edge.quantization.rounding import relative_error
from lfm_edge.quantization.tensor import QuantizedTensor

# Codes that are chosen by what a layer makes of a text lie further away than the nearest ones: in the trained toy a
# weight is up to 1.2 half steps off, and a row up to 3.2. So the whole weight counts, and may be twice as far.
_GPTQ_FACTOR = 2.0
_OF_ALL = 2.0 ** -8  # of a weight's root mean square: rows that are next to nothing beside the others need no better
_TINY = 1e-30  # of a weight that is zero: divide by something
_SLACK = 1.01  # scales are rounded to bfloat16


@dataclass(frozen=True)
class RoundingCheck:
    """Whether each weight is the checkpoint's, but for what its scheme must cost.

    weights: that were looked at
    worst: the quantized one that is furthest away, as a share of what its scheme may err; empty where none is quantized
    share: that share; relative_error: ||w - q|| / ||w|| of it
    wrong: those that are further away than that, or are not quantized and not exactly the checkpoint's
    """

    weights: int
    worst: str
    share: float
    relative_error: float
    wrong: list[str]

    @property
    def passed(self) -> bool:
        """Whether none is wrong."""
        return not self.wrong


def check_rounding(checkpoint: Checkpoint, weights: Weights, rounding: str,
                   done: Callable[[], None] = lambda: None) -> RoundingCheck:
    """Hold every weight of a checkpoint against what the quantizer made of it, one at a time.

    rounding: the recipe's; done: called after each weight
    """
    worst, highest, error, wrong = "", 0.0, 0.0, []
    for name in checkpoint.names:
        exact, weight = checkpoint.tensor(name).float(), weights[name]
        if isinstance(weight, QuantizedTensor):
            share = error_share(exact, weight, rounding)
            if share > 1.0:
                wrong.append(name)
            if share > highest:
                worst, highest, error = name, share, relative_error(exact, weight)
            weight.release()
        elif not torch.equal(exact, weight):
            wrong.append(name)
        done()
    return RoundingCheck(len(checkpoint.names), worst, highest, error, wrong)


def error_share(exact: Tensor, weight: QuantizedTensor, rounding: str) -> float:
    """How far a quantized weight is from the exact one, as a share of what its scheme may err: 1 at most.

    exact: float32 [rows, cols]; infinity where one of its numbers is not finite

    Plain rounding with a group's largest weight at the largest code errs by at most half a step, and the search for
    scales never by more, of each row in root mean square. So half a step is the bound, whatever the weights are: the
    errors of a right quantizer are 0.5 to 0.66 of it, and those of a wrong one a multiple.
    """
    if exact.shape != weight.shape:
        return float("inf")
    groups = exact.reshape(len(exact), -1, weight.group_size)
    half_steps = groups.abs().amax(2) / (2 ** (weight.bits - 1) - 1) / 2  # [rows, groups]
    most = half_steps.norm(dim=1) * weight.group_size ** 0.5
    errors = (exact - weight.dequantize()).norm(dim=1)  # [rows]
    if rounding == GPTQ:
        shares = errors.norm() / (_GPTQ_FACTOR * most.norm()).clamp(min=_TINY)
    else:
        shares = errors / (_SLACK * most + _OF_ALL * exact.norm() / len(exact) ** 0.5).clamp(min=_TINY)
    return float(shares.nan_to_num(nan=torch.inf).max())
