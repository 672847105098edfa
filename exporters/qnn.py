"""The Snapdragon NPU: context binaries for ONNX Runtime's QNN provider, by way of ONNX graphs of quantized operators.

The static network is traced for a prefill chunk and for a single token. Every value in it gets integers: 16 bits for
activations, in ranges that are measured on prompts, 8 for what is looked back at. The traces are written as ONNX, and
the provider compiles that for each chip. The graphs stay in the bundle: the simulator runs them, and another compiler
may.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from exporters.external_data import ExternalData
from exporters.qdq import GraphWriter, constant
from lfm_edge.backends import htp
from lfm_edge.backends.npu import (
    CONV_ROWS,
    DECODE,
    EMBEDDINGS,
    LAST,
    LOGITS,
    PREFILL,
    TABLES,
    Arrays,
    NpuSession,
    graph_name,
    graphs_of,
    hidden_name,
)
from lfm_edge.backends.socs import Soc, socs_named
from lfm_edge.bundle.job import Artifact, ExportJob
from lfm_edge.bundle.parts import TOKENS, Value
from lfm_edge.calibration import ranges
from lfm_edge.calibration.ranges import UNIT_INT8, Encoding, Ranges, Watched
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.checkpoint.layers import ATTENTION, SLIDING
from lfm_edge.errors import ExportError
from lfm_edge.model.decoder import Decoder
from lfm_edge.model.lowering import Linears, Weight, attention_kinds
from lfm_edge.model.static import ShiftedSum, StaticLowering, grouped, ungrouped
from lfm_edge.model.weights import Weights
from lfm_edge.progress import quiet
from lfm_edge.quantization import packing
from lfm_edge.quantization.activations import column_block
from lfm_edge.quantization.recipe import EMBEDDING
from lfm_edge.quantization.tensor import QuantizedTensor
from lfm_edge.session.state import StateSpec
from lfm_edge.targets import TARGETS

DIRECTORY, GRAPHS = "npu", "graphs"
_LARGEST_PART = 700_000_000  # bytes of weights in one context binary: compiling takes 8.5 times as much memory


def export(job: ExportJob, directory: Path, progress: Callable[[str], None]) -> Artifact:
    """Write the graphs into `directory`. Raises ExportError where the NPU has no operator for one of the trace."""
    (directory / DIRECTORY / GRAPHS).mkdir(parents=True)
    progress("write the embedding")
    _write_embedding(job.weights[EMBEDDING], directory / DIRECTORY)
    lengths = {PREFILL: job.options.prefill_chunk} if job.options.prefill_chunk > 1 else {}
    lengths |= {DECODE: 1}
    programs = {}
    for phase, length in lengths.items():
        progress(f"trace {phase}")
        with quiet(), torch.no_grad():
            programs[phase] = NpuProgram(job.config, job.weights, job.state, length)
    progress(f"measure activations on {sum(map(len, job.prompts))} tokens")
    measured = _measure(job, programs[next(iter(lengths))])
    progress("write the graphs")
    parts = _parts(job)
    nodes, (inputs, outputs) = _write_graphs(programs, measured, parts, directory / DIRECTORY / GRAPHS)
    return Artifact(DIRECTORY, inputs, outputs, {"parts": _number_of(parts), "nodes": nodes}, _usage(job),
                    activation_ranges=measured)


def compile_for(socs: Sequence[Soc], directory: Path, progress: Callable[[str], None]) -> dict[str, str]:
    """Compile the graphs in `directory` for each chip. Gives what there is to say of it.

    Raises NpuError where an operator would not run on the NPU.
    """
    report = {f"compiled for {soc.name}": _compile(soc, directory / DIRECTORY, progress) for soc in socs}
    return report | {"peak memory of the export": _peak_memory()}


def packed_weights(config: ModelConfig, weights: Weights) -> Iterator[tuple[str, bytes]]:
    """Every quantized weight, by name, as its bytes must stand in the files: codes and scales apart."""
    table = weights[EMBEDDING]
    yield f"{EMBEDDING}: rows", packing.block_codes(table).tobytes()
    yield f"{EMBEDDING}: scales of rows", packing.block_scales(table).tobytes()
    lowering = NpuLowering(1)
    Decoder(config, weights, StateSpec.of(config, 1, "int8", TARGETS["npu-q8"].state_layout), lowering)
    for name, weight in lowering.named(weights).values():
        yield f"{name}: codes", packing.transposed_codes(weight).tobytes()
        if weight.scales.shape[1] == 1:
            yield f"{name}: scales", weight.scales.numpy().tobytes()
            continue
        multiples, units = weight.two_level_scales()
        yield f"{name}: multiples", multiples.t().contiguous().numpy().tobytes()
        yield f"{name}: units", units.numpy().tobytes()


class Place(NamedTuple):
    """What the layers need to know of a step, all of it given.

    rotations: cos and sin, [1, T, 1, D] each, by the kind of layer
    masks: of the cache, [1, 1, 1, context] or [1, kv_heads, G*T, rows], and of the step's own rows,
        [1, kv_heads, G*T, T], by the kind of layer: -1 for what is hidden; G heads share a key head
    conv_rows: int32 [taps - 1], the columns that are the next conv state; last: int32 [1], the last valid token
    """

    rotations: dict[str, tuple[Tensor, Tensor]]
    masks: dict[str, tuple[Tensor, Tensor | None]]
    conv_rows: Tensor | None
    last: Tensor | None


class NpuLowering(StaticLowering):
    """The static pieces without look-ups, without reshaping of weights, and with 8-bit caches.

    The parts of a joined projection are layers of their own: each of them gets a range.
    """

    def __init__(self, length: int) -> None:
        super().__init__(length, torch.float32)
        self.linears_made: list[tuple[QuantizedTensor, QuantizedTensor, str]] = []  # the weight, its part, which

    def positions(self, config: ModelConfig, state: StateSpec) -> nn.Module:
        return Places(config, self.length)

    def embedding(self, weight: Weight) -> nn.Module:
        return nn.Identity()  # the host has looked the rows up

    def linear(self, weight: Weight, bias: Tensor | None) -> nn.Module:
        self.linears_made.append((weight, weight, ""))
        return super().linear(weight, bias)

    def split_linear(self, weight: Weight, bias: Tensor | None, parts: int) -> nn.Module:
        rows = weight.shape[0] // parts
        layers = []
        for index in range(parts):
            here = slice(index * rows, (index + 1) * rows)
            part = weight[here]
            self.linears_made.append((weight, part, f".{index}"))
            layers.append(super().linear(part, None if bias is None else bias[here]))
        return Linears(layers)

    def rotary(self, head_dim: int, kind: str) -> nn.Module:
        return Rotary(kind)

    def causal_conv(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        return CausalConv(weight, bias)

    def attention(self, scale: float, kv_scales: tuple[Tensor, Tensor] | None, window: int) -> nn.Module:
        return EightBitAttention(scale, kv_scales, SLIDING if window else ATTENTION)

    def last_tokens(self) -> nn.Module:
        return LastValidToken()

    def named(self, weights: Weights) -> dict[int, tuple[str, QuantizedTensor]]:
        """Weights of the linear layers made so far and their names, by the address of their integers."""
        names = {id(weight): name for name, weight in weights.items()}
        return {part.ints.data_ptr(): (names[id(whole)] + suffix, part)
                for whole, part, suffix in self.linears_made}


class Places(nn.Module):
    """What the host has computed, and the mask within a step, which is always the same."""

    def __init__(self, config: ModelConfig, length: int) -> None:
        super().__init__()
        groups = config.num_attention_heads // config.num_key_value_heads
        later = torch.ones(length, length).triu(diagonal=1)
        self.kinds = attention_kinds(config)
        for kind in self.kinds:
            beyond = torch.ones(length, length).tril(-config.sliding_window)
            mask = torch.where(later + beyond > 0 if kind == SLIDING else later > 0, -1.0, 0.0)
            # One for each key head: the simulator was seen to apply a mask for all of them to the first one only.
            self.register_buffer(f"{kind}_mask", mask.repeat(config.num_key_value_heads, groups, 1)[None])

    def forward(self, place: Place, length: int) -> Place:
        """The place, whole."""
        return place._replace(masks={kind: (place.masks[kind][0], getattr(self, f"{kind}_mask"))
                                     for kind in self.kinds})


class Rotary(nn.Module):
    """Rotary position embedding with the signs in the sines: the halves are swapped, and none is negated."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, place: Place) -> Tensor:
        """x: [1, T, heads, D] -> the same shape"""
        first, second = x[..., :x.shape[3] // 2], x[..., x.shape[3] // 2:]
        cos, sin = place.rotations[self.kind]
        return x * cos + torch.cat([second, first], dim=-1) * sin


class CausalConv(ShiftedSum):
    """The sum over taps; the next state is columns that the host chooses. Integers are finite, those of padding too."""

    def clean(self, x: Tensor, place: Place) -> Tensor:
        return x

    def next_state(self, columns: Tensor, length: int, place: Place) -> Tensor:
        """columns: [1, taps - 1 + length, H] -> [1, taps - 1, H]"""
        return columns[:, length:] if place.conv_rows is None else columns.index_select(1, place.conv_rows)


class LastValidToken(nn.Module):
    """The token that the host chooses."""

    def forward(self, x: Tensor, place: Place, count: int) -> Tensor:
        """x: [1, T, H] -> [1, 1, H]"""
        return x if place.last is None else x.index_select(1, place.last)


class EightBitAttention(nn.Module):
    """Attention over a cache of 8-bit integers and over the step's own keys and values, rounded to the same.

    The NPU multiplies 16-bit by 8-bit integers; wider ones are cut to 8 bits of their whole range. With a scale for
    each channel, 8 bits lose little. The scales of the keys are put on the queries, those of the values on the result.
    """

    def __init__(self, scale: float, kv_scales: tuple[Tensor, Tensor], kind: str) -> None:
        super().__init__()
        self.kind = kind
        key_scales, value_scales = kv_scales  # [kv_heads, D] each
        self.scale = scale
        self.register_buffer("key_scales", key_scales)
        self.register_buffer("value_scales", value_scales)
        self.register_buffer("to_keys", 1 / key_scales)
        self.register_buffer("to_values", 1 / value_scales)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, state: list[Tensor],
                place: Place) -> tuple[Tensor, list[Tensor]]:
        """query: [1, T, heads, D]; key, value: [1, T, kv_heads, D]

        state: keys [1, kv_heads, D, context] and values [1, kv_heads, context, D]
        Returns [1, T, heads, D], and the step's rows of the caches as they come, [1, T, kv_heads, D]: a transposition
        before a result is moved behind its rounding by ONNX Runtime, where the NPU has no operator for it.
        """
        past_keys, past_values = state
        past_mask, new_mask = place.masks[self.kind]
        heads, kv_heads = query.shape[2], key.shape[2]
        groups = heads // kv_heads
        keys, values = ranges.to_int8(key * self.to_keys), ranges.to_int8(value * self.to_values)
        query = grouped(query * (self.key_scales * self.scale).repeat_interleave(groups, 0), kv_heads)
        scores = torch.cat([ranges.masked(query @ past_keys, past_mask),
                            ranges.masked(query @ keys.permute(0, 2, 3, 1), new_mask)], dim=-1)
        shares = scores.softmax(dim=-1)  # [1, kv_heads, G*T, context + T]
        context = past_keys.shape[3]
        out = shares[..., :context] @ past_values + shares[..., context:] @ values.transpose(1, 2)
        return ungrouped(out, key.shape[1]) * self.value_scales.repeat_interleave(groups, 0), [keys, values]


