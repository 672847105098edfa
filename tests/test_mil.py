"""The evaluator of Core ML packages: every op against torch's, weights by their bytes, packages that are damaged."""

import json
import shutil
import struct
import tracemalloc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Program, types
from coremltools.optimize._utils import pack_elements_into_bits
from coremltools.proto import Model_pb2
from hypothesis import given
from hypothesis import strategies as st

from lfm_edge.errors import BundleError, LfmEdgeError
from runtimes import mil
from runtimes.mil import OPERATORS, EvaluationError, MilProgram

_MIL = {np.dtype(np.float16): types.fp16, np.dtype(np.float32): types.fp32, np.dtype(np.int32): types.int32}
_CORE = "Data/com.apple.CoreML"
_random = np.random.default_rng(0)


def some(*shape):
    return _random.standard_normal(shape)


def positive(*shape):
    return np.abs(some(*shape)) + 0.125


def whole(values):
    return np.array(values, np.int32)


def like(x, value):
    """A constant of the dtype of `x`."""
    return np.array(value, types.nptype_from_builtin(x.dtype))


def to_int(x):
    """Packages have no boolean inputs or outputs."""
    return mb.cast(x=x, dtype="int32")


def to_bool(x):
    return mb.cast(x=x, dtype="bool")


@dataclass(frozen=True)
class Case:
    """An op, what builds it of its inputs, and what it should give for them.

    Floating-point inputs are taken in the dtype under test; the definition gets them in float32.
    """

    op: str
    build: Callable[..., Any]
    define: Callable[..., Any]
    inputs: list[np.ndarray]


_WEIGHT, _BIAS = some(5, 4).astype(np.float16), some(5).astype(np.float16)
_FILTER, _FILTER_BIAS = some(6, 2, 3).astype(np.float16), some(6).astype(np.float16)
_IMAGE_FILTER = some(4, 3, 3, 2).astype(np.float16)
_GAMMA, _BETA = some(3, 4).astype(np.float16), some(3, 4).astype(np.float16)


def tensor(values):
    return torch.from_numpy(np.asarray(values, np.float32))


def unary(op, define, values=None):
    return Case(op, lambda x: getattr(mb, op)(x=x), define, [some(3, 4) * 3 if values is None else values])


def binary(op, define, x=None, y=None):
    return Case(op, lambda x, y: getattr(mb, op)(x=x, y=y), define,
                [some(2, 3, 4) if x is None else x, some(3, 1) if y is None else y])


def comparison(op, define):
    return Case(op, lambda x, y: to_int(getattr(mb, op)(x=x, y=y)), define,
                [np.array([[1., 2, 3], [-1, 0, 2]]), np.array([2., 2, 2])])


def logic(op, define):
    return Case(op, lambda x, y: to_int(getattr(mb, op)(x=to_bool(x), y=to_bool(y))), define,
                [whole([0, 0, 1, 1]), whole([0, 1, 0, 1])])


def reductions(op, define):
    """Over some axes and over all; `define` takes the tensor, the axes, and whether they stay."""
    return [Case(op, lambda x: getattr(mb, op)(x=x, axes=[0, -1], keep_dims=True), lambda x: define(x, (0, 2), True),
                 [some(2, 3, 4)]),
            Case(op, lambda x: getattr(mb, op)(x=x), lambda x: define(x, (0, 1), False), [some(3, 4)])]


def convolution(define, *shape, **how):
    return Case("conv", lambda x: mb.conv(x=x, **how), define, [some(*shape)])


def scatters(op, data, indices, updates, define, **how):
    return [Case(op, lambda data, updates, mode=mode: getattr(mb, op)(
                data=data, indices=whole(indices), updates=updates, mode=mode, **how),
                 lambda data, updates, mode=mode: define(data, torch.tensor(indices), updates, mode), [data, updates])
            for mode in ("update", "add", "sub", "mul", "div", "max", "min")]


def scattered(places):
    """Scattering, one update after the other. places: indices -> pairs of a place in updates and a place in data"""
    modes = {"update": lambda old, new: new, "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div,
             "max": torch.maximum, "min": torch.minimum}

    def define(data, indices, updates, mode):
        result = data.clone()
        for source, target in places(indices):
            result[target] = modes[mode](result[target], updates[source])
        return result
    return define


def everywhere(shape):
    return [tuple(index) for index in np.ndindex(*shape)]


def slices(build, define, shape=(4, 5, 6)):
    return Case("slice_by_index", build, define, [some(*shape)])


def scalar(x):
    """A value of rank 0 that nothing folds: the sum of the one element."""
    return mb.reduce_sum(x=x, axes=[0], keep_dims=False)


