"""MLX: a folder that mlx-lm and mlx-swift load as it is, and the network as MLX functions for hosts without them.

`model.safetensors` holds the checkpoint's tensors by their own names, quantized ones as MLX's affine codes. The
functions have no weights: they are keyword arguments by those names, so the folder holds them once.
"""

from __future__ import annotations

import json
import math
import operator
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lfm_edge.bundle.job import Artifact, ExportJob
from lfm_edge.bundle.parts import static_values
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.errors import ExportError
from lfm_edge.model.static import ShiftedSum, StaticLowering, StaticProgram, constants_of
from lfm_edge.model.weights import Weights
from lfm_edge.quantization.tensor import QuantizedTensor

WEIGHTS = "model.safetensors"
GPU_FUNCTION, CPU_FUNCTION = "model.mlxfn", "model.cpu.mlxfn"
GROUPS = (128, 64, 32)  # columns that may share a scale in MLX
CPU, GPU = 0, 1  # MLX's numbers of device types
_STREAM = struct.Struct("<3i")  # where an MLX operator runs: number of the stream, type and number of the device

Arrays = dict[str, mx.array]
Operators = dict[Any, Callable[..., Any]]


def export(job: ExportJob, directory: Path, progress: Callable[[str], None]) -> Artifact:
    """Write the weights, config.json and the functions into `directory`.

    A function has prefill and decode: `f(tokens, position, [valid,] *state, **weights) -> [logits, *next]`, in the
    shapes and types of `StaticProgram`.
    """
    entries = stored(job.weights, job.options.compute_dtype)
    progress("write the weights")
    write_safetensors(directory / WEIGHTS, entries)
    (directory / "config.json").write_text(json.dumps(mlx_lm_config(job), indent=2) + "\n")
    progress("trace")
    steps = Steps(job)
    progress("write the functions")
    inputs, outputs = static_values(job.state.tensors, job.options.prefill_chunk, job.options.compute_dtype,
                                    job.config.vocab_size)
    return Artifact(WEIGHTS, inputs, outputs, write_functions(steps, job, entries, directory), _usage(job),
                    files=(CPU_FUNCTION, GPU_FUNCTION))


def packed_weights(config: ModelConfig, weights: Weights) -> Iterator[tuple[str, bytes]]:
    """Every quantized weight, by name: codes, and scales and biases in float32, as `stored_constants` reads them."""
    for name, weight in weights.items():
        if isinstance(weight, QuantizedTensor):
            for part, entry in quantized_entries(name, weight, "float32").items():
                yield part, entry.make().tobytes()


# The weights


class Entry(NamedTuple):
    """A tensor of model.safetensors that is made when it is written. dtype: as MLX spells it"""

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return getattr(mx, self.dtype).size


def stored(weights: Weights, dtype: str) -> dict[str, Entry]:
    """What model.safetensors holds, by name. dtype: of all but codes. Raises ExportError for a width without groups."""
    entries: dict[str, Entry] = {}
    for name, weight in weights.items():
        if isinstance(weight, QuantizedTensor):
            entries |= quantized_entries(name, weight, dtype)
        else:
            value = weight.transpose(1, 2) if weight.dim() == 3 else weight  # conv taps: [H, taps, 1]
            entries[name] = Entry(dtype, tuple(value.shape), partial(_floats, value, dtype))
    return entries


