"""The one definition of the network, against transformers' Lfm2ForCausalLM, in float32."""

import pytest
import torch

from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.model.decoder import Decoder
from lfm_edge.session.state import StateSpec
from tests.helpers import AWKWARD, hf_config, hf_model

TOLERANCE = 1e-5  # largest difference of logits, relative to the largest logit
LENGTH = 21


def ours_and_theirs(overrides, context=48):
    theirs = hf_model(**overrides)
    config = ModelConfig.from_dict(theirs.config.to_dict())
    weights = {name: theirs.state_dict()[name] for name in config.weight_shapes()}
    return Decoder(config, weights, StateSpec.of(config, context)), theirs


def relative_error(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def run(decoder, tokens, lengths):
    """Logits of every position, given in parts of these lengths."""
    state, position, rows = decoder.state.fresh(), 0, []
    for length in lengths:
        part = tokens[:, position:position + length]
        logits, state = decoder(part, torch.tensor([position]), state, scored=None)
        rows.append(logits)
        position += length
    return torch.cat(rows, 1)


@pytest.fixture(params=list(AWKWARD))
def case(request):
    decoder, theirs = ours_and_theirs(AWKWARD[request.param])
    tokens = torch.randint(0, theirs.config.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
        yield decoder, theirs, tokens, expected


def test_full_prefill_equals_transformers(case):
    decoder, _, tokens, expected = case
    assert relative_error(run(decoder, tokens, [LENGTH]), expected) <= TOLERANCE


def test_chunked_prefill_equals_transformers(case):
    decoder, _, tokens, expected = case
    assert relative_error(run(decoder, tokens, [1, 7, 2, 1, 10]), expected) <= TOLERANCE


def test_decode_token_by_token_equals_transformers(case):
    decoder, _, tokens, expected = case
    assert relative_error(run(decoder, tokens, [1] * LENGTH), expected) <= TOLERANCE


def test_decode_equals_transformers_with_its_own_cache(case):
    decoder, theirs, tokens, _ = case
    if "full_attention" not in theirs.config.layer_types:
        # transformers 5.23 cannot cache a model without attention: its full pass is the only reference.
        expected = theirs(tokens, use_cache=False).logits
    else:
        first = theirs(tokens[:, :9], use_cache=True)
        rows, cache = [first.logits], first.past_key_values
        for index in range(9, LENGTH):
            step = theirs(tokens[:, index:index + 1], past_key_values=cache, use_cache=True)
            rows.append(step.logits)
        expected = torch.cat(rows, 1)
    assert relative_error(run(decoder, tokens, [9] + [1] * (LENGTH - 9)), expected) <= TOLERANCE


def test_a_prompt_of_exactly_the_context_fits():
    decoder, theirs = ours_and_theirs({}, context=LENGTH)
    tokens = torch.arange(LENGTH)[None] + 20
    with torch.no_grad():
        assert relative_error(run(decoder, tokens, [LENGTH]), theirs(tokens).logits) <= TOLERANCE


def test_only_the_logits_of_tokens_that_are_asked_for_are_computed():
    decoder, _ = ours_and_theirs({})
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        every, _ = decoder(tokens, torch.tensor([0]), decoder.state.fresh(), scored=None)
        for scored, expected in ((1, 1), (4, 4), (9, 6)):
            last, _ = decoder(tokens, torch.tensor([0]), decoder.state.fresh(), scored)
            assert last.shape == (1, expected, hf_config().vocab_size)
            torch.testing.assert_close(last, every[:, -expected:])


def test_a_step_leaves_the_state_it_was_given_unchanged():
    decoder, _ = ours_and_theirs({})
    state = decoder.state.fresh()
    with torch.no_grad():
        decoder(torch.arange(5)[None], torch.tensor([0]), state)
    assert all(torch.equal(a, b) for a, b in zip(state, decoder.state.fresh(), strict=True))


@pytest.mark.parametrize("overrides", [{}, {"conv_L_cache": 5, "conv_bias": True}, {"conv_L_cache": 1}])
def test_the_network_traces_into_one_graph_for_any_number_of_tokens(overrides):
    decoder, _ = ours_and_theirs(overrides)
    state = decoder.state.fresh()
    length = torch.export.Dim("T", min=1, max=32)
    program = torch.export.export(decoder, (torch.zeros(1, 4, dtype=torch.int64), torch.tensor([0]), state),
                                  dynamic_shapes=({1: length}, None, [None] * len(state)), strict=False)
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        eager, _ = decoder(tokens, torch.tensor([3]), state)
        traced, _ = program.module()(tokens, torch.tensor([3]), state)
    torch.testing.assert_close(traced, eager)


def test_int8_kv_costs_little_and_is_close_to_float():
    decoder, theirs = ours_and_theirs({})
    config = ModelConfig.from_dict(theirs.config.to_dict())
    weights = {name: theirs.state_dict()[name] for name in config.weight_shapes()}
    small = Decoder(config, weights, StateSpec.of(config, 48, "int8"))
    tokens = torch.arange(LENGTH)[None] + 30
    with torch.no_grad():
        error = relative_error(run(small, tokens, [4, 1, 16]), run(decoder, tokens, [LENGTH]))
    assert 0 < error < 0.05
    assert small.state.nbytes < decoder.state.nbytes / 2