CASES = [
    unary("abs", torch.abs), unary("exp", torch.exp), unary("sqrt", torch.sqrt, positive(3, 4)),
    unary("square", torch.square), unary("sin", torch.sin), unary("cos", torch.cos), unary("tanh", torch.tanh),
    unary("erf", torch.erf), unary("floor", torch.floor), unary("ceil", torch.ceil), unary("sign", torch.sign),
    unary("round", torch.round, np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 1.25, -1.75])),
    unary("sigmoid", torch.sigmoid), unary("silu", F.silu), unary("relu", F.relu), unary("identity", torch.clone),
    unary("sigmoid", torch.sigmoid, np.array([-1000., -20, 20, 1000])),
    unary("log", torch.log, positive(3, 4)), unary("rsqrt", torch.rsqrt, positive(3, 4)),
    Case("log", lambda x: mb.log(x=x, epsilon=like(x, 0.5)), lambda x: torch.log(x + 0.5), [positive(3)]),
    Case("rsqrt", lambda x: mb.rsqrt(x=x, epsilon=like(x, 0.5)), lambda x: torch.rsqrt(x + 0.5), [positive(3)]),
    Case("inverse", lambda x: mb.inverse(x=x, epsilon=like(x, 0.5)), lambda x: 1 / (x + 0.5), [positive(3)]),
    Case("clip", lambda x: mb.clip(x=x, alpha=like(x, -0.5), beta=like(x, 0.25)), lambda x: x.clamp(-0.5, 0.25),
         [some(3, 4)]),
    unary("gelu", F.gelu),
    Case("gelu", lambda x: mb.gelu(x=x, mode="TANH_APPROXIMATION"), lambda x: F.gelu(x, approximate="tanh"),
         [some(3, 4)]),
    Case("gelu", lambda x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"),
         lambda x: x * torch.sigmoid(1.702 * x), [some(3, 4)]),

    binary("add", torch.add), binary("sub", torch.sub), binary("mul", torch.mul), binary("real_div", torch.div),
    binary("floor_div", torch.floor_divide), binary("mod", torch.remainder), binary("pow", torch.pow, positive(3, 4)),
    binary("maximum", torch.maximum), binary("minimum", torch.minimum),
    binary("add", torch.add, whole([1, 2]), whole([[3], [4]])),
    binary("floor_div", torch.floor_divide, whole([7, -7]), whole([2, 2])),
    binary("mod", torch.remainder, whole([7, -7]), whole([3, 3])),
    comparison("less", torch.lt), comparison("less_equal", torch.le), comparison("greater", torch.gt),
    comparison("greater_equal", torch.ge), comparison("equal", torch.eq), comparison("not_equal", torch.ne),
    logic("logical_and", torch.logical_and), logic("logical_or", torch.logical_or),
    logic("logical_xor", torch.logical_xor),
    Case("logical_not", lambda x: to_int(mb.logical_not(x=to_bool(x))), torch.logical_not, [whole([0, 1])]),
    Case("select", lambda c, a, b: mb.select(cond=to_bool(c), a=a, b=b), lambda c, a, b: torch.where(c != 0, a, b),
         [whole([[0], [1]]), some(2, 3), some(3)]),
    Case("cast", lambda x: mb.cast(x=x, dtype="int32"), lambda x: x.int(), [np.array([-1.75, -0.5, 0.5, 1.75])]),
    Case("cast", lambda x: mb.cast(x=x, dtype="fp32"), lambda x: x.float(), [whole([-3, 0, 70_000])]),
    Case("cast", lambda x: mb.cast(x=to_bool(x), dtype="int32"), lambda x: (x != 0).int(), [np.array([-1., 0, 0.5])]),

    *reductions("reduce_sum", torch.sum), *reductions("reduce_mean", torch.mean),
    *reductions("reduce_max", torch.amax), *reductions("reduce_min", torch.amin),
    *reductions("reduce_sum_square", lambda x, axes, keep: (x * x).sum(axes, keep)),
    *reductions("reduce_l1_norm", lambda x, axes, keep: torch.linalg.vector_norm(x, 1, axes, keep)),
    *reductions("reduce_l2_norm", lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep)),
    *reductions("reduce_prod", lambda x, axes, keep: x.prod(axes[1], keep).prod(axes[0], keep)),
    Case("reduce_argmax", lambda x: mb.reduce_argmax(x=x), lambda x: x.argmax(-1).int(), [some(3, 4)]),
    Case("reduce_argmin", lambda x: mb.reduce_argmin(x=x, axis=0, keep_dims=True),
         lambda x: x.argmin(0, keepdim=True).int(), [some(3, 4)]),
    Case("cumsum", lambda x: mb.cumsum(x=x), lambda x: x.cumsum(0), [some(3, 4)]),
    Case("cumsum", lambda x: mb.cumsum(x=x, axis=-1, exclusive=True, reverse=True),
         lambda x: F.pad(x[:, 1:].flip(-1).cumsum(-1).flip(-1), (0, 1)), [some(3, 4) * 1000]),
    Case("topk", lambda x: mb.topk(x=x, k=2), lambda x: tuple(part.to(part.dtype if part.is_floating_point() else
         torch.int32) for part in x.topk(2)), [some(3, 5)]),
    Case("topk", lambda x: mb.topk(x=x, k=3, axis=0, ascending=True, return_indices=False),
         lambda x: x.topk(3, 0, largest=False).values, [some(5, 2)]),
    unary("softmax", lambda x: x.softmax(-1)), unary("softmax", lambda x: x.softmax(-1), some(3, 4) * 1000),
    Case("softmax", lambda x: mb.softmax(x=x, axis=0), lambda x: x.softmax(0), [some(3, 4)]),
    Case("layer_norm", lambda x: mb.layer_norm(x=x, axes=[1, -1], gamma=like(x, _GAMMA), beta=like(x, _BETA),
                                               epsilon=like(x, 0.25)),
         lambda x: F.layer_norm(x, (3, 4), tensor(_GAMMA), tensor(_BETA), 0.25), [some(2, 3, 4)]),
    Case("layer_norm", lambda x: mb.layer_norm(x=x, axes=[-1], epsilon=like(x, 2 ** -10)),
         lambda x: F.layer_norm(x, (4,), eps=2 ** -10), [some(2, 4)]),

    Case("linear", lambda x: mb.linear(x=x, weight=like(x, _WEIGHT), bias=like(x, _BIAS)),
         lambda x: F.linear(x, tensor(_WEIGHT), tensor(_BIAS)), [some(2, 3, 4)]),
    Case("linear", lambda x: mb.linear(x=x, weight=like(x, _WEIGHT)), lambda x: F.linear(x, tensor(_WEIGHT)),
         [some(3, 4)]),
    binary("matmul", torch.matmul, some(2, 1, 3, 4), some(5, 4, 2)),
    binary("matmul", lambda x, y: (x.double() @ y.double()).int(), whole([[1, 2], [3, 4]]), whole([[5, 6], [7, 8]])),
    Case("matmul", lambda x, y: mb.matmul(x=x, y=y, transpose_x=True, transpose_y=True), lambda x, y: x.mT @ y.mT,
         [some(3, 4, 2), some(5, 4)]),
    convolution(lambda x: F.conv1d(x, tensor(_FILTER), tensor(_FILTER_BIAS), groups=2), 2, 4, 7,
                weight=_FILTER, bias=_FILTER_BIAS, groups=2, pad_type="valid"),
    convolution(lambda x: F.conv1d(F.pad(x, (2, 1)), tensor(_FILTER), stride=2, dilation=2, groups=2), 1, 4, 9,
                weight=_FILTER, strides=[2], dilations=[2], groups=2, pad_type="custom", pad=[2, 1]),
    convolution(lambda x: F.conv1d(x, tensor(_FILTER[:, :1]), groups=6), 1, 6, 5,
                weight=_FILTER[:, :1], groups=6),
    convolution(lambda x: F.conv2d(F.pad(x, (0, 2, 1, 0)), tensor(_IMAGE_FILTER), stride=(2, 1)), 2, 3, 6, 5,
                weight=_IMAGE_FILTER, strides=[2, 1], pad_type="custom", pad=[1, 0, 0, 2]),
    convolution(lambda x: F.conv2d(x, tensor(_IMAGE_FILTER), padding="same", dilation=(1, 2)), 1, 3, 6, 5,
                weight=_IMAGE_FILTER, dilations=[1, 2], pad_type="same"),
    convolution(lambda x: F.conv2d(F.pad(x, (1, 0, 1, 1)), tensor(_IMAGE_FILTER)), 1, 3, 6, 5,
                weight=_IMAGE_FILTER, pad_type="same_lower"),
    convolution(lambda x: F.conv1d(F.pad(x, (0, 1)), tensor(_FILTER), stride=2, groups=2), 1, 4, 8,
                weight=_FILTER, strides=[2], groups=2, pad_type="same"),
    Case("conv", lambda x, w: mb.conv(x=x, weight=w, pad_type="valid"), F.conv1d, [some(1, 2, 5), some(3, 2, 2)]),
    Case("scaled_dot_product_attention", lambda q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v),
         F.scaled_dot_product_attention, [some(1, 2, 3, 4), some(1, 2, 5, 4), some(1, 2, 5, 6)]),
    Case("scaled_dot_product_attention",
         lambda q, k, v, m: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=m),
         F.scaled_dot_product_attention, [some(2, 3, 4), some(2, 5, 4), some(2, 5, 6), some(3, 5)]),
    Case("scaled_dot_product_attention",
         lambda q, k, v, m: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=to_bool(m)),
         lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m != 0),
         [some(2, 3, 4), some(2, 3, 4), some(2, 3, 4), whole(np.tri(3))]),

    Case("reshape", lambda x: mb.reshape(x=x, shape=[4, -1]), lambda x: x.reshape(4, 6), [some(2, 3, 4)]),
    Case("reshape", lambda x: mb.reshape(x=x, shape=[0, -1, 0]), lambda x: x.reshape(2, 3, 4), [some(2, 3, 4)]),
    Case("reshape", lambda x: mb.reshape(x=x, shape=[1, 0, -1, 0]), lambda x: x.reshape(1, 1, 2, 50), [some(2, 50)]),
    Case("transpose", lambda x: mb.transpose(x=x, perm=[2, 0, -2]), lambda x: x.permute(2, 0, 1), [some(2, 3, 4)]),
    Case("expand_dims", lambda x: mb.expand_dims(x=x, axes=[0, -1]), lambda x: x[None, ..., None], [some(2, 3)]),
    Case("squeeze", lambda x: mb.squeeze(x=x, axes=[0, -1]), lambda x: x.squeeze((0, 3)), [some(1, 2, 1, 1)]),
    Case("squeeze", lambda x: mb.squeeze(x=x), torch.squeeze, [some(1, 2, 1, 3)]),
    Case("tile", lambda x: mb.tile(x=x, reps=[2, 1, 3]), lambda x: x.tile(2, 1, 3), [some(2, 3, 2)]),
    Case("reverse", lambda x: mb.reverse(x=x, axes=[0, -1]), lambda x: x.flip(0, 2), [some(2, 3, 4)]),
    Case("reverse", lambda x: mb.reverse(x=x), lambda x: x.flip(0, 1), [some(2, 3)]),
    Case("concat", lambda x, y: mb.concat(values=[x, y], axis=-1), lambda x, y: torch.cat([x, y], -1),
         [some(2, 3), some(2, 4)]),
    Case("concat", lambda x: mb.concat(values=[x], axis=0), torch.clone, [some(2, 3)]),
    Case("concat", lambda x, y: mb.concat(values=[x, y], axis=0, interleave=True),
         lambda x, y: torch.stack([x, y], 1).flatten(0, 1), [some(3, 2), some(3, 2)]),
    Case("stack", lambda x, y: mb.stack(values=[x, y], axis=1), lambda x, y: torch.stack([x, y], 1),
         [some(2, 3), some(2, 3)]),
    Case("split", lambda x: mb.split(x=x, num_splits=3, axis=1), lambda x: x.split(2, 1), [some(2, 6)]),
    Case("split", lambda x: mb.split(x=x, split_sizes=[1, 3, 2], axis=-1), lambda x: x.split((1, 3, 2), 1),
         [some(2, 6)]),
    Case("pad", lambda x: mb.pad(x=x, pad=[1, 2, 0, 3], mode="constant", constant_val=like(x, 0.5)),
         lambda x: F.pad(x, (0, 3, 1, 2), value=0.5), [some(2, 3, 4)]),
    Case("pad", lambda x: mb.pad(x=x, pad=[1, 2], mode="reflect"), lambda x: F.pad(x, (1, 2), "reflect"),
         [some(2, 4)]),
    Case("pad", lambda x: mb.pad(x=x, pad=[1, 2], mode="replicate"), lambda x: F.pad(x, (1, 2), "replicate"),
         [some(2, 4)]),
    Case("fill", lambda x: mb.fill(shape=mb.shape(x=x), value=like(x, 0.5)), lambda x: torch.full_like(x, 0.5),
         [some(2, 3)]),
    Case("shape", lambda x: mb.shape(x=x), lambda x: torch.tensor(x.shape).int(), [some(2, 3)]),
    Case("range_1d", lambda x, y: mb.range_1d(start=scalar(x), end=scalar(y), step=np.int32(3)),
         lambda x, y: torch.arange(x.item(), y.item(), 3).int(), [whole([-2]), whole([8])]),
    Case("one_hot", lambda x: mb.one_hot(indices=x, one_hot_vector_size=4), lambda x: F.one_hot(x.long(), 4).int(),
         [whole([[0, 3], [1, 1]])]),
    Case("one_hot", lambda x: mb.one_hot(indices=x, one_hot_vector_size=3, axis=0, on_value=5, off_value=-1),
         lambda x: (F.one_hot(x.long(), 3) * 6 - 1).movedim(-1, 0).int(), [whole([0, 2])]),
    Case("band_part", lambda x: mb.band_part(x=x, lower=-1, upper=0), torch.tril, [some(2, 3, 4)]),
    Case("band_part", lambda x: mb.band_part(x=x, lower=0, upper=-1), torch.triu, [some(4, 3)]),
    Case("band_part", lambda x: mb.band_part(x=x, lower=1, upper=2), lambda x: x.tril(2).triu(-1), [some(5, 6)]),

    slices(lambda x: mb.slice_by_index(x=x, begin=[1, 0, -4], end=[3, 5, -1]), lambda x: x[1:3, 0:5, -4:-1]),
    slices(lambda x: mb.slice_by_index(x=x, begin=[0, 1, 5], end=[4, 5, 0], stride=[2, 3, 1],
                                       begin_mask=[False, True, False], end_mask=[False, False, True]),
           lambda x: x[0:4:2, :5:3, 5:]),
    slices(lambda x: mb.slice_by_index(x=x, begin=[3, -1, 0], end=[0, 0, 0], end_mask=[False, False, True],
                                       squeeze_mask=[True, True, False]), lambda x: x[3, -1]),
    slices(lambda x: mb.slice_by_index(x=x, begin=[3, 0, 0], end=[0, 0, 0], stride=[-1, 1, 1],
                                       end_mask=[False, True, True]), lambda x: x.flip(0)[:3]),
    slices(lambda x: mb.slice_by_index(x=x, begin=[3, 1, 0], end=[0, 0, 0], begin_mask=[True, False, True],
                                       end_mask=[False, True, True], squeeze_mask=[True, False, False]),
           lambda x: x[0, 1:]),
    Case("slice_by_index", lambda x, n: mb.slice_by_index(x=x, begin=n, end=mb.add(x=n, y=whole([2, 3]))),
         lambda x, n: x[n[0]:n[0] + 2, n[1]:n[1] + 3], [some(4, 5), whole([1, 2])]),
    Case("slice_by_size", lambda x, n: mb.slice_by_size(x=x, begin=n, size=[2, -1]),
         lambda x, n: x[n[0]:n[0] + 2, n[1]:], [some(4, 5), whole([1, 2])]),
    Case("slice_update", lambda x, u: mb.slice_update(x=x, update=u, begin=[1, 0], end=[3, 5], stride=[1, 2]),
         lambda x, u: x.slice_scatter(x[1:3].slice_scatter(u, 1, 0, 5, 2), 0, 1, 3), [some(4, 5), some(2, 3)]),
    Case("slice_update", lambda x, u, n: mb.slice_update(x=x, update=u, begin=n, end=mb.add(x=n, y=whole([1, 2])),
                                                         squeeze_mask=[True, False]),
         lambda x, u, n: x.index_put((n[0], torch.arange(2) + n[1]), u), [some(4, 5), some(2), whole([2, 1])]),
    Case("gather", lambda x, i: mb.gather(x=x, indices=i), lambda x, i: x[i], [some(5, 3), whole([[4, 0], [2, 2]])]),
    Case("gather", lambda x, i: mb.gather(x=x, indices=i, axis=-1), lambda x, i: x[..., i], [some(2, 5), whole([3])]),
    Case("gather", lambda x, i: mb.gather(x=x, indices=i, axis=2, batch_dims=1),
         lambda x, i: torch.stack([x[b][:, i[b]] for b in range(2)]), [some(2, 3, 5), whole([[4, 0], [1, 1]])]),
    Case("gather", lambda x, i: mb.gather(x=x, indices=i, axis=-1, batch_dims=1),
         lambda x, i: x.gather(1, i.long()), [some(2, 5), whole([[4, 0], [1, 1]])]),
    Case("gather_along_axis", lambda x, i: mb.gather_along_axis(x=x, indices=i, axis=1),
         lambda x, i: x.gather(1, i.long()), [some(2, 5), whole([[4, 0, 1], [2, 2, 3]])]),
    Case("gather_nd", lambda x, i: mb.gather_nd(x=x, indices=i), lambda x, i: x[i[..., 0], i[..., 1]],
         [some(3, 4, 2), whole([[0, 3], [2, 1]])]),
    Case("gather_nd", lambda x, i: mb.gather_nd(x=x, indices=i, batch_dims=1),
         lambda x, i: torch.stack([x[b][i[b, :, 0]] for b in range(2)]), [some(2, 4), whole([[[3]], [[0]]])]),
    *scatters("scatter", some(3, 4), [3, 1, 3], some(3, 3),
              scattered(lambda indices: [((slice(None), n), (slice(None), i)) for n, i in enumerate(indices)]), axis=1),
    *scatters("scatter_along_axis", some(3, 2), [[2, 0], [2, 1]], some(2, 2),
              scattered(lambda indices: [((n, m), (indices[n, m], m)) for n, m in everywhere(indices.shape)]), axis=0),
    *scatters("scatter_nd", some(3, 4), [[2, 0], [1, 3], [2, 0]], some(3),
              scattered(lambda indices: [(n, tuple(index)) for n, index in enumerate(indices)])),
]

