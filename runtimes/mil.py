"""An evaluator, in numpy, of the ML program in a saved Core ML package (`.mlpackage`).

Core ML predicts on Apple's systems only. Here the artifact itself is computed anywhere, op by op: the program as it
was serialized, its weights from the bytes of weight.bin.

    program = MilProgram.load(Path("model.mlpackage"))
    outputs = program.functions["main"].run({"x": np.zeros((1, 8), np.float16)})

What is evaluated is the definition of each op, as MIL's documentation for iOS 18 gives it. An op that computes does
so in float32 and rounds its result once to fp16, where the program declares fp16; an op that only moves values moves
them as they are. Apple's processors accumulate and fuse in ways of their own, so theirs differ by roundings.

`widen=True` leaves the roundings out: fp16 constants keep their exact values, everything made of them is float32, and
so are the inputs, outputs and states that the program declares as fp16. What then still differs from a float32
reference is an error of the lowering.

Formats: the messages of coremltools' MIL.proto; MIL's blob storage, version 2, for weights; Manifest.json for where
the files are. Packages are not trusted: nothing outside of one is read, and damage raises BundleError. How long a
program runs and how much memory its values take is not limited.
"""

from __future__ import annotations

import inspect
import math
import struct
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from coremltools.proto import MIL_pb2, Model_pb2

from lfm_edge.errors import BundleError, LfmEdgeError
from lfm_edge.files import read_json_object
from runtimes.mil_operators import OPERATORS, Operator, converted, unpacked

KEPT_BYTES = 1 << 30  # of dense values of compressed weights in a program; the others are made again at each use

_HEADER = struct.Struct("<II56x")  # weights in the file, version
_RECORD = struct.Struct("<IIQQ40x")  # sentinel, type, bytes, where they begin
_SENTINEL, _STORAGE_VERSION = 0xDEADBEEF, 2
_STORED = {1: "FLOAT16", 2: "FLOAT32", 3: "UINT8", 4: "INT8", 6: "INT16", 7: "UINT16", 8: "INT4", 9: "UINT1",
           10: "UINT2", 11: "UINT4", 12: "UINT3", 13: "UINT6", 14: "INT32", 15: "UINT32"}
_TYPES = {"BOOL": (np.bool_, 8), "STRING": (np.str_, 0), "FLOAT16": (np.float16, 16), "FLOAT32": (np.float32, 32),
          **{f"INT{bits}": (f"i{max(bits, 8) // 8}", bits) for bits in (4, 8, 16, 32, 64)},
          **{f"UINT{bits}": (f"u{max(bits, 8) // 8}", bits) for bits in (1, 2, 3, 4, 6, 8, 16, 32, 64)}}
_NEGATIVE_INDICES = ("CoreML5", "CoreML6")  # the opsets before iOS 17; later ones leave them undefined


class EvaluationError(LfmEdgeError):
    """A function was given what it does not take, or an op met operands for which it is not defined."""


@dataclass(frozen=True)
class TensorType:
    """shape: None for a size that only a run tells, or for all of them; dtype: how numpy holds an element

    bits: of an element as it is stored, fewer than the dtype has for integers below a byte
    """

    shape: tuple[int | None, ...] | None
    dtype: np.dtype
    bits: int

    def holds(self, value: Any) -> bool:
        """Whether the value is an array of this shape and dtype."""
        return isinstance(value, np.ndarray) and value.dtype == self.dtype and (self.shape is None or (
            value.ndim == len(self.shape)
            and all(size in (None, actual) for size, actual in zip(self.shape, value.shape, strict=True))))

    def __str__(self) -> str:
        sizes = ["..."] if self.shape is None else ["?" if size is None else str(size) for size in self.shape]
        return f"{self.dtype} [{', '.join(sizes)}]"


