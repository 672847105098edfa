"""The smallest contexts that `export` takes: what fits is right, what does not is one line."""

import itertools

import pytest

from lfm_edge import export
from lfm_edge.errors import LfmEdgeError
from lfm_edge.harness.bench import Settings, Subject
from lfm_edge.harness.parity import PHASES, run_phases
from lfm_edge.harness.round import measure_round
from lfm_edge.session.session import Session
from lfm_edge.session.state import StateSpec
from lfm_edge.targets import TARGETS
from tests.helpers import assert_verified, lfm_edge, save_checkpoint

FOUR_BITS = [name for name, target in TARGETS.items() if target.bits == 4 and not target.runtime.takes_chip]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("small") / "model", layer_types=["conv", "full_attention"])


@pytest.fixture(scope="module", params=FOUR_BITS)
def smallest(request, source, tmp_path_factory):
    return export(source, target=request.param, output=tmp_path_factory.mktemp("smallest") / "bundle", context=2)


def test_the_smallest_context_is_verified(smallest):
    result = assert_verified(smallest)
    assert result.passed
    assert result.greedy.tokens == 1 and result.quality.positions == 2
    assert all(row.positions > 0 for row in result.parity)


def test_the_smallest_context_is_measured_where_prompt_and_answer_fit(smallest):
    subject = Subject.of_bundle(smallest)
    with pytest.raises(LfmEdgeError, match="do not fit its context of 2"):
        Settings().plan(subject, None)
    made = measure_round(Settings((1,), 1, fills=(2,)).plan(subject, None))
    assert [(point.kind, point.tokens) for point in made.points] == [("prompt", 1), ("fill", 2)]


@pytest.mark.parametrize(("context", "chunk"), [(3, 1), (5, 2), (9, 4), (40, 1), (40, 39), (40, 128)])
@pytest.mark.parametrize("target", [name if name == "onnx-q4" else pytest.param(name, marks=pytest.mark.heavy)
                                    for name in FOUR_BITS])
def test_contexts_of_some_tokens_and_any_step_are_verified(source, tmp_path, target, context, chunk):
    assert_verified(export(source, target=target, output=tmp_path / "bundle", context=context, prefill_chunk=chunk))


@pytest.mark.heavy
def test_the_smallest_context_is_verified_on_the_npu(source, tmp_path):
    assert_verified(export(source, target="npu-q4", output=tmp_path / "bundle", context=2))


def test_a_full_context_is_one_line_and_not_a_traceback(source, tmp_path):
    export(source, target="onnx-q4", output=tmp_path / "bundle", context=2)
    answer = lfm_edge("generate", tmp_path / "bundle", "--raw", "--prompt", "", "--max-tokens", "9")
    assert answer.returncode == 0, answer.stderr
    for ended in (lfm_edge("generate", tmp_path / "bundle", "--raw", "--prompt", "a long one"),
                  lfm_edge("bench", tmp_path / "bundle")):
        assert ended.returncode == 2 and "context of 2" in ended.stderr and "Traceback" not in ended.stderr
    said = lfm_edge("chat", tmp_path / "bundle", input="hello\n")
    assert "the context holds 2" in said.stderr and "Traceback" not in said.stderr


def test_a_system_prompt_that_leaves_no_room_is_refused_and_one_that_leaves_one_token_is_verified(source, tmp_path):
    (tmp_path / "prompt").write_text("Be brief.")
    with pytest.raises(LfmEdgeError, match=r"(\d+) tokens leave no room in a context of 2") as refused:
        export(source, target="onnx-q4", output=tmp_path / "bundle", context=2, bake_prompt=tmp_path / "prompt")
    tokens = int(str(refused.value).split(": ")[-1].split()[0])
    bundle = export(source, target="onnx-q4", output=tmp_path / "bundle", context=tokens + 1,
                    bake_prompt=tmp_path / "prompt")
    assert assert_verified(bundle).baked.positions == 1


class Counting(Session):
    """A session without a model, which refuses what a real one would."""

    def __init__(self, context, chunk, scored):
        super().__init__(StateSpec((), context), 100, chunk)
        self.scored = scored

    def _step(self, tokens):
        assert len(tokens) <= self.chunk
        return self._scored_step(tokens, 1)[0]

    def _scored_step(self, tokens, count):
        return [tokens[-1]] * count


@pytest.mark.parametrize(("context", "chunk", "scored"), list(itertools.product((2, 3, 4, 7, 17, 40), (1, 2, 64),
                                                                                (1, 8))))
def test_every_phase_fits_every_context_and_compares_something(context, chunk, scored):
    for length in range(2, context + 1):
        steps = run_phases(Counting(context, chunk, min(scored, chunk)), list(range(length)), list(PHASES))
        assert all(len(given) > 0 for given in steps.values())
