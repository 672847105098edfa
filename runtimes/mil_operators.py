"""The definitions of MIL's ops, in numpy: what `runtimes.mil` evaluates programs by.

Each follows MIL's documentation for iOS 18. Parameters have the names that MIL gives them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

_FLOATS = {np.dtype(np.float16), np.dtype(np.float32)}
_PIECE = 1 << 15  # values that torch converts on one thread: its threads wait for each other on a busy machine


@dataclass(frozen=True)
class Operator:
    """How an op is computed. evaluate: operands by MIL's names, arrays or plain numbers -> result, results or None

    computes: fp16 operands are handed over as float32. Otherwise values are only moved, and come as they are
    """

    evaluate: Callable[..., Any]
    computes: bool

    def __call__(self, operands: Mapping[str, Any]) -> list[Any]:
        if self.computes:
            operands = {name: _widened(operand) for name, operand in operands.items()}
        results = self.evaluate(**operands)
        return list(results) if isinstance(results, list | tuple) else [] if results is None else [results]


def _widened(operand: Any) -> Any:
    if isinstance(operand, list):
        return [_widened(item) for item in operand]
    return converted(operand, np.float32) if getattr(operand, "dtype", None) == np.float16 else operand


def converted(values: np.ndarray, dtype: Any) -> np.ndarray:
    """The values in another type, or themselves where they have it; to fp16 rounded to nearest, ties to even.

    Between fp16 and float32, what most of an evaluation would otherwise be spent on, torch is over ten times as
    fast as numpy.
    """
    if {values.dtype, np.dtype(dtype)} != _FLOATS or values.size < _PIECE // 32 or not values.flags.writeable:
        return values.astype(dtype, copy=False)
    values = np.ascontiguousarray(values)
    result = np.empty(values.shape, dtype)
    source, target = torch.from_numpy(values).view(-1), torch.from_numpy(result).view(-1)
    for start in range(0, values.size, _PIECE):
        target[start:start + _PIECE] = source[start:start + _PIECE]
    return result


def unpacked(data: np.ndarray, bits: int, count: int, signed: bool = False) -> np.ndarray:
    """`count` integers of fewer than 8 bits, which lie end to end from the lowest bit of the first byte on.

    data: uint8 [bytes] -> uint8 [count], or int8 where `signed`, which those of 4 bits may be
    """
    if 8 % bits:
        stream = np.unpackbits(data, count=count * bits, bitorder="little")
        return np.packbits(stream.reshape(count, bits), axis=1, bitorder="little").ravel()
    codes = np.arange(256)[:, None] >> np.arange(0, 8, bits) & 2 ** bits - 1  # [256, integers in a byte]
    if signed:
        codes = (codes ^ 1 << bits - 1) - (1 << bits - 1)
    dtype = np.int8 if signed else np.uint8
    table = codes.astype(dtype).view(f"u{8 // bits}").ravel()  # what a byte holds, as one number
    return table.take(data).view(dtype)[:count]


def _ints(values: Any) -> tuple[int, ...]:
    return tuple(np.asarray(values).tolist())


def _erf(x):
    return np.frompyfunc(math.erf, 1, 1)(x).astype(np.float32)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _softmax(x, axis=-1):
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def _gelu(x, mode="EXACT"):
    if mode == "SIGMOID_APPROXIMATION":
        return x * _sigmoid(1.702 * x)
    bend = {"EXACT": lambda: _erf(x / math.sqrt(2)),
            "TANH_APPROXIMATION": lambda: np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3))}[mode]
    return x * (1 + bend()) / 2


def _layer_norm(x, axes=None, gamma=1, beta=0, epsilon=1e-5):
    axes = tuple(axis % x.ndim for axis in (range(x.ndim) if axes is None else _ints(axes)))
    shape = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
    gamma, beta = (part.reshape(shape) if np.ndim(part) else part for part in (gamma, beta))
    centred = x - x.mean(axes, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(axes, keepdims=True) + epsilon) * gamma + beta


def _linear(x, weight, bias=0):
    """x: [*D, in], weight: [out, in] -> [*D, out]"""
    rows = x.reshape(-1, x.shape[-1])
    return (weight @ rows.T).T.reshape(*x.shape[:-1], len(weight)) + bias  # several times faster in OpenBLAS this way


def _matmul(x, y, transpose_x=False, transpose_y=False):
    x = x.swapaxes(-1, -2) if transpose_x and x.ndim > 1 else x
    return x @ (y.swapaxes(-1, -2) if transpose_y and y.ndim > 1 else y)


def _attention(query, key, value, attn_mask=None):
    scores = query @ key.swapaxes(-1, -2) / np.float32(math.sqrt(query.shape[-1]))
    if attn_mask is not None:
        scores = np.where(attn_mask, scores, -np.inf) if attn_mask.dtype == bool else scores + attn_mask
    return _softmax(scores) @ value


def _conv(x, weight, bias=None, strides=None, pad_type="valid", pad=None, dilations=None, groups=1):
    """x: [N, C, *spatial], weight: [O, C / groups, *kernel] -> [N, O, *positions]"""
    dims = x.ndim - 2
    strides, dilations = (_ints(np.ones(dims, int) if value is None else value) for value in (strides, dilations))
    reach = [(size - 1) * step + 1 for size, step in zip(weight.shape[2:], dilations, strict=True)]
    pads = {"valid": [(0, 0)] * dims, "custom": None if pad is None else np.reshape(pad, (dims, 2)),
            "same": _same_pads(x.shape[2:], strides, reach),
            "same_lower": [(after, before) for before, after in _same_pads(x.shape[2:], strides, reach)]}[pad_type]
    windows = sliding_window_view(np.pad(x, [(0, 0), (0, 0), *pads]), reach, axis=tuple(range(2, x.ndim)))
    windows = windows[(..., *(slice(None, None, step) for step in (*strides, *dilations)))]
    batch, channels, *positions = windows.shape[:2 + dims]
    windows = windows.reshape(batch, groups, channels // groups, math.prod(positions), -1)
    windows = windows.swapaxes(2, 3).reshape(batch, groups, math.prod(positions), -1)  # [N, G, positions, C / G * K]
    filters = weight.reshape(groups, len(weight) // groups, -1)  # [G, O / G, C / G * K]
    result = (filters @ windows.swapaxes(2, 3)).reshape(batch, len(weight), *positions)
    return result if bias is None else result + bias.reshape(-1, *[1] * dims)


def _same_pads(sizes, strides, reach):
    """Zeros before and after each axis, so that there are size / stride positions; the odd one comes after."""
    missing = [max(0, (-(-size // stride) - 1) * stride + extent - size)
               for size, stride, extent in zip(sizes, strides, reach, strict=True)]
    return [(count // 2, count - count // 2) for count in missing]


def _shift_scale(data, scale, offset=None):
    split = [part for size, count in zip(data.shape, scale.shape, strict=True) for part in (count, size // count)]
    spread = [part for count in scale.shape for part in (count, 1)]
    values = data.astype(np.float32).reshape(split)  # each axis as [blocks, block]
    if offset is not None:
        values -= offset.astype(np.float32).reshape(spread)
    values *= scale.reshape(spread)
    return values.reshape(data.shape)


def _affine(quantized_data, zero_point, scale, axis):
    shape = [-1 if index == axis % quantized_data.ndim else 1 for index in range(quantized_data.ndim)]
    zero_point, scale = (np.asarray(part, np.float32).reshape(shape) for part in (zero_point, scale))
    return (quantized_data.astype(np.float32) - zero_point) * scale


def _lut(indices, lut, vector_axis=0, shape=None):
    if shape is not None:  # before iOS 18: one table, and the bytes of packed indices
        return lut[unpacked(indices, int(math.log2(len(lut))), math.prod(_ints(shape))).reshape(_ints(shape))]
    table = [np.arange(size) // (size // count) for size, count in zip(indices.shape, lut.shape[:-2], strict=True)]
    vectors = lut[(*np.ix_(*table), indices)]  # [*indices, vector]
    axis = vector_axis % indices.ndim
    return np.moveaxis(vectors, -1, axis + 1).reshape(*indices.shape[:axis], -1, *indices.shape[axis + 1:])


def _cumsum(x, axis=0, exclusive=False, reverse=False):
    x = np.flip(x, axis) if reverse else x
    sums = np.cumsum(x, axis, x.dtype)
    if exclusive:
        sums = np.roll(sums, 1, axis)
        sums.swapaxes(0, axis)[0] = 0
    return np.flip(sums, axis) if reverse else sums


def _reshape(x, shape):
    sizes = _ints(shape)
    same = (*[1] * len(sizes), *x.shape)[x.ndim:]  # a 0 stands for the size at its place, counted from the right
    return x.reshape([size or other for size, other in zip(sizes, same, strict=True)])


def _squeeze(x, axes=None):
    return x.squeeze(tuple(axis for axis in (range(x.ndim) if axes is None else _ints(axes)) if x.shape[axis] == 1))


def _concat(values, axis, interleave=False):
    if not interleave:
        return np.concatenate(values, axis)
    shape, axis = values[0].shape, axis % values[0].ndim
    return np.stack(values, axis + 1).reshape(*shape[:axis], -1, *shape[axis + 1:])


def _pad(x, pad, mode="constant", constant_val=0.0):
    pads = [(0, 0)] * (x.ndim - len(pad) // 2) + [_ints(pair) for pair in np.reshape(pad, (-1, 2))]
    if mode == "constant":
        return np.pad(x, pads, constant_values=constant_val)
    return np.pad(x, pads, {"reflect": "reflect", "replicate": "edge"}[mode])


def _one_hot(indices, one_hot_vector_size, axis=-1, on_value=1, off_value=0):
    hot = np.arange(int(one_hot_vector_size)) == np.asarray(indices)[..., None]
    return np.moveaxis(np.where(hot, on_value, off_value), -1, axis)


def _band_part(x, lower=-1, upper=-1):
    below = np.arange(x.shape[-2])[:, None] - np.arange(x.shape[-1])
    return np.where(((lower < 0) | (below <= lower)) & ((upper < 0) | (-below <= upper)), x, np.zeros((), x.dtype))


def _topk(x, k=1, axis=-1, ascending=False, sort=True, return_indices=True, output_indices_dtype="int32"):
    ranks = x.astype(np.float64)  # holds every float32 and int32, and its negative
    order = np.argsort(ranks if ascending else -ranks, axis, kind="stable")
    order = order.take(np.arange(x.shape[axis] if k == -1 else k), axis)
    values = np.take_along_axis(x, order, axis)
    return [values, order] if return_indices else values


def _part(rank, begin, end, stride=None, begin_mask=None, end_mask=None, squeeze_mask=None):
    """The index, in numpy's terms, of slice_by_index and slice_update."""
    columns = (_ints(np.full(rank, default) if part is None else part) for part, default in (
        (begin, 0), (end, 0), (stride, 1), (begin_mask, 0), (end_mask, 0), (squeeze_mask, 0)))
    return tuple((0 if no_first else first) if squeeze
                 else slice(None if no_first else first, None if no_last else last, step)
                 for first, last, step, no_first, no_last, squeeze in zip(*columns, strict=True))


