"""A call that raises, at any moment, leaves the session unchanged; where that cannot be, the session says so."""

import functools
import sys

import numpy as np
import pytest

from lfm_edge import export
from lfm_edge.backends.npu import EMBEDDINGS, LOGITS, MASK, NpuSession
from lfm_edge.checkpoint.checkpoint import open_checkpoint
from lfm_edge.errors import LfmEdgeError
from lfm_edge.session.scoring import loglikelihood, visit
from lfm_edge.session.state import APPEND, StateSpec
from lfm_edge.targets import TARGETS
from runtimes.reference import ReferenceSession, float_weights
from tests.helpers import REPO, save_checkpoint

CONTEXT, CHUNK = 32, 4
BEFORE, LONG, AFTER = [5, 9, 250, 17, 30], [31, 200, 11, 12, 13, 14], [40, 41, 42]
KINDS = {
    "reference": {}, "npu": {}, "android": {"target": "android-q4"}, "onnx": {"target": "onnx-q4"},
    "gguf": {"target": "gguf-q4"}, "mlx": {"target": "mlx-q4"},
    "coreml-internal": {"target": "coreml-q4", "state": "internal"},
    "android-internal": {"target": "android-q4", "state": "internal"}}
STEPS = {"a long prefill": lambda session: session.prefill(LONG), "a decode": lambda session: session.decode(7),
         "standing elsewhere": lambda session: session.stand_at(20)}
SCORED = ["reference", "android", "onnx"]  # those that tell the logits of several tokens
CANNOT_UNDO = {("android-internal", call) for call in STEPS} | {("gguf", "standing elsewhere")}
OURS = ("lfm_edge/session/session.py", "lfm_edge/session/state.py", "lfm_edge/backends/npu.py")
WATCHED = {str(REPO / name) for name in OURS} | {
    str(path) for path in (REPO / "runtimes").glob("*.py") if not path.name.startswith("mil")}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(save_checkpoint(tmp_path_factory.mktemp("small"),
                                           layer_types=["conv", "full_attention", "conv"]))


@pytest.fixture(scope="module")
def session_of(checkpoint, tmp_path_factory):
    """One session of each kind, which tests use one after the other."""
    @functools.cache
    def make(kind):
        if kind == "reference":
            spec = StateSpec.of(checkpoint.config, CONTEXT)
            return ReferenceSession(checkpoint.config, float_weights(checkpoint), spec, chunk=CHUNK)
        if kind == "npu":
            return simulated(checkpoint.config)
        folder = tmp_path_factory.mktemp(kind) / "bundle"
        bundle = export(checkpoint.source, output=folder, context=CONTEXT, prefill_chunk=CHUNK, **KINDS[kind])
        return bundle.session(1 if bundle.runtime.takes_threads else None)

    return make


def simulated(config):
    """The host side of an NPU, over a program that mixes all that it is given: the chip's own takes long here."""
    spec = StateSpec.of(config, CONTEXT, "int8", TARGETS["npu-q4"].state_layout)

    def run(length, inputs):
        given = inputs[EMBEDDINGS].mean()
        seen = sum(np.where(inputs[MASK][0, 0, 0] == 0, inputs[tensor.name].mean((0, 1, 5 - tensor.axis)), 0).sum()
                   for tensor in spec.tensors if tensor.update == APPEND)
        conv = {tensor.next_name: inputs[tensor.name] * 0.5 + given for tensor in spec.tensors if tensor.kind == "conv"}
        rows = {tensor.next_name: np.full((1, length, config.num_key_value_heads, config.head_dim), 10 * given, np.int8)
                for tensor in spec.tensors if tensor.update == APPEND}
        mixed = seen + sum(value.sum() for value in conv.values())
        return {LOGITS: np.full((1, 1, config.vocab_size), mixed, np.float32), **conv, **rows}

    return NpuSession(config, spec, CHUNK, lambda tokens: np.array([[[token] * 2 for token in tokens]], np.float32),
                      run)


def interrupted_at(line, call):
    """Whether the call reached so many lines of a session's code: there it is interrupted, as by Ctrl-C."""
    left = line

    def on_line(frame, event, _):
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return on_line

    previous = sys.gettrace()
    sys.settrace(lambda frame, *_: on_line if frame.f_code.co_filename in WATCHED else None)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(previous)
    return False