def _tables(config: ModelConfig, state: StateSpec, length: int) -> dict[str, Tensor]:
    """What the host computes for a step of `length` tokens, by name: samples of the shapes."""
    tables = {EMBEDDINGS: torch.zeros(1, length, config.hidden_size)}
    rows = config.num_attention_heads // config.num_key_value_heads * length
    for kind in attention_kinds(config):
        cos, sin, mask = TABLES[kind]
        ring = next((tensor.rows for tensor in state.tensors if tensor.window), 0)
        shape = (1, config.num_key_value_heads, rows, ring) if kind == SLIDING else (1, 1, 1, state.context)
        tables |= {cos: torch.zeros(1, length, 1, config.head_dim), sin: torch.zeros(1, length, 1, config.head_dim),
                   mask: torch.zeros(shape)}
    if length > 1:
        tables |= {CONV_ROWS: torch.zeros(config.conv_taps - 1, dtype=torch.int32),
                   LAST: torch.zeros(1, dtype=torch.int32)}
    return tables


class NpuProgram(nn.Module):
    """The trace of the network for `length` tokens: `(embeddings, place..., *state) -> (logits, *next)`.

    inputs: names of the arguments, in order; outputs: of the results
    """

    def __init__(self, config: ModelConfig, weights: Weights, state: StateSpec, length: int) -> None:
        super().__init__()
        lowering = NpuLowering(length)
        self.decoder = Decoder(config, weights, state, lowering)
        self.weights = lowering.named(weights)
        self.tables = _tables(config, state, length)
        samples = self.tables | {tensor.name: torch.zeros(1).expand(tensor.shape) for tensor in state.tensors}
        self.inputs = list(samples)
        self.outputs = [LOGITS, *(tensor.next_name for tensor in state.tensors)]
        self.traced = torch.export.export(self, tuple(samples.values()), strict=False).run_decompositions({})
        placeholders = [spec.arg.name for spec in self.traced.graph_signature.input_specs
                        if spec.kind == InputKind.USER_INPUT]
        self.input_of = dict(zip(placeholders, self.inputs, strict=True))
        numbers = {node: name for node, name in self.input_of.items() if name not in (CONV_ROWS, LAST)}
        self.value_names = ranges.value_names(self.traced, numbers)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """logits: [1, 1, vocab], of the last valid token"""
        given = dict(zip(self.tables, inputs, strict=False))
        rotations = {kind: (given[cos], given[sin]) for kind, (cos, sin, _) in TABLES.items() if cos in given}
        masks = {kind: (given[mask], None) for kind, (_, _, mask) in TABLES.items() if mask in given}
        place = Place(rotations, masks, given.get(CONV_ROWS), given.get(LAST))
        x, following = self.decoder.body(given[EMBEDDINGS], place, list(inputs[len(self.tables):]))
        return self.decoder.head(x), *following

    def encodings(self, measured: Ranges) -> dict[str, Encoding]:
        """Of every value of the trace, by its nodes."""
        caches = {tensor.name: UNIT_INT8 for tensor in self.decoder.state.tensors if tensor.is_cache}
        turns, hidden = Encoding.of(-1.0, 1.0), Encoding.of(-1.0, 0.0)
        fixed = {name: encoding for names in TABLES.values()
                 for name, encoding in zip(names, (turns, turns, hidden), strict=True)}
        return ranges.encodings(self.traced, self.value_names, measured, fixed | caches)


