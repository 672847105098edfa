"""ExecuTorch: one `model.pte` for Android, iOS and Linux, computed by XNNPACK.

The network is traced once, over a dynamic number of tokens: prefill and decode are one method and share
their packed weights. The lowering below writes every piece in the terms that XNNPACK's partitioner takes,
so that whatever stands between two attention kernels is one delegate (docs/internals/executorch.md tells which).
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import executorch.extension.llm.custom_ops.custom_ops
import executorch.kernels.quantized  # noqa: F401 - registers the quantized embeddings
import torch
from executorch.exir import ExecutorchBackendConfig
from executorch.exir.lowered_backend_module import get_lowered_backend_modules
from executorch.exir.passes import MemoryPlanningPass
from torch import Tensor, nn
from torch.ao.quantization.fx import _decomposed  # noqa: F401 - registers quantized_decomposed
from torch.export import Dim, ExportedProgram
from torch.export._remove_auto_functionalized_pass import unsafe_remove_auto_functionalized_pass
from torch.export.graph_signature import OutputKind
from torch.nn import functional as F

from exporters import xnnpack
from lfm_edge.bundle.job import Artifact, ExportJob
from lfm_edge.bundle.parts import TOKENS, Value, state_values
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.checkpoint.layers import SLIDING
from lfm_edge.errors import ExportError
from lfm_edge.model.decoder import Decoder
from lfm_edge.model.lowering import Linears, Lowering, Place, Positions, Weight, frozen, quantize_rows
from lfm_edge.model.weights import Weights
from lfm_edge.progress import quiet
from lfm_edge.quantization.recipe import EMBEDDING
from lfm_edge.quantization.tensor import QuantizedTensor
from lfm_edge.session.layout import EXPLICIT, INTERNAL
from lfm_edge.session.state import StateSpec

ARTIFACT = "model.pte"
SPLIT_IN_3 = "conv.in_proj.weight"  # the one projection that the network asks for in parts
_SCORED = 8  # last tokens whose logits a step gives: XNNPACK takes hardly longer for 8 rows than for 2

_quantized = torch.ops.quantized_decomposed


def export(job: ExportJob, directory: Path, progress: Callable[[str], None]) -> Artifact:
    """Write `model.pte` into `directory`.

    With explicit state the program is `forward(tokens int64 [1, T], position int64 [1], *state)`, which
    changes the state tensors in the caller's memory and returns the logits alone, float32 [1, min(T, 8), vocab].
    With internal state it is `forward(tokens, position)` with the metadata of the stock LLM runners.
    """
    decoder = Decoder(job.config, job.weights, job.state, XnnpackLowering())
    internal = job.options.state == INTERNAL
    module = InternalState(decoder) if internal else ExplicitState(decoder)
    scored = 1 if internal else min(_SCORED, job.options.prefill_chunk)
    progress("trace")
    with _quiet(), torch.no_grad():
        program = _trace(module, job)
    progress("lower to XNNPACK")
    with _quiet(), torch.no_grad():
        edge = xnnpack.lower(program, _metadata(job), job.release_weights)
        edge._edge_programs["forward"] = _update_state_in_place(edge.exported_program())
    progress("plan memory and write model.pte")
    with _quiet(), xnnpack.emission_mended(), torch.no_grad():
        compiled = edge.to_executorch(ExecutorchBackendConfig(
            extract_delegate_segments=True, memory_planning_pass=MemoryPlanningPass(alloc_graph_input=internal)))
    with (directory / ARTIFACT).open("wb") as file:
        compiled.write_to_file(file)
    usage, written = _INTERNAL_USAGE if internal else _EXPLICIT_USAGE, compiled.exported_program()
    _forget_weights(program, edge.exported_program(), written)
    inputs = (Value("tokens", "int64", (1, TOKENS)), Value("position", "int64", (1,)),
              *(() if internal else state_values(job.state.tensors)))
    logits = Value("logits", "float32", (1, f"min({TOKENS}, {scored})" if scored > 1 else 1, job.config.vocab_size))
    return Artifact(ARTIFACT, inputs, (logits,), _delegation(written), usage, scored=scored)


def _forget_weights(*programs: ExportedProgram) -> None:
    """Let go of the weights of programs, and of those that their delegates were made of: nothing needs them any more.

    torch remembers these programs for good, in circles through C++ where Python's collector sees none.
    """
    for program in programs:
        for module in get_lowered_backend_modules(program.graph_module):
            _forget_weights(module.original_module)
        program.state_dict.clear()
        program.constants.clear()
        for node in program.graph.nodes:
            node.meta.clear()


def packed_weights(config: ModelConfig, weights: Weights) -> Iterator[tuple[str, bytes]]:
    """Every quantized weight, by name, as its bytes must stand in `model.pte`: codes and scales apart.

    `verify` looks each of them up in the artifact: the integers there are the quantizer's, bit for bit.
    """
    for name, weight in weights.items():
        if not isinstance(weight, QuantizedTensor):
            continue
        is_table = name == EMBEDDING
        if is_table:
            packed = QuantizedEmbedding(weight)
            yield f"{name}: codes", _padded(_bytes(packed.ints))
            yield f"{name}: scales", _padded(_bytes(packed.scales))
        if not is_table or config.tie_embedding:
            for part in _rows_apart(weight, 3) if name.endswith(SPLIT_IN_3) else (weight,):
                yield f"{name}: codes", _bytes(_low_nibble_first(part.ints) if part.bits == 4 else part.ints)
                yield f"{name}: scales", _bytes(part.scales.bfloat16() if part.bits == 4 else part.scales)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _padded(data: bytes) -> bytes:
    """A constant outside the delegates: the program pads those to 16 bytes."""
    return data + bytes(-len(data) % 16)


def _low_nibble_first(ints: Tensor) -> Tensor:
    """XNNPACK's int4 weights: codes plus 8, the even column in the low half of a byte."""
    codes = (ints + 8).to(torch.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4


def _rows_apart(weight: QuantizedTensor, parts: int) -> list[QuantizedTensor]:
    """The weights of the single outputs of a `split_linear`, each with memory of its own."""
    # XNNPACK's serializer writes the whole storage of a tensor: a view would drag its neighbours along.
    return [QuantizedTensor(ints.clone(), scales.clone(), weight.bits)
            for ints, scales in zip(weight.ints.chunk(parts), weight.scales.chunk(parts), strict=True)]


class XnnpackLowering(Lowering):
    """The pieces in terms that XNNPACK delegates, and the llama:: kernels for attention."""

    def linear(self, weight: Weight, bias: Tensor | None) -> nn.Module:
        return RoundedInput(QuantizedLinear(_quantized_only(weight), bias))

    def linears(self, weights: list[Weight], biases: list[Tensor | None]) -> nn.Module:
        # One rounding of the input for all.
        return RoundedInput(Linears(QuantizedLinear(_quantized_only(weight), bias)
                                    for weight, bias in zip(weights, biases, strict=True)))

    def split_linear(self, weight: Weight, bias: Tensor | None, parts: int) -> nn.Module:
        # Cutting the rows of a weight is free, cutting the output would end the delegate.
        biases = [None] * parts if bias is None else [part.clone() for part in bias.chunk(parts)]
        return self.linears(_rows_apart(_quantized_only(weight), parts), biases)

    def embedding(self, weight: Weight) -> nn.Module:
        return QuantizedEmbedding(_quantized_only(weight))

    def norm(self, weight: Tensor, eps: float) -> nn.Module:
        return RMSNorm(weight, eps)

    def positions(self, config: ModelConfig, state: StateSpec) -> nn.Module:
        return WindowPositions(config, state) if SLIDING in config.layer_types else super().positions(config, state)

    def rotary(self, head_dim: int, kind: str) -> nn.Module:
        return Rotary(head_dim, kind)

    def attention(self, scale: float, kv_scales: tuple[Tensor, Tensor] | None, window: int) -> nn.Module:
        return RingAttention(scale) if window else InPlaceAttention(scale)

    def last_tokens(self) -> nn.Module:
        return LastTokens()


def _quantized_only(weight: Weight) -> QuantizedTensor:
    if not isinstance(weight, QuantizedTensor):
        raise ExportError("ExecuTorch bundles are quantized; XNNPACK's float kernels are no target of ours")
    return weight


class RoundedInput(nn.Module):
    """Layers of one input, which is rounded to 8 bits first, each token by its own range."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Any:
        """x: float32 [..., cols] -> what the layers give"""
        scale, zero = _quantized.choose_qparams_per_token_asymmetric.default(x, torch.int8)
        x = _quantized.quantize_per_token.default(x, scale, zero, -128, 127, torch.int8)
        return self.layers(_quantized.dequantize_per_token.default(x, scale, zero, -128, 127, torch.int8,
                                                                   torch.float32))


class QuantizedLinear(nn.Module):
    """A product with 4-bit groups or 8-bit channels, after `RoundedInput` in the pattern that XNNPACK recognizes."""

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None) -> None:
        super().__init__()
        scales = weight.scales if weight.scales.shape[1] > 1 or weight.bits == 4 else weight.scales[:, 0]
        self.register_buffer("ints", weight.ints)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", torch.zeros(1, dtype=torch.int8).expand(scales.shape))
        self.bias = frozen(bias)
        self.group_size = weight.group_size
        self.limits = (-2 ** (weight.bits - 1), 2 ** (weight.bits - 1) - 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 [..., cols], rounded -> float32 [..., rows]"""
        if self.scales.dim() == 1:
            weight = _quantized.dequantize_per_channel.default(
                self.ints, self.scales, self.zeros, 0, *self.limits, torch.int8)
        else:
            weight = _quantized.dequantize_per_channel_group.default(
                self.ints, self.scales, self.zeros, *self.limits, torch.int8, self.group_size, torch.float32)
        return F.linear(x, weight, self.bias)


class QuantizedEmbedding(nn.Module):
    """ExecuTorch's embedding kernels: bytes, or two 4-bit codes a byte."""

    def __init__(self, weight: QuantizedTensor) -> None:
        super().__init__()
        ints = weight.ints
        if weight.bits == 4:
            codes = (ints + 8).to(torch.uint8)
            ints = codes[:, ::2] << 4 | codes[:, 1::2]
        self.register_buffer("ints", ints)
        self.register_buffer("scales", weight.scales if weight.scales.shape[1] > 1 else weight.scales[:, 0])
        self.lookup = _quantized.embedding_4bit.dtype if weight.bits == 4 else _quantized.embedding_byte.dtype
        self.limits = (-2 ** (weight.bits - 1), 2 ** (weight.bits - 1) - 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: int64 [1, T] -> float32 [1, T, hidden]"""
        return self.lookup(self.ints, self.scales, None, *self.limits, tokens, dtype=torch.float32)


class RMSNorm(nn.Module):
    """RMSNorm with its mean as a matrix product: XNNPACK takes no mean over three dimensions."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = frozen(weight)
        self.eps = eps
        self.register_buffer("mean", torch.full((1, weight.shape[0]), 1.0 / weight.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 [..., size] -> the same shape"""
        return x * torch.rsqrt(F.linear(x * x, self.mean) + self.eps) * self.weight


class Rotary(nn.Module):
    """Rotary embedding whose half rotation is a signed permutation matrix: slices would end the delegate."""

    def __init__(self, head_dim: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        half, none = torch.eye(head_dim // 2), torch.zeros(head_dim // 2, head_dim // 2)
        self.register_buffer("rotation", torch.cat([torch.cat([none, -half], 1), torch.cat([half, none], 1)]))

    def forward(self, x: Tensor, place: Place) -> Tensor:
        """x: float32 [1, T, heads, D] -> the same shape"""
        cos, sin = place.rotations[self.kind]
        return x * cos + F.linear(x, self.rotation) * sin


class WindowPlace(NamedTuple):
    """As the reference's, and for sliding-window layers: where a step's rows go in the ring, and what it sees there.

    indices: int64 [1, T]; mask: float32 [T, rows], 0 or minus infinity
    """

    start: int
    rotations: dict[str, tuple[Tensor, Tensor]]
    indices: Tensor
    mask: Tensor


class WindowPositions(Positions):
    """The reference's, and the ring of the sliding-window layers, once for all of them."""

    def __init__(self, config: ModelConfig, state: StateSpec) -> None:
        super().__init__(config, state.context)
        self.window = config.sliding_window
        self.rows = next(tensor.rows for tensor in state.tensors if tensor.window)
        self.register_buffer("slots", torch.arange(self.rows))

    def forward(self, position: Tensor, length: int) -> WindowPlace:
        """position: int64 [1]; length: tokens of the step"""
        place = super().forward(position, length)
        taken = torch.arange(place.start, place.start + length)  # positions of the step
        newest = position + length - 1
        held = newest - (newest - self.slots) % self.rows  # the position whose row stands in each slot; none below 0
        distance = taken.unsqueeze(1) - held  # [T, rows]
        seen = (distance >= 0) & (distance < self.window) & (held >= 0)
        mask = torch.where(seen, 0.0, -torch.inf)
        return WindowPlace(place.start, place.rotations, (taken % self.rows).unsqueeze(0), mask)


class InPlaceAttention(nn.Module):
    """The llama:: kernels: write the new rows into the caches where they lie, attend over what is filled."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, state: list[Tensor],
                place: Place) -> tuple[Tensor, list[Tensor]]:
        """query: float32 [1, T, heads, D]; key, value: float32 [1, T, kv_heads, D]; state: the layer's caches"""
        in_float = len(state) == 2
        rows = (key, value) if in_float else (*quantize_rows(key), *quantize_rows(value))
        for cache, new in zip(state, rows, strict=True):
            self.write(new, cache, place)
        seen = self.seen(place, query.shape[1], state[0].shape[1])
        if in_float:
            return torch.ops.llama.custom_sdpa(query, *state, *seen, self.scale), state
        keys, key_scales, key_zeros, values, value_scales, value_zeros = state
        query, query_scales, query_zeros = quantize_rows(query)
        out = torch.ops.llama.custom_quantized_sdpa(
            query, keys, values, *seen, self.scale,
            query_zeros, query_scales, key_zeros, key_scales, value_zeros, value_scales)
        return out, state

    def write(self, rows: Tensor, cache: Tensor, place: Place) -> None:
        """Write rows [1, T, ...] into a cache [1, rows, ...]."""
        torch.ops.llama.update_cache(rows, cache, place.start)

    def seen(self, place: Place, length: int, rows: int) -> tuple[int, Tensor | None, float, bool]:
        """What the kernel is told of it: rows before the step's, a mask, how much to drop out, whether it is causal."""
        return place.start, None, 0.0, True


class RingAttention(InPlaceAttention):
    """The same over a ring of the last positions, whose mask is the same for all layers."""

    def write(self, rows: Tensor, cache: Tensor, place: WindowPlace) -> None:
        torch.ops.llama.update_cache_with_indices(rows, cache, 0, place.indices)

    def seen(self, place: WindowPlace, length: int, rows: int) -> tuple[int, Tensor | None, float, bool]:
        return rows - length, place.mask, 0.0, False


class LastTokens(nn.Module):
    """The last tokens, all where there are fewer."""

    def forward(self, x: Tensor, place: Place, count: int) -> Tensor:
        """x: float32 [1, T, H] -> float32 [1, min(count, T), H]"""
        return x[:, -1:] if count == 1 else xnnpack.slice_of_any_length(x, 1, -count, torch.iinfo(torch.int64).max, 1)


class ExplicitState(nn.Module):
    """The program whose state is the caller's: `forward(tokens, position, *state) -> logits`."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens: Tensor, position: Tensor, *state: Tensor) -> Tensor:
        """tokens: int64 [1, T]; position: int64 [1] -> logits, float32 [1, min(T, 8), vocab]"""
        logits, following = self.decoder(tokens, position, list(state), _SCORED)
        for old, new in zip(state, following, strict=True):
            if new is not old:
                old.copy_(new)
        return logits


class InternalState(nn.Module):
    """The program that the stock LLM runners load: `forward(tokens, position) -> logits`, state in buffers.

    Those runners reset a conversation by going back to position 0 and nothing else. Rows of the KV cache
    past the position are never read, but a conv state would be: at position 0 it counts as zero.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        for index, tensor in enumerate(decoder.state.fresh()):
            self.register_buffer(f"state_{index}", tensor, persistent=False)

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """tokens: int64 [1, T]; position: int64 [1] -> logits, float32 [1, 1, vocab]"""
        buffers = [getattr(self, f"state_{index}") for index in range(len(self.decoder.state.tensors))]
        # Chosen, not multiplied: 0 times an infinity that the last conversation left is no number.
        state = [torch.where(position > 0, buffer, torch.zeros_like(buffer)) if tensor.kind == "conv" else buffer
                 for buffer, tensor in zip(buffers, self.decoder.state.tensors, strict=True)]
        logits, following = self.decoder(tokens, position, state)
        for buffer, new in zip(buffers, following, strict=True):
            if new is not buffer:
                buffer.copy_(new)
        return logits


_EXPLICIT_USAGE = """\
## Loading it

The program is `forward(tokens, position, *state)`: `tokens` int64 [1, T], `position` int64 [1], then the state
tensors of `manifest.json` in their order. It changes them in place and returns the logits of the last tokens, float32
[1, min(T, 8), vocab]; those of the last one choose the next. Begin with every tensor at its `initial` value and
`position` 0; add T after each step.

- Python: `from lfm_edge import open_bundle; session = open_bundle(".").session()`
- Android: `org.pytorch.executorch.Module.load(path, Module.LOAD_MODE_MMAP)`, keep the tensors, pass them to every
  `forward`; the default mode reads the whole file into memory
- iOS: `Module(filePath:loadMode: .mmap)` of the ExecuTorch package, likewise

The runtime needs the XNNPACK backend and the kernels `llama::` and `quantized_decomposed::`, which the stock
LLM packages of ExecuTorch link.
"""

_INTERNAL_USAGE = """\
## Loading it

The program keeps its state and follows the contract of ExecuTorch's LLM runners: `forward(tokens, position)`. Going
back to position 0 begins a new conversation.

- Python: `import executorch.extension.llm.custom_ops.custom_ops, executorch.kernels.quantized`, then
  `from executorch.extension.llm.runner import TextLLMRunner; TextLLMRunner("model.pte", "tokenizer.json")`
- Android: `org.pytorch.executorch.extension.llm.LlmModule("model.pte", "tokenizer.json", 0.0f)`
- iOS: `TextRunner(modelPath:tokenizerPath:)` of the ExecuTorch package
"""


def _trace(module: nn.Module, job: ExportJob) -> ExportedProgram:
    length = min(job.options.prefill_chunk, 2)  # traced with 2 tokens, as 1 would be taken for a constant
    arguments = (torch.zeros(1, length, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    dynamic: dict[str, Any] = {"tokens": {1: Dim("T", min=1, max=job.options.prefill_chunk)} if length > 1 else None,
                               "position": None}
    if job.options.state == EXPLICIT:
        arguments += tuple(job.state.fresh())
        dynamic["state"] = (None,) * len(job.state.tensors)
    return torch.export.export(module, arguments, dynamic_shapes=dynamic, strict=False,
                               prefer_deferred_runtime_asserts_over_guards=True)


def _metadata(job: ExportJob) -> dict[str, Any]:
    """The constant methods that the stock LLM runners ask for."""
    begin = {} if job.config.bos_token_id is None else {"get_bos_id": job.config.bos_token_id}
    return {
        "get_max_seq_len": job.options.prefill_chunk, "get_max_context_len": job.state.context,
        "get_vocab_size": job.config.vocab_size, **begin,
        "get_eos_ids": list(job.config.eos_token_ids), "use_kv_cache": True, "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }


def _update_state_in_place(program: ExportedProgram) -> ExportedProgram:
    """Let each state tensor be written where it lies, once, and be no output.

    Functionalization leaves a chain of copies of every mutated tensor and returns the last one. Left in,
    each step would copy every KV buffer, and the runtime allocate them all again as outputs.
    """
    program = unsafe_remove_auto_functionalized_pass(program)
    graph = program.graph_module.graph
    output = graph.output_node()
    inputs = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    returned, specs = [], []
    for node, spec in zip(output.args[0], program.graph_signature.output_specs, strict=True):
        if spec.kind in (OutputKind.USER_INPUT_MUTATION, OutputKind.BUFFER_MUTATION):
            while _is_copy(node):
                node = node.args[1]
        if spec.kind == OutputKind.USER_INPUT_MUTATION:
            state = inputs[spec.target]
            if node is not state:
                with graph.inserting_before(output):
                    graph.call_function(torch.ops.aten.copy_.default, (state, node)).meta.update(node.meta)
            continue
        if spec.kind == OutputKind.BUFFER_MUTATION:
            spec.arg.name = node.name  # to_executorch writes it back, unless it is the buffer itself
        returned.append(node)
        specs.append(spec)
    output.args = (tuple(returned),)
    program.graph_signature.output_specs[:] = specs
    graph.eliminate_dead_code()
    graph.lint()
    program.graph_module.recompile()
    return program


def _is_copy(node: torch.fx.Node) -> bool:
    return node.op == "call_function" and "aten.copy.default" in str(node.target)


def _delegation(program: ExportedProgram) -> dict[str, Any]:
    """How much XNNPACK took: the number of delegates, and the operators that stayed portable."""
    delegates, portable = 0, Counter()
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        name = str(getattr(node.target, "_name", None) or getattr(node.target, "__name__", node.target))
        if name == "executorch_call_delegate":
            delegates += 1
        elif "::" in name:
            name = name.replace("lfm_edge::slice_copy", "aten::slice_copy.Tensor_out")
            portable[name.removesuffix(".out").removesuffix(".default")] += 1
    return {"delegates": delegates, "left portable": dict(sorted(portable.items()))}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """As `quiet`, for a lowering that prints, too."""
    with quiet(), contextlib.redirect_stdout(io.StringIO()):
        yield
