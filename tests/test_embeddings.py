"""Embedding, body and head apart: a step that starts from embeddings, and a conversation that remembers which."""

import numpy as np
import pytest
import torch

from lfm_edge.checkpoint.checkpoint import open_checkpoint
from lfm_edge.errors import BundleError, LfmEdgeError
from lfm_edge.session.history import Embedded, token_ids
from lfm_edge.session.saved import Origin, SavedSession
from lfm_edge.session.speculation import PromptLookup
from lfm_edge.session.state import StateSpec
from runtimes.reference import ReferenceSession, float_weights
from tests.helpers import AWKWARD, AWKWARD_LFM3, hf_model, lfm3_model, save_checkpoint, save_model
from tests.untrusted_helpers import header_of, signed, with_header

CONTEXT = 24
BEFORE, PICTURE, AFTER = [5, 9, 250], [42, 42, 42, 42], [30, 31]


@pytest.fixture(scope="module")
def make_session(tmp_path_factory):
    checkpoint = open_checkpoint(save_checkpoint(tmp_path_factory.mktemp("embeddings"), **AWKWARD["untied head"]))
    weights = float_weights(checkpoint)

    def make(chunk=None):
        session = ReferenceSession(checkpoint.config, weights, StateSpec.of(checkpoint.config, CONTEXT), chunk=chunk)
        session.origin = Origin("a" * 64)
        session.rows = weights["model.embed_tokens.weight"].numpy()
        return session

    return make


def a_picture(seed):
    return np.random.default_rng(seed).normal(size=(len(PICTURE), 64)).astype(np.float32)


def seen(session, seed):
    """Logits after a text with a picture in it."""
    session.prefill(BEFORE)
    session.prefill_embeddings(PICTURE, a_picture(seed))
    return session.prefill(AFTER)


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_the_table_s_own_rows_are_the_tokens(make_session, chunk):
    session, plain = make_session(chunk), make_session()
    tokens = BEFORE + AFTER

    given = session.prefill_embeddings(tokens, session.rows[tokens])

    np.testing.assert_allclose(given, plain.prefill(tokens), atol=1e-5)
    np.testing.assert_allclose(session.prefill(PICTURE), plain.prefill(PICTURE), atol=1e-5)


def test_chunked_and_whole_embeddings_agree(make_session):
    np.testing.assert_allclose(seen(make_session(3), 1), seen(make_session(), 1), atol=1e-5)


def test_the_network_in_three_pieces_is_the_network(tmp_path):
    """What an exporter traces on its own: rows of the table, the layers, the head."""
    for index, model in enumerate((hf_model(**AWKWARD["untied odd vocabulary, conv bias, four taps"]),
                                   lfm3_model(**AWKWARD_LFM3["window of 8"]))):
        checkpoint = open_checkpoint(save_model(tmp_path / str(index), model))
        spec = StateSpec.of(checkpoint.config, CONTEXT)
        decoder = ReferenceSession(checkpoint.config, float_weights(checkpoint), spec).decoder
        tokens, position = torch.tensor([[1, 5, 9, 200]]), torch.tensor([0])

        whole, state = decoder(tokens, position, spec.fresh())
        x, following = decoder.body(decoder.embed_tokens(tokens), position, spec.fresh())

        assert torch.equal(decoder.head(x), whole)
        assert all(map(torch.equal, following, state))


def test_two_pictures_behind_the_same_tokens_are_two_histories(make_session):
    one, same, other = make_session(), make_session(), make_session()
    logits = [seen(one, 1), seen(same, 1), seen(other, 2)]

    assert (logits[0] == logits[1]).all() and not np.allclose(logits[0], logits[2])
    assert one.tokens == same.tokens
    assert one.tokens != other.tokens and token_ids(one.tokens) == token_ids(other.tokens)
    assert one.tokens != BEFORE + PICTURE + AFTER


def test_snapshots_and_files_remember_what_was_given(make_session, tmp_path):
    session, fork, loaded = make_session(), make_session(), make_session()
    seen(session, 1)
    session.save(tmp_path / "saved")
    fork.restore(session.snapshot())
    loaded.load(tmp_path / "saved")

    assert fork.tokens == session.tokens == loaded.tokens
    assert isinstance(loaded.tokens[3], Embedded) and loaded.tokens[0] == BEFORE[0]
    assert (loaded.decode(7) == session.decode(7)).all()


@pytest.mark.parametrize("given, version", [(False, "1"), (True, "2")])
def test_a_file_that_an_older_reader_would_misread_has_another_version(make_session, tmp_path, given, version):
    session = make_session()
    session.prefill(BEFORE)
    if given:
        session.prefill_embeddings(PICTURE, a_picture(1))
    session.save(tmp_path / "saved")

    header, _ = header_of((tmp_path / "saved").read_bytes())
    assert header["__metadata__"]["version"] == version
    assert ("embedded" in header["__metadata__"]) == given


@pytest.mark.parametrize("content", ["[]", '{"3": 4}', '{"x": "y"}', '{"-1": "y"}', '{"999": "y"}', "{"])
def test_damaged_contents_are_refused(make_session, tmp_path, content):
    session = make_session()
    seen(session, 1)
    session.save(tmp_path / "saved")
    header, data = header_of((tmp_path / "saved").read_bytes())
    header["__metadata__"]["embedded"] = content
    (tmp_path / "saved").write_bytes(signed(with_header(header, data)))

    with pytest.raises(BundleError, match="malformed"):
        SavedSession.read(tmp_path / "saved")


def test_a_step_that_fails_takes_nothing(make_session, monkeypatch):
    session = make_session(2)
    session.prefill(BEFORE)
    before = list(session.tokens)
    steps = []

    def fails(embeddings):
        steps.append(len(embeddings))
        if len(steps) == 2:
            raise RuntimeError("out of something")
        return ReferenceSession._embedded_step(session, embeddings)

    monkeypatch.setattr(session, "_embedded_step", fails)
    with pytest.raises(RuntimeError):
        session.prefill_embeddings(PICTURE, a_picture(1))

    assert session.tokens == before and session.position == len(before)
    monkeypatch.undo()
    session.prefill_embeddings(PICTURE, a_picture(1))
    np.testing.assert_allclose(session.prefill(AFTER), seen(make_session(), 1), atol=1e-5)


def test_wrong_embeddings_are_refused_in_one_line(make_session, tiny_bundle):
    session = make_session()
    for rows in (a_picture(1)[:2], a_picture(1)[0]):
        with pytest.raises(LfmEdgeError, match=r"embeddings of shape \[.*\] for 4 tokens"):
            session.prefill_embeddings(PICTURE, rows)
    with pytest.raises(LfmEdgeError, match="looks embeddings up itself"):
        tiny_bundle.session().prefill_embeddings(PICTURE, a_picture(1))


def test_an_embedding_is_never_guessed():
    lookup = PromptLookup()
    picture = Embedded(42, "a" * 64)
    lookup.extend([1, 2, 3, 4, 5, picture, 6, 1, 2, 3, 4])

    assert lookup.guess(4) == [5]