def _measure(job: ExportJob, program: NpuProgram) -> Ranges:
    """Run the prompts of the job through a program, in float32 but for the caches; the range of every value."""
    watched = Watched(program.traced, program.value_names)
    types = {tensor.next_name: np.dtype(tensor.dtype) for tensor in job.state.tensors}

    def run(_: int, inputs: Arrays) -> Arrays:
        given = [torch.from_numpy(inputs[name]) for name in program.inputs]
        results = watched.step([value.float() if value.dtype == torch.int8 else value for value in given])
        return {name: value.numpy().astype(types.get(name, np.float32))
                for name, value in zip(program.outputs, results, strict=True)}

    table = job.weights[EMBEDDING]

    def embed(tokens: list[int]) -> np.ndarray:
        return table[tokens].dequantize()[None].numpy()

    session = NpuSession(job.config, job.state, job.options.prefill_chunk, embed, run)
    for prompt in job.prompts:
        session.reset()
        session.prefill(prompt)
    return watched.ranges


def _parts(job: ExportJob) -> dict[int, int]:
    """Which part of the model each layer belongs to: as many layers as one context binary holds."""
    sizes = [0] * job.config.num_layers
    for name, weight in job.weights.items():
        if name.startswith("model.layers.") and isinstance(weight, QuantizedTensor):
            sizes[int(name.split(".")[2])] += weight.ints.numel() * weight.bits // 8
    head = job.weights.get("lm_head.weight", job.weights[EMBEDDING])
    sizes[-1] += head.ints.numel() * head.bits // 8
    parts, held = {0: 0}, sizes[0]
    for layer in range(1, len(sizes)):
        fits = held + sizes[layer] <= _LARGEST_PART
        parts[layer] = parts[layer - 1] + (not fits)
        held = held + sizes[layer] if fits else sizes[layer]
    return parts


