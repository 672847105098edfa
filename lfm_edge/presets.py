"""Published dimensions, for `random:PRESET` models: seeded random weights at a real model's exact size.

Each row states what the model's own config.json says, in the spelling of its generation; the exact
parameter count, where the model card or the checkpoint's own index publishes one, is checked by a test.
"""

from __future__ import annotations

from typing import Any

from lfm_edge.config import ATTENTION, CONV

DEFAULT_MODEL = "LiquidAI/LFM2.5-1.2B-Instruct"  # what the commands take where no model is named

_ATTENTION_OF_14 = (2, 4, 6, 8, 10, 12)
_ATTENTION_OF_16 = (2, 5, 8, 10, 12, 14)
_ATTENTION_OF_30 = (2, 5, 9, 13, 17, 21, 24, 27)


def _first_generation(hidden: int, heads: int, block_ff_dim: int) -> dict[str, Any]:
    """LFM2-350M, -700M and -1.2B: attention by index, width to be adjusted, no tie flag."""
    return {
        "model_type": "lfm2", "vocab_size": 65536, "hidden_size": hidden, "block_dim": hidden, "conv_dim": hidden,
        "num_hidden_layers": 16, "full_attn_idxs": list(_ATTENTION_OF_16), "num_attention_heads": heads,
        "num_heads": heads, "num_key_value_heads": 8, "block_ff_dim": block_ff_dim, "block_auto_adjust_ff_dim": True,
        "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0, "conv_L_cache": 3, "conv_bias": False,
        "norm_eps": 1e-5, "block_norm_eps": 1e-5, "rope_theta": 1_000_000.0, "max_position_embeddings": 128_000,
        "bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 0,
    }


def _later(base: dict[str, Any], layers: int, attention: tuple[int, ...], **changes: Any) -> dict[str, Any]:
    """LFM2-2.6B and LFM2.5: layer_types, the tie flag, rope_parameters."""
    config = {key: value for key, value in base.items() if key not in ("full_attn_idxs", "rope_theta")}
    types = [ATTENTION if index in attention else CONV for index in range(layers)]
    return {**config, "num_hidden_layers": layers, "layer_types": types, "tie_embedding": True,
            "intermediate_size": base["block_ff_dim"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}, **changes}


_350M = _first_generation(1024, 16, 6656)
_700M = _first_generation(1536, 24, 10240)
_1_2B = _first_generation(2048, 32, 12288)
_2_6B = _later(_1_2B, 30, _ATTENTION_OF_30, block_ff_dim=10752, intermediate_size=10752,
               block_auto_adjust_ff_dim=False)

# name -> (config.json, published parameter count). Sources: the model cards and config.json files at
# huggingface.co/LiquidAI under the names on the left; transformers' Lfm2Config for the spellings.
PRESETS: dict[str, tuple[dict[str, Any], int]] = {
    "lfm2-350m": (_350M, 354_483_968),
    "lfm2-700m": (_700M, 742_489_344),
    "lfm2-1.2b": (_1_2B, 1_170_340_608),
    "lfm2-2.6b": (_2_6B, 2_569_272_320),
    "lfm2.5-230m": (_later(_350M, 14, _ATTENTION_OF_14, block_ff_dim=2560, intermediate_size=2560,
                           block_auto_adjust_ff_dim=False), 229_693_184),
    "lfm2.5-350m": (_later(_350M, 16, _ATTENTION_OF_16), 354_483_968),
    "lfm2.5-1.2b": (_later(_1_2B, 16, _ATTENTION_OF_16), 1_170_340_608),
    "lfm2.5-2.6b": ({**{k: v for k, v in _2_6B.items() if k not in ("block_ff_dim", "tie_embedding")},
                     "tie_word_embeddings": True, "vocab_size": 128_000, "max_position_embeddings": 131_072,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000.0}}, 2_697_198_592),
}
