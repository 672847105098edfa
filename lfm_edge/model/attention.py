"""Grouped-query attention over an explicit KV cache, with per-head norms and rotary positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lfm_edge.config import ModelConfig
from lfm_edge.model import ops
from lfm_edge.model.weights import LayerWeights


def rotary_tables(config: ModelConfig, context: int) -> tuple[Tensor, Tensor]:
    """cos and sin for every position, float32 [context, head_dim] (half-rotation layout).

    The angles are float32 products, as in the published implementation: a more exact table would be
    a different model at long contexts.
    """
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    angles = torch.arange(context, dtype=torch.float32)[:, None] * frequencies  # [context, D / 2]
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al., 2021).

    x: float32 [B, T, heads, D]; cos, sin: float32 [T, 1, D]
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """Causal grouped-query attention; query and key heads are normalized before rotation."""

    def __init__(self, weights: LayerWeights, config: ModelConfig) -> None:
        super().__init__()
        self.q_proj = weights.linear("self_attn.q_proj")
        self.k_proj = weights.linear("self_attn.k_proj")
        self.v_proj = weights.linear("self_attn.v_proj")
        self.out_proj = weights.linear("self_attn.out_proj")
        self.q_layernorm = weights.norm("self_attn.q_layernorm", config.norm_eps)
        self.k_layernorm = weights.norm("self_attn.k_layernorm", config.norm_eps)
        self.head_dim = config.head_dim
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.scale = config.head_dim ** -0.5

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], position: int,
                state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """x: float32 [B, T, H]; rotary: cos and sin, float32 [T, 1, D]; state: the layer's caches"""
        batch, length, _ = x.shape
        query = self.q_proj(x).view(batch, length, self.heads, self.head_dim)
        key = self.k_proj(x).view(batch, length, self.kv_heads, self.head_dim)
        value = self.v_proj(x).view(batch, length, self.kv_heads, self.head_dim)
        query = rotate(self.q_layernorm(query), *rotary)
        key = rotate(self.k_layernorm(key), *rotary)
        attend = ops.cached_attention if len(state) == 2 else ops.cached_attention_int8
        out, *state = attend(query, key, value, *state, position, self.scale)  # [B, T, heads, D]
        return self.out_proj(out.view(batch, length, self.heads * self.head_dim)), state
