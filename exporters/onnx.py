"""ONNX: `onnx/model_q4.onnx` or `onnx/model_quantized.onnx`, for ONNX Runtime's CPU provider and its clients.

The lowering below writes the fused pieces as operators of the `com.microsoft` domain while torch.export traces
the network; torch.onnx turns the trace into a graph. Quantized weights are not in memory while that happens:
each is packed when the external data file is written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import Tensor, nn
from torch.export import Dim
from torch.onnx import ops

from exporters.external_data import INLINE_BYTES, ExternalData
from lfm_edge.bundle.job import Artifact, ExportJob
from lfm_edge.bundle.parts import Value
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.checkpoint.layers import ATTENTION, CONV, SLIDING
from lfm_edge.errors import ExportError
from lfm_edge.model import lowering as reference
from lfm_edge.model.decoder import Decoder
from lfm_edge.model.lowering import Lowering, Weight, attention_kinds, frozen, rotary_angles
from lfm_edge.model.weights import Weights
from lfm_edge.progress import quiet
from lfm_edge.quantization.activations import column_block
from lfm_edge.quantization.packing import block_codes, block_scales
from lfm_edge.quantization.tensor import QuantizedTensor
from lfm_edge.session.state import APPEND, SLIDE, StateLayout, StateSpec, StateTensor

OPSET = 23  # the first with RMSNormalization
MICROSOFT = "com.microsoft"
SCORED = "num_logits_to_keep"  # as transformers calls it
WINDOW_ROWS = "window_rows"  # of the caches of sliding-window layers: as many as the caller has, the window or more
INT8_MULTIPLY = 4  # MatMulNBits' accuracy level at which activations are rounded to 8 bits, too
_LARGEST_FILE = 2_000_000_000  # of external data: what a browser can hold in one buffer


def export(job: ExportJob, directory: Path, progress: Callable[[str], None]) -> Artifact:
    """Write the graph, its external data, and the configuration files of its clients into `directory`.

    The graph takes `input_ids` int64 [1, T], `attention_mask` int64 [1, P + T] and the state, and gives the
    logits of the last token, float32 [1, 1, vocab], and the next state. An input that need not be given,
    `num_logits_to_keep` int64 [1], asks for those of more tokens.
    """
    _check_widths(job.weights)
    lowering = OnnxLowering()
    program = ExplicitState(Decoder(job.config, job.weights, job.state, lowering))
    progress("trace")
    with quiet(), torch.no_grad():
        model = _trace(program, job.state)
        _simplify(model, lowering.packed)
    _fuse_skip_norms(model.graph)
    _make_optional(model.graph)
    _strip(model)
    name = artifact_name(job)
    (directory / "onnx").mkdir()
    progress("write the weights")
    files = _write(model, lowering.packed, directory / "onnx" / name)
    _write_json(directory / "config.json", transformers_js_config(job, name, files))
    _write_json(directory / "genai_config.json", genai_config(job, f"onnx/{name}"))
    inputs, outputs = (tuple(map(_described, values)) for values in (model.graph.inputs, model.graph.outputs))
    return Artifact(f"onnx/{name}", inputs, outputs, _operators(model.graph), _usage(job, f"onnx/{name}"),
                    scored=job.options.prefill_chunk)


def packed_weights(config: ModelConfig, weights: Weights) -> Iterator[tuple[str, bytes]]:
    """Every quantized weight, by name, as its bytes must stand in the external data: codes and scales apart."""
    lowering = OnnxLowering()
    decoder = Decoder(config, weights, StateSpec.of(config, 1, layout=StateLayout(kv_heads_first=True)), lowering)
    for name, buffer in decoder.named_buffers():
        if buffer.data_ptr() in lowering.packed:
            yield name, lowering.packed[buffer.data_ptr()].make().tobytes()


def _described(value: ir.Value) -> Value:
    """An input or an output of the graph, for the manifest."""
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
    return Value(value.name, str(value.dtype.numpy()), shape, optional=value.name == SCORED)


def artifact_name(job: ExportJob) -> str:
    """The file name that transformers.js looks for: `q4`, or `q8` under its older name."""
    return "model_q4.onnx" if job.recipe.body.bits == 4 else "model_quantized.onnx"


class Packed(NamedTuple):
    """A constant of the graph that is made when it is written. Those with one `key` have the same bytes."""

    key: tuple[str, tuple[int, ...]]
    make: Callable[[], np.ndarray]


class OnnxLowering(Lowering):
    """The pieces as operators of ONNX Runtime.

    packed: what stands behind each placeholder of the trace, by its address
    """

    def __init__(self) -> None:
        super().__init__()
        self.packed: dict[int, Packed] = {}

    def positions(self, config: ModelConfig, state: StateSpec) -> nn.Module:
        return Positions(config, state.context)

    def linear(self, weight: Weight, bias: Tensor | None) -> nn.Module:
        return QuantizedLinear(self, [_quantized_only(weight)], bias)

    def linears(self, weights: list[Weight], biases: list[Tensor | None]) -> nn.Module:
        parts = [_quantized_only(weight) for weight in weights]
        if len({(part.bits, part.group_size) for part in parts}) > 1 or any(bias is not None for bias in biases):
            return super().linears(weights, biases)
        return JoinedLinears(self, parts)

    def embedding(self, weight: Weight) -> nn.Module:
        return QuantizedEmbedding(self, _quantized_only(weight))

    def norm(self, weight: Tensor, eps: float) -> nn.Module:
        return RMSNorm(weight, eps)

    def rotary(self, head_dim: int, kind: str) -> nn.Module:
        return RotatedLater()

    def causal_conv(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        return CausalConv(weight, bias) if weight.shape[-1] > 1 else Scale(weight, bias)

    def attention(self, scale: float, kv_scales: tuple[Tensor, Tensor] | None, window: int) -> nn.Module:
        return GroupQueryAttention(scale, kv_scales, window)

    def last_tokens(self) -> nn.Module:
        return LastTokens()

    def codes(self, weights: list[QuantizedTensor], *shape: int) -> Tensor:
        """A placeholder for the codes of weights one below the other, uint8."""
        return self._placeholder(shape, torch.uint8, _packed("codes", weights, block_codes))

    def scales(self, weights: list[QuantizedTensor], *shape: int) -> Tensor:
        """A placeholder for the scales of weights one below the other, float32 [rows, blocks]."""
        return self._placeholder(shape, torch.float32, _packed("scales", weights, block_scales))

    def _placeholder(self, shape: tuple[int, ...], dtype: torch.dtype, packed: Packed) -> Tensor:
        """A tensor to trace with: the shape of the constant, and no memory."""
        tensor = torch.zeros(1, dtype=dtype).expand(shape)
        self.packed[tensor.data_ptr()] = packed
        return tensor


def _packed(kind: str, weights: list[QuantizedTensor], pack: Callable[[QuantizedTensor], np.ndarray]) -> Packed:
    def make() -> np.ndarray:
        parts = [pack(weight) for weight in weights]
        for weight in weights:
            weight.release()
        return np.concatenate(parts)

    return Packed((kind, tuple(map(id, weights))), make)


def _quantized_only(weight: Weight) -> QuantizedTensor:
    if not isinstance(weight, QuantizedTensor):
        raise ExportError("ONNX bundles are quantized; float kernels are no target of ours")
    return weight


def _check_widths(weights: Weights) -> None:
    for name, weight in weights.items():
        if isinstance(weight, QuantizedTensor) and not column_block(weight):
            raise ExportError(f"{name}: {weight.shape[1]} columns; MatMulNBits takes a multiple of 16")


def _microsoft(name: str, inputs: Sequence[Tensor | None], attributes: dict[str, Any],
               shape: Sequence[Any]) -> Tensor:
    """One operator of ONNX Runtime's own domain, in the trace, with one output in float32."""
    return ops.symbolic(f"{MICROSOFT}::{name}", inputs, attributes, dtype=torch.float32, shape=shape, version=1)


