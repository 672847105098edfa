"""Sessions, over the torch runtime: what the interface promises. (test_executorch.py holds the artifact to it.)"""

import itertools

import numpy as np
import pytest
import torch

from lfm_edge.checkpoint.checkpoint import open_checkpoint
from lfm_edge.errors import ContextFull, LfmEdgeError
from lfm_edge.harness.memory import read_memory
from lfm_edge.session.generation import generate
from lfm_edge.session.sampling import Sampling
from lfm_edge.session.session import Session
from lfm_edge.session.state import StateSpec, StateTensor
from runtimes.reference import ReferenceSession, float_weights
from tests.helpers import save_checkpoint

CONTEXT = 40
TOKENS = [5, 9, 250, 17, 30, 31, 200, 11, 12, 13]


@pytest.fixture(scope="module")
def make_session(tmp_path_factory):
    checkpoint = open_checkpoint(save_checkpoint(tmp_path_factory.mktemp("small"), conv_L_cache=4))
    weights = float_weights(checkpoint)

    def make(kv_dtype="float32", chunk=None):
        spec = StateSpec.of(checkpoint.config, CONTEXT, kv_dtype)
        return ReferenceSession(checkpoint.config, weights, spec, chunk=chunk)

    return make


@pytest.fixture(params=["float32", "int8"])
def session(request, make_session):
    return make_session(request.param)


def test_any_split_of_a_prompt_gives_the_same_logits(make_session):
    whole = make_session().prefill(TOKENS)
    for chunk in (1, 3, 4):
        np.testing.assert_allclose(make_session(chunk=chunk).prefill(TOKENS), whole, rtol=1e-4, atol=1e-5)
    split = make_session()
    split.prefill(TOKENS[:4])
    split.prefill(TOKENS[4:9])
    np.testing.assert_allclose(split.decode(TOKENS[9]), whole, rtol=1e-4, atol=1e-5)
    assert split.position == len(TOKENS)


def test_logits_are_float32_over_the_vocabulary(session):
    logits = session.prefill(TOKENS)
    assert logits.dtype == np.float32 and logits.shape == (300,)


def test_a_snapshot_brings_back_the_conversation_as_often_as_wanted(session):
    session.prefill(TOKENS[:6])
    snapshot = session.snapshot()
    first = session.prefill(TOKENS[6:])
    for _ in range(2):
        session.prefill([1, 2, 3])
        session.restore(snapshot)
        assert session.position == 6
        assert np.array_equal(session.prefill(TOKENS[6:]), first)


def test_a_snapshot_forks_into_another_session(make_session):
    first, second = make_session(), make_session()
    first.prefill(TOKENS[:6])
    second.prefill([99, 98])
    second.restore(first.snapshot())
    assert np.array_equal(second.decode(7), first.decode(7))


def test_a_snapshot_keeps_only_the_filled_rows(make_session):
    session = make_session()
    empty = session.snapshot().nbytes
    session.prefill(TOKENS)
    assert session.snapshot().nbytes - empty == len(TOKENS) * session.spec.nbytes_of(conv=False) // CONTEXT


def test_a_snapshot_of_another_layout_is_refused(make_session):
    with pytest.raises(LfmEdgeError, match="another model, context or KV type"):
        make_session("int8").restore(make_session().snapshot())


def test_reset_leaves_nothing_of_the_conversation(session):
    fresh = session.prefill(TOKENS)
    session.prefill([200, 201, 202])
    session.reset()
    assert session.position == 0
    assert np.array_equal(session.prefill(TOKENS), fresh)


def test_a_prompt_of_exactly_the_context_fits_and_one_more_token_does_not(session):
    session.prefill([4] * CONTEXT)
    with pytest.raises(ContextFull, match=f"at {CONTEXT} of a context of {CONTEXT}"):
        session.decode(4)
    assert session.position == CONTEXT


def test_a_prompt_that_does_not_fit_leaves_the_session_unchanged(session):
    session.prefill(TOKENS)
    before = session.snapshot()
    with pytest.raises(ContextFull):
        session.prefill([4] * (CONTEXT - len(TOKENS) + 1))
    assert session.position == len(TOKENS)
    assert all(torch.equal(a, b) for a, b in zip(before.tensors, session.snapshot().tensors, strict=True))


@pytest.mark.parametrize("tokens", [[], [300], [-1], [3, 4, 1000]])
def test_no_tokens_and_unknown_tokens_are_refused(session, tokens):
    with pytest.raises(LfmEdgeError):
        session.prefill(tokens)
    assert session.position == 0


def test_greedy_generation_takes_the_best_token_and_stops_when_told(make_session):
    session = make_session()
    answer = list(generate(session, TOKENS, max_tokens=8))
    again = make_session()
    logits = again.prefill(TOKENS)
    for token in answer:
        assert token == int(logits.argmax())
        logits = again.decode(token)
    stopped = make_session()
    assert list(generate(stopped, TOKENS, max_tokens=8, stop=[answer[3]])) == answer[:answer.index(answer[3])]


def test_generation_ends_when_the_context_is_full(make_session):
    session = make_session()
    answer = list(generate(session, [4] * (CONTEXT - 2), max_tokens=50))
    assert len(answer) == 3  # two fill the context, and the logits of the second give one more
    assert session.position == CONTEXT


