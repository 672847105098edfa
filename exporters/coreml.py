"""Core ML: `model.mlpackage` for iOS 18 and macOS 15, two functions over the same weights.

`prefill` takes a chunk of tokens, `decode` one. Both are traced from the one definition of the network as plain
operators over static shapes (`lfm_edge.model.static`), the only ones that the Neural Engine runs. The table below
turns each operator of the trace into one of MIL, Core ML's intermediate language, in exactly the type that the trace
has; coremltools optimizes and saves the program. Quantized weights go in as our integers and scales.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Program, Var, types
from coremltools.converters.mil.mil.passes import pass_pipeline
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from lfm_edge.bundle.job import Artifact, ExportJob
from lfm_edge.bundle.parts import static_values
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.checkpoint.layers import ATTENTION
from lfm_edge.errors import ExportError
from lfm_edge.model.static import (
    HIDDEN,
    Place,
    Positions,
    StaticLowering,
    StaticProgram,
    Step,
    constants_of,
    grouped,
    ungrouped,
)
from lfm_edge.model.weights import Weights
from lfm_edge.progress import quiet
from lfm_edge.quantization.tensor import QuantizedTensor
from lfm_edge.session.layout import INTERNAL
from lfm_edge.session.state import APPEND, StateSpec, StateTensor

ARTIFACT = "model.mlpackage"
PREFILL, DECODE = "prefill", "decode"
_TYPES = {torch.float16: types.fp16, torch.float32: types.fp32, torch.int32: types.int32}
# Those that have something to do in our programs: coremltools' whole list takes twice as long.
_PASSES = ["common::noop_elimination", "common::const_deduplication", "common::fuse_transpose_matmul",
           "common::remove_redundant_ops", "common::dead_code_elimination"]
_SMALLEST = 2.0 ** -10  # what a norm divides by at least
_ENGINE_MULTIPLE = 32  # of the sizes of a state that the Neural Engine is to take


def export(job: ExportJob, directory: Path, progress: Callable[[str], None]) -> Artifact:
    """Write `model.mlpackage` into `directory`.

    `decode` is `(tokens int32 [1, 1], position int32 [1], *state) -> (logits [1, 1, vocab], *next)`; `prefill` takes
    a whole chunk, padded at its end, and `valid` int32 [1], how many of the tokens are no padding. Where a chunk is
    one token there is no `prefill`. With internal state the caches are states of the program (`MLState`), and
    neither inputs nor outputs. Raises ExportError where a type cannot hold what it should.
    """
    _check_types(job)
    lengths = {DECODE: 1, PREFILL: job.options.prefill_chunk} if job.options.prefill_chunk > 1 else {DECODE: 1}
    program = Program()
    program.default_function_name = DECODE
    program.export_as_multifunction = True
    # coremltools takes a `$NAME` in the path of what it has written for a variable.
    with _quiet(), patch.object(os.path, "expandvars", str), torch.no_grad():
        for name, length in lengths.items():
            progress(f"trace {name}")
            program.add_function(name, _function(job, length))
        progress("write the package")
        ct.convert(
            program, convert_to="mlprogram", minimum_deployment_target=ct.target.iOS18, skip_model_load=True,
            compute_precision=ct.precision.FLOAT32,  # leave the types as they are
            pass_pipeline=ct.PassPipeline(_PASSES, "lfm-edge"), package_dir=str(directory / ARTIFACT))
    _open_to_all(directory / ARTIFACT)
    operations = program.functions[DECODE].operations
    operators = Counter(operation.op_type for operation in operations if operation.op_type != "const")
    held = [tensor for tensor in job.state.tensors if tensor not in _kept(job)]
    inputs, outputs = static_values(held, job.options.prefill_chunk, job.options.compute_dtype, job.config.vocab_size,
                                    feature_name)
    return Artifact(ARTIFACT, inputs, outputs, _report(job, dict(sorted(operators.items()))), _usage(job))


def packed_weights(config: ModelConfig, weights: Weights) -> Iterator[tuple[str, bytes]]:
    """Every quantized weight, by name, as the float32 bytes of what the package must dequantize to."""
    for name, weight in weights.items():
        if isinstance(weight, QuantizedTensor):
            yield name, weight.dequantize().numpy().tobytes()


def feature_name(name: str) -> str:
    """A name as Core ML has it: its features have no dots."""
    return name.replace(".", "_")


def _check_types(job: ExportJob) -> None:
    if job.options.state == INTERNAL and job.options.compute_dtype != "float16":
        raise ExportError("--state internal: Core ML's states are float16; give --compute-dtype float16")
    dtype = getattr(torch, job.options.compute_dtype)
    for name, weight in job.weights.items():
        if isinstance(weight, QuantizedTensor) and not torch.equal(weight.scales.to(dtype).float(), weight.scales):
            raise ExportError(f"{name}: a scale is too large for float16; give --compute-dtype float32")


def _function(job: ExportJob, length: int) -> Function:
    """The MIL function for `length` tokens."""
    kind = InternalLowering if job.options.state == INTERNAL else StaticLowering
    program = StaticProgram(job.config, job.weights, job.state, kind(length, getattr(torch, job.options.compute_dtype)))
    return MilWriter(program, job.weights, {feature_name(tensor.name) for tensor in _kept(job)}).write()


def _kept(job: ExportJob) -> list[StateTensor]:
    """What of the state the program keeps."""
    return [tensor for tensor in job.state.tensors if tensor.update == APPEND and job.options.state == INTERNAL]


def _open_to_all(package: Path) -> None:
    """coremltools writes packages that their owner alone can read; those of a bundle are files like others."""
    for path in (package, *package.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


class InternalLowering(StaticLowering):
    """The static pieces over caches that the program keeps: rows are written first, then the whole cache is read."""

    def positions(self, config: ModelConfig, state: StateSpec) -> nn.Module:
        return InternalPositions(config, state.context, self.length, self.dtype)

    def attention(self, scale: float, kv_scales: tuple[Tensor, Tensor] | None, window: int) -> nn.Module:
        return super().attention(scale, kv_scales, window) if window else CacheAttention(scale)


class InternalPositions(Positions):
    """As its parent, with a mask over a cache that holds the step's own rows already: [1, 1, G*T, context]."""

    def forward(self, step: Step, length: int) -> Place:
        """step: where; length: tokens that the program takes, padding included"""
        place = super().forward(step, length)
        last_seen = (step.position + self.offsets).unsqueeze(1)  # [T, 1]
        unseen = (self.columns > last_seen).to(self.dtype) * HIDDEN  # [T, context]
        whole = torch.cat([unseen] * self.groups, dim=0)
        return place._replace(masks=place.masks | {ATTENTION: (whole, self.new_mask)})