def _number_of(parts: dict[int, int]) -> int:
    return max(parts.values()) + 1


def _write_graphs(programs: dict[str, NpuProgram], measured: Ranges, parts: dict[int, int],
                  directory: Path) -> tuple[dict[str, int], list[tuple[Value, ...]]]:
    """Write the graphs of all parts, and their constants into one file.

    Returns the number of operators of each, and what goes into all of them together and comes out.
    """
    counts, described = {}, []
    with ExternalData(directory / "weights.data") as weights:
        for phase, program in programs.items():
            for index, model in enumerate(_models(program, measured, parts, weights)):
                name = graph_name(phase, index, _number_of(parts))
                onnx.save(model, directory / name)
                counts[name] = sum(node.op_type not in ("QuantizeLinear", "DequantizeLinear")
                                   for node in model.graph.node)
                described.append(model.graph)
    widest = next(iter(programs.values()))  # that for a chunk takes all that the one for a token does, and more
    return counts, [_described(names, [value for graph in described for value in getattr(graph, side)])
                    for names, side in ((widest.inputs, "input"), (widest.outputs, "output"))]


def _described(names: Sequence[str], values: Sequence[onnx.ValueInfoProto]) -> tuple[Value, ...]:
    """Inputs or outputs for the manifest, from those of the graphs for a chunk and for one token."""
    described = []
    for name in names:
        found = [value.type.tensor_type for value in values if value.name == name]
        sizes = zip(*([dim.dim_value for dim in kind.shape.dim] for kind in found), strict=True)
        shape = tuple(_dimension(set(each)) for each in sizes)
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(found[0].elem_type))
        described.append(Value(name, dtype, shape, optional=name in (CONV_ROWS, LAST)))
    return tuple(described)