def at_every_line(call, prepare):
    """Prepare and interrupt again and again, one line later each time, until the call ends by itself."""
    line = 1
    prepare()
    while interrupted_at(line, call):
        yield line
        line += 1
        prepare()
    assert line > 5


def logits_after(session, tokens):
    """Of what comes next, one step of several tokens and one of a single one."""
    return np.concatenate([session.prefill(tokens[:-1]), session.decode(tokens[-1])])


def expected_after(session, tokens):
    session.reset()
    session.prefill(tokens)
    return logits_after(session, AFTER)


def prepared(session):
    session.reset()
    session.prefill(BEFORE)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_interrupted_anywhere_leaves_the_session_unchanged(session_of, kind, name):
    session, call = session_of(kind), STEPS[name]
    expected = expected_after(session, BEFORE)
    for line in at_every_line(lambda: call(session), lambda: prepared(session)):
        if session.broken and (kind, name) in CANNOT_UNDO:
            assert_only_a_reset_mends(session)
            continue
        assert not session.broken, line
        assert (session.position, session.tokens) == (len(BEFORE), BEFORE), line
        assert np.array_equal(logits_after(session, AFTER), expected), line


def assert_only_a_reset_mends(session):
    calls = [lambda: session.prefill([1, 2]), lambda: session.decode(1), lambda: session.stand_at(3),
             session.take_back, session.snapshot, lambda: session.prefill_scored([1], 1),
             lambda: session.save("nowhere")]
    for call in calls:
        with pytest.raises(LfmEdgeError, match=r"the session is broken: .*reset it") as raised:
            call()
        assert "\n" not in str(raised.value)
    session.reset()
    assert not session.broken and session.position == 0


def test_where_the_program_keeps_the_conv_state_the_session_is_broken_until_it_is_reset(session_of):
    session = session_of("android-internal")
    expected = expected_after(session, LONG)
    prepared(session)
    step = session._step

    def taken_and_failed(tokens):
        step(tokens)
        raise RuntimeError("after the native call")

    session._step = taken_and_failed
    try:
        with pytest.raises(RuntimeError, match="after the native call"):
            session.decode(7)
    finally:
        del session._step
    assert session.broken
    assert_only_a_reset_mends(session)
    assert np.array_equal(expected_after(session, LONG), expected)


@pytest.mark.parametrize("kind", SCORED)
def test_a_step_that_can_be_taken_back_is_undone_as_well(session_of, kind):
    session = session_of(kind)
    expected, tokens = expected_after(session, BEFORE), LONG[:CHUNK]
    count = min(session.scored, 3)
    for line in at_every_line(lambda: session.prefill_scored(tokens, count), lambda: prepared(session)):
        assert not session.broken and session.tokens == BEFORE, line
        assert np.array_equal(logits_after(session, AFTER), expected), line

    further = expected_after(session, BEFORE + tokens)

    def scored():
        prepared(session)
        session.prefill_scored(tokens, count)

    for line in at_every_line(session.take_back, scored):
        assert not session.broken and session.tokens == BEFORE + tokens, line
        session.take_back()  # still there to take back
        session.prefill_scored(tokens, count)
        np.testing.assert_allclose(logits_after(session, AFTER), further, rtol=1e-4, atol=1e-4)
    scored()
    session.take_back()
    assert np.array_equal(logits_after(session, AFTER), expected)


@pytest.mark.parametrize("kind", SCORED)
def test_a_step_that_failed_does_not_take_away_what_could_be_taken_back(session_of, kind, monkeypatch):
    session = session_of(kind)
    expected = expected_after(session, BEFORE)
    prepared(session)
    session.prefill_scored(LONG[:3], 1)
    with monkeypatch.context() as patch:
        patch.setattr(session, "_step", lambda tokens: (_ for _ in ()).throw(RuntimeError("failed")), raising=False)
        with pytest.raises(RuntimeError):
            session.decode(3)
    session.take_back()
    assert np.array_equal(logits_after(session, AFTER), expected)


WHOLE = {"reset": lambda session, _: session.reset(), "restore": lambda session, kept: session.restore(kept)}


