"""config.json: every published spelling is read, every contradiction is refused by name."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Lfm2Config, Lfm2ForCausalLM

from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.errors import ConfigError
from tests.helpers import AWKWARD, TINY, hf_config

BASE = {
    "model_type": "lfm2", "vocab_size": 300, "hidden_size": 64, "block_ff_dim": 96, "block_auto_adjust_ff_dim": False,
    "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"],
    "num_attention_heads": 4, "num_key_value_heads": 2,
}


def read(**changes):
    return ModelConfig.from_dict(BASE | changes)


def read_without(*names, **changes):
    return ModelConfig.from_dict({key: value for key, value in (BASE | changes).items() if key not in names})


def hf_shapes(raw):
    """Weight shapes of the model that transformers builds from the same config.json."""
    with torch.device("meta"):
        model = Lfm2ForCausalLM(Lfm2Config(**raw))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


# --- spellings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling, width", [
    ({"block_ff_dim": 12288, "block_auto_adjust_ff_dim": True}, 8192),
    ({"block_ff_dim": 6656, "block_auto_adjust_ff_dim": True}, 4608),
    ({"block_ff_dim": 10240, "block_auto_adjust_ff_dim": True}, 6912),
    ({"block_ff_dim": 12288}, 8192),
    ({"intermediate_size": 12288}, 8192),
    ({"intermediate_size": 12288, "block_ff_dim": 12288, "block_auto_adjust_ff_dim": True}, 8192),
    ({"intermediate_size": 10752, "block_auto_adjust_ff_dim": False}, 10752),
    ({"block_ff_dim": 2560, "intermediate_size": 2560, "block_auto_adjust_ff_dim": False}, 2560),
    ({"block_ff_dim": 96, "intermediate_size": 9999, "block_auto_adjust_ff_dim": False}, 96),
    ({"block_ff_dim": None, "intermediate_size": 96, "block_auto_adjust_ff_dim": False}, 96),
    ({"block_ff_dim": 1000, "block_ffn_dim_multiplier": None}, 666),
    ({"block_ff_dim": 1000, "block_ffn_dim_multiplier": 1.3, "block_multiple_of": 32}, 896),
    ({"block_ff_dim": 1000, "block_multiple_of": 1}, 666),
    ({"block_ff_dim": 6656, "block_ffn_dim_multiplier": 1, "block_multiple_of": 256}, 4608),
])
def test_feed_forward_width_in_every_spelling(spelling, width):
    config = read_without(*({"block_ff_dim", "block_auto_adjust_ff_dim"} - set(spelling)), **spelling)

    assert config.intermediate_size == width


@given(block_ff_dim=st.integers(300, 20_000), adjust=st.booleans(), multiple=st.sampled_from([1, 32, 256]),
       multiplier=st.sampled_from([None, 1.0, 0.75, 1.3]))
def test_feed_forward_width_is_transformers(block_ff_dim, adjust, multiple, multiplier):
    from transformers.models.lfm2.modeling_lfm2 import Lfm2MLP

    raw = BASE | {"block_ff_dim": block_ff_dim, "block_auto_adjust_ff_dim": adjust, "block_multiple_of": multiple,
                  "block_ffn_dim_multiplier": multiplier}
    theirs = Lfm2Config(**{key: value for key, value in raw.items() if key != "block_ffn_dim_multiplier"})
    object.__setattr__(theirs, "block_ffn_dim_multiplier", multiplier)  # null is published, and fails their type check
    with torch.device("meta"):
        layer = Lfm2MLP(theirs)

    assert ModelConfig.from_dict(raw).intermediate_size == layer.w1.weight.shape[0]


def test_layers_by_type_and_by_attention_index_are_the_same():
    by_type = read()
    by_index = read_without("layer_types", full_attn_idxs=[1])

    assert by_type == by_index
    assert by_type.layer_types == ("conv", "full_attention", "conv")
    assert (by_type.conv_layers, by_type.attention_layers, by_type.num_layers) == ((0, 2), (1,), 3)


def test_layer_types_win_over_indices():
    assert read(full_attn_idxs=[0, 2]).attention_layers == (1,)


def test_layer_types_alone_say_how_many_layers_there_are():
    assert read_without("num_hidden_layers").num_layers == 3


def test_without_types_and_indices_every_layer_is_attention():
    assert read_without("layer_types").layer_types == ("full_attention",) * 3


def test_no_attention_indices_at_all_is_a_model_of_convolutions():
    assert read_without("layer_types", full_attn_idxs=[]).layer_types == ("conv",) * 3


@pytest.mark.parametrize("spelling, tied", [
    ({}, True),
    ({"tie_embedding": True}, True),
    ({"tie_embedding": False}, False),
    ({"tie_word_embeddings": False}, False),
    ({"tie_word_embeddings": True}, True),
    ({"tie_embedding": True, "tie_word_embeddings": False}, True),
    ({"tie_embedding": False, "tie_word_embeddings": True}, False),
    ({"tie_embedding": None, "tie_word_embeddings": False}, False),
])
def test_tied_embeddings_in_every_spelling(spelling, tied):
    config = read(**spelling)

    assert config.tie_embedding is tied
    assert ("lm_head.weight" in config.weight_shapes()) is not tied


@pytest.mark.parametrize("spelling, theta", [
    ({}, 1e6),
    ({"rope_theta": 10_000}, 1e4),
    ({"rope_theta": 1e7}, 1e7),
    ({"theta": 5e5}, 5e5),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e7}}, 1e7),
    ({"rope_parameters": {"rope_theta": 1e7}}, 1e7),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e7}}, 1e7),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default"}}, 1e4),
    ({"rope_theta": 1e4, "rope_parameters": None, "rope_scaling": None}, 1e4),
    ({"rope_theta": 1e4, "rope_scaling": {"type": "default"}}, 1e4),
])
def test_rope_theta_in_every_spelling(spelling, theta):
    assert read(**spelling).rope_theta == theta


@pytest.mark.parametrize("spelling, eps", [
    ({}, 1e-5), ({"norm_eps": 1e-6}, 1e-6), ({"block_norm_eps": 1e-6}, 1e-6),
    ({"norm_eps": 1e-3, "block_norm_eps": 1e-6}, 1e-3),
])
def test_norm_epsilon_in_every_spelling(spelling, eps):
    assert read(**spelling).norm_eps == eps


@pytest.mark.parametrize("old, new", [
    ("block_dim", "hidden_size"), ("conv_dim", "hidden_size"), ("num_heads", "num_attention_heads")])
def test_older_names_are_read(old, new):
    assert read_without(new, **{old: BASE[new]}) == read()


@pytest.mark.parametrize("value, ids", [(7, (7,)), ([7, 2], (7, 2)), (124_900, (124_900,))])
def test_end_of_text_is_one_id_or_several(value, ids):
    assert read(eos_token_id=value).eos_token_ids == ids


def test_published_defaults_where_a_key_is_absent_or_null():
    absent = read_without("num_key_value_heads")
    null = read(**dict.fromkeys(("num_key_value_heads", "conv_L_cache", "norm_eps", "head_dim",
                                 "max_position_embeddings", "full_attn_idxs")))

    assert absent == null
    assert (absent.num_key_value_heads, absent.head_dim, absent.conv_taps, absent.conv_bias) == (4, 16, 3, False)
    assert (absent.bos_token_id, absent.eos_token_ids, absent.pad_token_id) == (1, (7,), 0)
    assert absent.max_position_embeddings == 128_000


def test_a_token_that_is_null_is_not_there_and_stays_so():
    config = read(bos_token_id=None, eos_token_id=None, pad_token_id=None)

    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (None, (), None)
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_head_width_is_free_where_it_is_given():
    config = read(head_dim=32)

    assert config.weight_shapes()["model.layers.1.self_attn.q_proj.weight"] == (4 * 32, 64)
    assert config.weight_shapes()["model.layers.1.self_attn.out_proj.weight"] == (64, 4 * 32)


WITHOUT_EFFECT = {
    "published": {"transformers_version": "4.54.0.dev0", "block_use_swiglu": True, "block_use_xavier_init": True,
                  "conv_use_xavier_init": True, "block_mlp_init_scale": 1.0, "block_out_init_scale": 1.0,
                  "conv_dim_out": 64, "use_pos_enc": True, "initializer_range": 0.02, "torch_dtype": "bfloat16"},
    "of a training tool": {"_name_or_path": "LiquidAI/LFM2-350M", "unsloth_fixed": True, "unsloth_version": "2025.8.1",
                           "model_name": "LiquidAI/LFM2-350M", "attention_dropout": 0.1, "dtype": "bfloat16"},
    "of transformers' base class": {"return_dict": True, "output_hidden_states": False, "chunk_size_feed_forward": 0,
                                    "is_encoder_decoder": False, "id2label": {"0": "a"}, "label2id": {"a": 0},
                                    "problem_type": None, "tie_encoder_decoder": False, "pruned_heads": {}},
    "of generation": {"do_sample": True, "temperature": 0.3, "min_p": 0.15, "repetition_penalty": 1.05},
    "at the value of this model": {"partial_rotary_factor": 1.0, "attention_bias": False, "use_attention_gate": False,
                                   "is_causal": True, "hidden_act": "silu", "num_experts": 0},
    "null": dict.fromkeys(("sliding_window", "attn_logit_softcapping", "quantization_config", "whatever_comes_next",
                           "architectures", "is_causal")),
    "of the rotation": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0,
                                            "factor": None, "original_max_position_embeddings": 4096}},
    "its architecture": {"architectures": ["Lfm2ForCausalLM"]},
    "its architecture, no list of others": {"architectures": []},
}


@pytest.mark.parametrize("keys", WITHOUT_EFFECT.values(), ids=WITHOUT_EFFECT)
def test_keys_that_change_nothing_are_passed_over(keys):
    assert read(**keys) == read()


def test_all_that_transformers_writes_is_understood():
    assert ModelConfig.from_dict({**Lfm2Config(**BASE).to_dict(), "num_labels": 3, "output_attentions": True})


# --- agreement with transformers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", AWKWARD.values(), ids=AWKWARD)
def test_shapes_are_those_of_transformers(overrides):
    raw = hf_config(**overrides).to_dict()

    assert ModelConfig.from_dict(raw).weight_shapes() == hf_shapes(raw)


@pytest.mark.parametrize("overrides", AWKWARD.values(), ids=AWKWARD)
def test_what_is_written_reads_back_the_same(overrides):
    config = ModelConfig.from_dict(hf_config(**overrides).to_dict())

    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("overrides", [*AWKWARD.values(), {"head_dim": 32}, {"eos_token_id": [7, 2]}],
                         ids=[*AWKWARD, "wide heads", "two ends"])
def test_transformers_reads_what_is_written(overrides):
    config = ModelConfig.from_dict(hf_config(**overrides).to_dict())
    theirs = Lfm2Config(**config.to_dict())

    assert hf_shapes(config.to_dict()) == config.weight_shapes()
    assert ModelConfig.from_dict(theirs.to_dict()) == config


def test_each_older_spelling_that_is_written_says_the_same():
    config = ModelConfig.from_dict(json.loads((TINY / "config.json").read_text()))
    written = config.to_dict()
    older = {key: written[key] for key in ("model_type", "vocab_size", "block_dim", "block_ff_dim", "num_heads",
                                           "block_auto_adjust_ff_dim", "num_hidden_layers", "full_attn_idxs",
                                           "num_key_value_heads", "conv_L_cache", "block_norm_eps", "rope_theta",
                                           "tie_word_embeddings", "max_position_embeddings")}

    assert ModelConfig.from_dict(older) == config


@pytest.mark.parametrize("overrides", AWKWARD.values(), ids=AWKWARD)
def test_parameters_are_counted_as_transformers_counts_them(overrides):
    raw = hf_config(**overrides).to_dict()
    with torch.device("meta"):
        count = Lfm2ForCausalLM(Lfm2Config(**raw)).num_parameters()

    assert ModelConfig.from_dict(raw).num_parameters == count


# --- refusals -----------------------------------------------------------------------------------------------------

REFUSED = {
    "another model type": ({"model_type": "llama"}, "model_type"),
    "mixture of experts": ({"model_type": "lfm2_moe"}, "model_type"),
    "no model type": ({"model_type": None}, "model_type"),
    "unknown layer type": ({"layer_types": ["conv", "sliding_attention", "conv"]}, "layer_types[1]"),
    "a layer type that is no text": ({"layer_types": ["conv", 3, "conv"]}, "layer_types[1]"),
    "a layer type of two lines": ({"layer_types": ["conv", "a\nb", "conv"]}, "layer_types[1]"),
    "layer types that are no list": ({"layer_types": "conv"}, "layer_types"),
    "no layers": ({"layer_types": [], "num_hidden_layers": 0}, "layer_types"),
    "more layers than types": ({"num_hidden_layers": 4}, "num_hidden_layers"),
    "fewer layers than types": ({"num_hidden_layers": 2}, "num_hidden_layers"),
    "attention index past the end": ({"layer_types": None, "full_attn_idxs": [3]}, "full_attn_idxs"),
    "negative attention index": ({"layer_types": None, "full_attn_idxs": [-1]}, "full_attn_idxs"),
    "attention indices that are no list": ({"layer_types": None, "full_attn_idxs": 2}, "full_attn_idxs"),
    "width not a multiple of the heads": ({"hidden_size": 66}, "hidden_size"),
    "that, with head_dim null": ({"hidden_size": 66, "head_dim": None}, "hidden_size"),
    "heads not a multiple of key heads": ({"num_key_value_heads": 3}, "num_key_value_heads"),
    "odd head width": ({"head_dim": 15}, "head_dim"),
    "zero heads": ({"num_attention_heads": 0}, "num_attention_heads"),
    "zero key heads": ({"num_key_value_heads": 0}, "num_key_value_heads"),
    "zero width": ({"hidden_size": 0}, "hidden_size"),
    "negative vocabulary": ({"vocab_size": -1}, "vocab_size"),
    "zero conv taps": ({"conv_L_cache": 0}, "conv_taps"),
    "zero positions": ({"max_position_embeddings": 0}, "max_position_embeddings"),
    "zero feed-forward width": ({"block_ff_dim": 0}, "intermediate_size"),
    "a number as text": ({"vocab_size": "300"}, "vocab_size"),
    "a width as text": ({"hidden_size": "64"}, "hidden_size"),
    "a fraction for an integer": ({"num_attention_heads": 4.0}, "num_attention_heads"),
    "true for an integer": ({"conv_L_cache": True}, "conv_L_cache"),
    "text for true": ({"conv_bias": "false"}, "conv_bias"),
    "text for a tie": ({"tie_embedding": "false"}, "tie_embedding"),
    "text for the adjustment": ({"block_auto_adjust_ff_dim": "false"}, "block_auto_adjust_ff_dim"),
    "multiplier as text": ({"block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": "1"},
                           "block_ffn_dim_multiplier"),
    "multiple of nothing": ({"block_auto_adjust_ff_dim": True, "block_multiple_of": 0}, "block_multiple_of"),
    "epsilon as text": ({"norm_eps": "1e-5"}, "norm_eps"),
    "epsilon of zero": ({"norm_eps": 0}, "norm_eps"),
    "epsilon that is no number": ({"norm_eps": float("nan")}, "norm_eps"),
    "theta as text": ({"rope_theta": "1e6"}, "rope_theta"),
    "theta of zero": ({"rope_theta": 0}, "rope_theta"),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type"),
    "linear scaling": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type"),
    "scaling beside default parameters": ({"rope_parameters": {"rope_type": "default"},
                                           "rope_scaling": {"rope_type": "yarn"}}, "rope_scaling"),
    "rope parameters that are no object": ({"rope_parameters": "default"}, "rope_parameters"),
    "a part of each head rotated": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only 1.0"),
    "that, among the rotation's": ({"rope_parameters": {"partial_rotary_factor": 0.5}},
                                   "rope_parameters: partial_rotary_factor is 0.5; only 1.0"),
    "an unknown key of the rotation": ({"rope_scaling": {"type": "default", "mrope_section": [1, 2]}},
                                       "rope_scaling: 'mrope_section' is [1, 2], which is not understood"),
    "a sliding window": ({"sliding_window": 4096}, "'sliding_window' is 4096, which is not understood"),
    "an attention gate": ({"use_attention_gate": True}, "use_attention_gate is True; only False"),
    "no swiglu": ({"block_use_swiglu": False}, "block_use_swiglu is False"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "experts": ({"num_experts": 8}, "num_experts is 8"),
    "logits that are capped": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    "two unknown keys": ({"one": 1, "two": [0] * 100}, "'one' is 1, which is not understood, like 'two': it"),
    "a long unknown value": ({"layer_scales": [0.5] * 100}, "0..., which is not understood: it may"),
    "another file of weights": ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
    "an encoder": ({"architectures": ["Lfm2BidirectionalModel"]}, "no encoder, embedding model or classifier"),
    "a model without its head": ({"architectures": ["Lfm2Model"]}, "only Lfm2ForCausalLM, which predicts the next"),
    "a classifier": ({"architectures": ["Lfm2ForSequenceClassification"]}, "architectures"),
    "architectures that are no list": ({"architectures": "Lfm2ForCausalLM"}, "architectures"),
    "no causality": ({"is_causal": False}, "this is an encoder or an embedding model"),
    "both directions": ({"use_bidirectional_attention": True}, "this is an encoder or an embedding model"),
    "8 bits": ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
               "the weights are quantized already ('bitsandbytes'); give the bfloat16"),
    "mlx's 4 bits": ({"quantization": {"group_size": 64, "bits": 4}}, "the weights are quantized already; give"),
    "end of text as text": ({"eos_token_id": "<|im_end|>"}, "eos_token_id"),
    "no end of text": ({"eos_token_id": []}, "eos_token_id"),
    "an end of text that is null": ({"eos_token_id": [7, None]}, "eos_token_id"),
}


@pytest.mark.parametrize("changes, key", REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line_that_names_the_key(changes, key):
    with pytest.raises(ConfigError) as refusal:
        read(**changes)

    assert str(refusal.value).startswith("config.json: ")
    assert key in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_what_is_not_understood_is_refused_with_all_that_is():
    with pytest.raises(ConfigError) as refusal:
        read(use_tanh=True)

    assert all(key in str(refusal.value) for key in (*BASE, "rope_parameters", "conv_L_cache", "head_dim"))


def test_a_refusal_names_where_the_config_was_read():
    with pytest.raises(ConfigError, match=r"^some/where/config\.json: num_attention_heads is 'four'"):
        ModelConfig.from_dict(BASE | {"num_attention_heads": "four"}, "some/where/config.json")


@pytest.mark.parametrize("key", ["model_type", "vocab_size", "hidden_size", "num_attention_heads", "block_ff_dim"])
def test_a_missing_key_is_named(key):
    with pytest.raises(ConfigError, match=key):
        read_without(key)


def test_a_layout_without_any_layer_count_is_refused():
    with pytest.raises(ConfigError, match="num_hidden_layers is missing"):
        read_without("layer_types", "num_hidden_layers")


@pytest.mark.parametrize("raw", [[], "lfm2", None, 3])
def test_config_that_is_no_object_is_refused(raw):
    with pytest.raises(ConfigError, match="expected an object"):
        ModelConfig.from_dict(raw)


def test_a_config_cannot_be_changed_into_a_contradiction():
    with pytest.raises(ConfigError, match="num_key_value_heads"):
        replace(read(), num_key_value_heads=3)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["rope_theta", "type"]), inner),
    max_leaves=4)
READ_KEYS = sorted({*BASE, "rope_parameters", "full_attn_idxs", "head_dim", "architectures", "is_causal",
                    "quantization_config", "a key that\nnobody knows"})


@given(st.dictionaries(st.sampled_from(READ_KEYS), JSON_VALUES))
def test_any_json_is_read_or_refused_as_a_config_error(changes):
    try:
        config = read(**changes)
    except ConfigError as refusal:
        assert "\n" not in str(refusal)
        return
    assert ModelConfig.from_dict(config.to_dict()) == config