def _dimension(sizes: set[int]) -> int | str:
    """One size, or where the graphs differ how it grows with the tokens."""
    least = min(sizes)
    return least if len(sizes) == 1 else TOKENS if least == 1 else f"{least}*{TOKENS}"


def _models(program: NpuProgram, measured: Ranges, parts: dict[int, int], file: ExternalData) -> list[onnx.ModelProto]:
    """The graphs of a program, one for each part. What crosses from one to the next is a result and an input."""
    encodings = program.encodings(measured)
    graph = program.traced.graph
    results = dict(zip(graph.output_node().args[0], program.outputs, strict=True))
    models, crossing = [], {}
    for part in range(_number_of(parts)):
        here = [node for node in graph.nodes if node.op == "call_function" and _part_of(node, parts) == part]
        writer = GraphWriter(program.traced, encodings, program.weights, file)
        needed = {source: None for node in here for source in node.all_input_nodes
                  if source not in here and source.name not in writer.constants}
        for source in needed:
            writer.add_input(source, program.input_of.get(source.name) or crossing[source])
        for node in here:
            if node in results and writer.keeps_integers(node):
                writer.result_names[node.name] = results[node]
        for node in here:
            writer.add(node)
        crossing |= {node: hidden_name(part) for node in here
                     if node.name in writer.values and any(_part_of(user, parts) > part for user in node.users)}
        for node, name in [*results.items(), *crossing.items()]:
            if node in here:
                writer.add_output(node, name)
        models.append(writer.model(f"part {part} of {_number_of(parts)}"))
    return models


def _part_of(node: fx.Node, parts: dict[int, int]) -> int:
    """The part in which a node is written: that of its layer; the final norm and the head go with the last one."""
    if node.op == "output":
        return -1
    words = ranges.module_path(node).split(".")
    if words[0] == "layers":
        return parts[int(words[1])]
    return _number_of(parts) - 1 if words[0] in ("embedding_norm", "lm_head") else 0


