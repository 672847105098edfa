"""LFM3's network against transformers' own: window, gate, norms, half rotation, in every way of cutting a prompt."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.checkpoint.layers import GATE
from lfm_edge.checkpoint.presets import PRESETS
from lfm_edge.errors import ConfigError
from lfm_edge.quantization.recipe import PER_CHANNEL_8, recipe
from lfm_edge.session.state import SHIFT, StateSpec
from lfm_edge.targets import TARGETS
from runtimes.reference import ReferenceSession
from tests.helpers import AWKWARD_LFM3, lfm3_model

PROMPTS = (255, 256, 257, 600)


def ours(model, context=1024):
    config = ModelConfig.from_dict(model.config.to_dict())
    weights = {name.replace("g_proj", "gate_proj"): value for name, value in model.state_dict().items()
               if name != "lm_head.weight" or not config.tie_embedding}
    assert weights.keys() == config.weight_shapes().keys()
    return ReferenceSession(config, weights, StateSpec.of(config, context))


def tokens_of(model, count):
    return torch.randint(16, model.config.vocab_size, (count,), generator=torch.Generator().manual_seed(count)).tolist()


def theirs(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def assert_close(logits, expected):
    assert float((torch.as_tensor(logits) - expected).abs().max() / expected.std()) < 1e-5


@pytest.fixture(scope="module", params=AWKWARD_LFM3, ids=str)
def model(request):
    return lfm3_model(**AWKWARD_LFM3[request.param])


def test_every_position_of_a_long_prompt(model):
    tokens = tokens_of(model, 600)
    assert_close(ours(model).score(tokens), theirs(model, tokens))


@pytest.mark.parametrize("length", PROMPTS)
def test_a_prompt_in_one_call(model, length):
    tokens = tokens_of(model, length)
    assert_close(ours(model).prefill(tokens), theirs(model, tokens)[-1])


def test_chunks_and_decoding_across_the_windows_edge(model):
    tokens, session = tokens_of(model, 300), ours(model)
    expected = theirs(model, tokens)
    taken = 0
    for size in (1, 7, 100, 1, 1, 140, 3, 1, 1, 1, 1, 1, 1):
        logits = session.prefill(tokens[taken:taken + size])
        taken += size
        assert_close(logits, expected[taken - 1])


def test_transformers_own_cache_agrees(model):
    tokens, cache = tokens_of(model, 280), DynamicCache(config=model.config)
    session = ours(model)
    with torch.no_grad():
        model(torch.tensor([tokens[:254]]), past_key_values=cache)
        session.prefill(tokens[:254])
        for token in tokens[254:]:
            expected = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
            assert_close(session.decode(token), expected)


# --- its config.json ----------------------------------------------------------------------------------------------


def published(**changes):
    return ModelConfig.from_dict(PRESETS["lfm3-1.7b"][0] | changes)


def test_the_published_label_of_the_half_rotation_means_what_the_model_was_trained_with():
    """transformers reads `default` as a rotation of all frequencies, whatever the factor says."""
    spelled_out = {
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    assert published() == published(rope_parameters=spelled_out)
    assert published().rope_share == 0.5


def test_the_published_size_is_counted():
    assert published().num_parameters == 1_728_801_536
    assert len(published().weights()) == 286


def test_a_config_is_read_back_as_it_was_written():
    config = replace(published(), eos_token_ids=(7, 9), attention_gate=False)
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_without_a_list_of_layers_they_are_those_of_the_family():
    assert published(layer_types=None) == published()


@pytest.mark.parametrize(("changes", "message"), [
    ({"sliding_window": 0}, "sliding_window is 0; it must be at least 1"),
    ({"layer_types": ["conv", "mamba"], "num_hidden_layers": 2}, "layer types of lfm3 are conv, full_attention, "
                                                                 "sliding_attention"),
    ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "known rope types are default and proportional"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e6, "partial_rotary_factor": 1.5}}}, "at most 1"),
    ({"rope_parameters": {"sliding_attention": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}}, "only 1 is known"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e6, "factor": 8.0}}}, "only 1.0 can be exported"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "expected an entry each"),
])
def test_what_is_not_known_is_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        published(**changes)


def test_lfm2_has_no_sliding_window():
    with pytest.raises(ConfigError, match="layer types of lfm2 are conv, full_attention"):
        ModelConfig.from_dict(PRESETS["lfm2-350m"][0] | {
            "full_attn_idxs": None, "num_hidden_layers": 1, "layer_types": ["sliding_attention"]})


@pytest.mark.parametrize("bits", [4, 8])
def test_a_gate_has_8_bits_whatever_the_linear_layers_have(bits):
    entries = published().weights()
    schemes = recipe(bits, 32, 8, "float").schemes(entries)
    gates = [name for name, entry in entries.items() if entry.role == GATE]
    assert len(gates) == 11
    assert all(schemes[name] == PER_CHANNEL_8 for name in gates)
    assert all(schemes[name] is None for name in entries if name.endswith("norm.weight"))


# --- what its state takes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [name for name in TARGETS if not name.startswith("gguf")])
def test_at_a_long_context_the_caches_are_those_of_six_layers_and_five_windows(target):
    config, layout, chunk = published(), TARGETS[target].state_layout, 128
    state = StateSpec.of(config, 32_768, "float32", layout, chunk=chunk)
    row = 2 * config.num_key_value_heads * config.head_dim * 4
    rows = config.sliding_window if layout.window == SHIFT else config.sliding_window + chunk
    assert state.nbytes_of(conv=False) == row * (6 * 32_768 + 5 * rows)
    assert state.filled_bytes(1_000) == row * (6 * 1_000 + 5 * rows)
    assert state.filled_bytes(100) == row * 11 * 100