@torch.library.custom_op("lfm_edge::update_cache", mutates_args=())
def update_cache(cache: Tensor, rows: Tensor, position: Tensor) -> Tensor:
    """A cache [1, kv_heads, context, D] with `rows` [1, kv_heads, T, D] from `position` int32 [1] on."""
    start = int(position)
    return torch.cat([cache[:, :, :start], rows, cache[:, :, start + rows.shape[2]:]], dim=2)


@update_cache.register_fake
def _(cache: Tensor, rows: Tensor, position: Tensor) -> Tensor:
    return torch.empty_like(cache)


class CacheAttention(nn.Module):
    """Write the step's rows into the caches, then attend over these."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, state: list[Tensor],
                place: Place) -> tuple[Tensor, list[Tensor]]:
        """query: [1, T, heads, D]; key, value: [1, T, kv_heads, D]; state: [1, kv_heads, context, D] each"""
        keys, values = (update_cache(cache, place.without_padding(rows.transpose(1, 2)), place.start)
                        for cache, rows in zip(state, (key, value), strict=True))
        past_mask, _ = place.masks[ATTENTION]
        scores = grouped(query * self.scale, key.shape[2]) @ keys.transpose(2, 3) + past_mask
        return ungrouped(scores.softmax(dim=-1) @ values, key.shape[1]), [keys, values]


class MilWriter:
    """Writes the trace of a static program as a function of MIL, operator by operator.

    weights: those that the program was made of; states: features that the MIL program keeps
    """

    def __init__(self, program: StaticProgram, weights: Weights, states: set[str]) -> None:
        self.program = program
        self.states = states
        self.rules = _RULES | {"lfm_edge.linear.default": self._linear, "lfm_edge.embedding.default": self._embedding,
                               "lfm_edge.update_cache.default": self._update_cache}
        self.names = {weight.ints.data_ptr(): (name, weight.bits) for name, weight in weights.items()
                      if isinstance(weight, QuantizedTensor)}
        self.dequantized: dict[int, Var] = {}  # by the address of the integers
        self.kept_in: dict[Var, Var] = {}  # for a value of a state: the state

    def write(self) -> Function:
        """The function. Its weights are named, so that functions of one package share them."""
        exported = self.program.trace().run_decompositions({})
        inputs = [spec.arg.name for spec in exported.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
        names = dict(zip(inputs, map(feature_name, self.program.input_names()), strict=True))
        samples = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
        placeholders = {name: self._placeholder(name, samples[argument]) for argument, name in names.items()}
        with Function(placeholders, opset_version=ct.target.iOS18) as function:
            values = {argument: self._read(function.inputs[name]) for argument, name in names.items()}
            constants = {name: tensor.detach().numpy() for name, tensor in constants_of(exported).items()}
            function.set_outputs(self._write_nodes(exported, values | constants))
        return function

    def _placeholder(self, name: str, sample: Tensor) -> Any:
        make = mb.state_tensor_placeholder if name in self.states else mb.placeholder
        return make(shape=tuple(sample.shape), dtype=_TYPES[sample.dtype])

    def _read(self, value: Var) -> Var:
        if not types.is_state(value.sym_type):
            return value
        read = mb.read_state(input=value)
        self.kept_in[read] = value
        return read

    def _write_nodes(self, exported: ExportedProgram, values: dict[str, Any]) -> list[Var]:
        """Write every node; `values` are those of the inputs and constants. Gives the outputs, without the states."""
        def evaluated(arguments: Any) -> Any:
            return torch.fx.node.map_arg(arguments, lambda other: values[other.name])

        for node in exported.graph.nodes:
            if node.op == "call_function":
                rule = self.rules.get(str(node.target))
                if rule is None:
                    raise ExportError(f"there is no MIL for the operator {node.target}")
                values[node.name] = rule(*evaluated(node.args), **evaluated(node.kwargs))
        outputs = evaluated(exported.graph.output_node().args[0])
        named = [(feature_name(name), value) for name, value in zip(self.program.output_names(), outputs, strict=True)
                 if value not in self.kept_in]
        for name, value in named:
            value.set_name(name)
        return [value for _, value in named]

    def _dequantized(self, ints: np.ndarray, scales: np.ndarray) -> Var:
        address = ints.ctypes.data
        if address not in self.dequantized:
            name, bits = self.names[address]
            data = mb.const(val=ints.view(types.np_int4_dtype) if bits == 4 else ints)
            scale = mb.const(val=scales)
            data.op.weight_id, scale.op.weight_id = f"{name}: codes", f"{name}: scales"
            self.dequantized[address] = mb.constexpr_blockwise_shift_scale(data=data, scale=scale)
        return self.dequantized[address]

    def _linear(self, x: Var, ints: np.ndarray, scales: np.ndarray, bias: np.ndarray | None) -> Var:
        weight = self._dequantized(ints, scales)
        return mb.linear(x=x, weight=weight) if bias is None else mb.linear(x=x, weight=weight, bias=bias)

    def _embedding(self, tokens: Var, ints: np.ndarray, scales: np.ndarray) -> Var:
        return mb.gather(x=self._dequantized(ints, scales), indices=tokens, axis=0)

    def _update_cache(self, cache: Var, rows: Var, position: Var) -> Var:
        begin = mb.concat(values=[np.int32([0, 0]), position, np.int32([0])], axis=0)
        end = mb.concat(values=[np.int32([0, 0]), mb.add(x=position, y=np.int32(rows.shape[2])), np.int32([0])], axis=0)
        whole = [True, True, False, True]
        written = mb.slice_update(x=cache, update=rows, begin=begin, end=end, begin_mask=whole, end_mask=whole)
        state = self.kept_in[cache]
        updated = mb.coreml_update_state(state=state, value=written)
        self.kept_in[updated] = state
        return updated


def _binary(write: Callable[..., Var]) -> Callable[[Any, Any], Var]:
    """The rule of an operator of two operands, one of which may be a plain number."""
    def rule(x: Any, y: Any) -> Var:
        if not isinstance(y, Var | np.ndarray):
            y = types.nptype_from_builtin(x.dtype)(y)
        return write(x=x, y=y)

    return rule


def _rms_norm(x: Var, shape: list[int], weight: np.ndarray, eps: float) -> Var:
    """RMSNorm of an input divided by its largest magnitude first: the squares of float16 end at 65,504.

    With m the magnitude, x / sqrt(mean(x^2) + eps) is (x/m) / sqrt(mean((x/m)^2) + eps/m^2).
    """
    number = types.nptype_from_builtin(x.dtype)
    largest = mb.maximum(x=mb.reduce_max(x=mb.abs(x=x), axes=[-1], keep_dims=True), y=number(_SMALLEST))
    x = mb.real_div(x=x, y=largest)
    root = mb.real_div(x=number(eps ** 0.5), y=largest)
    mean = mb.add(x=mb.reduce_mean(x=mb.mul(x=x, y=x), axes=[-1], keep_dims=True), y=mb.mul(x=root, y=root))
    return mb.mul(x=mb.mul(x=x, y=mb.rsqrt(x=mean, epsilon=number(0))), y=weight)


def _slice(x: Var, axis: int = 0, start: int = 0, end: int = 2 ** 63 - 1) -> Var:
    length = x.shape[axis]
    begin, stop = [0] * x.rank, list(x.shape)
    begin[axis] = start + length if start < 0 else start
    stop[axis] = min(end + length if end < 0 else end, length)
    return mb.slice_by_index(x=x, begin=begin, end=stop)


def _split(x: Var, size: int, axis: int = 0) -> tuple[Var, ...]:
    return mb.split(x=x, split_sizes=[size] * (x.shape[axis] // size), axis=axis)


def _transpose(x: Var, first: int, second: int) -> Var:
    order = list(range(x.rank))
    order[first], order[second] = order[second], order[first]
    return mb.transpose(x=x, perm=order)


def _cast(x: Var, dtype: torch.dtype, **_: Any) -> Var:
    return mb.cast(x=x, dtype=types.builtin_to_string(_TYPES[dtype]))


# Core ATen operators, as torch.export leaves them. Constants are arrays: those rules that fold them say so.
_RULES: dict[str, Callable[..., Any]] = {
    "aten.add.Tensor": _binary(mb.add), "aten.sub.Tensor": _binary(mb.sub), "aten.mul.Tensor": _binary(mb.mul),
    "aten.where.ScalarOther": lambda condition, x, y: mb.select(cond=condition, a=x,
                                                                b=types.nptype_from_builtin(x.dtype)(y)),
    "aten.eq.Tensor": _binary(mb.equal), "aten.lt.Tensor": _binary(mb.less),
    "aten.ge.Tensor": _binary(mb.greater_equal), "aten.gt.Tensor": _binary(mb.greater),
    "aten.matmul.default": _binary(mb.matmul), "aten.neg.default": lambda x: _binary(mb.mul)(x, -1.0),
    "aten.clamp.default": lambda x, low, high: _binary(mb.minimum)(x, high),
    "aten.sigmoid.default": lambda x: mb.sigmoid(x=x), "aten.silu.default": lambda x: mb.silu(x=x),
    "aten.softmax.int": lambda x, axis: mb.softmax(x=x, axis=axis),
    "aten.rms_norm.default": _rms_norm,
    "aten.embedding.default": lambda table, rows: mb.gather(x=table, indices=rows, axis=0),
    "aten.cat.default": lambda parts, axis=0: mb.concat(values=list(parts), axis=axis),
    "aten.slice.Tensor": _slice, "aten.split.Tensor": _split, "aten.transpose.int": _transpose,
    "aten.select.int": lambda x, axis, index: np.take(x, index, axis),  # a row of a constant
    "aten.view.default": lambda x, shape: mb.reshape(x=x, shape=shape),
    "aten._unsafe_view.default": lambda x, shape: mb.reshape(x=x, shape=shape),
    "aten.unsqueeze.default": lambda x, axis: mb.expand_dims(x=x, axes=[axis]),
    "aten.clone.default": lambda x, **_: x, "aten.alias.default": lambda x: x,
    "aten._to_copy.default": _cast,
    "aten._assert_tensor_metadata.default": lambda *_, **__: None,
    "<built-in function getitem>": lambda parts, index: parts[index],
}


def _report(job: ExportJob, operators: dict[str, int]) -> dict[str, Any]:
    """What `inspect` shows: the operators, and what is known to keep work off the Neural Engine."""
    sizes = {"context": job.state.context, "hidden size": job.config.hidden_size, "head": job.config.head_dim}
    uneven = [f"{name} {size}" for name, size in sizes.items() if size % _ENGINE_MULTIPLE]
    reasons = {
        "it computes in float16": job.options.compute_dtype != "float16",
        "programs with states were seen to fail on it": job.options.state == INTERNAL,
        f"states were seen to fail on it whose size is no multiple of {_ENGINE_MULTIPLE} ({', '.join(uneven)})": uneven,
    }
    off = [reason for reason, applies in reasons.items() if applies]
    return {
        "operators of decode": operators,
        "on the CPU, once a step": "gather (rows of embedding and rotations), integer arithmetic for the masks",
        "off the Neural Engine": "; ".join(off) or "nothing else that is known",
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """As `quiet`, for a converter that shows bars of its own."""
    shown = pass_pipeline.tqdm
    pass_pipeline.tqdm = functools.partial(shown, disable=True)
    try:
        with quiet():
            yield
    finally:
        pass_pipeline.tqdm = shown


def _usage(job: ExportJob) -> str:
    internal = job.options.state == INTERNAL
    prefill = _PREFILL_USAGE.replace("CHUNK", str(job.options.prefill_chunk)) if job.options.prefill_chunk > 1 else ""
    return (_USAGE.replace("PREFILL", prefill).replace("STATE", _INTERNAL_USAGE if internal else _EXPLICIT_USAGE)
            .replace("TYPE", job.options.compute_dtype))


_USAGE = """\
## Loading it