@pytest.mark.parametrize("call", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("kind", ["reference", "npu", "android", "onnx", "gguf", "mlx"])
def test_what_overwrites_the_session_is_done_not_begun_or_said_to_be_broken(session_of, kind, call):
    session = session_of(kind)
    kept_tokens = [] if call is WHOLE["reset"] else LONG[:3]
    session.reset()
    if kept_tokens:
        session.prefill(kept_tokens)
    kept = session.snapshot()
    expected = {tuple(BEFORE): expected_after(session, BEFORE)}
    session.restore(kept)
    expected[tuple(kept_tokens)] = logits_after(session, AFTER)
    seen = set()
    for line in at_every_line(lambda: call(session, kept), lambda: prepared(session)):
        seen.add(session.broken)
        if session.broken:
            with pytest.raises(LfmEdgeError, match=r"the session is broken: .*reset it, or load a saved one"):
                session.decode(1)
            call(session, kept)
        tokens = tuple(session.tokens)
        assert np.array_equal(logits_after(session, AFTER), expected[tokens]), line
    assert True in seen


def test_a_state_that_cannot_be_put_back_leaves_a_broken_session(session_of, monkeypatch):
    """Also where the runtime as such could: the second failure is not hidden."""
    session = session_of("reference")
    prepared(session)
    kept = session.snapshot()

    def lost(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(session, "_step", lost)
    monkeypatch.setattr(session, "_write", lost)
    with pytest.raises(RuntimeError, match="no memory"):
        session.prefill(LONG)
    assert session.broken
    with pytest.raises(LfmEdgeError, match="the session is broken"):
        session.snapshot()
    monkeypatch.undo()
    session.restore(kept)
    assert np.array_equal(logits_after(session, AFTER), expected_after(session, BEFORE))


def test_a_broken_session_is_not_saved(session_of, tmp_path):
    session = session_of("reference")
    session.reset()
    (tmp_path / "file").write_text("older")
    session.broken = True
    with pytest.raises(LfmEdgeError, match="the session is broken"):
        session.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "older" and len(list(tmp_path.iterdir())) == 1
    session.reset()


def test_marks_of_steps_do_not_pile_up(session_of):
    session = session_of("reference")
    prepared(session)
    for token in (1, 2, 3):
        session.prefill_scored([token], 1)
    assert session._before.before is None



# --- marks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.endswith("internal")])
def test_going_back_to_a_mark_leaves_nothing_of_what_came_after(session_of, kind):
    session = session_of(kind)
    expected = expected_after(session, BEFORE)
    prepared(session)
    mark = session.mark()
    for _ in range(2):
        session.prefill(LONG)
        session.rewind(mark)
        assert (session.position, session.tokens) == (len(BEFORE), BEFORE)
        np.testing.assert_array_equal(logits_after(session, AFTER), expected)


@pytest.mark.parametrize("kind", ["reference", "android", "onnx", "gguf"])
def test_going_back_that_is_interrupted_anywhere_leaves_the_session_unchanged_or_broken(session_of, kind):
    session = session_of(kind)
    marks = []

    def gone_on():
        prepared(session)
        marks.append(session.mark())
        session.prefill(LONG)

    gone_on()
    expected = logits_after(session, AFTER)
    for line in at_every_line(lambda: session.rewind(marks[-1]), gone_on):
        if not session.broken:
            assert session.tokens in (BEFORE, BEFORE + LONG), line
            if session.tokens == BEFORE + LONG:
                np.testing.assert_array_equal(logits_after(session, AFTER), expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "npu"])  # that one here is no model
def test_prompts_that_begin_alike_score_as_fresh_sessions_do(session_of, kind):
    session = session_of(kind)
    prompts = [(*BEFORE, *LONG, *end) for end in ((1, 2), (1, 3, 4, 5, 6, 7, 8, 9, 10, 11), (2,), ())]
    visited = {stop.index: (stop.logits, loglikelihood(session, stop.logits, AFTER)[0])
               for stop in visit(session, prompts)}
    for index, (logits, score) in visited.items():
        session.reset()
        fresh = session.prefill(prompts[index])
        np.testing.assert_allclose(logits, fresh, atol=(0.2 if kind == "mlx" else 0.02) * fresh.std())  # MLX: bfloat16
        assert score == pytest.approx(loglikelihood(session, fresh, AFTER)[0], abs=0.5 if kind == "mlx" else 0.1)
