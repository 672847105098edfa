"""What went wrong in numbers, infinities and what comes of them, ends with the conversation, and with the step."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lfm_edge import export
from lfm_edge.checkpoint.checkpoint import open_checkpoint
from lfm_edge.session.state import StateSpec
from runtimes.reference import ReferenceSession, float_weights
from tests.helpers import save_checkpoint

CONTEXT, CHUNK = 32, 8
PADDING, POISON = 0, 250
LONG, SHORT, AFTER = [5, 9, 17, 30, 31, 200, 11, 12, 13], [1, 30, 40], [41, 42, 43]
# How large the weights are that meet the poisonous tokens: too large for the products in what is computed in.
KINDS = {"reference": ({}, 1e20), "android": ({"target": "android-q4"}, 1e20),
         "android-int8": ({"target": "android-q4", "kv_dtype": "int8"}, 1e20),
         "android-internal": ({"target": "android-q4", "state": "internal"}, 1e20),
         "onnx": ({"target": "onnx-q4"}, 1e20), "gguf": ({"target": "gguf-q4"}, 1e4),
         "gguf-float32": ({"target": "gguf-q4", "kv_dtype": "float32"}, 1e4),
         "mlx": ({"target": "mlx-q4"}, 1e20), "coreml": ({"target": "coreml-q4"}, 300),
         "coreml-internal": ({"target": "coreml-q4", "state": "internal"}, 300)}
INTERNAL = [kind for kind in KINDS if kind.endswith("internal")]
EXPLICIT = [kind for kind in KINDS if kind not in INTERNAL]
RUN = [kind for kind in KINDS if kind != "android-int8"]  # whose kernels end the process at an infinity


@pytest.fixture(scope="module")
def session_of(tmp_path_factory):
    """One session of each kind, of a model in which a token overflows."""
    @functools.cache
    def checkpoint(size):
        folder = save_checkpoint(tmp_path_factory.mktemp("poisonous"), layer_types=["conv", "full_attention", "conv"])
        file = folder / "model.safetensors"
        weights = load_file(file)
        table = next(value for name, value in weights.items() if name.endswith("embed_tokens.weight"))
        table[:, :32] = 0  # a whole group: what others make of it is exactly zero
        table[[PADDING, POISON]] = torch.eye(1, table.shape[1])
        projection = next(value for name, value in weights.items() if name.endswith("layers.0.conv.in_proj.weight"))
        projection[:, 0] = size
        save_file(weights, file, metadata={"format": "pt"})
        return folder

    @functools.cache
    def make(kind):
        options, size = KINDS[kind]
        if kind == "reference":
            source = open_checkpoint(checkpoint(size))
            return ReferenceSession(source.config, float_weights(source), StateSpec.of(source.config, CONTEXT),
                                    chunk=CHUNK)
        bundle = export(checkpoint(size), output=tmp_path_factory.mktemp(kind) / "bundle", context=CONTEXT,
                        prefill_chunk=CHUNK, **options)
        return bundle.session(1 if bundle.runtime.takes_threads else None)

    return make


def logits_after(session, tokens):
    return np.concatenate([session.prefill(tokens[:-1]), session.decode(tokens[-1])])


def fresh(session):
    session.reset()
    logits = logits_after(session, SHORT)
    assert np.isfinite(logits).all()
    return logits


def poisoned(snapshot, value):
    """The same, with a value in the place of every floating-point number."""
    tensors = tuple(torch.full_like(tensor, value) if tensor.is_floating_point() else tensor
                    for tensor in snapshot.tensors)
    return dataclasses.replace(snapshot, tensors=tensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", EXPLICIT)
def test_a_reset_ends_what_is_not_finite(session_of, kind, value):
    session = session_of(kind)
    expected = fresh(session)
    session.prefill(LONG)
    session.restore(poisoned(session.snapshot(), value))
    session.reset()
    assert np.array_equal(logits_after(session, SHORT), expected)


@pytest.mark.parametrize("kind", EXPLICIT)
def test_so_does_going_back_to_a_snapshot(session_of, kind):
    session = session_of(kind)
    fresh(session)
    good, expected = session.snapshot(), logits_after(session, AFTER)
    session.prefill(LONG)
    session.restore(poisoned(session.snapshot(), float("nan")))
    session.restore(good)
    assert np.array_equal(logits_after(session, AFTER), expected)


@pytest.mark.parametrize("kind", RUN)
def test_a_reset_ends_what_the_program_itself_made_of_a_token(session_of, kind):
    session = session_of(kind)
    expected = fresh(session)
    session.prefill([*LONG, POISON, POISON])
    if kind in EXPLICIT and not kind.startswith("gguf"):  # whose weights cannot be so large
        assert not all(tensor.isfinite().all() for tensor in session.snapshot().tensors)
    session.reset()
    assert np.array_equal(logits_after(session, SHORT), expected)


@pytest.mark.parametrize("kind", [kind for kind in RUN if kind != "android-internal"])
def test_a_step_that_is_undone_leaves_nothing_either(session_of, kind):
    session = session_of(kind)
    fresh(session)
    expected = logits_after(session, AFTER)
    fresh(session)
    step = session._step

    def taken_and_failed(tokens):
        step(tokens)
        raise KeyboardInterrupt

    session._step = taken_and_failed
    try:
        with pytest.raises(KeyboardInterrupt):
            session.prefill([POISON, POISON])
    finally:
        del session._step
    assert np.array_equal(logits_after(session, AFTER), expected)


@pytest.mark.parametrize("kind", ["mlx", "coreml", "coreml-internal"])
def test_what_padding_makes_of_itself_meets_nothing_else(session_of, kind):
    """These pad a chunk with token 0, which overflows here."""
    session = session_of(kind)
    session.reset()
    expected = [session.decode(token) for token in (*SHORT, *AFTER)][2::3]
    session.reset()
    for tokens, logits in zip((SHORT, AFTER), expected, strict=True):
        np.testing.assert_allclose(session.prefill(tokens), logits, atol=0.1 * logits.std())