def function(build, inputs, states=None, opset=ct.target.iOS18):
    """A function of the builder's, over inputs and states of these shapes and dtypes: {name: array}."""
    placeholders = {name: mb.placeholder(value.shape, _MIL[value.dtype]) for name, value in inputs.items()}
    placeholders |= {name: mb.state_tensor_placeholder(value.shape, _MIL[value.dtype])
                     for name, value in (states or {}).items()}
    with Function(placeholders, opset_version=opset) as made:
        outputs = build(**made.inputs)
        made.set_outputs(list(outputs) if isinstance(outputs, list | tuple) else [outputs])
    return made


def save(path, functions, target=ct.target.iOS18):
    """A package of these functions, with no pass over them that coremltools does not insist on."""
    program = Program()
    for name, made in functions.items():
        program.add_function(name, made)
    if len(functions) > 1:
        program.default_function_name, program.export_as_multifunction = next(iter(functions)), True
    model = ct.convert(program, convert_to="mlprogram", minimum_deployment_target=target,
                       pass_pipeline=ct.PassPipeline.EMPTY, skip_model_load=True)
    model.save(str(path))
    return path


def case_inputs(case, dtype):
    return {f"x{index}": value if value.dtype == np.int32 else value.astype(dtype)
            for index, value in enumerate(case.inputs)}


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Every case as a function of its own, in a package for each dtype."""
    directory = tmp_path_factory.mktemp("cases")
    return {dtype: save(directory / f"{dtype}.mlpackage", {
        f"case_{index}": function(lambda case=case, **inputs: case.build(*inputs.values()), case_inputs(case, dtype))
        for index, case in enumerate(CASES)}) for dtype in ("float32", "float16")}


@pytest.fixture(scope="module")
def programs(packages):
    return {dtype: MilProgram.load(package) for dtype, package in packages.items()}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{case.op}-{index}" for index, case in enumerate(CASES)])
def test_an_op_gives_what_torch_gives(programs, index, dtype):
    """In fp16 as well: torch computes in float32, and its result is rounded once."""
    case, evaluated = CASES[index], programs[dtype].functions[f"case_{index}"]
    assert case.op in evaluated.operators
    inputs = case_inputs(case, dtype)
    found = evaluated.run(inputs)
    expected = case.define(*(torch.from_numpy(value if value.dtype == np.int32 else value.astype(np.float32))
                             for value in inputs.values()))
    expected = list(expected) if isinstance(expected, list | tuple) else [expected]
    for (name, value), reference in zip(found.items(), expected, strict=True):
        assert evaluated.outputs[name].holds(value)
        assert (value.dtype.kind == "i") == (not reference.is_floating_point())
        one_unit = 2 ** -10 if dtype == "float16" else 1e-5
        np.testing.assert_allclose(value, reference.numpy().astype(value.dtype), rtol=one_unit, atol=1e-6, strict=True)


def test_no_op_is_untested(programs, weights, stateful, older):
    loaded = [*programs.values(), *(MilProgram.load(package) for package in (weights[0], stateful, older[0]))]
    assert {op for program in loaded for made in program.functions.values() for op in made.operators} == set(OPERATORS)


def test_a_matrix_product_of_vectors_ignores_transposition():
    """The builder cannot make one; the definition allows it."""
    x, y = some(3).astype(np.float32), some(3).astype(np.float32)
    assert OPERATORS["matmul"]({"x": x, "y": y, "transpose_x": True, "transpose_y": True}) == [x @ y]


# Arithmetic


def sums():
    """From 2048 on, fp16 goes in steps of 2."""
    values = np.array([2048, 1, 1, 1, 1], np.float16)
    return values, function(
        lambda x: (mb.reduce_sum(x=x, axes=[0], keep_dims=True),
                   mb.sub(x=mb.add(x=x, y=np.float16(1)), y=x)), {"x": values})


def test_an_fp16_op_computes_in_float32(tmp_path):
    """From 32768 on, float32 goes in steps of 2**-8."""
    values = np.array([32768, 2 ** -10, -32768], np.float16)
    package = save(tmp_path / "m.mlpackage", {"main": function(lambda x: mb.cumsum(x=x), {"x": values})})
    found, = MilProgram.load(package).functions["main"].run({"x": values}).values()
    assert found.tolist() == [32768, 32768, 0]


def test_an_fp16_op_rounds_its_result_once_and_nothing_before_it(tmp_path):
    values, made = sums()
    total, steps = MilProgram.load(save(tmp_path / "m.mlpackage", {"main": made})).functions["main"].run(
        {"x": values}).values()
    assert total.dtype == np.float16
    assert total == [2052]
    assert list(steps) == [0, 1, 1, 1, 1]


def test_what_fp16_cannot_hold_is_infinite_without_a_warning(tmp_path):
    values = np.array([0, 20], np.float16)
    package = save(tmp_path / "m.mlpackage", {"main": function(lambda x: mb.exp(x=x), {"x": values})})
    evaluated = MilProgram.load(package).functions["main"]
    with warnings.catch_warnings(action="error"):
        found, = evaluated.run({"x": values}).values()
    assert found.tolist() == [1, np.inf]


def test_widened_nothing_is_rounded_to_fp16(tmp_path):
    values, made = sums()
    evaluated = MilProgram.load(save(tmp_path / "m.mlpackage", {"main": made}), widen=True).functions["main"]
    assert str(evaluated.inputs["x"]) == "float32 [5]"
    total, steps = evaluated.run({"x": values.astype(np.float32)}).values()
    assert total.dtype == np.float32
    assert list(steps) == [1, 1, 1, 1, 1]
    assert evaluated.run({"x": np.full(5, 1 / 3, np.float32)})["reduce_sum_0"] != np.float16(5 / 3)


class Block(torch.nn.Module):
    """A causal convolution and attention, each with a residual, and a feed-forward. [B, T, 16] -> the same, and [B]"""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = torch.nn.LayerNorm(16), torch.nn.Conv1d(16, 16, 3, padding=2, groups=16)
        self.qkv, self.out = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)
        self.up, self.down = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)

    def forward(self, x, mask):
        x = x + self.conv(self.norm(x).mT)[..., :x.shape[1]].mT
        heads = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x))), x.mean(1).argmax(-1)


def test_a_torch_module_converted_gives_what_it_gave_in_torch(tmp_path):
    torch.manual_seed(0)
    block = Block().eval().half().float()  # weights that fp16 holds
    inputs = {"x": torch.randn(2, 5, 16), "mask": torch.full((5, 5), -1e4).triu(1)}
    exported = torch.export.export(block, tuple(inputs.values())).run_decompositions({})
    expected, best = (value.detach().numpy() for value in block(*inputs.values()))
    for precision, widen, tolerance in ((ct.precision.FLOAT32, False, 1e-5), (ct.precision.FLOAT16, False, 5e-3),
                                        (ct.precision.FLOAT16, True, 1e-5)):
        package = tmp_path / f"{precision.name}.mlpackage"
        if not package.exists():
            ct.convert(exported, minimum_deployment_target=ct.target.iOS18, compute_precision=precision,
                       skip_model_load=True).save(str(package))
        evaluated = MilProgram.load(package, widen=widen).functions["main"]
        found = list(evaluated.run({name: value.numpy() for name, value in inputs.items()}).values())
        assert evaluated.operators["scaled_dot_product_attention"] == 1
        np.testing.assert_allclose(found[0], expected, atol=tolerance)
        assert np.array_equal(found[1], best)


# Compressed weights


def dense(ints, scales, offsets=None):
    """By the definition: every scale stands for a block of equal size."""
    for axis in range(ints.ndim):
        scales = scales.repeat(ints.shape[axis] // scales.shape[axis], axis)
        offsets = None if offsets is None else offsets.repeat(ints.shape[axis] // offsets.shape[axis], axis)
    ints = ints.astype(np.float32) - (0 if offsets is None else offsets.astype(np.float32))
    return ints * scales.astype(np.float32)


def integers(dtype, *shape):
    low, high = {"int4": (-8, 7), "uint4": (0, 15), "int8": (-128, 127), "uint8": (0, 255)}[dtype]
    values = _random.integers(low, high, shape, endpoint=True)
    return values.astype(np.dtype("int8" if dtype[0] == "i" else "uint8"))


BLOCKWISE = [(dtype, shape, blocks, with_offset) for dtype in ("int4", "uint4", "int8", "uint8")
             for shape, blocks in (((7, 64), (7, 2)), ((7, 64), (7, 1)), ((3, 5), (1, 1)), ((6, 9), (3, 3)),
                                   ((1, 3), (1, 1)), ((3, 2, 4), (3, 1, 2)), ((33,), (3,)))
             for with_offset in (False, True)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A package with weights of all kinds, and what each of them is in float32, by its name."""
    expected, functions = {}, {}

    def add(name, value, op, **operands):
        expected[name] = value
        functions[name] = function(lambda x: mb.add(x=x, y=getattr(mb, op)(name=name, **operands)),
                                   {"x": np.zeros(value.shape, np.float16)})

    for index, (dtype, shape, blocks, with_offset) in enumerate(BLOCKWISE):
        ints, offsets = integers(dtype, *shape), integers(dtype, *blocks) if with_offset else None
        scales = positive(*blocks).astype(np.float16)
        typed = {"offset": offsets.astype(types.string_to_nptype(dtype))} if with_offset else {}
        add(f"blockwise_{index}", dense(ints, scales, offsets), "constexpr_blockwise_shift_scale",
            data=ints.astype(types.string_to_nptype(dtype)), scale=scales, **typed)
    for bits in (1, 2, 3, 4, 6, 8):
        indices, table = _random.integers(0, 2 ** bits, (6, 5)), some(2, 1, 2 ** bits, 1).astype(np.float16)
        add(f"table_{bits}", np.stack([table[row // 3, 0, indices[row], 0] for row in range(6)]).astype(np.float32),
            "constexpr_lut_to_dense", lut=table, indices=indices.astype(types.string_to_nptype(f"uint{bits}")))
    indices = np.array([[[0, 0], [1, 0]], [[1, 1], [0, 0]]])
    vectors = some(2, 3).astype(np.float16)  # two of three values
    for axis in (1, 2):
        value = np.moveaxis(vectors[indices], -1, axis + 1).reshape((2, 6, 2) if axis == 1 else (2, 2, 6))
        add(f"vectors_{axis}", value.astype(np.float32), "constexpr_lut_to_dense", vector_axis=axis,
            indices=indices.astype(types.string_to_nptype("uint1")), lut=vectors.reshape(1, 1, 1, 2, 3))
    return save(tmp_path_factory.mktemp("weights") / "weights.mlpackage", functions), expected


def test_compressed_weights_come_back_bit_for_bit(weights):
    package, expected = weights
    found = dict(MilProgram.load(package).constants())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == np.float32, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("widen", [False, True])
def test_a_function_computes_with_the_weight_as_declared(weights, widen):
    package, expected = weights
    for name, evaluated in MilProgram.load(package, widen).functions.items():
        dtype = np.float32 if widen else np.float16
        value, = evaluated.run({"x": np.zeros(expected[name].shape, dtype)}).values()
        np.testing.assert_array_equal(value, expected[name].astype(dtype), err_msg=name)


@given(st.data(), st.sampled_from([(np.int8, 4, -8), *((np.uint8, bits, 0) for bits in (1, 2, 3, 4, 6))]))
def test_packed_integers_unpack_to_what_was_packed(data, kind):
    dtype, bits, low = kind
    values = np.array(data.draw(st.lists(st.integers(low, low + 2 ** bits - 1), min_size=1)), dtype)
    packed = mil._Packed(pack_elements_into_bits(values, bits), mil.TensorType(values.shape, values.dtype, bits))
    assert np.array_equal(packed.value(), values)


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """A package for iOS 16, whose constexpr ops have attributes instead of operands, and what its weights are."""
    ints, scales, zeros = integers("int8", 4, 6), positive(4).astype(np.float16), integers("int8", 4)
    indices, table = _random.integers(0, 64, 35), some(64).astype(np.float16)
    made = function(
        lambda x: (mb.linear(x=x, weight=mb.constexpr_affine_dequantize(
                       quantized_data=ints, scale=scales, zero_point=zeros, axis=0, name="affine")),
                   mb.constexpr_lut_to_dense(indices=pack_elements_into_bits(indices.astype(np.uint8), 6), lut=table,
                                             shape=np.array([5, 7], np.uint32), name="table"),
                   mb.gather(x=x, indices=whole([-1]), axis=1)),
        {"x": some(3, 6).astype(np.float16)}, opset=ct.target.iOS16)
    package = save(tmp_path_factory.mktemp("older") / "older.mlpackage", {"main": made}, ct.target.iOS16)
    return package, {"affine": dense(ints, scales[:, None], zeros[:, None]),
                     "table": table[indices].reshape(5, 7).astype(np.float32)}


def test_packages_for_ios_16_are_read_as_well(older):
    package, expected = older
    program = MilProgram.load(package)
    found = dict(program.constants())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
    x = some(3, 6).astype(np.float16)
    product, table, last = program.functions["main"].run({"x": x}).values()
    np.testing.assert_allclose(product, x.astype(np.float32) @ expected["affine"].astype(np.float16).T, rtol=2e-3)
    np.testing.assert_array_equal(table, expected["table"].astype(np.float16))
    np.testing.assert_array_equal(last, x[:, -1:])  # before iOS 17 an index may be negative


def linear(x, ints, scales):
    weight = mb.constexpr_blockwise_shift_scale(data=ints.astype(types.np_int4_dtype), scale=scales, name="weight")
    return mb.linear(x=x, weight=weight)


def test_functions_of_a_package_share_their_weights(tmp_path):
    """As coremltools combines two packages into one."""
    ints, scales = integers("int4", 32, 64), positive(32, 2).astype(np.float16)
    combined = ct.utils.MultiFunctionDescriptor()
    for name, tokens in (("prefill", 4), ("decode", 1)):
        single = save(tmp_path / f"{name}.mlpackage", {"main": function(
            lambda x: linear(x, ints, scales), {"x": np.zeros((tokens, 64), np.float16)})})
        combined.add_function(str(single), src_function_name="main", target_function_name=name)
    combined.default_function_name = "decode"
    ct.utils.save_multifunction(combined, str(tmp_path / "both.mlpackage"))
    program = MilProgram.load(tmp_path / "both.mlpackage")
    assert program.functions.keys() == {"prefill", "decode"}
    (name, value), = program.constants()
    assert name == "weight"
    np.testing.assert_array_equal(value, dense(ints, scales))
    x = some(4, 64).astype(np.float16)
    together = program.functions["prefill"].run({"x": x})["linear_0"]
    one_by_one = [program.functions["decode"].run({"x": row[None]})["linear_0"] for row in x]
    np.testing.assert_allclose(together, np.concatenate(one_by_one), rtol=2 ** -10)


def test_dense_values_are_kept_while_there_is_room(tmp_path, monkeypatch):
    ints, scales = integers("int4", 32, 64), positive(32, 2).astype(np.float16)
    package = save(tmp_path / "m.mlpackage", {"main": function(
        lambda x: linear(x, ints, scales), {"x": np.zeros((4, 64), np.float16)})})
    x = {"x": some(4, 64).astype(np.float16)}
    products, kept = [], []
    for room in (32 * 64 * 2, 32 * 64 * 2 - 1):
        monkeypatch.setattr(mil, "KEPT_BYTES", room)
        program = MilProgram.load(package)
        products += [program.functions["main"].run(x)["linear_0"] for _ in range(2)]
        kept += [weight.kept is not None for weight in program._weights]
    assert kept == [True, False]
    assert all(np.array_equal(product, products[0]) for product in products)


# Memory


def peak(compute):
    tracemalloc.start()
    try:
        compute()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_loading_reads_no_weights(tmp_path):
    weight = some(2000, 1000).astype(np.float16)
    package = save(tmp_path / "m.mlpackage", {"main": function(
        lambda x: mb.linear(x=x, weight=weight), {"x": np.zeros((1, 1000), np.float16)})})
    assert peak(lambda: MilProgram.load(package)) < weight.nbytes / 10


def test_a_value_is_freed_after_its_last_use(tmp_path):
    def chain(x):
        for _ in range(40):
            x = mb.add(x=x, y=x)
        return x

    value = np.zeros((100, 1000), np.float32)
    package = save(tmp_path / "m.mlpackage", {"main": function(chain, {"x": value})})
    evaluated = MilProgram.load(package).functions["main"]
    assert peak(lambda: evaluated.run({"x": value})) < 4 * value.nbytes


# States


@pytest.fixture(scope="module")
def stateful(tmp_path_factory):
    """A sum over all runs, a window of the last three inputs, and the sum as it was before."""
    def build(x, total, window):
        before = mb.read_state(input=total)
        total = mb.coreml_update_state(state=total, value=mb.add(x=before, y=x))
        latest = mb.concat(values=[mb.slice_by_index(x=mb.read_state(input=window), begin=[1, 0], end=[3, 2]), x],
                           axis=0)
        return total, mb.coreml_update_state(state=window, value=latest), mb.identity(x=before)

    made = function(build, {"x": np.zeros((1, 2), np.float16)},
                    {"total": np.zeros((1, 2), np.float16), "window": np.zeros((3, 2), np.float16)})
    return save(tmp_path_factory.mktemp("stateful") / "m.mlpackage", {"main": made})


@pytest.mark.parametrize("widen", [False, True])
def test_states_are_written_in_place_from_run_to_run(stateful, widen):
    evaluated = MilProgram.load(stateful, widen=widen).functions["main"]
    states = {name: np.zeros(kind.shape, kind.dtype) for name, kind in evaluated.states.items()}
    assert {name: value.dtype for name, value in states.items()} == dict.fromkeys(
        ("total", "window"), np.dtype(np.float32 if widen else np.float16))
    arrays = dict(states)
    for step in range(1, 5):
        x = np.full((1, 2), step, states["total"].dtype)
        found, window, before = evaluated.run({"x": x}, states).values()
    assert all(states[name] is arrays[name] for name in arrays)
    assert found.tolist() == states["total"].tolist() == [[10, 10]]
    assert before.tolist() == [[6, 6]]
    assert window.tolist() == states["window"].tolist() == [[2, 2], [3, 3], [4, 4]]
    states["total"][:] = 0
    assert found.tolist() == [[10, 10]]  # what a run gave is not the state itself


def test_without_states_a_run_begins_with_zeros(stateful):
    evaluated = MilProgram.load(stateful).functions["main"]
    x = {"x": np.ones((1, 2), np.float16)}
    assert [evaluated.run(x)["coreml_update_state_0"].tolist() for _ in range(2)] == [[[1, 1]], [[1, 1]]]


# What is refused


@pytest.mark.parametrize(("inputs", "complaint"), [
    ({}, r"expected the inputs x, found \(none\)"),
    ({"y": np.zeros((1, 2), np.float16)}, "expected the inputs x, found y"),
    ({"x": np.zeros((2, 2), np.float16)}, r"input x: expected float16 \[1, 2\], found float16 \[2, 2\]"),
    ({"x": np.zeros((1, 2), np.float32)}, r"input x: expected float16 \[1, 2\], found float32 \[1, 2\]"),
    ({"x": [[0, 0]]}, r"input x: expected float16 \[1, 2\], found list"),
])
def test_inputs_that_the_function_does_not_take_are_refused(stateful, inputs, complaint):
    with pytest.raises(EvaluationError, match=f"^main: {complaint}$"):
        MilProgram.load(stateful).functions["main"].run(inputs)


def test_states_that_the_function_does_not_have_are_refused(stateful):
    evaluated, x = MilProgram.load(stateful).functions["main"], {"x": np.zeros((1, 2), np.float16)}
    with pytest.raises(EvaluationError, match=r"^main: expected the states total, window, found total$"):
        evaluated.run(x, {"total": np.zeros((1, 2), np.float16)})
    with pytest.raises(EvaluationError, match=r"^main: state window: expected float16"):
        evaluated.run(x, {"total": np.zeros((1, 2), np.float16), "window": np.zeros((3, 2), np.float32)})


@pytest.mark.parametrize("index", [5, -1])
def test_an_index_out_of_range_is_refused_by_name(tmp_path, index):
    made = function(lambda x, i: mb.gather(x=x, indices=i, name="row"),
                    {"x": some(5, 2).astype(np.float32), "i": whole([0])})
    evaluated = MilProgram.load(save(tmp_path / "m.mlpackage", {"main": made})).functions["main"]
    with pytest.raises(EvaluationError, match=r"^main: row \(gather\): .*index"):
        evaluated.run({"x": some(5, 2).astype(np.float32), "i": whole([index])})


def test_all_unknown_ops_are_named_when_the_package_is_loaded(tmp_path):
    x = {"x": some(3).astype(np.float32)}
    package = save(tmp_path / "m.mlpackage", {
        "one": function(lambda x: mb.tan(x=mb.softsign(x=mb.tan(x=mb.exp(x=x)))), x),
        "two": function(lambda x: mb.exp(x=x), x),
        "three": function(lambda x: mb.cond(pred=mb.greater(x=mb.reduce_sum(x=x, axes=[0]), y=np.float32(0)),
                                            _true_fn=lambda: mb.exp(x=x), _false_fn=lambda: mb.abs(x=x)), x)})
    with pytest.raises(BundleError, match=r"one: no evaluator for the ops tan, softsign; "
                                          r"three: no evaluator for the ops cond$"):
        MilProgram.load(package)


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    ints, scales = integers("int4", 8, 32), positive(8, 2).astype(np.float16)
    gain = some(32).astype(np.float16)
    made = function(lambda x: mb.softmax(x=linear(mb.mul(x=mb.reshape(x=x, shape=[2, 32]), y=gain), ints, scales)),
                    {"x": np.zeros((1, 64), np.float16)})
    return save(tmp_path_factory.mktemp("intact") / "m.mlpackage", {"main": made})


@pytest.fixture
def package(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "m.mlpackage")


def rewrite(package, change):
    """Change the serialized program of a package."""
    path = package / _CORE / "model.mlmodel"
    model = Model_pb2.Model.FromString(path.read_bytes())
    change(model, model.mlProgram.functions["main"].block_specializations["CoreML8"].operations)
    path.write_bytes(model.SerializeToString())


def patch(package, offset, data):
    with (package / _CORE / "weights/weight.bin").open("r+b") as file:
        file.seek(offset)
        file.write(data)


def repoint(package, **place):
    """Let the first weight lie in another place."""
    def change(model, operations):
        value = next(op.attributes["val"] for op in operations if op.attributes["val"].HasField("blobFileValue"))
        for field, content in place.items():
            setattr(value.blobFileValue, field, content)
    rewrite(package, change)


def of_manifest(package, change):
    path = package / "Manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest, manifest["itemInfoEntries"][manifest["rootModelIdentifier"]])
    path.write_text(json.dumps(manifest))


def cut(path, length):
    path.write_bytes(path.read_bytes()[:length])


def bend_links(package):
    outside = package.parent / "weight.bin"
    (package / _CORE / "weights/weight.bin").rename(outside)
    (package / _CORE / "weights/weight.bin").symlink_to(outside)


DAMAGE = {
    "no package": (shutil.rmtree, "no such file"),
    "no manifest": (lambda package: (package / "Manifest.json").unlink(), "Manifest.json: no such file"),
    "a manifest of something else": (lambda package: (package / "Manifest.json").write_text("{}"), "not a readable"),
    "no model": (lambda package: (package / _CORE / "model.mlmodel").unlink(), "model.mlmodel is missing"),
    "a model cut off": (lambda package: cut(package / _CORE / "model.mlmodel", 1000), "not a readable"),
    "an empty model": (lambda package: cut(package / _CORE / "model.mlmodel", 0), "an ML program, found no model"),
    "no weights": (lambda package: shutil.rmtree(package / _CORE / "weights"), "weights/weight.bin is missing"),
    "weights cut off": (lambda package: cut(package / _CORE / "weights/weight.bin", 400), "outside the file of 400"),
    "a weight cut off": (lambda package: cut(package / _CORE / "weights/weight.bin", 150), "outside the file of 150"),
    "empty weights": (lambda package: cut(package / _CORE / "weights/weight.bin", 0), "blob storage, found 0 bytes"),
    "other weights": (lambda package: patch(package, 4, b"\1"), "blob storage of version 2, found 1"),
    "another sentinel": (lambda package: patch(package, 64, b"\xee"), "the weight at 64 has no record"),
    "another type": (lambda package: patch(package, 68, b"\2"), "expected 64 bytes of FLOAT16, found 64 of FLOAT32"),
    "another size": (lambda package: patch(package, 72, struct.pack("<Q", 99)), "expected 64 bytes .* found 99"),
    "data elsewhere": (lambda package: patch(package, 80, struct.pack("<Q", 2 ** 63)), "outside the file"),
    "a record elsewhere": (lambda package: repoint(package, offset=2 ** 40), "outside the file"),
    "a weight outside": (lambda package: repoint(package, fileName="@model_path/../../../out.bin"), "leads out of"),
    "a weight by its absolute path": (lambda package: repoint(package, fileName="/etc/passwd"), "leads out of"),
    "a weight behind a link": (bend_links, "leads out of the package"),
    "a model outside": (lambda package: of_manifest(package, lambda manifest, root: root.update(path="../../x")),
                        "leads out of the package"),
    "a root that is not listed": (lambda package: of_manifest(package, lambda manifest, root: manifest.update(
        rootModelIdentifier="x")), "not a readable"),
    "another kind of model": (lambda package: rewrite(package, lambda model, ops: model.identity.SetInParent()),
                              "expected an ML program, found identity"),
    "no function": (lambda package: rewrite(package, lambda model, ops: model.mlProgram.functions.clear()),
                    "no function at all"),
    "an op whose name would not print": (
        lambda package: rewrite(package, lambda model, ops: setattr(ops[-1], "type", "tan\n\x1b[31m")),
        "no evaluator for the ops tan\N{REPLACEMENT CHARACTER}{2}\\[31m"),
    "an op of a value that nothing computes": (
        lambda package: rewrite(package, lambda model, ops: ops.remove(ops[0])), "there is no value"),
    "two values of one name": (
        lambda package: rewrite(package, lambda model, ops: ops.append(ops[-1])), "there is a value of that name"),
    "an op without its operand": (
        lambda package: rewrite(package, lambda model, ops: ops[-1].inputs.pop("x")), "missing a required argument"),
    "an op with an operand too many": (
        lambda package: rewrite(package, lambda model, ops: ops[-1].inputs["y"].CopyFrom(ops[-1].inputs["x"])),
        "unexpected keyword argument 'y'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_package_is_refused_in_one_line(package, damage):
    break_it, complaint = DAMAGE[damage]
    break_it(package)
    with pytest.raises(BundleError, match=complaint) as caught:
        MilProgram.load(package)
    assert str(caught.value).startswith(str(package))
    assert "\n" not in str(caught.value)


@given(st.sampled_from(["model.mlmodel", "weights/weight.bin"]), st.integers(0, 1 << 20), st.integers(0, 7),
       st.booleans())
def test_any_bit_may_flip_and_any_byte_be_the_last(intact, tmp_path_factory, file, place, bit, is_cut):
    """What is read then is another program, or an error of ours."""
    package = tmp_path_factory.getbasetemp() / "flipped.mlpackage"
    shutil.copytree(intact, package, dirs_exist_ok=True)
    path = package / _CORE / file
    data = bytearray(path.read_bytes())
    place %= len(data)
    data[place] ^= 1 << bit
    path.write_bytes(data[:place] if is_cut else data)
    try:
        program = MilProgram.load(package)
        for evaluated in program.functions.values():
            evaluated.run({name: np.ones(kind.shape, kind.dtype) for name, kind in evaluated.inputs.items()})
        list(program.constants())
    except LfmEdgeError:
        pass