def quantized_entries(name: str, weight: QuantizedTensor, dtype: str) -> dict[str, Entry]:
    """MLX's three tensors of one weight: it computes `code * scale + bias`, codes being unsigned.

    A bias is a scale times a power of two, so as exact in `dtype` as the scale.
    """
    module, (rows, cols), columns = name.removesuffix(".weight"), weight.shape, shared_columns(name, weight)

    def spread(factor: int) -> np.ndarray:
        return _floats(weight.scales.repeat_interleave(weight.group_size // columns, dim=1) * factor, dtype)

    return {name: Entry("uint32", (rows, cols * weight.bits // 32), partial(pack_codes, weight)),
            f"{module}.scales": Entry(dtype, (rows, cols // columns), partial(spread, 1)),
            f"{module}.biases": Entry(dtype, (rows, cols // columns), partial(spread, -(2 ** (weight.bits - 1))))}


def shared_columns(name: str, weight: QuantizedTensor) -> int:
    """Columns that share a scale in MLX: a wider group becomes several with one scale. Raises ExportError."""
    for columns in GROUPS:
        if weight.group_size % columns == 0:
            return columns
    raise ExportError(f"{name}: {weight.shape[1]} columns; MLX takes a multiple of {GROUPS[-1]}")


def pack_codes(weight: QuantizedTensor) -> np.ndarray:
    """Codes plus half their range, unsigned, the first column in the lowest bits: uint32 [rows, cols * bits / 32]."""
    codes = weight.ints.numpy().view(np.uint8) + np.uint8(2 ** (weight.bits - 1))
    weight.release()
    return (codes if weight.bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4).view(np.uint32)


def _floats(values: Tensor, dtype: str) -> np.ndarray:
    """Values in `dtype`; numpy has no bfloat16, and holds its bits as uint16."""
    values = values.to(getattr(torch, dtype)).contiguous()
    return values.view(torch.uint16).numpy() if dtype == "bfloat16" else values.numpy()


def write_safetensors(path: Path, entries: dict[str, Entry]) -> None:
    """Write entries one at a time; wider types first, so that each begins at a multiple of its size."""
    spellings = {"uint32": "U32", "float32": "F32", "bfloat16": "BF16"}
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    ordered, end = sorted(entries.items(), key=lambda item: -item[1].itemsize), 0
    for name, entry in ordered:
        start, end = end, end + entry.itemsize * math.prod(entry.shape)
        header[name] = {"dtype": spellings[entry.dtype], "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, entry in ordered:
            file.write(entry.make().data)


def mlx_lm_config(job: ExportJob) -> dict[str, Any]:
    """config.json with the section by which mlx-lm and mlx-swift quantize their modules, the exceptions by name."""
    schemes = {name.removesuffix(".weight"): {"group_size": shared_columns(name, weight), "bits": weight.bits}
               for name, weight in job.weights.items() if isinstance(weight, QuantizedTensor)}
    common = max(schemes.values(), key=list(schemes.values()).count)
    exceptions = {module: scheme for module, scheme in schemes.items() if scheme != common}
    section = {**common, "mode": "affine", **exceptions}
    return {**job.config.to_dict(), "quantization": section, "quantization_config": section}


def unmet_by(config: ModelConfig) -> list[str]:
    """What mlx-lm 0.32 needs and this model lacks. Every published LFM2 has all of it."""
    if config.model_type != "lfm2":
        return [f"a model of type lfm2, and this one is {config.model_type}"]
    needs = {"a tied head": config.tie_embedding, "an attention layer": bool(config.attention_layers),
             "a conv layer": bool(config.conv_layers), "two conv taps or more": config.conv_taps > 1,
             "heads as wide as hidden_size / num_attention_heads":
                 config.head_dim * config.num_attention_heads == config.hidden_size}
    return [need for need, is_met in needs.items() if not is_met]


# The network as a function of MLX arrays


class MlxLowering(StaticLowering):
    """The pieces over static shapes, but for the one that MLX has a kernel for."""

    def causal_conv(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        return DepthwiseConv(weight, bias)


class DepthwiseConv(ShiftedSum):
    """One conv1d. MLX's takes activations and weights as they lie in the bundle, so the transpositions are views."""

    def convolve(self, columns: Tensor, length: int) -> Tensor:
        """columns: [1, taps - 1 + length, H] -> [1, length, H]"""
        return F.conv1d(columns.transpose(1, 2), self.weight, self.bias, groups=columns.shape[2]).transpose(1, 2)


class Steps:
    """The network for each number of tokens that a step may take."""

    def __init__(self, job: ExportJob) -> None:
        dtype = getattr(torch, job.options.compute_dtype)
        # Converted before they are traced: so the tensors of the traces are these, and their names are known.
        self.weights = {name: QuantizedTensor(weight.ints, weight.scales.to(dtype), weight.bits)
                        if isinstance(weight, QuantizedTensor) else weight.to(dtype)
                        for name, weight in job.weights.items()}
        self.names = {(weight.ints if isinstance(weight, QuantizedTensor) else weight).data_ptr(): name
                      for name, weight in self.weights.items()}
        self.traces = {length: StaticProgram(job.config, self.weights, job.state, MlxLowering(length, dtype)).trace()
                       for length in sorted({job.options.prefill_chunk, 1}, reverse=True)}
        self.constants: dict[Any, mx.array] = {}

    def run(self, operators: Operators, tokens: mx.array, *inputs: mx.array, **weights: mx.array) -> list[mx.array]:
        """One step. inputs: position, valid where it takes several tokens, and the state"""
        trace = self.traces[tokens.shape[1]]
        held = [self._value(tensor, weights) for tensor in constants_of(trace).values()]
        return list(Interpreter(trace.graph_module, operators).run(*held, tokens, *inputs))

    def _value(self, tensor: Tensor, weights: Arrays) -> Packed | mx.array:
        """What stands for a tensor of a trace: a weight, or a constant, which MLX writes once if it is one array."""
        name = self.names.get(tensor.data_ptr())
        if name is None:
            content = (tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).numpy().tobytes())
            return self.constants.setdefault(content, _constant(tensor))
        weight, module = self.weights[name], name.removesuffix(".weight")
        if not isinstance(weight, QuantizedTensor):
            return weights[name]
        return Packed(weights[name], weights[f"{module}.scales"], weights[f"{module}.biases"],
                      shared_columns(name, weight), weight.bits)


def _constant(tensor: Tensor) -> mx.array:
    """A small tensor of a trace. (numpy, which stands between the two, has no bfloat16; float32 holds it exactly.)"""
    values = tensor.float() if tensor.is_floating_point() else tensor
    array = mx.array(values.numpy()).astype(getattr(mx, str(tensor.dtype).removeprefix("torch.")))
    mx.eval(array)  # or the conversion would be part of the function
    return array


class Interpreter(fx.Interpreter):
    """Runs a trace on MLX arrays."""

    def __init__(self, module: fx.GraphModule, operators: Operators) -> None:
        super().__init__(module)
        self.operators = operators

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.operators[target](*args, **kwargs)


class Packed(NamedTuple):
    """A quantized weight among the arguments of a step."""

    codes: mx.array
    scales: mx.array
    biases: mx.array
    group_size: int
    bits: int


def _linear(x: mx.array, weight: Packed, scales: None, bias: mx.array | None) -> mx.array:
    y = mx.quantized_matmul(x, *weight[:3], group_size=weight.group_size, bits=weight.bits)
    return y if bias is None else y + bias


def _wide_linear(x: mx.array, weight: Packed, scales: None, bias: mx.array | None) -> mx.array:
    wide = weight._replace(scales=weight.scales.astype(mx.float32), biases=weight.biases.astype(mx.float32))
    y = _linear(x.astype(mx.float32), wide, None, None).astype(x.dtype)
    return y if bias is None else y + bias


def _embedding(tokens: mx.array, table: Packed, scales: None) -> mx.array:
    return mx.dequantize(*(part[tokens] for part in table[:3]), group_size=table.group_size, bits=table.bits)


def _conv1d(x: mx.array, weight: mx.array, bias: mx.array | None, stride: Any, padding: Any, dilation: Any,
            groups: int) -> mx.array:
    y = mx.conv1d(x.swapaxes(1, 2), weight, groups=groups)
    return (y if bias is None else y + bias).swapaxes(1, 2)


def _slice(x: mx.array, axis: int, start: int, end: int) -> mx.array:
    return x[(slice(None),) * (axis % x.ndim) + (slice(start, min(end, x.shape[axis])),)]


_ATEN, _OURS = torch.ops.aten, torch.ops.lfm_edge
ON_GPU: Operators = {
    _OURS.linear.default: _linear,
    _OURS.embedding.default: _embedding,
    operator.getitem: operator.getitem,
    _ATEN._assert_tensor_metadata.default: lambda *_, **__: None,
    _ATEN.add.Tensor: operator.add,
    _ATEN.cat.default: mx.concatenate,
    _ATEN.chunk.default: mx.split,
    _ATEN.clamp.default: mx.clip,
    _ATEN.conv1d.default: _conv1d,
    _ATEN.embedding.default: operator.getitem,
    _ATEN.eq.Tensor: operator.eq,
    _ATEN.ge.Tensor: operator.ge,
    _ATEN.lt.Tensor: operator.lt,
    _ATEN.matmul.default: operator.matmul,
    _ATEN.mul.Tensor: operator.mul,
    _ATEN.neg.default: operator.neg,
    _ATEN.new_zeros.default: lambda x, shape, **_: mx.zeros(shape, x.dtype),
    _ATEN.reshape.default: mx.reshape,
    _ATEN.rms_norm.default: lambda x, shape, weight, eps: mx.fast.rms_norm(x, weight, eps),
    _ATEN.sigmoid.default: mx.sigmoid,
    _ATEN.silu.default: lambda x: x * mx.sigmoid(x),
    _ATEN.slice.Tensor: _slice,
    _ATEN.softmax.int: lambda x, axis: mx.softmax(x, axis, precise=True),
    _ATEN.sub.Tensor: operator.sub,
    _ATEN.to.dtype: lambda x, dtype: x.astype(getattr(mx, str(dtype).removeprefix("torch."))),
    _ATEN.transpose.int: mx.swapaxes,
    _ATEN.unsqueeze.default: mx.expand_dims,
    _ATEN.view.default: mx.reshape,
    _ATEN.where.ScalarOther: mx.where,
}
# MLX's kernels for the GPU sum products of quantized weights in float32. The one for the CPU rounds every partial
# sum to 16 bits, an error ten times as large, so there the sums are made float32's.
ON_CPU: Operators = {**ON_GPU, _OURS.linear.default: _wide_linear}


# The functions as files


def write_functions(steps: Steps, job: ExportJob, entries: dict[str, Entry], directory: Path) -> dict[str, Any]:
    """Write the function for each device. Returns how often each MLX operator occurs in the one for the GPU.

    MLX writes down on which device each operator runs, and traces only for devices that are there. So both are
    traced for the CPU, on every machine, and in one of them the device is changed.
    """
    weights = {name: mx.zeros(entry.shape, getattr(mx, entry.dtype)) for name, entry in entries.items()}  # no memory
    inputs = {"decode" if length == 1 else "prefill": example_inputs(job, length) for length in steps.traces}
    counts: dict[str, Counter[str]] = {}
    with mx.stream(mx.cpu):
        for name, operators in ((CPU_FUNCTION, ON_CPU), (GPU_FUNCTION, ON_GPU)):
            with mx.exporter(str(directory / name), partial(steps.run, operators)) as exporter:
                for arrays in inputs.values():
                    exporter(*arrays, **weights)
        for kind, arrays in inputs.items():
            found: list[str] = []
            mx.export_function(lambda part, found=found: found.append(part["name"]) if "name" in part else None,
                               partial(steps.run, ON_GPU), *arrays, **weights)
            counts[kind] = Counter(found)
    traced = (directory / GPU_FUNCTION).read_bytes()
    (directory / GPU_FUNCTION).write_bytes(moved(traced, CPU, GPU, sum(counts.values(), Counter())))
    return {f"{kind} operators": dict(count.most_common()) for kind, count in counts.items()}


def example_inputs(job: ExportJob, length: int) -> list[mx.array]:
    """Arrays of the shapes and types that a step takes before its weights."""
    valid = [] if length == 1 else [mx.ones(1, mx.int32)]
    state = [mx.zeros(tensor.shape, getattr(mx, tensor.dtype)) for tensor in job.state.tensors]
    return [mx.zeros((1, length), mx.int32), mx.zeros(1, mx.int32), *valid, *state]


def moved(function: bytes, old: int, new: int, operators: Counter[str]) -> bytes:
    """A function's file with its operators on another type of device.

    An operator is written as its stream, the length of its name (uint64), and the name. Raises ExportError where
    one is not found as often as it occurs.
    """
    result, found = bytearray(function), Counter[str]()
    written = {struct.pack("<Q", len(name)) + name.encode(): name for name in operators}
    for match in re.finditer(b"|".join(map(re.escape, written)), function):
        stream, device, number = _STREAM.unpack_from(function, match.start() - _STREAM.size)
        if (device, number) == (old, 0):
            _STREAM.pack_into(result, match.start() - _STREAM.size, stream, new, number)
            found[written[match[0]]] += 1
    if found != operators:
        raise ExportError("the operators in a function's file are not where they are looked for: this version of MLX "
                          "writes another format than the one that lfm-edge was made for")
    return bytes(result)


def _usage(job: ExportJob) -> str:
    unmet = unmet_by(job.config)
    clients = _NO_CLIENTS.replace("UNMET", " and ".join(unmet)) if unmet else _CLIENTS
    return _USAGE.replace("CLIENTS", clients).replace("STOP", repr(list(job.config.eos_token_ids)))


_CLIENTS = """\
- mlx-lm: `mlx_lm.chat --model .`, or in Python `model, tokenizer = mlx_lm.load(".")`
- mlx-swift: `LLMModelFactory.shared.loadContainer(from: folder, using: #huggingFaceTokenizerLoader())`"""
_NO_CLIENTS = "- mlx-lm and mlx-swift cannot run this model: their LFM2 needs UNMET"

_USAGE = """\
## Loading it

- Python: `from lfm_edge import open_bundle; session = open_bundle(".").session()`
CLIENTS
- MLX alone, in any of its languages: `model.mlxfn` on an Apple GPU, `model.cpu.mlxfn` on a CPU, each
  `(tokens, position, [valid,] *state, **weights) -> [logits, *next]` for `prefill_chunk` tokens and, without
  `valid`, for one. `weights` are the tensors of `model.safetensors` by name, `state` those of `manifest.json` in its
  order, zeros at first. `logits` are those of the last valid token. `next` has the whole value of each `replace`
  tensor, and of each `append` tensor the rows of this step: write the valid ones at `position`. In Python:

```python
import json

import mlx.core as mx
from tokenizers import Tokenizer

with open("manifest.json") as file:
    manifest = json.load(file)
layout, chunk = manifest["state"]["tensors"], manifest["options"]["prefill_chunk"]
function = mx.import_function("model.mlxfn" if mx.metal.is_available() else "model.cpu.mlxfn")
weights = mx.load("model.safetensors")
tokenizer = Tokenizer.from_file("tokenizer.json")
state = [mx.zeros(tensor["shape"], getattr(mx, tensor["dtype"])) for tensor in layout]


def step(tokens, position):
    length, count = 1 if len(tokens) == 1 else chunk, len(tokens)
    inputs = [mx.array([tokens + [0] * (length - count)]), mx.array([position])]
    if length > 1:
        inputs.append(mx.array([count]))
    logits, *following = function(*inputs, *state, **weights)
    mx.eval(logits, following)
    for index, (tensor, value) in enumerate(zip(layout, following)):
        if tensor["update"] == "append":
            state[index][:, :, position:position + count] = value[:, :, :count]
        else:
            state[index] = value
    mx.eval(state)
    return int(logits.argmax()), position + count


prompt, position, answer = tokenizer.encode("The harbour").ids, 0, []
for start in range(0, len(prompt), chunk):
    token, position = step(prompt[start:start + chunk], position)
while token not in STOP and len(answer) < 32:
    answer.append(token)
    token, position = step([token], position)
print(tokenizer.decode(answer))
```
"""
