"""Grouped-query attention over an explicit KV cache, with per-head norms and rotary positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lfm_edge.config import ModelConfig
from lfm_edge.model.weights import LayerWeights


class Attention(nn.Module):
    """Causal grouped-query attention; query and key heads are normalized before rotation."""

    def __init__(self, weights: LayerWeights, config: ModelConfig) -> None:
        super().__init__()
        self.qkv_proj = weights.linears("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.out_proj = weights.linear("self_attn.out_proj")
        self.q_layernorm = weights.norm("self_attn.q_layernorm", config.norm_eps)
        self.k_layernorm = weights.norm("self_attn.k_layernorm", config.norm_eps)
        self.rotary = weights.lowering.rotary(config.head_dim)
        kv_scales = (weights.optional("self_attn.k_scale"), weights.optional("self_attn.v_scale"))
        self.attend = weights.lowering.attention(
            scale=config.head_dim ** -0.5, kv_scales=None if kv_scales[0] is None else kv_scales)
        self.query_shape = (config.num_attention_heads, config.head_dim)
        self.key_shape = (config.num_key_value_heads, config.head_dim)

    def forward(self, x: Tensor, place: Any, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """x: float32 [B, T, H]; place: where the tokens stand, as the lowering says it; state: the layer's caches"""
        batch = x.shape[0]
        query, key, value = self.qkv_proj(x)
        query = query.view(batch, -1, *self.query_shape)
        key = key.view(batch, -1, *self.key_shape)
        value = value.view(batch, -1, *self.key_shape)
        query = self.rotary(self.q_layernorm(query), place)
        key = self.rotary(self.k_layernorm(key), place)
        out, state = self.attend(query, key, value, state, place)  # [B, T, heads, D]
        return self.out_proj(out.reshape(batch, -1, self.query_shape[0] * self.query_shape[1])), state