def _write_embedding(table: QuantizedTensor, directory: Path) -> None:
    """`embedding.onnx`: `input_ids` int64 [1, T] -> `inputs_embeds`, on the CPU, a few rows of a file."""
    rows, cols = table.shape
    block = column_block(table)
    if not block:
        raise ExportError(f"{EMBEDDING}: {cols} columns; its kernel takes a multiple of 16")
    with ExternalData(directory / "embedding.data") as file:
        codes = constant(file, "codes", TensorProto.UINT8, (rows, cols * table.bits // 8),
                         lambda: packing.block_codes(table))
        scales = constant(file, "scales", TensorProto.FLOAT, (rows, cols // block),
                          lambda: packing.block_scales(table))
    node = helper.make_node("GatherBlockQuantized", ["codes", "input_ids", "scales"], [EMBEDDINGS],
                            domain="com.microsoft", bits=table.bits, block_size=block, gather_axis=0, quantize_axis=1)
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "length"])
    result = helper.make_tensor_value_info(EMBEDDINGS, TensorProto.FLOAT, [1, "length", cols])
    graph = helper.make_graph([node], "embedding", [ids], [result], [codes, scales])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(
        "com.microsoft", 1)], ir_version=10, producer_name="lfm-edge"), directory / "embedding.onnx")


def _compile(soc: Soc, directory: Path, progress: Callable[[str], None]) -> str:
    """Compile all graphs for one chip. Prefill and decode of a part have one context binary."""
    start = time.monotonic()
    (directory / soc.name).mkdir()
    parts = list(zip(*graphs_of(directory / GRAPHS).values(), strict=True))
    for number, together in enumerate(parts, 1):
        progress(f"compile for {soc.name} ({soc.product})" + (f", part {number} of {len(parts)}" if parts[1:] else ""))
        try:
            htp.compile_together(together, soc, directory / soc.name)
        except htp.NpuError:
            if shutil.disk_usage(directory).free < _bytes(directory / GRAPHS):  # it does not say why it cannot write
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory)) from None
            raise
    return f"{_bytes(directory / soc.name) / 1e6:,.1f} MB in {time.monotonic() - start:,.0f} s"


def _bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def _peak_memory() -> str:
    """Of this process, and of the largest that compiled for it."""
    own, compiler = (resource.getrusage(who).ru_maxrss * 1024 / 1e9
                     for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return f"{own:,.2f} GB, and of a compiler beside it {compiler:,.2f} GB"


def _usage(job: ExportJob) -> str:
    prefill = _PREFILL_USAGE.replace("CHUNK", str(job.options.prefill_chunk)) if job.options.prefill_chunk > 1 else ""
    chips = ", ".join(f"`{DIRECTORY}/{soc.name}` ({soc.product})" for soc in socs_named(job.options.soc))
    return (_USAGE.replace("PREFILL", prefill).replace("CHIPS", chips)
            .replace("WIDTH", str(job.config.head_dim)))


_USAGE = """\
## Loading it

Compiled for CHIPS: put that directory and `npu/embedding.*` on the device. ONNX Runtime with the QNN provider loads
`decode.onnx` from it, which takes one token. `npu/graphs` is what was compiled; a device has no need of it.
PREFILL
- `npu/embedding.onnx`, on the CPU: `input_ids` int64 [1, T] -> `inputs_embeds`, the first input of the graphs
- `cos`, `sin` float32 [1, T, 1, WIDTH]: the rotation of each position, `sin` with the sign of its first half changed
- `past_mask` float32 [1, 1, 1, context]: 0 for positions that are filled, -1 for the others
- the state, named as in `manifest.json`; begin with zeros
- `logits` float32 [1, 1, vocab]; `present_conv.N` replaces `past_conv.N`; `present.N.key` and `.value` are the step's
  rows, int8 [1, T, kv_heads, WIDTH]: write them into the caches at the position, keys as columns

In Python: `from lfm_edge import open_bundle; session = open_bundle(".").session()`, on the NPU of the device, or on the
simulator of an x86-64 Linux host.
"""

_PREFILL_USAGE = """
`prefill.onnx` takes CHUNK tokens; where there are fewer, the last ones are padding. Two inputs tell it how many are
valid: `last` int32 [1] is the index of the last valid token, and `conv_rows` int32 [taps - 1] = valid, valid + 1, ...
are the columns that become the next conv state.
"""