`model.mlpackage` needs iOS 18 or macOS 15. Its default function is `decode`: `tokens` int32 [1, 1], `position` int32
[1], the number of tokens before, and the state give `logits` TYPE [1, 1, vocab] and the next state.
PREFILL
Features are named as the state in `manifest.json`, with `_` for `.`: `past_conv.0` is the input `past_conv_0`, and its
next value the output `present_conv_0`. Begin with zeros and position 0.
STATE
- Swift: set `functionName` of an `MLModelConfiguration`, then `MLModel.load(contentsOf:configuration:)` with the
  compiled package
- Python on a Mac: `coremltools.models.MLModel("model.mlpackage", function_name="decode")`
- Python anywhere: `from lfm_edge import open_bundle; session = open_bundle(".").session()`, by Core ML on a Mac, by an
  evaluator of the package elsewhere
"""

_PREFILL_USAGE = """\
`prefill` takes CHUNK tokens and `valid` int32 [1], how many of them are no padding: put the padding at the end. Logits
and conv states are those of the last valid token.
"""

_EXPLICIT_USAGE = """\
`present_conv_N` replaces `past_conv_N`. `present_N_key` and `present_N_value` are the step's rows only, TYPE [1,
kv_heads, T, head_dim]: write the valid ones into `past_key_values_N_key` and `past_key_values_N_value` at `position`.
"""

_INTERNAL_USAGE = """\
`present_conv_N` replaces `past_conv_N`. The caches are states of the program: make one with `makeState()`, and give it
to every prediction. `prefill` writes the rows of its padding, too: where `position` plus the chunk is more than the
context, use `decode`. The caches need no clearing for a new conversation, unless logits were not finite: then make a
new state.
"""
