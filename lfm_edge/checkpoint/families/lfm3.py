"""LFM3, dense text: `model_type: lfm3`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lfm_edge.checkpoint.config_keys import ROPE_READ, check_rope_keys, keys
from lfm_edge.checkpoint.families.family import Family
from lfm_edge.checkpoint.fields import boolean, first, integer, layer_types, number, token_id, token_ids
from lfm_edge.checkpoint.layers import ATTENTION, CONV, SLIDING, AttentionNames, Rotation
from lfm_edge.errors import ConfigError

if TYPE_CHECKING:
    from lfm_edge.checkpoint.config import ModelConfig

_ARCHITECTURE = "Lfm3ForCausalLM"
_KEYS = keys("""
    model_type architectures vocab_size hidden_size num_hidden_layers layer_types num_attention_heads
    num_key_value_heads head_dim intermediate_size conv_L_cache conv_bias norm_eps rope_parameters sliding_window
    use_sandwich_norm use_attention_gate tie_word_embeddings max_position_embeddings bos_token_id eos_token_id
    pad_token_id""")
_ROPE_KEYS = ROPE_READ | {"partial_rotary_factor"}


def _read(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of an LFM3 model."""
    hidden, heads = integer(raw, "hidden_size"), integer(raw, "num_attention_heads")
    full, sliding = _rotations(raw)
    return {
        "vocab_size": integer(raw, "vocab_size"), "hidden_size": hidden,
        "intermediate_size": integer(raw, "intermediate_size"), "num_attention_heads": heads,
        "num_key_value_heads": integer(raw, "num_key_value_heads"),
        "head_dim": integer(raw, "head_dim", default=128), "layer_types": _layer_types(raw),
        "conv_taps": integer(raw, "conv_L_cache", default=7), "conv_bias": boolean(raw, "conv_bias", default=False),
        "norm_eps": number(raw, "norm_eps", default=1e-5), "rope_theta": full.theta, "rope_share": full.share,
        "sliding_rope_theta": sliding.theta, "sliding_window": integer(raw, "sliding_window", default=256),
        "tie_embedding": boolean(raw, "tie_word_embeddings", default=True),
        "max_position_embeddings": integer(raw, "max_position_embeddings", default=128_000),
        "bos_token_id": token_id(raw, "bos_token_id", default=124_894),
        "eos_token_ids": token_ids(raw.get("eos_token_id", 124_900)),
        "pad_token_id": token_id(raw, "pad_token_id", default=124_893),
        "sandwich_norms": boolean(raw, "use_sandwich_norm", default=True),
        "attention_gate": boolean(raw, "use_attention_gate", default=True),
    }


def _layer_types(raw: dict[str, Any]) -> tuple[str, ...]:
    """As the config says, or every second layer attention, sliding and full in turns, as the family has it."""
    if raw.get("layer_types") is not None:
        return layer_types(raw)
    of_four = {0: SLIDING, 2: ATTENTION}
    return tuple(of_four.get(index % 4, CONV) if index else CONV for index in range(integer(raw, "num_hidden_layers")))


def _rotations(raw: dict[str, Any]) -> tuple[Rotation, Rotation]:
    """Of full and of sliding attention.

    Published configs label the rotation of half the frequencies `default`, with a `partial_rotary_factor` of 0.5; what
    the model was trained with is what transformers calls `proportional`. Both spellings are read so.
    """
    given = first(raw, "rope_parameters", default={})
    if not isinstance(given, dict) or not given.keys() <= {ATTENTION, SLIDING}:
        raise ConfigError(f"rope_parameters is {given!r}; expected an entry each for {ATTENTION} and {SLIDING}")
    full = _rotation(given, ATTENTION, Rotation(1_000_000.0, 0.5))
    sliding = _rotation(given, SLIDING, Rotation(10_000.0))
    if sliding.share != 1:
        raise ConfigError(f"rope_parameters: {SLIDING} has a partial_rotary_factor of {sliding.share}; only 1 is known "
                          "there")
    return full, sliding


def _rotation(given: dict[str, Any], kind: str, default: Rotation) -> Rotation:
    entry = given.get(kind)
    if entry is None:
        return default
    if not isinstance(entry, dict) or entry.get("rope_type", "default") not in ("default", "proportional"):
        raise ConfigError(f"rope_parameters: {kind} is {entry!r}; known rope types are default and proportional")
    check_rope_keys(entry, f"rope_parameters: {kind}", _ROPE_KEYS)
    return Rotation(number(entry, "rope_theta", default=default.theta),
                    number(entry, "partial_rotary_factor", default=1.0))


def _write(config: ModelConfig) -> dict[str, Any]:
    """config.json of an LFM3 model, its rotation labelled as transformers computes it."""
    return {
        "architectures": [_ARCHITECTURE], "model_type": "lfm3", "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers, "layer_types": list(config.layer_types),
        "num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim, "conv_L_cache": config.conv_taps, "conv_bias": config.conv_bias,
        "norm_eps": config.norm_eps, "sliding_window": config.sliding_window,
        "rope_parameters": {
            ATTENTION: {"rope_type": "proportional", "rope_theta": config.rope_theta,
                        "partial_rotary_factor": config.rope_share},
            SLIDING: {"rope_type": "default", "rope_theta": config.sliding_rope_theta}},
        "use_sandwich_norm": config.sandwich_norms, "use_attention_gate": config.attention_gate,
        "tie_word_embeddings": config.tie_embedding, "max_position_embeddings": config.max_position_embeddings,
        **config.special_ids(), "use_cache": True,
    }


# As ollama.com serves a copy of the config.json at huggingface.co/LiquidAI/LFM3-1.7B.
_LFM3_1_7B = {
    "model_type": "lfm3", "vocab_size": 128_000, "hidden_size": 2048, "intermediate_size": 7680,
    "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
    "layer_types": [SLIDING if index in (4, 8, 12, 16, 20) else ATTENTION if index % 4 == 2 else CONV
                    for index in range(24)],
    "conv_L_cache": 7, "conv_bias": False, "sliding_window": 256, "norm_eps": 1e-5, "tie_word_embeddings": True,
    "max_position_embeddings": 262_144, "bos_token_id": 124_894, "eos_token_id": 124_900, "pad_token_id": 124_893,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}},
}
_PRESETS = {"lfm3-1.7b": (_LFM3_1_7B, 1_728_801_536)}

LFM3 = Family("lfm3", _ARCHITECTURE, (CONV, ATTENTION, SLIDING), AttentionNames("o_proj", "q_norm", "k_norm"), _KEYS,
              _read, _write, _PRESETS)
