"""Which keys of config.json are understood, and which say that it is another model's.

A key that nobody here has heard of may change what the model computes, and a model that is exported all the same is
wrong without a word. So each key is read, known to change nothing, known by the one value that changes nothing, or
refused. Null is like a key that is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lfm_edge.errors import ConfigError


def keys(names: str) -> frozenset[str]:
    """Names with spaces between."""
    return frozenset(names.split())


# Whatever they say. Where a checkpoint came from, and what to do with it:
_WITHOUT_EFFECT = keys("""
    transformers_version _name_or_path name_or_path _commit_hash model_name auto_map model_file tokenizer_class prefix
    dtype torch_dtype use_cache keys_to_ignore_at_inference model_max_length transformers.js_config""")
# how it was trained:
_WITHOUT_EFFECT |= keys("""
    initializer_range block_use_xavier_init conv_use_xavier_init block_mlp_init_scale block_out_init_scale
    attention_dropout hidden_dropout resid_pdrop embd_pdrop gradient_checkpointing""")
# what follows from the weights' shapes, or is of use to other keys only:
_WITHOUT_EFFECT |= keys("conv_dim_out original_max_position_embeddings max_window_layers is_decoder pretraining_tp")
# how transformers runs it, and what for:
_WITHOUT_EFFECT |= keys("""
    return_dict use_return_dict output_hidden_states output_attentions tie_last_hidden_states chunk_size_feed_forward
    torchscript use_bfloat16 tf_legacy_loss attn_implementation _attn_implementation _attn_implementation_autoset
    _flash_attn_2_enabled id2label label2id num_labels problem_type finetuning_task task_specific_params""")
# and the options of its `generate`, which old versions kept here:
_WITHOUT_EFFECT |= keys("""
    max_length max_new_tokens min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p min_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size encoder_repetition_penalty bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens epsilon_cutoff eta_cutoff
    num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind
    target_lookbehind sep_token_id decoder_start_token_id""")

_TOOLS = ("unsloth_",)  # how keys begin by which a training tool knows its own

_BY_VALUE = {
    "block_use_swiglu": True, "use_pos_enc": True, "use_qk_norm": True, "hidden_act": "silu", "is_causal": True,
    "partial_rotary_factor": 1.0, "logits_scaling": 1.0, "logit_scale": 1.0, "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0, "num_experts": 0, "num_local_experts": 0, "pruned_heads": {},
    "use_sliding_window": False, "use_attention_gate": False, "attention_bias": False, "mlp_bias": False,
    "use_bidirectional_attention": False, "bidirectional": False, "is_encoder_decoder": False,
    "add_cross_attention": False, "tie_encoder_decoder": False,
}
ROPE_READ = keys("rope_type type rope_theta")
_ROPE_WITHOUT_EFFECT = keys("original_max_position_embeddings")
_ROPE_BY_VALUE = {"partial_rotary_factor": 1.0, "factor": 1.0, "attention_factor": 1.0}

_QUANTIZED = ("quantization_config", "quantization", "compression_config")


def check_kind(raw: Mapping[str, Any], architecture: str) -> None:
    """Raises ConfigError for models that share the type of `architecture`, transformers' class, and are others."""
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list):
        raise ConfigError(f"architectures is {_short(architectures)}; expected a list of names")
    if architectures and architecture.lower() not in [str(name).lower() for name in architectures]:
        raise ConfigError(f"architectures is {_short(architectures)}; only {architecture}, which predicts the "
                          "next token, can be exported: no encoder, embedding model or classifier")
    if raw.get("is_causal") is False or raw.get("use_bidirectional_attention") or raw.get("bidirectional"):
        raise ConfigError("its tokens see those that follow (is_causal, bidirectional): this is an encoder or an "
                          "embedding model, and only models that predict the next token can be exported")
    for key in _QUANTIZED:
        if raw.get(key) is not None:
            how = raw[key].get("quant_method") if isinstance(raw[key], dict) else None
            raise ConfigError(f"{key}: the weights are quantized already" + (f" ({_short(how)})" if how else "")
                              + "; give the bfloat16, float16 or float32 model that they were made from")


def check_keys(raw: Mapping[str, Any], read: frozenset[str]) -> None:
    """Raises ConfigError for a key of config.json that is not understood. read: those that the family reads"""
    _check(raw, read, _WITHOUT_EFFECT, _BY_VALUE)


def check_rope_keys(parameters: Mapping[str, Any], name: str, read: frozenset[str] = ROPE_READ) -> None:
    """The same for what is inside `rope_parameters` or `rope_scaling`, or an entry of it, whichever `name` says."""
    try:
        _check(parameters, read, _ROPE_WITHOUT_EFFECT, _ROPE_BY_VALUE)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _check(raw: Mapping[str, Any], read: frozenset[str], without_effect: frozenset[str],
           by_value: Mapping[str, Any]) -> None:
    given = {key: value for key, value in raw.items() if value is not None}
    unknown = [key for key in given if key not in read | without_effect | by_value.keys()
               and not key.startswith(_TOOLS)]
    if unknown:
        others = f", like {', '.join(map(_short, unknown[1:]))}" if len(unknown) > 1 else ""
        raise ConfigError(f"{_short(unknown[0])} is {_short(given[unknown[0]])}, which is not understood{others}: it "
                          "may change what the model computes. Remove it if it does not. Understood are "
                          f"{', '.join(sorted(read))}")
    for key, value in by_value.items():
        if key in given and key not in read and given[key] != value:
            raise ConfigError(f"{key} is {_short(given[key])}; only {value!r} can be exported")


def _short(value: Any) -> str:
    """A value of somebody else's file, fit for a line."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
