"""The network as plain operators over static shapes: for backends that compile a graph for one number of tokens.

A program takes exactly `length` tokens. A shorter step is padded at its end, and told how many tokens are valid:
the conv states and the logits are then those of the last *valid* token, and the host keeps the valid rows of the
new keys and values. Caches are inputs only; a step gives its new rows, and the host writes them.

Whatever depends on where the tokens stand (rotations, masks, the choice of the last valid token) is computed once
at the beginning of the program, so that no layer has an index that is not constant. Choices are products with
rows of a unit matrix, which are exact in every type. A product with 0 hides finite values only, so what is computed
of padding is replaced by zeros before it meets anything else; rows of a cache past the position must be finite.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.nn import functional as F

from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.checkpoint.layers import ATTENTION, SLIDING
from lfm_edge.errors import ExportError
from lfm_edge.model.decoder import Decoder
from lfm_edge.model.lowering import Lowering, RMSNorm, Weight, attention_kinds, frozen, rotary_angles
from lfm_edge.model.weights import Weights
from lfm_edge.quantization.tensor import QuantizedTensor, dequantize
from lfm_edge.session.state import StateSpec

HIDDEN = -1e4  # added to the score of a position that is not seen: its exponential is 0 in every type


@torch.library.custom_op("lfm_edge::linear", mutates_args=())
def quantized_linear(x: Tensor, ints: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., cols] times a quantized weight: ints int8 [rows, cols], scales [rows, groups] -> [..., rows]"""
    return F.linear(x, dequantize(ints, scales.float()).to(x.dtype), bias)


@quantized_linear.register_fake
def _(x: Tensor, ints: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], ints.shape[0])


@torch.library.custom_op("lfm_edge::embedding", mutates_args=())
def quantized_embedding(tokens: Tensor, ints: Tensor, scales: Tensor) -> Tensor:
    """Rows of a quantized table, in the type of its scales: tokens int32 [1, T] -> [1, T, cols]"""
    return dequantize(ints[tokens[0]], scales[tokens[0]].float()).to(scales.dtype)[None]


@quantized_embedding.register_fake
def _(tokens: Tensor, ints: Tensor, scales: Tensor) -> Tensor:
    return scales.new_empty(*tokens.shape, ints.shape[1])


class Step(NamedTuple):
    """Which tokens a step takes. position: int32 [1], tokens before them; valid: int32 [1], how many are no padding,
    or None where the program takes a single token"""

    position: Tensor
    valid: Tensor | None


class Place(NamedTuple):
    """What the layers need to know of a step; all of the program's type.

    start: int32 [1], tokens before the step; rotations: cos and sin, [T, 1, D] each, by the kind of layer
    masks: added to scores, by the kind of layer: of the cache, [context] or [1, 1, G*T, window], and of the step's own
        rows, [1, 1, G*T, T]; G query heads share a key head
    conv_rows: [taps - 1, taps - 1 + T], chooses the next conv state; window_rows: [window, window + T], the next window
    last_row: [1, T], the last valid token; is_valid: bool [T, 1], which tokens are no padding
    The last four are None where no step has any.
    """

    start: Tensor
    rotations: dict[str, tuple[Tensor, Tensor]]
    masks: dict[str, tuple[Tensor, Tensor]]
    conv_rows: Tensor | None
    window_rows: Tensor | None
    last_row: Tensor | None
    is_valid: Tensor | None

    def without_padding(self, x: Tensor) -> Tensor:
        """x: [..., T, size] -> the same, zeros in the place of padding"""
        return x if self.is_valid is None else torch.where(self.is_valid, x, 0.0)


