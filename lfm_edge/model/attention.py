"""Grouped-query attention over an explicit KV cache: per-head norms, rotary positions, for some a gate."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.checkpoint.layers import SLIDING
from lfm_edge.model.weights import LayerWeights


class Attention(nn.Module):
    """Causal grouped-query attention; query and key heads are normalized before rotation.

    With a gate, each head's output is scaled by a sigmoid of the layer's input (Qiu et al., "Gated Attention for Large
    Language Models", 2025).
    """

    def __init__(self, weights: LayerWeights, kind: str, config: ModelConfig) -> None:
        super().__init__()
        names = config.family.attention
        projections = ["q_proj", "k_proj", "v_proj", *([names.gate] if config.attention_gate else [])]
        self.projections = weights.linears(*(f"self_attn.{name}" for name in projections))
        self.out_proj = weights.linear(f"self_attn.{names.out}")
        self.query_norm = weights.norm(f"self_attn.{names.query_norm}", config.norm_eps)
        self.key_norm = weights.norm(f"self_attn.{names.key_norm}", config.norm_eps)
        self.rotary = weights.lowering.rotary(config.head_dim, kind)
        kv_scales = (weights.optional("self_attn.k_scale"), weights.optional("self_attn.v_scale"))
        self.attend = weights.lowering.attention(
            scale=config.head_dim ** -0.5, kv_scales=None if kv_scales[0] is None else kv_scales,
            window=config.sliding_window if kind == SLIDING else 0)
        self.query_shape = (config.num_attention_heads, config.head_dim)
        self.key_shape = (config.num_key_value_heads, config.head_dim)

    def forward(self, x: Tensor, place: Any, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """x: float32 [B, T, H]; place: where the tokens stand, as the lowering says it; state: the layer's caches"""
        batch = x.shape[0]
        query, key, value, *gate = self.projections(x)
        query = query.view(batch, -1, *self.query_shape)
        key = key.view(batch, -1, *self.key_shape)
        value = value.view(batch, -1, *self.key_shape)
        query = self.rotary(self.query_norm(query), place)
        key = self.rotary(self.key_norm(key), place)
        out, state = self.attend(query, key, value, state, place)  # [B, T, heads, D]
        if gate:
            out = out * gate[0].sigmoid().unsqueeze(-1)
        return self.out_proj(out.reshape(batch, -1, self.query_shape[0] * self.query_shape[1])), state
