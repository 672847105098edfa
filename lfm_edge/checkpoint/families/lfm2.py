"""LFM2 and LFM2.5, dense: `model_type: lfm2` (LFM2 Technical Report, arXiv 2511.23404)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lfm_edge.checkpoint.config_keys import check_rope_keys, keys
from lfm_edge.checkpoint.families.family import Family
from lfm_edge.checkpoint.fields import boolean, first, integer, layer_types, number, token_id, token_ids
from lfm_edge.checkpoint.layers import ATTENTION, CONV, AttentionNames
from lfm_edge.errors import ConfigError

if TYPE_CHECKING:
    from lfm_edge.checkpoint.config import ModelConfig

_ARCHITECTURE = "Lfm2ForCausalLM"
_KEYS = keys("""
    model_type architectures vocab_size hidden_size block_dim conv_dim num_hidden_layers layer_types full_attn_idxs
    num_attention_heads num_heads num_key_value_heads head_dim block_ff_dim intermediate_size block_auto_adjust_ff_dim
    block_ffn_dim_multiplier block_multiple_of conv_L_cache conv_bias norm_eps block_norm_eps rope_theta theta
    rope_parameters rope_scaling tie_embedding tie_word_embeddings max_position_embeddings bos_token_id eos_token_id
    pad_token_id""")


def _read(raw: dict[str, Any]) -> dict[str, Any]:
    hidden = integer(raw, "hidden_size", "block_dim", "conv_dim")
    heads = integer(raw, "num_attention_heads", "num_heads")
    if heads < 1:
        raise ConfigError(f"num_attention_heads is {heads}; it must be at least 1")
    if raw.get("head_dim") is None and hidden % heads:
        raise ConfigError(f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}")
    return {
        "vocab_size": integer(raw, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": _ffn_width(raw),
        "num_attention_heads": heads,
        "num_key_value_heads": integer(raw, "num_key_value_heads", default=heads),
        "head_dim": integer(raw, "head_dim", default=hidden // heads),
        "layer_types": _layer_types(raw),
        "conv_taps": integer(raw, "conv_L_cache", default=3),
        "conv_bias": boolean(raw, "conv_bias", default=False),
        "norm_eps": number(raw, "norm_eps", "block_norm_eps", default=1e-5),
        "rope_theta": _rope_theta(raw),
        "tie_embedding": boolean(raw, "tie_embedding", "tie_word_embeddings", default=True),
        "max_position_embeddings": integer(raw, "max_position_embeddings", default=128_000),
        "bos_token_id": token_id(raw, "bos_token_id", default=1),
        "eos_token_ids": token_ids(raw.get("eos_token_id", 7)),
        "pad_token_id": token_id(raw, "pad_token_id", default=0),
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": [_ARCHITECTURE],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "block_dim": config.hidden_size,
        "conv_dim": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "block_ff_dim": config.intermediate_size,
        "block_auto_adjust_ff_dim": False,
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "num_hidden_layers": config.num_layers,
        "layer_types": list(config.layer_types),
        "full_attn_idxs": list(config.attention_layers),
        "num_attention_heads": config.num_attention_heads,
        "num_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "conv_L_cache": config.conv_taps,
        "conv_bias": config.conv_bias,
        "norm_eps": config.norm_eps,
        "block_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_embedding": config.tie_embedding,
        "tie_word_embeddings": config.tie_embedding,
        "max_position_embeddings": config.max_position_embeddings,
        **config.special_ids(),
        "use_cache": True,
    }


def _ffn_width(raw: dict[str, Any]) -> int:
    """The feed-forward width. The older spelling gives 1.5 times it, to be cut to 2/3 and rounded up."""
    # transformers lets block_ff_dim win where both are there; so do we, to load the same model.
    width = integer(raw, "block_ff_dim", "intermediate_size")
    if not boolean(raw, "block_auto_adjust_ff_dim", default=True):
        return width
    width = int(2 * width / 3)
    if raw.get("block_ffn_dim_multiplier", 1.0) is None:
        return width
    multiplier = number(raw, "block_ffn_dim_multiplier", default=1.0)
    multiple = integer(raw, "block_multiple_of", default=256)
    if multiple < 1:
        raise ConfigError(f"block_multiple_of is {multiple}; it must be at least 1")
    return -(-int(multiplier * width) // multiple) * multiple


def _layer_types(raw: dict[str, Any]) -> tuple[str, ...]:
    if raw.get("layer_types") is not None:
        return layer_types(raw)
    layers = integer(raw, "num_hidden_layers")
    indices = first(raw, "full_attn_idxs", default=list(range(layers)))
    if not isinstance(indices, list) or any(not isinstance(i, int) or not 0 <= i < layers for i in indices):
        raise ConfigError(f"full_attn_idxs is {indices!r}; expected layer indices below {layers}")
    return tuple(ATTENTION if index in indices else CONV for index in range(layers))


def _rope_theta(raw: dict[str, Any]) -> float:
    merged = dict(raw)
    for name in ("rope_parameters", "rope_scaling"):
        parameters = raw.get(name) or {}
        if not isinstance(parameters, dict):
            raise ConfigError(f"{name} is {parameters!r}; expected an object")
        kind = first(parameters, "rope_type", "type", default="default")
        if kind != "default":
            raise ConfigError(f"{name}: rope_type is {kind!r}; only 'default' rotary embedding is known")
        check_rope_keys(parameters, name)
        if parameters.get("rope_theta") is not None:
            merged["rope_theta"] = parameters["rope_theta"]
    return number(merged, "rope_theta", "theta", default=1_000_000.0)


# Published dimensions.

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
_PRESETS: dict[str, tuple[dict[str, Any], int]] = {
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

LFM2 = Family("lfm2", _ARCHITECTURE, (CONV, ATTENTION), AttentionNames("out_proj", "q_layernorm", "k_layernorm"), _KEYS,
              _read, _write, _PRESETS)