def _slice_update(x, update, begin, end, stride=None, begin_mask=None, end_mask=None, squeeze_mask=None):
    result = np.array(x)
    place = _part(x.ndim, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    result[place] = update.reshape(result[place].shape)
    return result


def _slice_by_size(x, begin, size):
    parts = zip(x.shape, _ints(begin), _ints(size), strict=True)
    return x[tuple(slice(first, total if count == -1 else first + count) for total, first, count in parts)]


def _gather(x, indices, axis=0, batch_dims=0, validate_indices=False):
    if not batch_dims:
        return np.take(x, indices, axis)
    axis %= x.ndim
    return np.stack([_gather(part, index, axis - 1, batch_dims - 1) for part, index in zip(x, indices, strict=True)])


def _gather_nd(x, indices, batch_dims=0, validate_indices=False):
    if not batch_dims:
        return x[tuple(np.moveaxis(indices, -1, 0))]
    return np.stack([_gather_nd(part, index, batch_dims - 1) for part, index in zip(x, indices, strict=True)])


def _along(indices, axis):
    """numpy's index of the values that `indices` name along the axis, each at its own place on the other axes."""
    places = list(np.indices(indices.shape, sparse=True))
    places[axis] = indices
    return tuple(places)


def _scattered(data, place, updates, mode):
    result = np.array(data)
    if mode == "update":
        result[place] = updates
        return result
    {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.maximum,
     "min": np.minimum}[mode].at(result, place, updates)
    return result


def _unary(function):
    return lambda x: function(x)


def _binary(function):
    return lambda x, y: function(x, y)


def _reduction(function):
    return lambda x, axes=None, keep_dims=False: function(x, None if axes is None else _ints(axes), keepdims=keep_dims)


_COMPUTED = {
    **{name: _unary(getattr(np, name)) for name in (
        "abs", "exp", "sqrt", "square", "sin", "cos", "tanh", "floor", "ceil", "round", "sign", "logical_not")},
    **{name: _binary(getattr(np, name)) for name in (
        "add", "mod", "maximum", "minimum", "less", "less_equal", "greater", "greater_equal", "equal", "not_equal",
        "logical_and", "logical_or", "logical_xor")},
    "sub": _binary(np.subtract), "mul": _binary(np.multiply), "real_div": _binary(np.divide),
    "floor_div": _binary(np.floor_divide), "pow": _binary(np.power),
    **{f"reduce_{name}": _reduction(getattr(np, name)) for name in ("mean", "sum", "max", "min", "prod")},
    "reduce_sum_square": _reduction(lambda x, axes, keepdims: np.square(x).sum(axes, keepdims=keepdims)),
    "reduce_l1_norm": _reduction(lambda x, axes, keepdims: np.abs(x).sum(axes, keepdims=keepdims)),
    "reduce_l2_norm": _reduction(lambda x, axes, keepdims: np.sqrt(np.square(x).sum(axes, keepdims=keepdims))),
    "reduce_argmax": lambda x, axis=-1, keep_dims=False, output_dtype=None: np.argmax(x, axis, keepdims=keep_dims),
    "reduce_argmin": lambda x, axis=-1, keep_dims=False, output_dtype=None: np.argmin(x, axis, keepdims=keep_dims),
    "log": lambda x, epsilon=1e-45: np.log(x + np.float32(epsilon)),
    "rsqrt": lambda x, epsilon=1e-12: 1 / np.sqrt(x + epsilon),
    "inverse": lambda x, epsilon=1e-4: 1 / (x + epsilon),
    "clip": lambda x, alpha, beta: np.clip(x, alpha, beta),
    "relu": lambda x: np.maximum(x, 0), "silu": lambda x: x * _sigmoid(x),
    "erf": _erf, "sigmoid": _sigmoid, "gelu": _gelu, "softmax": _softmax, "layer_norm": _layer_norm,
    "linear": _linear, "matmul": _matmul, "conv": _conv, "scaled_dot_product_attention": _attention, "cumsum": _cumsum,
    "range_1d": lambda start, end, step: np.arange(*(np.asarray(part).item() for part in (start, end, step))),
    "scatter": lambda data, indices, updates, axis=0, mode="add", validate_indices=False:
        _scattered(data, (*[slice(None)] * (axis % data.ndim), indices), updates, mode),
    "scatter_along_axis": lambda data, indices, updates, axis=0, mode="add", validate_indices=False:
        _scattered(data, _along(indices, axis), updates, mode),
    "scatter_nd": lambda data, indices, updates, mode="add", validate_indices=False:
        _scattered(data, tuple(np.moveaxis(indices, -1, 0)), updates, mode),
    "constexpr_blockwise_shift_scale": _shift_scale, "constexpr_affine_dequantize": _affine,
    "constexpr_lut_to_dense": _lut,
}

_MOVED = {
    "identity": lambda x: x,
    "cast": lambda x, dtype: x,  # to the type that the result is declared with
    "shape": lambda x: np.array(x.shape),
    "fill": lambda shape, value=0.0: np.full(_ints(shape), value),
    "select": lambda cond, a, b: np.where(cond, a, b),
    "reshape": _reshape, "squeeze": _squeeze,
    "expand_dims": lambda x, axes: np.expand_dims(x, _ints(axes)),
    "transpose": lambda x, perm: x.transpose(_ints(perm)),
    "tile": lambda x, reps: np.tile(x, _ints(reps)),
    "reverse": lambda x, axes=None: np.flip(x, None if axes is None else _ints(axes)),
    "pad": _pad, "one_hot": _one_hot, "band_part": _band_part, "topk": _topk, "concat": _concat,
    "stack": lambda values, axis: np.stack(values, axis),
    "split": lambda x, axis, num_splits=None, split_sizes=None:
        np.split(x, num_splits if split_sizes is None else np.cumsum(split_sizes)[:-1], axis),
    "slice_by_index": lambda x, begin, end, stride=None, begin_mask=None, end_mask=None, squeeze_mask=None:
        x[_part(x.ndim, begin, end, stride, begin_mask, end_mask, squeeze_mask)],
    "slice_by_size": _slice_by_size, "slice_update": _slice_update, "gather": _gather, "gather_nd": _gather_nd,
    "gather_along_axis": lambda x, indices, axis=0, validate_indices=False: x[_along(indices, axis)],
    "read_state": lambda input: input.copy(),
    "write_state": lambda input, data: np.copyto(input, data),
}

OPERATORS = {**{name: Operator(function, True) for name, function in _COMPUTED.items()},
             **{name: Operator(function, False) for name, function in _MOVED.items()}}
"""The ops that have an evaluator, by MIL's names. A `const` has a value, and needs none."""
