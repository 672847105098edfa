"""`random:PRESET` models have the published dimensions, and the same weights wherever they are made."""

import pytest
import torch
from transformers import AutoTokenizer, Lfm2Config, Lfm2ForCausalLM

from lfm_edge.checkpoint.checkpoint import RandomCheckpoint, open_checkpoint
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.checkpoint.families import FAMILIES
from lfm_edge.checkpoint.presets import PRESETS
from lfm_edge.errors import CheckpointError

# From the model cards and config.json files at huggingface.co/LiquidAI:
# parameters, hidden size, feed-forward width, attention heads, vocabulary, rope theta, layers.
PUBLISHED = {
    "lfm2-350m": (354_483_968, 1024, 4608, 16, 65_536, 1e6, "ccaccaccacacacac"),
    "lfm2-700m": (742_489_344, 1536, 6912, 24, 65_536, 1e6, "ccaccaccacacacac"),
    "lfm2-1.2b": (1_170_340_608, 2048, 8192, 32, 65_536, 1e6, "ccaccaccacacacac"),
    "lfm2-2.6b": (2_569_272_320, 2048, 10752, 32, 65_536, 1e6, "ccaccacccacccacccacccaccaccacc"),
    "lfm2.5-230m": (229_693_184, 1024, 2560, 16, 65_536, 1e6, "ccacacacacacac"),
    "lfm2.5-350m": (354_483_968, 1024, 4608, 16, 65_536, 1e6, "ccaccaccacacacac"),
    "lfm2.5-1.2b": (1_170_340_608, 2048, 8192, 32, 65_536, 1e6, "ccaccaccacacacac"),
    "lfm2.5-2.6b": (2_697_198_592, 2048, 10752, 32, 128_000, 1e7, "ccaccacccacccacccacccaccaccacc"),
}


def test_every_preset_has_a_published_row():
    """Those of LFM3 are in test_lfm3.py."""
    assert PUBLISHED.keys() == PRESETS.keys() - FAMILIES["lfm3"].presets.keys()


@pytest.mark.parametrize("preset", PUBLISHED)
def test_dimensions_are_the_published_ones(preset):
    config = ModelConfig.from_dict(PRESETS[preset][0])
    layers = "".join("c" if kind == "conv" else "a" for kind in config.layer_types)

    assert PUBLISHED[preset] == (config.num_parameters, config.hidden_size, config.intermediate_size,
                                 config.num_attention_heads, config.vocab_size, config.rope_theta, layers)
    assert PRESETS[preset][1] == config.num_parameters
    assert (config.head_dim, config.num_key_value_heads, config.conv_taps, config.conv_bias) == (64, 8, 3, False)
    assert config.tie_embedding


@pytest.mark.parametrize("preset", PUBLISHED)
def test_transformers_builds_the_same_shapes_from_the_same_config(preset):
    raw, published = PRESETS[preset]
    with torch.device("meta"):
        model = Lfm2ForCausalLM(Lfm2Config(**raw))

    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == ModelConfig.from_dict(raw).weight_shapes()
    assert model.num_parameters() == published


def test_random_weights_depend_on_name_and_seed_alone():
    first, second = RandomCheckpoint("lfm2-350m"), RandomCheckpoint("lfm2-350m")
    other = RandomCheckpoint("lfm2-350m", seed=1)
    names = ["model.layers.0.conv.conv.weight", "model.layers.2.self_attn.k_proj.weight", "model.embedding_norm.weight"]

    forwards = [first.tensor(name) for name in names]
    torch.manual_seed(1234)
    backwards = [second.tensor(name) for name in reversed(names)][::-1]

    for one, two, name in zip(forwards, backwards, names, strict=True):
        assert torch.equal(one, two)
        assert not torch.equal(one, other.tensor(name))
    assert first.digest() == second.digest() != other.digest()


def test_random_weights_are_bfloat16_in_the_model_s_shapes():
    checkpoint = open_checkpoint("random:lfm2-350m")

    for name in ("model.layers.0.conv.in_proj.weight", "model.layers.0.operator_norm.weight",
                 "model.layers.2.self_attn.q_layernorm.weight", "model.layers.0.feed_forward.w2.weight"):
        tensor = checkpoint.tensor(name)
        assert tensor.dtype == torch.bfloat16
        assert tuple(tensor.shape) == checkpoint.config.weight_shapes()[name]


def test_random_layers_differ_from_each_other():
    checkpoint = open_checkpoint("random:lfm2-350m")

    assert not torch.equal(checkpoint.tensor("model.layers.0.conv.conv.weight"),
                           checkpoint.tensor("model.layers.1.conv.conv.weight"))


def test_random_models_come_with_a_working_tokenizer(tmp_path):
    open_checkpoint("random:lfm2-350m").copy_text_files(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    assert len(tokenizer) == 65_536
    text = "Grüße, Welt! 漢字 🙂"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


@pytest.mark.parametrize("preset", ["lfm3-1b", "", "LFM2-350M"])
def test_an_unknown_preset_is_refused_with_the_known_ones(preset):
    with pytest.raises(CheckpointError, match=r"unknown preset; known are .*lfm2\.5-1\.2b"):
        open_checkpoint(f"random:{preset}")