def test_a_step_is_taken_back_with_all_that_it_did(session):
    session.prefill(TOKENS[:4])
    before, expected = session.snapshot(), make_rows(session, TOKENS[4:8])
    session.restore(before)
    session.prefill_scored([99, 98, 97], 2)
    assert session.position == 7 and session.tokens[4:] == [99, 98, 97]
    session.take_back()
    assert session.position == 4 and session.tokens == TOKENS[:4]
    assert all(torch.equal(a, b) for a, b in zip(before.tensors, session.snapshot().tensors, strict=True))
    rows = session.prefill_scored(TOKENS[4:8], 4)
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-5)


def make_rows(session, tokens):
    return np.stack([session.decode(token) for token in tokens])


@pytest.mark.parametrize("after", [
    lambda session: session.decode(1), lambda session: session.reset(), lambda session: session.take_back(),
    lambda session: session.restore(session.snapshot()), lambda session: session.stand_at(9)])
def test_only_the_last_step_is_taken_back(make_session, after):
    session = make_session()
    with pytest.raises(LfmEdgeError, match="no step to take back"):
        session.take_back()
    session.prefill_scored(TOKENS[:5], 5)
    after(session)
    with pytest.raises(LfmEdgeError, match="no step to take back"):
        session.take_back()


@pytest.mark.parametrize("tokens, count", [([1, 2, 3], 4), ([1, 2, 3], 0), ([1, 2, 3, 4, 5], 2)])
def test_logits_of_more_tokens_than_a_step_has_are_refused(make_session, tokens, count):
    session = make_session(chunk=4)
    with pytest.raises(LfmEdgeError, match="a step takes 4"):
        session.prefill_scored(tokens, count)
    assert session.position == 0


@pytest.mark.parametrize("sampling", [
    Sampling(), Sampling(0.2), Sampling(1.0), Sampling(repetition_penalty=1.3),
    Sampling(0.8, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.1)], ids=str)
@pytest.mark.parametrize("lookahead", [1, 3, 7])
def test_a_lookahead_gives_the_same_tokens_and_leaves_the_same_session(make_session, lookahead, sampling):
    prompt = [5, 9, 5, 9, 5, 9, 11, 5]  # repeats, so there is something to guess
    plain, ahead = make_session("float32"), make_session("float32")
    options = {"max_tokens": 20, "sampling": sampling, "seed": 3}
    expected = list(generate(plain, prompt, **options))
    assert list(generate(ahead, prompt, **options, lookahead=lookahead)) == expected
    assert ahead.tokens == plain.tokens == prompt + expected and ahead.position == plain.position
    np.testing.assert_allclose(ahead.decode(4), plain.decode(4), rtol=1e-4, atol=1e-5)


def test_a_right_guess_saves_steps_and_a_wrong_one_changes_nothing():
    """A session that counts, in words of its own: after a token comes that token plus one, up to 9, then 0."""
    session, prompt = Counting(), list(range(10)) * 2
    assert list(generate(session, prompt, max_tokens=15, lookahead=4)) == [*range(10), *range(5)]
    assert session.tokens == [*prompt, *range(10), *range(5)]
    assert session.steps == 5  # of the prompt, of 1 + 4, 1 + 4, 1 + 3 tokens, of the last one
    session = Counting()
    misleading = [3, 4, 5, 9, 3, 4, 5, 8, 3, 4, 5, 2, 3, 4]
    assert list(generate(session, misleading, max_tokens=4, lookahead=4)) == [5, 6, 7, 8]
    assert session.tokens == [*misleading, 5, 6, 7, 8]


@pytest.mark.parametrize("stop_after", range(1, 14))
def test_who_stops_listening_early_or_at_a_stop_token_finds_what_was_given_in_the_session(stop_after):
    prompt = list(range(10)) * 2
    session = Counting()
    given = list(itertools.islice(generate(session, prompt, max_tokens=30, lookahead=6), stop_after))
    assert session.tokens[:19 + stop_after] == [*prompt, *given][:19 + stop_after]
    assert len(session.tokens) <= 20 + stop_after
    session = Counting()
    stop = stop_after % 10
    assert list(generate(session, prompt, max_tokens=30, stop=[stop], lookahead=6)) == list(range(stop))
    assert session.tokens == prompt + list(range(stop))


def test_a_lookahead_ends_where_the_context_does():
    plain, ahead = Counting(context=27), Counting(context=27)
    prompt = list(range(10)) * 2
    assert list(generate(ahead, prompt, max_tokens=30, lookahead=6)) == list(generate(plain, prompt, max_tokens=30))
    assert ahead.position == plain.position == 27


def test_a_lookahead_beyond_what_the_program_scores_is_refused():
    session = Counting()
    with pytest.raises(LfmEdgeError, match="a lookahead of 8: at most 7"):
        generate(session, [1], max_tokens=3, lookahead=8)


class Counting(Session):
    """Answers each token with the next digit, and has no state but its tokens."""

    scored = 8

    def __init__(self, context=CONTEXT):
        super().__init__(StateSpec((), context), 10, chunk=64)
        self.steps = 0

    def _step(self, tokens):
        return self._scored_step(tokens, 1)[0]

    def _scored_step(self, tokens, count):
        self.steps += 1
        return np.eye(10, dtype=np.float32)[[(token + 1) % 10 for token in tokens[-count:]]]


def test_a_fresh_cache_takes_memory_for_the_rows_that_are_written():
    """Also with heads first, where each head's rows are far from the others'."""
    cache = StateTensor("key", 0, "key", (1, 32, 8192, 64), "float32", "append", axis=2)  # 67 MB
    before = read_memory()
    value = cache.fresh()
    assert not value[:, :, :100].any()
    value[:, :, :100] = 1.0  # 0.8 MB
    assert read_memory().above(before).anonymous < 3_000_000
