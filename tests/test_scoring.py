"""What a session says of given tokens, and prompts that begin alike. (test_interrupted.py has marks on artifacts.)"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm_edge.checkpoint.checkpoint import open_checkpoint
from lfm_edge.errors import LfmEdgeError
from lfm_edge.session.scoring import from_here, loglikelihood, visit
from lfm_edge.session.state import StateSpec
from runtimes.reference import ReferenceSession, float_weights
from tests.helpers import lfm3_model, save_checkpoint, save_model

CONTEXT = 96
PROMPTS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)).map(
    lambda ends: tuple([1, 2, 3] * 4 * ends[0] + [4, 5] * 5 * ends[1])), min_size=1, max_size=8, unique=True)


@pytest.fixture(scope="module", params=["lfm2", "lfm3, a window of 8"])
def make_session(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    path = (save_checkpoint(folder, layer_types=["conv", "full_attention"]) if request.param == "lfm2" else
            save_model(folder, lfm3_model(layer_types=["conv", "sliding_attention"], sliding_window=8)))
    checkpoint = open_checkpoint(path)
    spec, weights = StateSpec.of(checkpoint.config, CONTEXT), float_weights(checkpoint)
    return lambda chunk=None: ReferenceSession(checkpoint.config, weights, spec, chunk=chunk)


@pytest.fixture(scope="module")
def session(make_session):
    return make_session()


def fresh_logits(session, tokens):
    session.reset()
    return session.prefill(tokens)


# --- marks --------------------------------------------------------------------------------------------------------


def test_a_mark_is_gone_back_to_as_often_as_wanted(session):
    session.reset()
    session.prefill(range(5, 17))
    mark = session.mark()
    first = session.prefill([7, 8, 9])
    for _ in range(2):
        session.prefill(range(200, 220))
        session.rewind(mark)
        assert session.position == 12 and session.tokens == list(range(5, 17))
        np.testing.assert_array_equal(session.prefill([7, 8, 9]), first)


def test_marks_stand_in_one_another(session):
    session.reset()
    outer = session.mark()
    session.prefill([1, 2, 3])
    inner = session.mark()
    session.prefill([4])
    session.rewind(inner)
    session.rewind(outer)
    assert session.position == 0
    with pytest.raises(LfmEdgeError, match="gone back to before it"):
        session.rewind(inner)
    np.testing.assert_array_equal(session.prefill([9, 9]), fresh_logits(session, [9, 9]))


@pytest.mark.parametrize("away", [
    lambda session: session.reset(), lambda session: session.restore(session.snapshot()),
    lambda session: session.stand_at(1)])
def test_a_mark_is_void_once_what_it_needs_is_gone(session, away):
    session.reset()
    session.prefill([1, 2, 3])
    mark = session.mark()
    away(session)
    with pytest.raises(LfmEdgeError, match="no such mark"):
        session.rewind(mark)


def test_a_step_that_is_taken_back_takes_marks_with_it(session):
    session.reset()
    session.prefill([1, 2])
    kept = session.mark()
    session.prefill_scored([3, 4], 1)
    void = session.mark()
    session.take_back()
    with pytest.raises(LfmEdgeError, match="no such mark"):
        session.rewind(void)
    session.rewind(kept)
    with pytest.raises(LfmEdgeError, match="no step to take back"):
        session.take_back()


def test_a_mark_is_of_one_session(make_session):
    with pytest.raises(LfmEdgeError, match="another session's"):
        make_session().rewind(make_session().mark())


# --- prompts that begin alike -------------------------------------------------------------------------------------


@given(prompts=PROMPTS)
@settings(max_examples=40)
def test_visits_give_what_fresh_sessions_give_and_compute_a_shared_beginning_once(make_session, prompts):
    session, fresh = make_session(), make_session()
    seen, prefilled = [], 0
    for stop in visit(session, prompts):
        seen.append(prompts[stop.index])
        prefilled += stop.prefilled
        assert session.tokens == list(prompts[stop.index])
        if stop.logits is None:
            assert not prompts[stop.index]
        else:
            np.testing.assert_allclose(stop.logits, fresh_logits(fresh, prompts[stop.index]), atol=1e-4)
        session.prefill([250, 251])  # what is led on from there does not matter
    assert seen == sorted(prompts)
    assert prefilled == len({prompt[:end] for prompt in prompts for end in range(1, len(prompt) + 1)})


def test_a_few_shot_beginning_is_computed_once(session):
    examples = tuple(range(5, 35))
    prompts = [(*examples, *question) for question in ((40, 41), (40, 42), (43,), (44, 45, 46))]
    assert [stop.prefilled for stop in visit(session, prompts)] == [32, 2, 1, 3]


def test_where_the_program_keeps_the_state_every_prompt_is_computed(session, monkeypatch):
    monkeypatch.setattr(type(session), "holds_all", False)
    prompts = [(1,) * 20 + (2,), (1,) * 20 + (3,)]
    assert [stop.prefilled for stop in visit(session, prompts)] == [21, 21]


@pytest.mark.parametrize("explicit", [True, False])
def test_one_way_after_the_other_starts_at_the_same_place(session, monkeypatch, explicit):
    monkeypatch.setattr(type(session), "holds_all", explicit)
    fresh_logits(session, [1, 2, 3])
    rows = []
    for way in from_here(session, [4, 5, 4]):
        assert session.tokens == [1, 2, 3]
        rows.append(session.decode(way))
    np.testing.assert_allclose(rows[0], rows[2], atol=1e-5)


# --- likelihoods --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_a_likelihood_is_that_of_all_logits_at_once(make_session, chunk):
    session = make_session(chunk)
    tokens = [5, 9, 250, 17, 30, 31, 200, 11, 12, 13]
    logits = make_session().score(tokens[:-1])[2:].astype(np.float64)  # of what comes after each from the third on
    shares = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = sum(row[token] for row, token in zip(shares, tokens[3:], strict=True))
    total, best = loglikelihood(session, session.prefill(tokens[:3]), tokens[3:])
    assert total == pytest.approx(expected, abs=1e-4) and not best
    assert session.tokens == tokens[:-1]


def test_the_greedy_answer_is_the_best(session):
    logits, answer = fresh_logits(session, [5, 9]), []
    start = session.mark()
    row = logits
    for _ in range(4):
        answer.append(int(row.argmax()))
        row = session.decode(answer[-1])
    session.rewind(start)
    assert loglikelihood(session, logits, answer)[1]
    session.rewind(start)
    assert not loglikelihood(session, logits, [*answer[:3], answer[3] ^ 1])[1]
