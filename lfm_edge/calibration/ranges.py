"""Ranges of activations, for backends whose integers have constant scales: measured on prompts, value by value.

A value is named after the module that computes it and the operator, such as `layers.3.feed_forward.w2/linear.0`, so
that the traces of one network for different numbers of tokens have the same names. Operators that only move numbers
have no range of their own: what goes in and what comes out share one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from lfm_edge.model.static import constants_of

HEADROOM = 1.5  # how far other texts may go beyond the measured ones: half a bit of 16, and clipping costs more
_HIDDEN = 1e4
_INVISIBLE = 16.0  # a score that much below the lowest visible one: its share of a softmax is below 1e-7

Ranges = dict[str, tuple[float, float]]

MOVES = frozenset({"aten.slice.Tensor", "aten.view.default", "aten._unsafe_view.default", "aten.transpose.int",
                   "aten.permute.default", "aten.cat.default", "aten.unsqueeze.default", "aten.clone.default",
                   "aten.alias.default", "aten.index_select.default", "aten.reshape.default",
                   "lfm_edge.to_int8.default"})
SHARES = frozenset({"aten.softmax.int", "aten._softmax.default", "aten.sigmoid.default"})  # 0 to 1


@torch.library.custom_op("lfm_edge::to_int8", mutates_args=())
def to_int8(x: Tensor) -> Tensor:
    """The nearest integers that 8 bits hold, in the type of x: from here on the value is kept in them."""
    return x.round().clamp(-128, 127)


@torch.library.custom_op("lfm_edge::masked", mutates_args=())
def masked(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores without those that a mask hides. mask: 0, or -1 for what must be invisible to a softmax"""
    return scores + mask * _HIDDEN


@to_int8.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@masked.register_fake
def _(scores: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(scores)


@dataclass(frozen=True)
class Encoding:
    """Integers for real numbers: `(integer - zero_point) * scale`. dtype: uint16 or int8"""

    dtype: str
    scale: float
    zero_point: int

    @classmethod
    def of(cls, low: float, high: float) -> Encoding:
        """16 bits from `low` to `high`, zero among them and exact."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = float(np.float32(max(high - low, 1e-6) / 65535))
        return cls("uint16", scale, min(65535, max(0, round(-low / scale))))

    @property
    def span(self) -> float:
        """From the lowest to the highest number."""
        limits = np.iinfo(self.dtype)
        return self.scale * (int(limits.max) - int(limits.min))

    def quantize(self, values: np.ndarray) -> np.ndarray:
        """The nearest integers."""
        limits = np.iinfo(self.dtype)
        return np.clip(np.rint(values / np.float32(self.scale)) + self.zero_point, limits.min,
                       limits.max).astype(self.dtype)


UNIT_INT8 = Encoding("int8", 1.0, 0)


def value_names(program: ExportedProgram, inputs: Mapping[str, str]) -> dict[str, str]:
    """Names of the values of a trace, by its nodes. inputs: names of those placeholders that are inputs of numbers

    Constants, and what is computed of nothing else, have none.
    """
    seen: dict[str, int] = defaultdict(int)
    names = dict(inputs)
    for node in program.graph.nodes:
        if node.op == "call_function" and any(source.name in names for source in node.all_input_nodes):
            path = module_path(node)
            operator = f"{path}/{str(node.target).split('.')[1]}"
            names[node.name] = f"{operator}.{seen[operator]}"
            seen[operator] += 1
    return names


def module_path(node: fx.Node) -> str:
    """Where in the network a node comes from, such as `layers.3.feed_forward.w2`."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0].removeprefix("decoder").removeprefix(".") if stack else ""


class Watched(fx.Interpreter):
    """Runs a trace, and keeps the smallest and largest number of every value that has a range of its own.

    ranges: what has been seen so far, by name
    """

    def __init__(self, program: ExportedProgram, names: Mapping[str, str]) -> None:
        super().__init__(program.graph_module)
        self.constants = list(constants_of(program).values())
        self.names = names
        self.ranges: Ranges = {}

    def step(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """One step of the program."""
        with torch.no_grad():
            return self.run(*self.constants, *inputs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if (n.name in self.names and not _has_no_range(n) and isinstance(value, Tensor) and value.is_floating_point()
                and value.numel()):
            smallest, largest = map(float, value.aminmax())
            low, high = self.ranges.get(self.names[n.name], (0.0, 0.0))
            self.ranges[self.names[n.name]] = (min(low, smallest), max(high, largest))
        return value


def encodings(program: ExportedProgram, names: Mapping[str, str], ranges: Ranges,
              fixed: Mapping[str, Encoding]) -> dict[str, Encoding]:
    """The encoding of every value of a trace, by its nodes.

    fixed: of inputs that have one; the others have that of their range
    """
    nodes = {node.name: node for node in program.graph.nodes if node.name in names}
    found: dict[str, Encoding] = {}
    for group in _tied(nodes):
        encoding = _encoding([nodes[name] for name in group], names, ranges, fixed)
        found |= dict.fromkeys(group, encoding)
    return found


def mask_depth(scores: Encoding) -> float:
    """What a mask must take from any score to hide it, of scores that have this encoding once masks are applied.

    That encoding holds every score with the depth taken from it (`_encoding`): the NPU was seen to let a sum that is
    written into a concatenation run over.
    """
    return (scores.span + _INVISIBLE) / 2


def _encoding(group: list[fx.Node], names: Mapping[str, str], ranges: Ranges,
              fixed: Mapping[str, Encoding]) -> Encoding:
    given = {fixed[names[node.name]] for node in group if names[node.name] in fixed}
    if given:
        encoding, = given
        return encoding
    if any(is_to_int8(node) for node in group):
        return UNIT_INT8
    scores = [ranges[names[node.args[0].name]] for node in group if is_masked(node)]
    if scores:
        lows, highs = zip(*scores, strict=True)
        low, high = HEADROOM * min(lows), HEADROOM * max(highs)
        return Encoding.of(low - (high - low + _INVISIBLE), high)
    if any(str(node.target) in SHARES for node in group):
        return Encoding.of(0.0, 1.0)
    lows, highs = zip(*(ranges[names[node.name]] for node in group if str(node.target) not in MOVES), strict=True)
    return Encoding.of(HEADROOM * min(lows), HEADROOM * max(highs))


def is_masked(node: fx.Node) -> bool:
    """Whether a node adds a mask, its second operand, to scores."""
    return _is(node, "masked")


def is_to_int8(node: fx.Node) -> bool:
    """Whether from this node on a value is 8-bit integers."""
    return _is(node, "to_int8")


def _has_no_range(node: fx.Node) -> bool:
    """Whether what a node gives has the range of something else, or one that is known."""
    return str(node.target) in MOVES | SHARES or is_masked(node)


def _is(node: fx.Node, operator: str) -> bool:
    return str(node.target) == f"lfm_edge.{operator}.default"


def _tied(nodes: Mapping[str, fx.Node]) -> list[list[str]]:
    """The values that must have one encoding, because numbers only move between them."""
    leader = {name: name for name in nodes}

    def lead(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    for name, node in nodes.items():
        if str(node.target) in MOVES:
            for source in node.all_input_nodes:
                if source.name in nodes:
                    leader[lead(source.name)] = lead(name)
    groups: dict[str, list[str]] = defaultdict(list)
    for name in nodes:
        groups[lead(name)].append(name)
    return list(groups.values())