class QuantizedLinear(nn.Module):
    """MatMulNBits: 4- or 8-bit blocks of columns, activations rounded to 8 bits block by block.

    weights: of one scheme and width; their rows stand one below the other
    """

    def __init__(self, lowering: OnnxLowering, weights: list[QuantizedTensor], bias: Tensor | None) -> None:
        super().__init__()
        rows, cols = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
        bits, block = weights[0].bits, column_block(weights[0])
        self.register_buffer("codes", lowering.codes(weights, rows, cols // block, block * bits // 8))
        self.register_buffer("scales", lowering.scales(weights, rows, cols // block))
        self.bias = frozen(bias)
        self.rows = rows
        self.attributes = {"K": cols, "N": rows, "bits": bits, "block_size": block, "accuracy_level": INT8_MULTIPLY}

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 [1, T, cols] -> float32 [1, T, rows]"""
        inputs = (x, self.codes, self.scales, *(() if self.bias is None else (None, None, self.bias)))
        return _microsoft("MatMulNBits", inputs, self.attributes, (*x.shape[:-1], self.rows))


class JoinedLinears(nn.Module):
    """Linear layers of one input as one product: it is rounded once, and one kernel is started instead of several."""

    def __init__(self, lowering: OnnxLowering, weights: list[QuantizedTensor]) -> None:
        super().__init__()
        self.linear = QuantizedLinear(lowering, weights, None)
        self.rows = [weight.shape[0] for weight in weights]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: float32 [1, T, cols] -> one tensor for each, float32 [1, T, rows]"""
        return self.linear(x).split(self.rows, dim=-1)


class QuantizedEmbedding(nn.Module):
    """GatherBlockQuantized over the very bytes that a tied head multiplies with."""

    def __init__(self, lowering: OnnxLowering, weight: QuantizedTensor) -> None:
        super().__init__()
        rows, cols = weight.shape
        self.register_buffer("codes", lowering.codes([weight], rows, cols * weight.bits // 8))
        self.register_buffer("scales", lowering.scales([weight], rows, cols // column_block(weight)))
        self.cols = cols
        self.attributes = {"bits": weight.bits, "block_size": column_block(weight), "gather_axis": 0,
                           "quantize_axis": 1}

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: int64 [1, T] -> float32 [1, T, hidden]"""
        return _microsoft("GatherBlockQuantized", (self.codes, tokens, self.scales), self.attributes,
                          (*tokens.shape, self.cols))


class RMSNorm(reference.RMSNorm):
    """ONNX's RMSNormalization. Where it follows a residual sum, `_fuse_skip_norms` joins the two."""

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 [..., size] -> the same shape"""
        return ops.symbolic("::RMSNormalization", (x, self.weight), {"axis": -1, "epsilon": self.eps}, dtype=x.dtype,
                            shape=x.shape, version=OPSET)


class Place(NamedTuple):
    """What GroupQueryAttention asks for: positions counted from the attention mask, and whole rotary tables."""

    total: int  # P + T
    last_position: Tensor  # int32 [1]
    total_length: Tensor  # int32 []: the same as `total`
    rotations: dict[str, tuple[Tensor, Tensor]]  # cos and sin by the kind of layer, float32 [context, D / 2] each


class Positions(nn.Module):
    """Where the tokens stand, told by the attention mask: clients feed no positions."""

    def __init__(self, config: ModelConfig, context: int) -> None:
        super().__init__()
        self.kinds = attention_kinds(config)
        for kind in self.kinds:
            angles = rotary_angles(config.rotation(kind), config.head_dim, context)
            self.register_buffer(f"{kind}_cos", angles.cos())
            self.register_buffer(f"{kind}_sin", angles.sin())

    def forward(self, attention_mask: Tensor, length: int) -> Place:
        """attention_mask: int64 [1, P + T], all ones"""
        total = attention_mask.shape[1]
        last_position = (attention_mask.sum(dim=1) - 1).to(torch.int32)
        rotations = {kind: (getattr(self, f"{kind}_cos"), getattr(self, f"{kind}_sin")) for kind in self.kinds}
        return Place(total, last_position, torch.scalar_tensor(total, dtype=torch.int32), rotations)


class RotatedLater(nn.Module):
    """GroupQueryAttention rotates queries and keys itself."""

    def forward(self, x: Tensor, place: Place) -> Tensor:
        """x: float32 [1, T, heads, D] -> itself"""
        return x


class CausalConv(nn.Module):
    """CausalConvWithState over activations as they lie, [1, T, H].

    In that layout the operator wants its state as [1, taps - 1, H]. Clients keep it as [1, H, taps - 1]: to turn
    the few columns of the state costs less than to turn every activation.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = frozen(weight)
        self.bias = frozen(bias)

    def forward(self, x: Tensor, state: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """x: float32 [1, T, H]; state: float32 [1, H, taps - 1] -> the same"""
        past = state.transpose(1, 2)
        out, present = ops.symbolic_multi_out(
            f"{MICROSOFT}::CausalConvWithState", (x, self.weight, self.bias, past), {"channels_last": 1},
            dtypes=(x.dtype, past.dtype), shapes=(x.shape, past.shape), version=1)
        return out, present.transpose(1, 2)


class Scale(nn.Module):
    """A convolution of one tap: a weight for each channel, and no state."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = frozen(weight.flatten())
        self.bias = frozen(bias)

    def forward(self, x: Tensor, state: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """x: float32 [1, T, H]; state: float32 [1, H, 0]"""
        x = x * self.weight
        return x if self.bias is None else x + self.bias, state


class GroupQueryAttention(nn.Module):
    """Rotates, appends to the caches (in place where past and present are one buffer), attends causally.

    With a window, the caches have a fixed number of rows, and the operator drops those that are too old.
    """

    def __init__(self, scale: float, kv_scales: tuple[Tensor, Tensor] | None, window: int) -> None:
        super().__init__()
        self.scale = scale
        self.window = window
        if kv_scales is not None:
            for name, scales in zip(("key_scales", "value_scales"), kv_scales, strict=True):
                self.register_buffer(name, scales[None, :, None].contiguous())  # [1, kv_heads, 1, D]
        self.is_quantized = kv_scales is not None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, state: list[Tensor],
                place: Place) -> tuple[Tensor, list[Tensor]]:
        """query: float32 [1, T, heads, D]; key, value: float32 [1, T, kv_heads, D]; state: [1, kv_heads, P, D]"""
        heads, kv_heads = query.shape[2], key.shape[2]
        present = state[0].shape if self.window else (1, kv_heads, place.total, key.shape[3])
        rotation = place.rotations[SLIDING if self.window else ATTENTION]
        query, key, value = (x.flatten(2) for x in (query, key, value))
        inputs = [query, key, value, *state, place.last_position, place.total_length, *rotation]
        attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": self.scale, "do_rotary": 1}
        if self.window:
            attributes |= {"local_window_size": self.window, "sliding_window_cache": 1}
        if self.is_quantized:
            inputs += [None, None, None, self.key_scales, self.value_scales]  # no positions, no bias, no sink
            attributes |= {"kv_cache_bit_width": 8, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
        out, *state = ops.symbolic_multi_out(
            f"{MICROSOFT}::GroupQueryAttention", inputs, attributes,
            dtypes=(query.dtype, *(cache.dtype for cache in state)), shapes=(query.shape, present, present), version=1)
        return out.unflatten(2, (heads, -1)), state


class LastTokens(nn.Module):
    """As many of the last tokens as the caller of the graph asks for."""

    def forward(self, x: Tensor, place: Place, count: Tensor) -> Tensor:
        """x: float32 [1, T, H]; count: int64 [1] -> float32 [1, count, H]"""
        end, axis = torch.tensor([torch.iinfo(torch.int64).max]), torch.tensor([1])
        return ops.symbolic("::Slice", (x, -count, end, axis), {}, dtype=x.dtype, shape=x.shape, version=13)


class ExplicitState(nn.Module):
    """The program: `(input_ids, attention_mask, num_logits_to_keep, *past) -> (logits, *present)`."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens: Tensor, attention_mask: Tensor, scored: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """tokens: int64 [1, T]; attention_mask: int64 [1, P + T]; scored: int64 [1]

        Returns the logits of the last `scored` tokens, float32 [1, scored, vocab], and the state.
        """
        logits, following = self.decoder(tokens, attention_mask, list(state), scored)
        return logits, *following


def _trace(program: ExplicitState, state: StateSpec) -> ir.Model:
    length = Dim("sequence_length")
    rows = {APPEND: Dim("past_sequence_length"), SLIDE: Dim(WINDOW_ROWS)}
    sample = 3  # not 1, which torch would take for a constant
    # No memory is needed to trace with: a cache of zeros is one zero, expanded.
    tensors = [torch.zeros(1, dtype=tensor.torch_dtype).expand(*_sample_shape(tensor, sample))
               for tensor in state.tensors]
    dynamic = tuple({tensor.axis: rows[tensor.update]} if tensor.is_cache else {} for tensor in state.tensors)
    tokens, mask = torch.zeros(1, sample, dtype=torch.int64), torch.ones(1, 2 * sample + 1, dtype=torch.int64)
    exported = torch.onnx.export(
        program, (tokens, mask, torch.ones(1, dtype=torch.int64), *tensors),
        dynamic_shapes=({1: length}, {1: Dim("total_sequence_length")}, {}, dynamic), dynamo=True, opset_version=OPSET,
        input_names=["input_ids", "attention_mask", SCORED, *(tensor.name for tensor in state.tensors)],
        output_names=["logits", *(tensor.next_name for tensor in state.tensors)], verbose=False, optimize=False)
    return exported.model


def _sample_shape(tensor: StateTensor, length: int) -> tuple[int, ...]:
    return tuple(length if tensor.is_cache and axis == tensor.axis else size
                 for axis, size in enumerate(tensor.shape))


def _simplify(model: ir.Model, packed: dict[int, Packed]) -> None:
    """Fold constants and drop what is unused, with the packed weights out of sight.

    Their placeholders are all zeros, and the optimizer would take two of one shape for the same.
    """
    hidden = {value: value.const_value for value in model.graph.initializers.values()
              if _address(value.const_value) in packed}
    for value in hidden:
        value.const_value = None
    optimizer.optimize_ir(model)
    for value, tensor in hidden.items():
        value.const_value = tensor


def _address(tensor: ir.TensorProtocol) -> int | None:
    """Where a tensor of torch lies; None for another."""
    return tensor.raw.data_ptr() if isinstance(tensor.raw, Tensor) else None


def _fuse_skip_norms(graph: ir.Graph) -> None:
    """Join every residual sum with the norm that follows it: SkipSimplifiedLayerNormalization gives both."""
    for norm in list(graph):
        total = norm.inputs[0].producer() if norm.op_type == "RMSNormalization" else None
        if total is None or total.op_type != "Add" or len(norm.inputs[0].shape) != 3:
            continue
        normed, summed = norm.outputs[0], total.outputs[0]
        fused = ir.Node(MICROSOFT, "SkipSimplifiedLayerNormalization", [*total.inputs, norm.inputs[1]],
                        [ir.AttrFloat32("epsilon", norm.attributes["epsilon"].as_float())], num_outputs=4)
        for old, new in ((normed, fused.outputs[0]), (summed, fused.outputs[3])):
            new.name, new.type, new.shape = old.name, old.type, old.shape
        graph.insert_before(norm, fused)
        ir.convenience.replace_all_uses_with((normed, summed), (fused.outputs[0], fused.outputs[3]))
        graph.remove((norm, total), safe=True)


def _make_optional(graph: ir.Graph) -> None:
    """Give the number of scored tokens a default: clients that do not know the input get the last token's logits.

    It is an input with an initializer, which ONNX Runtime counts among the overridable ones and not among the inputs.
    The traced shapes of what depends on it are those of the whole step; without them they are inferred. That of the
    logits is what the default gives: onnxruntime-genai takes any other as one row for each token of the step.
    """
    scored = next(value for value in graph.inputs if value.name == SCORED)
    graph.inputs.remove(scored)
    graph.inputs.append(scored)
    scored.const_value = ir.tensor([1], ir.DataType.INT64, name=SCORED)
    graph.register_initializer(scored)
    depend = {scored}
    for node in graph:
        if not depend.isdisjoint(node.inputs):
            depend.update(node.outputs)
            for value in node.outputs:
                value.shape = None
    graph.outputs[0].shape = ir.Shape([1, 1, graph.outputs[0].producer().attributes["N"].as_int()])


def _strip(model: ir.Model) -> None:
    """Take out what the trace left about the machine it ran on: stack traces, module paths, torch's version."""
    graph = model.graph
    for holder in (model, graph, *graph, *graph.inputs, *graph.initializers.values(),
                   *(output for node in graph for output in node.outputs)):
        holder.metadata_props.clear()
    model.producer_name, model.producer_version, model.doc_string = "lfm-edge", None, None


def _write(model: ir.Model, packed: dict[int, Packed], path: Path) -> int:
    """Write the graph to `path` and its weights beside it, each packed when its turn comes.

    Gives the number of files of external data: as many as keep each below what a browser can hold.
    """
    with ExternalData(path.with_name(f"{path.name}_data"), _LARGEST_FILE) as file:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            constant = packed.get(_address(tensor))
            if constant is None and tensor.nbytes < INLINE_BYTES:
                continue
            key = ("value", (id(tensor),)) if constant is None else constant.key
            value.const_value = ir.ExternalTensor(
                *file.place(key, tensor.numpy if constant is None else constant.make), tensor.dtype,
                shape=tensor.shape, name=value.name, base_dir=path.parent)
    ir.save(model, path)
    return len(file.files)


def _operators(graph: ir.Graph) -> dict[str, Any]:
    """How many of which operator the graph has."""
    counts = Counter(f"{node.domain}::{node.op_type}".removeprefix("::") for node in graph)
    return {"operators": dict(sorted(counts.items()))}


def transformers_js_config(job: ExportJob, name: str, files: int) -> dict[str, Any]:
    """config.json with the section that transformers.js reads: which file, and in how many parts its weights are."""
    section = {"dtype": "q4" if job.recipe.body.bits == 4 else "q8", "use_external_data_format": {name: files}}
    return {**job.config.to_dict(), "transformers.js_config": section}


def genai_config(job: ExportJob, path: str) -> dict[str, Any]:
    """genai_config.json, which onnxruntime-genai loads the folder by.

    It knows no sliding windows: for it, such a layer has a cache as long as the answer may get, of which the graph
    looks at the last rows only.
    """
    config, context = job.config, job.state.context
    ids = {name: value for name, value in config.special_ids().items() if value is not None}
    return {
        "model": {
            "type": "lfm2", "vocab_size": config.vocab_size, "context_length": context,
            **ids,
            "decoder": {
                "filename": path, "session_options": {"provider_options": []},
                "hidden_size": config.hidden_size, "head_size": config.head_dim,
                "num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads,
                "num_hidden_layers": config.num_layers,
                "layer_types": [CONV if kind == CONV else ATTENTION for kind in config.layer_types],
                "conv_cache_size": config.conv_taps - 1,
                "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask",
                           "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value",
                           "past_conv_names": "past_conv.%d"},
                "outputs": {"logits": "logits",
                            "present_key_names": "present.%d.key", "present_value_names": "present.%d.value",
                            "present_conv_names": "present_conv.%d"},
            },
        },
        "search": {"do_sample": False, "max_length": context, "past_present_share_buffer": True},
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _usage(job: ExportJob, path: str) -> str:
    window = next((tensor for tensor in job.state.tensors if tensor.window), None)
    text = _USAGE.replace("JAVASCRIPT", _JAVASCRIPT if window is None else _NO_JAVASCRIPT)
    if window is not None:
        text = text.replace("WINDOWS", _WINDOWS.replace("ROWS", str(window.rows)).replace("LEAST", str(window.window)))
        text = text.replace("isinstance(size, int) else 0", "isinstance(size, int) else ROWS.get(size, 0)")
        text = text.replace("\ndtypes =", f'\nROWS = {{"{WINDOW_ROWS}": {window.rows}}}\ndtypes =')
    return text.replace("WINDOWS", "").replace("PATH", path).replace("STOP", repr(list(job.config.eos_token_ids)))


_JAVASCRIPT = '`AutoModelForCausalLM.from_pretrained(".")`; in a browser, from the hub or your own server'
_NO_JAVASCRIPT = "cannot run it: it knows no model of this type, and begins with caches that are too small for a window"
_WINDOWS = """\
Caches of layers with a sliding window have ROWS rows, zeros at first; any number from LEAST on will do. The operator
drops rows that are too old, so these caches do not grow with the context.
"""


_USAGE = """\
## Loading it

The graph is `(input_ids, attention_mask, *past) -> (logits, *present)`: `input_ids` int64 [1, T], `attention_mask`
int64 [1, P + T], all ones, P being the tokens of the steps before. `logits` are those of the last token, float32
[1, 1, vocab], or of as many as `num_logits_to_keep` int64 [1] says, which need not be given. The n-th `present` output
is the next value of the n-th `past` input. A conversation begins with zeros and P = 0. Past and present of one KV cache
may be one buffer of [1, kv_heads, context, head_dim]: the step then writes its rows in place.
WINDOWS
- Python: `from lfm_edge import open_bundle; session = open_bundle(".").session()`
- onnxruntime-genai: `onnxruntime_genai.Model(".")`. Its tokenizer puts the first token before a text only after
  `tokenizer.update_options(add_special_tokens="true")`; a chat template brings its own
- transformers.js: JAVASCRIPT
- onnxruntime alone, in any language; in Python:

```python
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

session = onnxruntime.InferenceSession("PATH")
tokenizer = Tokenizer.from_file("tokenizer.json")
dtypes = {"tensor(float)": np.float32, "tensor(int8)": np.int8}
state = {tensor.name: np.zeros([size if isinstance(size, int) else 0 for size in tensor.shape], dtypes[tensor.type])
         for tensor in session.get_inputs()[2:]}

step, seen, answer = tokenizer.encode("The harbour").ids, 0, []
while len(answer) < 32:
    seen += len(step)
    feeds = {"input_ids": np.array([step]), "attention_mask": np.ones((1, seen), np.int64), **state}
    logits, *present = session.run(None, feeds)
    state = dict(zip(state, present))
    token = int(logits[0, -1].argmax())
    if token in STOP:
        break
    answer.append(token)
    step = [token]
print(tokenizer.decode(answer))
```
"""
