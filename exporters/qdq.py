"""ONNX graphs of quantized operators: every value is rounded to integers and back (QDQ), as ONNX's
QuantizeLinear and DequantizeLinear define it. A compiler for integers makes one operator of integers of each group.

Weights are 4- or 8-bit integers in a file beside the graphs; those with the same name are one weight.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, fx
from torch.export import ExportedProgram

from exporters.external_data import INLINE_BYTES, ExternalData
from lfm_edge.calibration.ranges import UNIT_INT8, Encoding, is_to_int8, mask_depth
from lfm_edge.errors import ExportError
from lfm_edge.model.static import constants_of
from lfm_edge.quantization.packing import transposed_codes
from lfm_edge.quantization.tensor import QuantizedTensor

OPSET = 23  # the first with RMSNormalization
_IR_VERSION = 11
_TYPES = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.uint16): TensorProto.UINT16,
          np.dtype(np.int8): TensorProto.INT8, np.dtype(np.uint8): TensorProto.UINT8,
          np.dtype(np.int32): TensorProto.INT32, np.dtype(np.int64): TensorProto.INT64}
_BITS = {TensorProto.INT4: 4, **{kind: 8 * dtype.itemsize for dtype, kind in _TYPES.items()}}


def constant(file: ExternalData, name: str, kind: int, shape: Sequence[int], make: Callable[[], np.ndarray],
             key: str | None = None) -> TensorProto:
    """A constant, in the graph where it is small. key: what tells it from others in the file, its name if nothing else

    make: its bytes, asked for the first time that the key comes
    """
    if math.prod(shape) * _BITS[kind] // 8 < INLINE_BYTES:
        return helper.make_tensor(name, kind, shape, make().tobytes(), raw=True)
    tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
    for entry, value in file.place(key or name, make)._asdict().items():
        tensor.external_data.add(key=entry, value=str(value))
    return tensor


@dataclass(frozen=True)
class Value:
    """A value of the graph as integers: their name, and what they mean."""

    name: str
    encoding: Encoding


class GraphWriter:
    """Writes nodes of a trace as one ONNX graph.

    encodings: of every value, by node; weights: by the address of their integers, with their names
    """

    def __init__(self, program: ExportedProgram, encodings: Mapping[str, Encoding],
                 weights: Mapping[int, tuple[str, QuantizedTensor]], file: ExternalData) -> None:
        self.constants = constants_of(program)
        self.encodings = encodings
        self.weights = weights
        self.file = file
        self.values: dict[str, Value | str] = {}  # integers; or the name of an index, or of what is rounded later
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.result_names: dict[str, str] = {}  # of nodes whose 8-bit integers are outputs as they are

    def add_input(self, node: fx.Node, name: str) -> None:
        """A value from outside: 8-bit integers as they are, everything else in float32; or an index."""
        sample: Tensor = node.meta["val"]
        if not sample.is_floating_point():
            self.inputs.append(helper.make_tensor_value_info(name, TensorProto.INT32, sample.shape))
            self.values[node.name] = name
            return
        encoding = self.encodings[node.name]
        kind = TensorProto.INT8 if encoding == UNIT_INT8 else TensorProto.FLOAT
        self.inputs.append(helper.make_tensor_value_info(name, kind, sample.shape))
        self.values[node.name] = (Value(name, encoding) if encoding == UNIT_INT8
                                  else self._quantized(name, f"{name}.integers", encoding))

    def add_output(self, node: fx.Node, name: str) -> None:
        """A result; name it before its node is written, where `keeps_integers` says so."""
        kind = TensorProto.INT8 if self.keeps_integers(node) else TensorProto.FLOAT
        self.outputs.append(helper.make_tensor_value_info(name, kind, node.meta["val"].shape))
        if not self.keeps_integers(node):
            self._dequantized(node.name, name)

    def keeps_integers(self, node: fx.Node) -> bool:
        """Whether a result leaves the graph as 8-bit integers."""
        return self.encodings[node.name] == UNIT_INT8

    def add(self, node: fx.Node) -> None:
        """Write one node of the trace. Raises ExportError where it has no counterpart here."""
        if all(other.name in self.constants for other in node.all_input_nodes):
            arguments = torch.fx.node.map_arg((node.args, node.kwargs), lambda other: self.constants[other.name])
            self.constants[node.name] = node.target(*arguments[0], **arguments[1])
            return
        rule = _RULES.get(str(node.target))
        if rule is None:
            raise ExportError(f"there is no NPU operator for {node.target}")
        rule(self, node)

    def model(self, name: str) -> onnx.ModelProto:
        """What has been written, as a model."""
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, list(self.initializers.values()))
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR_VERSION,
                                 producer_name="lfm-edge")

    # What the rules are made of.

    def operator(self, kind: str, node: fx.Node, inputs: Iterable[str], suffix: str = "",
                 encoding: Encoding | None = None, **attributes: Any) -> None:
        """Write an operator over floating-point values, and the rounding of its result."""
        name = f"{node.name}{suffix}"
        real = self._node(kind, list(inputs), f"{name}.real", **attributes)
        if not suffix and all(is_to_int8(user) for user in node.users):
            self.values[name] = real  # rounded once, there
        else:
            self.values[name] = self._quantized(real, f"{name}.integers", encoding or self.encodings[node.name])

    def real(self, operand: Any) -> str:
        """An operand in floating point: rounded back from its integers, for this use alone."""
        if operand.name in self.constants:
            return self.constant(operand.name, self.constants[operand.name].float().numpy())
        return self._dequantized(operand.name, f"{operand.name}.for.{len(self.nodes)}")

    def shape_of(self, numbers: Sequence[int]) -> str:
        """A constant vector of integers."""
        name = "shape." + ".".join(map(str, numbers))
        self._initializer(name, np.array(numbers, np.int64))
        return name

    def weight(self, ints: fx.Node) -> str:
        """A quantized weight, transposed to float32 [cols, rows], from integers in the file."""
        name, weight = self.weights[self.constants[ints.name].data_ptr()]
        rows, cols = weight.shape
        four_bits = weight.bits == 4
        self._stored(name, TensorProto.INT4 if four_bits else TensorProto.INT8, (cols, rows),
                     lambda: transposed_codes(weight))
        if weight.scales.shape[1] == 1:
            self._stored(f"{name}.scale", TensorProto.FLOAT, (rows,), lambda: weight.scales[:, 0].numpy())
            return self._node("DequantizeLinear", [name, f"{name}.scale"], f"{name}.real", axis=1)
        scales = functools.cache(weight.two_level_scales)
        groups = weight.scales.shape[1]
        self._stored(f"{name}.multiple", TensorProto.UINT8, (groups, rows), lambda: scales()[0].t().numpy())
        self._stored(f"{name}.unit", TensorProto.FLOAT, (rows,), lambda: scales()[1].numpy())
        self._stored(f"{name}.no_offset", TensorProto.UINT8, (rows,), lambda: np.zeros(rows, np.uint8))
        scale = self._node("DequantizeLinear", [f"{name}.multiple", f"{name}.unit", f"{name}.no_offset"],
                           f"{name}.scale", axis=1)
        self._stored(f"{name}.offset", TensorProto.INT4, (groups, rows),
                     lambda: np.zeros(-(-groups * rows // 2), np.uint8))
        return self._node("DequantizeLinear", [name, scale, f"{name}.offset"], f"{name}.real", axis=0,
                          block_size=weight.group_size)

    def constant(self, name: str, values: np.ndarray) -> str:
        """A constant in 16 bits, in its own range."""
        encoding = Encoding.of(float(values.min()), float(values.max()))
        stored, integers = f"{name}.constant", encoding.quantize(values)
        # Nodes of two traces may have one name, and other numbers.
        key = hashlib.sha256(integers).hexdigest()
        self._stored(stored, TensorProto.UINT16, values.shape, lambda: integers, key)
        self.values[f"{name}.constant"] = Value(stored, encoding)
        return self._dequantized(f"{name}.constant", f"{name}.for.{len(self.nodes)}")

    def _quantized(self, real: str, integers: str, encoding: Encoding) -> Value:
        return Value(self._node("QuantizeLinear", [real, *self._parameters(encoding)], integers), encoding)

    def _dequantized(self, key: str, output: str) -> str:
        value = self.values[key]
        return self._node("DequantizeLinear", [value.name, *self._parameters(value.encoding)], output)

    def _parameters(self, encoding: Encoding) -> tuple[str, str]:
        scale, zero = f"scale.{encoding.scale!r}", f"zero.{encoding.dtype}.{encoding.zero_point}"
        self._initializer(scale, np.array(encoding.scale, np.float32))
        self._initializer(zero, np.array(encoding.zero_point, encoding.dtype))
        return scale, zero

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"{output}.{kind}", **attributes))
        return output

    def _initializer(self, name: str, value: np.ndarray) -> None:
        if name not in self.initializers:
            self.initializers[name] = helper.make_tensor(name, _TYPES[value.dtype], value.shape, value.tobytes(),
                                                         raw=True)

    def _stored(self, name: str, kind: int, shape: Sequence[int], make: Callable[[], np.ndarray],
                key: str | None = None) -> None:
        if name not in self.initializers:
            self.initializers[name] = constant(self.file, name, kind, shape, make, key)


def _linear(writer: GraphWriter, node: fx.Node) -> None:
    x, ints, _, bias = node.args
    product = [writer.real(x), writer.weight(ints)]
    if bias is None:
        writer.operator("MatMul", node, product)
        return
    writer.operator("MatMul", node, product, suffix=".product")
    writer.operator("Add", node, [writer._dequantized(f"{node.name}.product", f"{node.name}.without_bias"),
                                  writer.real(bias)])


def _binary(kind: str) -> Callable[[GraphWriter, fx.Node], None]:
    return lambda writer, node: _write(writer, kind, node, *node.args[:2])


def _write(writer: GraphWriter, kind: str, node: fx.Node, *operands: fx.Node, **attributes: Any) -> None:
    writer.operator(kind, node, [writer.real(operand) for operand in operands], **attributes)


def _masked(writer: GraphWriter, node: fx.Node) -> None:
    scores, mask = node.args
    depth = mask_depth(writer.encodings[node.name])
    if mask.name in writer.constants:
        hidden = writer.constant(f"{node.name}.mask", writer.constants[mask.name].numpy() * np.float32(depth))
    else:
        factor = writer.constant(f"{node.name}.depth", np.full((1, 1, 1, 1), depth, np.float32))
        writer.operator("Mul", node, [writer.real(mask), factor], suffix=".hidden", encoding=Encoding.of(-depth, 0.0))
        hidden = writer._dequantized(f"{node.name}.hidden", f"{node.name}.hiding")
    writer.operator("Add", node, [writer.real(scores), hidden])


def _silu(writer: GraphWriter, node: fx.Node) -> None:
    x, = node.args
    writer.operator("Sigmoid", node, [writer.real(x)], suffix=".gate", encoding=Encoding.of(0.0, 1.0))
    writer.operator("Mul", node, [writer.real(x), writer._dequantized(f"{node.name}.gate", f"{node.name}.gated")])


def _rms_norm(writer: GraphWriter, node: fx.Node) -> None:
    x, _, weight, eps = node.args
    _write(writer, "RMSNormalization", node, x, weight, axis=-1, epsilon=eps)


def _reshape(writer: GraphWriter, node: fx.Node) -> None:
    shape = writer.shape_of(list(node.meta["val"].shape))
    writer.operator("Reshape", node, [writer.real(node.args[0]), shape])


def _transpose(writer: GraphWriter, node: fx.Node) -> None:
    x, first, second = node.args
    order = list(range(node.meta["val"].dim()))
    order[first], order[second] = order[second], order[first]
    _permute(writer, node, x, order)


def _permute(writer: GraphWriter, node: fx.Node, x: fx.Node, order: Sequence[int]) -> None:
    moved = [axis for axis in order if x.meta["val"].shape[axis] > 1]
    if moved == sorted(moved):  # numbers stay where they are
        _reshape(writer, node)
    else:
        _write(writer, "Transpose", node, x, perm=order)


def _slice(writer: GraphWriter, node: fx.Node) -> None:
    x, axis, start, end = (*node.args, *(0, 0, 2 ** 63 - 1)[len(node.args) - 1:])
    length = x.meta["val"].shape[axis]
    start, end = (min(max(bound + length if bound < 0 else bound, 0), length) for bound in (start or 0, end))
    writer.operator("Slice", node, [writer.real(x), *map(writer.shape_of, ([start], [end], [axis]))])


def _index_select(writer: GraphWriter, node: fx.Node) -> None:
    x, axis, index = node.args
    writer.operator("Gather", node, [writer.real(x), writer.values[index.name]], axis=axis)


def _to_int8(writer: GraphWriter, node: fx.Node) -> None:
    integers = writer.result_names.get(node.name, f"{node.name}.integers")
    writer.values[node.name] = writer._quantized(writer.values[node.args[0].name], integers, UNIT_INT8)


def _same(writer: GraphWriter, node: fx.Node) -> None:
    writer.values[node.name] = writer.values[node.args[0].name]


_RULES: dict[str, Callable[[GraphWriter, fx.Node], None]] = {
    "aten.add.Tensor": _binary("Add"), "aten.mul.Tensor": _binary("Mul"), "aten.matmul.default": _binary("MatMul"),
    "lfm_edge.linear.default": _linear, "lfm_edge.masked.default": _masked,
    "aten.sigmoid.default": lambda writer, node: _write(writer, "Sigmoid", node, *node.args),
    "aten.silu.default": _silu,
    "aten.rms_norm.default": _rms_norm,
    "aten.softmax.int": lambda writer, node: _write(writer, "Softmax", node, node.args[0], axis=node.args[1]),
    "aten.cat.default": lambda writer, node: _write(
        writer, "Concat", node, *node.args[0], axis=node.args[1] if len(node.args) > 1 else 0),
    "aten.slice.Tensor": _slice, "aten.transpose.int": _transpose,
    "aten.permute.default": lambda writer, node: _permute(writer, node, *node.args),
    "aten.view.default": _reshape, "aten._unsafe_view.default": _reshape, "aten.reshape.default": _reshape,
    "aten.unsqueeze.default": _reshape, "aten.index_select.default": _index_select,
    "lfm_edge.to_int8.default": _to_int8, "aten.clone.default": _same, "aten.alias.default": _same,
    "aten._assert_tensor_metadata.default": lambda writer, node: None,
}