class StaticLowering(Lowering):
    """The pieces for `length` tokens, computed in `dtype`."""

    def __init__(self, length: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.length = length
        self.dtype = dtype

    def positions(self, config: ModelConfig, state: StateSpec) -> nn.Module:
        return Positions(config, state.context, self.length, self.dtype)

    def linear(self, weight: Weight, bias: Tensor | None) -> nn.Module:
        return QuantizedLinear(_quantized_only(weight), bias, self.dtype)

    def embedding(self, weight: Weight) -> nn.Module:
        return QuantizedEmbedding(_quantized_only(weight), self.dtype)

    def norm(self, weight: Tensor, eps: float) -> nn.Module:
        return RMSNorm(weight.to(self.dtype), eps)

    def causal_conv(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        return ShiftedSum(weight.to(self.dtype), None if bias is None else bias.to(self.dtype))

    def attention(self, scale: float, kv_scales: tuple[Tensor, Tensor] | None, window: int) -> nn.Module:
        return WindowAttention(scale) if window else TwoPartAttention(scale)

    def last_tokens(self) -> nn.Module:
        return LastValidToken()


def _quantized_only(weight: Weight) -> QuantizedTensor:
    if not isinstance(weight, QuantizedTensor):
        raise ExportError("bundles are quantized; float kernels are no target of ours")
    return weight


class QuantizedLinear(nn.Module):
    """A linear layer that its backend dequantizes."""

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("ints", weight.ints)
        self.register_buffer("scales", weight.scales.to(dtype))
        self.bias = frozen(None if bias is None else bias.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., cols] -> [..., rows]"""
        return quantized_linear(x, self.ints, self.scales, self.bias)


class QuantizedEmbedding(nn.Module):
    """Rows of a quantized table."""

    def __init__(self, weight: QuantizedTensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("ints", weight.ints)
        self.register_buffer("scales", weight.scales.to(dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: int32 [1, T] -> [1, T, hidden]"""
        return quantized_embedding(tokens, self.ints, self.scales)


class Positions(nn.Module):
    """Rotations, masks and choices of one step."""

    def __init__(self, config: ModelConfig, context: int, length: int, dtype: torch.dtype) -> None:
        super().__init__()
        # Both tables in one, because a lookup is dear where it leaves the accelerator.
        self.tables = nn.ParameterDict({kind: frozen(_rotations(config, kind, context).to(dtype))
                                        for kind in attention_kinds(config)})
        self.register_buffer("offsets", torch.arange(length, dtype=torch.int32))
        self.register_buffer("columns", torch.arange(context, dtype=torch.int32))
        causal = torch.full((length, length), HIDDEN).triu(diagonal=1)
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.register_buffer("new_mask", self._grouped(causal.to(dtype)))
        self.window = min(config.sliding_window, context) if SLIDING in config.layer_types else 0
        if self.window:
            beyond = torch.full((length, length), HIDDEN).tril(diagonal=-config.sliding_window)
            self.register_buffer("new_window_mask", self._grouped((causal + beyond).to(dtype)))
            ages = torch.arange(self.window, dtype=torch.int32).flip(0)  # 0 of the newest row, which stands last
            seen = ages + 1 + torch.arange(length)[:, None] < config.sliding_window
            self.register_buffer("window_mask", self._grouped(torch.where(seen, 0.0, HIDDEN).to(dtype)))
            self.register_buffer("window_ages", ages)
            self.register_buffer("window_columns", torch.arange(self.window + length, dtype=torch.int32)[None])
            self.register_buffer("window_offsets", torch.arange(self.window, dtype=torch.int32)[:, None])
        self.register_buffer("conv_columns", torch.arange(config.conv_taps - 1 + length, dtype=torch.int32)[None])
        self.register_buffer("conv_offsets", torch.arange(config.conv_taps - 1, dtype=torch.int32)[:, None])
        self.dtype = dtype

    def forward(self, step: Step, length: int) -> Place:
        """step: where; length: tokens that the program takes, padding included"""
        last_position = self.columns.shape[0] - 1
        positions = (step.position + self.offsets).clamp(max=last_position)  # padding may lie behind the context
        rotations = {kind: F.embedding(positions, table).unsqueeze(1).chunk(2, dim=-1)  # [T, 1, D]
                     for kind, table in self.tables.items()}
        if step.valid is None:
            return Place(step.position, rotations, self._masks(step), None, None, None, None)
        conv_rows = self._chosen(self.conv_columns, self.conv_offsets, step.valid)
        window_rows = self._chosen(self.window_columns, self.window_offsets, step.valid) if self.window else None
        last_row = (self.offsets == step.valid - 1).to(self.dtype)[None]
        is_valid = (self.offsets < step.valid).unsqueeze(1)
        return Place(step.position, rotations, self._masks(step), conv_rows, window_rows, last_row, is_valid)

    def _masks(self, step: Step) -> dict[str, tuple[Tensor, Tensor]]:
        unseen = (self.columns >= step.position).to(self.dtype) * HIDDEN  # [context]
        masks = {ATTENTION: (unseen, self.new_mask)}
        if self.window:
            empty = (self.window_ages >= step.position).to(self.dtype) * HIDDEN  # [window]
            masks[SLIDING] = (self.window_mask + empty, self.new_window_mask)
        return masks

    def _chosen(self, columns: Tensor, offsets: Tensor, valid: Tensor) -> Tensor:
        """Rows of a unit matrix that choose, of columns, those from the number of valid tokens on."""
        return (columns == offsets + valid).to(self.dtype)

    def _grouped(self, mask: Tensor) -> Tensor:
        """[T, columns] -> [1, 1, G*T, columns]"""
        return mask.repeat(self.groups, 1)[None, None]


def _rotations(config: ModelConfig, kind: str, context: int) -> Tensor:
    """cos and sin of every position side by side, [context, 2 * D]"""
    angles = rotary_angles(config.rotation(kind), config.head_dim, context)
    angles = torch.cat([angles, angles], dim=-1)  # [context, D]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ShiftedSum(nn.Module):
    """A depthwise causal convolution as a sum over its taps, each a product with the columns that much earlier.

    Accelerators have no kernel for depthwise convolutions over time; products and sums they all have.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = frozen(weight)  # [H, 1, taps]
        self.bias = frozen(bias)

    def forward(self, x: Tensor, state: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """x: [1, T, H]; state: [1, taps - 1, H] -> the same"""
        if self.weight.shape[2] == 1:
            return self.convolve(x, x.shape[1]), state
        columns = torch.cat([state, self.clean(x, place)], dim=1)  # [1, taps - 1 + T, H]
        return self.convolve(columns, x.shape[1]), self.next_state(columns, x.shape[1], place)

    def convolve(self, columns: Tensor, length: int) -> Tensor:
        """columns: [1, taps - 1 + length, H] -> [1, length, H]"""
        taps = (self.weight.select(1, 0).select(1, tap) for tap in range(self.weight.shape[2]))  # [H] each
        y = functools.reduce(torch.add, (columns[:, tap:tap + length] * weight for tap, weight in enumerate(taps)))
        return y if self.bias is None else y + self.bias

    def clean(self, x: Tensor, place: Place) -> Tensor:
        """x: [1, T, H] -> the same without what padding has made of it"""
        return place.without_padding(x)

    def next_state(self, columns: Tensor, length: int, place: Place) -> Tensor:
        """columns: [1, taps - 1 + length, H] -> [1, taps - 1, H]"""
        return columns[:, length:] if place.conv_rows is None else place.conv_rows @ columns


class LastValidToken(nn.Module):
    """The last token that is no padding: a static program gives the logits of one."""

    def forward(self, x: Tensor, place: Place, count: int) -> Tensor:
        """x: [1, T, H] -> [1, 1, H]"""
        return x if place.last_row is None else place.last_row @ place.without_padding(x)


class TwoPartAttention(nn.Module):
    """Attention over the cache as it was before the step, and over the step's own keys and values.

    The query heads that share a key head are rows of one product, so no key is copied for each of them.
    """

    kind = ATTENTION

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, state: list[Tensor],
                place: Place) -> tuple[Tensor, list[Tensor]]:
        """query: [1, T, heads, D]; key, value: [1, T, kv_heads, D]; state: [1, kv_heads, rows, D] each

        Returns [1, T, heads, D], and what `next_state` makes of the step's rows, [1, kv_heads, T, D] each.
        """
        past_keys, past_values = state
        past_mask, new_mask = place.masks[self.kind]
        query = grouped(query * self.scale, key.shape[2])
        key, value = (place.without_padding(rows.transpose(1, 2)) for rows in (key, value))  # [1, kv_heads, T, D]
        scores = torch.cat([query @ past_keys.transpose(2, 3) + past_mask,
                            query @ key.transpose(2, 3) + new_mask], dim=-1)  # [1, kv_heads, G*T, rows + T]
        past = past_keys.shape[2]
        shares = scores.softmax(dim=-1)
        out = shares[..., :past] @ past_values + shares[..., past:] @ value
        return ungrouped(out, key.shape[2]), self.next_state(state, [key, value], place)

    def next_state(self, state: list[Tensor], rows: list[Tensor], place: Place) -> list[Tensor]:
        """The rows: the host writes them."""
        return rows


class WindowAttention(TwoPartAttention):
    """The same through a window: the cache holds the last positions, the newest at the end, and is given anew."""

    kind = SLIDING

    def next_state(self, state: list[Tensor], rows: list[Tensor], place: Place) -> list[Tensor]:
        """The last rows of what was there and of the step's valid ones."""
        both = [torch.cat([past, new], dim=2) for past, new in zip(state, rows, strict=True)]
        if place.window_rows is None:
            return [joined[:, :, 1:] for joined in both]
        return [place.window_rows @ joined for joined in both]


def grouped(query: Tensor, kv_heads: int) -> Tensor:
    """[1, T, heads, D] -> [1, kv_heads, G*T, D]"""
    _, length, heads, width = query.shape
    return query.transpose(1, 2).reshape(1, kv_heads, heads // kv_heads * length, width)


def ungrouped(out: Tensor, length: int) -> Tensor:
    """[1, kv_heads, G*T, D] -> [1, T, heads, D]"""
    _, kv_heads, rows, width = out.shape
    return out.reshape(1, kv_heads * rows // length, length, width).transpose(1, 2)


def constants_of(program: ExportedProgram) -> dict[str, Tensor]:
    """Parameters and buffers of a trace, by the names of its nodes, in the order of its inputs."""
    held = {**program.state_dict, **program.constants}
    return {spec.arg.name: held[spec.target] for spec in program.graph_signature.input_specs
            if spec.kind != InputKind.USER_INPUT}


class StaticProgram(nn.Module):
    """A program for `length` tokens: `(tokens, position, [valid,] *state) -> (logits, *next)`.

    tokens: int32 [1, length]; position, valid: int32 [1] (no `valid` where length is 1)
    next: of a conv state its next value, of a cache the step's rows
    """

    def __init__(self, config: ModelConfig, weights: Weights, state: StateSpec, lowering: StaticLowering) -> None:
        super().__init__()
        self.decoder = Decoder(config, weights, state, lowering)
        self.length = lowering.length
        self.dtype = lowering.dtype

    def forward(self, tokens: Tensor, position: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """logits: [1, 1, vocab], of the last valid token"""
        valid, state = (None, rest) if self.length == 1 else (rest[0], rest[1:])
        logits, following = self.decoder(tokens, Step(position, valid), list(state))
        return logits, *following

    def trace(self) -> ExportedProgram:
        """The program as torch.export sees it."""
        state = [torch.zeros(1, dtype=tensor.torch_dtype).expand(tensor.shape)
                 for tensor in self.decoder.state.tensors]
        valid = () if self.length == 1 else (torch.ones(1, dtype=torch.int32),)
        tokens, position = torch.zeros(1, self.length, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        return torch.export.export(self, (tokens, position, *valid, *state), strict=False)

    def input_names(self) -> list[str]:
        """Of `forward`, in order."""
        names = [tensor.name for tensor in self.decoder.state.tensors]
        return ["tokens", "position", *(["valid"] if self.length > 1 else []), *names]

    def output_names(self) -> list[str]:
        """Of `forward`, in order."""
        return ["logits", *(tensor.next_name for tensor in self.decoder.state.tensors)]
