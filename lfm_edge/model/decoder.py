"""The decoder: embedding, layers of short convolution or attention, norm, head."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.checkpoint.layers import ATTENTION, CONV, SLIDING
from lfm_edge.model.attention import Attention
from lfm_edge.model.lowering import Lowering
from lfm_edge.model.short_conv import ShortConv
from lfm_edge.model.weights import LayerWeights, Weights
from lfm_edge.session.state import StateSpec


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020): `w2(silu(w1(x)) * w3(x))`."""

    def __init__(self, weights: LayerWeights) -> None:
        super().__init__()
        self.w1_w3 = weights.linears("feed_forward.w1", "feed_forward.w3")
        self.w2 = weights.linear("feed_forward.w2")

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 [B, T, H] -> the same shape"""
        gate, up = self.w1_w3(x)
        return self.w2(nn.functional.silu(gate) * up)


class DecoderLayer(nn.Module):
    """Pre-norm residual block: an operator (short convolution or attention), then a feed-forward.

    With sandwich norms, what each of them gives is normalized as well before it is added.
    """

    def __init__(self, weights: LayerWeights, kind: str, config: ModelConfig) -> None:
        super().__init__()
        self.operator_norm = weights.norm("operator_norm", config.norm_eps)
        self.operator = _OPERATORS[kind](weights, kind, config)
        self.ffn_norm = weights.norm("ffn_norm", config.norm_eps)
        self.feed_forward = FeedForward(weights)
        self.post_operator_norm, self.post_ffn_norm = (
            weights.norm(name, config.norm_eps) if config.sandwich_norms else nn.Identity()
            for name in ("post_operator_norm", "post_ffn_norm"))
        self.last_tokens = weights.lowering.last_tokens()

    def forward(self, x: Tensor, place: Any, state: list[Tensor],
                scored: int | None = None) -> tuple[Tensor, list[Tensor]]:
        """x: float32 [B, T, H]; state: this layer's tensors -> the same

        scored: leave out all but so many last tokens, once the operator has mixed the others into them
        """
        out, state = self.operator(self.operator_norm(x), place, state)
        x = x + self.post_operator_norm(out)
        if scored is not None:
            x = self.last_tokens(x, place, scored)
        return x + self.post_ffn_norm(self.feed_forward(self.ffn_norm(x))), state


_OPERATORS = {CONV: ShortConv, ATTENTION: Attention, SLIDING: Attention}


class Decoder(nn.Module):
    """A model over an explicit state.

    weights: every tensor of `config.weight_shapes()`, float32 or quantized
    state: the layout of the state (see `StateSpec`), which also fixes the context
    lowering: how the pieces are computed; the reference where none is given
    """

    def __init__(self, config: ModelConfig, weights: Weights, state: StateSpec,
                 lowering: Lowering | None = None) -> None:
        super().__init__()
        lowering = lowering or Lowering()
        table = weights["model.embed_tokens.weight"]
        head = table if config.tie_embedding else weights["lm_head.weight"]
        self.embed_tokens = lowering.embedding(table)
        self.layers = nn.ModuleList(
            DecoderLayer(LayerWeights(weights, f"model.layers.{index}", lowering), kind, config)
            for index, kind in enumerate(config.layer_types))
        self.embedding_norm = lowering.norm(weights["model.embedding_norm.weight"], config.norm_eps)
        self.lm_head = lowering.linear(head, None)
        self.positions = lowering.positions(config, state)
        self.state = state
        self.eval()

    def forward(self, tokens: Tensor, position: Tensor, state: list[Tensor],
                scored: int | None = 1) -> tuple[Tensor, list[Tensor]]:
        """One step: any number of tokens, from `position` on.

        tokens: int64 [1, T]; position: int64 [1], the number of tokens before these, or whatever else tells the
            lowering's `positions` where they stand
        state: every tensor of the spec, in its order
        scored: how many of the last tokens the logits are wanted of; None for all
        Returns logits float32 [1, min(scored, T), vocab], and the next state.
        """
        x, following = self.body(self.embed_tokens(tokens), position, state, scored)
        return self.head(x), following

    def body(self, x: Tensor, position: Tensor, state: list[Tensor],
             scored: int | None = 1) -> tuple[Tensor, list[Tensor]]:
        """All layers, over embeddings: those of tokens, or whatever else stands in their place.

        x: [1, T, H]; the rest as `forward` has it
        Returns [1, min(scored, T), H], for `head`, and the next state.
        """
        place = self.positions(position, x.shape[1])
        following: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            # The last feed-forward need not see tokens whose logits are not wanted.
            wanted = scored if index == len(self.layers) - 1 else None
            x, updated = layer(x, place, [state[i] for i in self.state.of_layer(index)], wanted)
            following += updated
        return x, following

    def head(self, x: Tensor) -> Tensor:
        """[1, T, H] -> logits [1, T, vocab]"""
        return self.lm_head(self.embedding_norm(x))