class MilProgram:
    """A loaded ML program. functions: by name; "main" where the package has but one"""

    def __init__(self, functions: dict[str, MilFunction], weights: list[_Constexpr]) -> None:
        self.functions = functions
        self._weights = weights

    @classmethod
    def load(cls, package: Path, widen: bool = False, listed: Container[Path] = ()) -> MilProgram:
        """Read the program of a package. Weights stay in the file until they are needed.

        widen: float32 in the place of fp16, as described above
        listed: files of the package that may be links to somewhere else, as their content was checked
        Raises BundleError for a package that is missing or damaged, that holds another kind of model, or whose
        program has ops without an evaluator.
        """
        try:
            return _Reader(Path(package), widen, listed).program()
        except BundleError:
            raise
        except Exception as error:  # protobuf and numpy raise what they like on damaged files
            raise BundleError(f"{package}: not a readable Core ML package ({_printable(str(error))})") from None

    def constants(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every compressed weight, dequantized when asked for: the name of its value, and the value in float32.

        Functions share weights: what several ops make of the same bytes comes once, by its first name. As nothing
        is rounded to fp16 here, an int4 or int8 weight with fp16 scales is exact.
        """
        for weight in self._weights:
            with np.errstate(all="ignore"):
                value = weight.exact()
            yield weight.name, value


@dataclass(eq=False)
class MilFunction:
    """One function of a program.

    inputs, outputs, states: by name, in the program's order; operators: how many of which op, constants left out
    """

    name: str
    inputs: dict[str, TensorType] = field(default_factory=dict)
    outputs: dict[str, TensorType] = field(default_factory=dict)
    states: dict[str, TensorType] = field(default_factory=dict)
    operators: dict[str, int] = field(default_factory=dict)
    _constants: dict[str, Any] = field(default_factory=dict, repr=False)
    _steps: list[_Step] = field(default_factory=list, repr=False)

    def run(self, inputs: Mapping[str, np.ndarray],
            states: MutableMapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """The outputs for these inputs, in memory of their own.

        inputs: all of them, each of its shape and dtype
        states: all of them; the function writes into these arrays. None for zeros that are dropped afterwards
        Raises EvaluationError for other inputs or states, and where an op is not defined for its operands (an index
        out of range, say).
        """
        if states is None:
            states = {name: np.zeros(kind.shape, kind.dtype) for name, kind in self.states.items()}
        self._check("input", self.inputs, inputs)
        self._check("state", self.states, states)
        values = {**inputs, **states}

        def value(name: str) -> Any:
            return values[name] if name in values else _value(self._constants[name])

        with np.errstate(all="ignore"):  # infinities are results like others
            for step in self._steps:
                values |= step.evaluate(value)
                for name in step.last_uses:
                    del values[name]
            return {name: np.array(value(name), kind.dtype) for name, kind in self.outputs.items()}

    def _check(self, role: str, types: Mapping[str, TensorType], given: Mapping[str, Any]) -> None:
        if types.keys() != given.keys():
            raise EvaluationError(f"{self.name}: expected the {role}s {', '.join(types) or '(none)'}, "
                                  f"found {', '.join(given) or '(none)'}")
        for name, kind in types.items():
            if not kind.holds(given[name]):
                raise EvaluationError(f"{self.name}: {role} {name}: expected {kind}, found {_described(given[name])}")


def _printable(text: str) -> str:
    """The text on one line, whatever the names in it hold."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def _described(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__


@dataclass(eq=False)
class _Step:
    """An op of a program, its operands given by names of values. last_uses: values that nothing needs after it"""

    where: str
    operator: Operator
    operands: dict[str, str | list[str]]
    results: dict[str, TensorType]
    from_zero: bool  # indices
    last_uses: list[str] = field(default_factory=list)

    def names(self) -> Iterator[str]:
        for operand in self.operands.values():
            yield from operand if isinstance(operand, list) else [operand]

    def evaluate(self, value: Callable[[str], Any]) -> dict[str, np.ndarray]:
        operands = {parameter: [value(name) for name in operand] if isinstance(operand, list) else value(operand)
                    for parameter, operand in self.operands.items()}
        try:
            if self.from_zero and np.min(operands["indices"], initial=0) < 0:
                raise IndexError("an index is below 0, which is not defined from iOS 17 on")
            return {name: _typed(result, kind) for (name, kind), result
                    in zip(self.results.items(), self.operator(operands), strict=True)}
        except Exception as error:  # numpy has one of its own for each way in which operands do not fit
            raise EvaluationError(f"{self.where}: {error}") from None


def _typed(result: Any, kind: TensorType) -> np.ndarray:
    """The result as the program declares it: rounded where that is fp16. Raises ValueError for another shape."""
    typed = converted(np.asarray(result), kind.dtype)
    if not kind.holds(typed):
        raise ValueError(f"expected {kind}, found {_described(typed)}")
    return typed


@dataclass(eq=False)
class _Constexpr:
    """A compressed weight: a constant that is computed when it is needed, and kept where there is room."""

    name: str
    where: str
    operator: Operator
    operands: dict[str, Any]
    kind: TensorType
    room: _Room
    kept: np.ndarray | None = None

    def exact(self) -> np.ndarray:
        """In float32, not rounded to the type that the program declares."""
        try:
            operands = {parameter: _value(operand) for parameter, operand in self.operands.items()}
            return _typed(self.operator(operands)[0], TensorType(self.kind.shape, np.dtype(np.float32), 32))
        except Exception as error:
            raise EvaluationError(f"{self.where}: {error}") from None

    def value(self) -> np.ndarray:
        if self.kept is not None:
            return self.kept
        dense = converted(self.exact(), self.kind.dtype)
        if dense.nbytes <= self.room.left:
            self.room.left -= dense.nbytes
            self.kept = dense
        return dense


@dataclass
class _Room:
    """Bytes left for dense values."""

    left: int


@dataclass(frozen=True, eq=False)
class _Packed:
    """Integers of fewer than 8 bits, as they lie in the file. data: uint8 [bytes]"""

    data: np.ndarray
    kind: TensorType

    def value(self) -> np.ndarray:
        is_signed = self.kind.dtype.kind == "i"
        return unpacked(self.data, self.kind.bits, math.prod(self.kind.shape), is_signed).reshape(self.kind.shape)


def _value(constant: Any) -> Any:
    return constant.value() if isinstance(constant, _Packed | _Constexpr) else constant


class _Reader:
    """Makes a program of the files of a package."""

    def __init__(self, package: Path, widen: bool, listed: Container[Path]) -> None:
        self.package, self.widen, self.listed = package, widen, listed
        self.room = _Room(KEPT_BYTES)
        self.files: dict[str, np.ndarray] = {}
        self.shared: dict[Any, Any] = {}  # the constants of all functions, by what they are made of

    def program(self) -> MilProgram:
        manifest = read_json_object(self.package / "Manifest.json", BundleError)
        root = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]
        path = self.inside(self.package / "Data", root["path"])
        self.model_path = path.parent
        model = Model_pb2.Model.FromString(path.read_bytes())
        if model.WhichOneof("Type") != "mlProgram":
            raise self.error(f"expected an ML program, found {model.WhichOneof('Type') or 'no model'}")
        protos = dict(sorted(model.mlProgram.functions.items()))
        if not protos or any(proto.opset not in proto.block_specializations for proto in protos.values()):
            raise self.error("a function without operations for its opset, or no function at all")
        unknown = {name: dict.fromkeys(op.type for op in proto.block_specializations[proto.opset].operations
                                       if op.type != "const" and op.type not in OPERATORS)
                   for name, proto in protos.items()}
        if any(unknown.values()):
            raise self.error("; ".join(f"{name}: no evaluator for the ops {', '.join(ops)}"
                                       for name, ops in unknown.items() if ops))
        functions = {name: self.function(name, proto) for name, proto in protos.items()}
        return MilProgram(functions, [item for item in self.shared.values() if isinstance(item, _Constexpr)])

    def error(self, what: str) -> BundleError:
        return BundleError(f"{self.package}: {_printable(what)}")

    def inside(self, directory: Path, name: str) -> Path:
        path = directory / name
        if path not in self.listed and not path.resolve().is_relative_to(self.package.resolve()):
            raise self.error(f"{name} leads out of the package")
        if not path.is_file():
            raise self.error(f"{name} is missing")
        return path

    def function(self, name: str, proto: MIL_pb2.Function) -> MilFunction:
        function, block = MilFunction(name), proto.block_specializations[proto.opset]
        for value in proto.inputs:
            if value.type.HasField("stateType"):
                function.states[value.name] = kind = self.tensor_type(value.type.stateType.wrappedType)
                if kind.shape is None or None in kind.shape:
                    raise self.error(f"{name}: the state {value.name} has no fixed shape")
            else:
                function.inputs[value.name] = self.tensor_type(value.type)
        types = {**function.inputs, **function.states}  # of every value up to the op at hand
        for operation in block.operations:
            self.operation(function, operation, types, proto.opset)
        function.operators = dict(Counter(op.type for op in block.operations if op.type != "const"))
        function.outputs = {output: self.known(types, output, f"{name}: outputs") for output in block.outputs}
        needed = {*function.outputs, *function._constants}
        for step in reversed(function._steps):
            names = dict.fromkeys([*step.names(), *step.results])
            step.last_uses = [name for name in names if name not in needed]
            needed.update(names)
        return function

    def known(self, types: Mapping[str, TensorType], name: str, where: str) -> TensorType:
        if name not in types:
            raise self.error(f"{where}: there is no value {name}")
        return types[name]

    def operation(self, function: MilFunction, proto: MIL_pb2.Operation, types: dict[str, TensorType],
                  opset: str) -> None:
        """Add an op to the function, as a constant or as a step, and the types of its results to `types`."""
        names = ", ".join(output.name for output in proto.outputs) or "(no result)"
        where = _printable(f"{function.name}: {names} ({proto.type})")
        operands = self.operands(function, proto, types, where)
        results = {output.name: self.tensor_type(output.type) for output in proto.outputs}
        if len(results) != len(proto.outputs) or results.keys() & types.keys():
            raise self.error(f"{where}: there is a value of that name")
        types |= results
        if proto.type == "const":
            if self.tensor_type(proto.attributes["val"].type) not in results.values():
                raise self.error(f"{where}: the value is of another type")
            function._constants[proto.outputs[0].name] = function._constants[operands["val"]]
            return
        operator = OPERATORS[proto.type]
        try:
            inspect.signature(operator.evaluate).bind(**operands)
        except TypeError as error:
            raise self.error(f"{where}: {error}") from None
        if not proto.type.startswith("constexpr_"):
            from_zero = opset not in _NEGATIVE_INDICES and proto.type.startswith(("gather", "scatter"))
            function._steps.append(_Step(where, operator, operands, results, from_zero))
            return
        constants = {parameter: function._constants[name] for parameter, name in operands.items()}
        key = (proto.type, *((parameter, id(constant)) for parameter, constant in constants.items()))
        for name, kind in results.items():
            made = _Constexpr(name, where, operator, constants, kind, self.room)
            function._constants[name] = self.shared.setdefault((key, kind), made)

    def operands(self, function: MilFunction, proto: MIL_pb2.Operation, types: Mapping[str, TensorType],
                 where: str) -> dict[str, str | list[str]]:
        """Names of values, by parameter. Values in the operation itself get names of their own."""
        sources = {parameter: list(argument.arguments) for parameter, argument in proto.inputs.items()}
        if proto.type.startswith("const"):  # opsets before iOS 18 give a constexpr its operands like this too
            sources |= {parameter: [MIL_pb2.Argument.Binding(value=value)]
                        for parameter, value in proto.attributes.items() if parameter != "name"}
        operands: dict[str, str | list[str]] = {}
        for parameter, bindings in sorted(sources.items()):
            names = [binding.name or f"{where}: {parameter} {len(function._constants) + index}"
                     for index, binding in enumerate(bindings)]
            for name, binding in zip(names, bindings, strict=True):
                if binding.name:
                    self.known(types, name, where)
                else:
                    function._constants[name] = self.constant(binding.value)
            operands[parameter] = names if len(names) > 1 or parameter == "values" else names[0]
        return operands

    def tensor_type(self, proto: MIL_pb2.ValueType, stored: bool = False) -> TensorType:
        """stored: as it lies in the file, even where fp16 is to be widened"""
        form = proto.WhichOneof("type")
        name = MIL_pb2.DataType.Name(proto.tensorType.dataType) if form == "tensorType" else form
        if name not in _TYPES:
            raise self.error(f"no evaluator for values of {name}")
        dtype, bits = _TYPES["FLOAT32" if name == "FLOAT16" and self.widen and not stored else name]
        dimensions = proto.tensorType.dimensions
        if any(dimension.unknown.variadic for dimension in dimensions):
            return TensorType(None, np.dtype(dtype), bits)
        sizes = (dimension.constant.size if dimension.HasField("constant") else None for dimension in dimensions)
        return TensorType(tuple(sizes), np.dtype(dtype), bits)

    def constant(self, proto: MIL_pb2.Value) -> Any:
        """An array, over the file where it lies there; a _Packed; a string or plain number. One for equal values."""
        key = proto.SerializeToString(deterministic=True)
        if key not in self.shared:
            kind, tensor = self.tensor_type(proto.type, stored=True), proto.immediateValue.tensor
            form = tensor.WhichOneof("value")
            if proto.HasField("blobFileValue"):
                name = MIL_pb2.DataType.Name(proto.type.tensorType.dataType)
                value = _from_bytes(self.weight(proto.blobFileValue, name, _bytes(kind)), kind)
            elif form == "strings":
                value = tensor.strings.values[0]
            elif form == "bytes":
                value = _from_bytes(np.frombuffer(tensor.bytes.values, np.uint8), kind)
            else:
                value = np.array(getattr(tensor, form).values, kind.dtype).reshape(kind.shape)
            plain = isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "biu"
            self.shared[key] = value.item() if plain else value  # axes, counts and flags are plain
        return self.shared[key]

    def weight(self, proto: MIL_pb2.Value.BlobFileValue, expected: str, length: int) -> np.ndarray:
        """The bytes of a weight, mapped: uint8 [length]"""
        data, where = self.file(proto.fileName), f"{proto.fileName}: the weight at {proto.offset}"
        if proto.offset + _RECORD.size > len(data):
            raise self.error(f"{where} lies outside the file of {len(data)} bytes")
        sentinel, stored, size, start = _RECORD.unpack_from(data, proto.offset)
        if sentinel != _SENTINEL:
            raise self.error(f"{where} has no record")
        if (_STORED.get(stored), size) != (expected, length):
            raise self.error(f"{where}: expected {length} bytes of {expected}, "
                             f"found {size} of {_STORED.get(stored, f'type {stored}')}")
        if start + size > len(data):
            raise self.error(f"{where} ends at {start + size}, outside the file of {len(data)} bytes")
        return data[start:start + size]

    def file(self, name: str) -> np.ndarray:
        """The bytes of a weight file, mapped: uint8 [bytes]"""
        if name not in self.files:
            path = self.inside(self.model_path, name.removeprefix("@model_path/"))
            if path.stat().st_size < _HEADER.size:
                raise self.error(f"{name}: expected blob storage, found {path.stat().st_size} bytes")
            data = np.asarray(np.memmap(path, np.uint8, "r"))
            _, version = _HEADER.unpack_from(data)
            if version != _STORAGE_VERSION:
                raise self.error(f"{name}: expected blob storage of version {_STORAGE_VERSION}, found {version}")
            self.files[name] = data
        return self.files[name]


def _bytes(kind: TensorType) -> int:
    return -(-math.prod(kind.shape) * kind.bits // 8)


def _from_bytes(data: np.ndarray, kind: TensorType) -> np.ndarray | _Packed:
    if len(data) != _bytes(kind):
        raise ValueError(f"expected the {_bytes(kind)} bytes of {kind}, found {len(data)}")
    return _Packed(data, kind) if kind.bits < 8 else data.view(kind.dtype).reshape(kind.shape)
