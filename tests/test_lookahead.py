"""A lookahead over artifacts: the same tokens, from fewer steps. (test_session.py has what holds for any session.)"""

import re

import numpy as np
import pytest

from lfm_edge import export
from lfm_edge.errors import LfmEdgeError
from lfm_edge.harness.quality import read_tasks
from lfm_edge.session.generation import Chat, generate
from tests.helpers import TINY, example, lfm_edge


@pytest.fixture(scope="module", params=["android-q4", "onnx-q4"])
def bundle(request, tmp_path_factory):
    return export(TINY, target=request.param, output=tmp_path_factory.mktemp("lookahead") / "bundle", context=512,
                  prefill_chunk=64)


@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_the_logits_of_a_step_are_those_of_single_steps(bundle, length):
    text = [1, 5, 7, 9, 100, 44, 33, 22, 90, 91, 92]
    one, several = bundle.session(), bundle.session()
    one.prefill(text[:3])
    several.prefill(text[:3])
    expected = np.stack([one.decode(token) for token in text[3:3 + length]])
    rows = several.prefill_scored(text[3:3 + length], length)
    assert rows.shape == expected.shape
    np.testing.assert_allclose(rows, expected, atol=1e-4 * expected.std())
    np.testing.assert_allclose(several.decode(8), one.decode(8), atol=1e-4 * expected.std())


def test_a_step_that_is_taken_back_leaves_nothing(bundle):
    session, other = bundle.session(), bundle.session()
    for each in (session, other):
        each.prefill([1, 5, 7])
    session.prefill_scored([200, 201, 202], 2)
    session.take_back()
    np.testing.assert_array_equal(session.prefill([9, 10, 11]), other.prefill([9, 10, 11]))


def test_answers_are_the_same_and_copies_take_fewer_steps(bundle, capsys):
    session, tokenizer = bundle.session(), bundle.tokenizer()
    stop = bundle.manifest.config.eos_token_ids
    by_task = {task["task"]: task for task in read_tasks(bundle)}
    for task in by_task.values():
        answers = []
        for lookahead in (0, 3, 7):
            session.reset()
            answers.append(list(generate(session, tokenizer.chat(task["messages"]), max_tokens=64, stop=stop,
                                         lookahead=lookahead)))
        assert answers[0] and answers[1] == answers[2] == answers[0]
    example("lookahead").main(bundle.directory)
    printed = capsys.readouterr().out
    assert "a step of 8 tokens" in printed
    assert float(re.search(r"--lookahead 7.* copy ([\d.]+)", printed)[1]) > 2


def test_a_conversation_goes_on_after_guesses(bundle):
    said = []
    for lookahead in (0, 7):
        chat = Chat(bundle.session(), bundle.tokenizer(), bundle.manifest.config.eos_token_ids)
        said.append(["".join(chat.answer(text, max_tokens=24, lookahead=lookahead))
                     for text in ("copy: abcabcabd", "23+19=?", "copy: abcabcabd")])
        said[-1].append(chat.session.tokens)
    assert said[0] == said[1]


def test_the_command_line_takes_it_and_refuses_too_much(bundle):
    command = ("generate", bundle.directory, "--raw", "--prompt", "abcabcabc", "--max-tokens", 24)
    plain, ahead = lfm_edge(*command), lfm_edge(*command, "--lookahead", 7)
    assert plain.returncode == ahead.returncode == 0 and plain.stdout == ahead.stdout
    refused = lfm_edge("generate", bundle.directory, "--raw", "--prompt", "abc", "--lookahead", 64)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "a lookahead of 64" in refused.stderr


@pytest.mark.parametrize("options", [{"target": "android-q4", "state": "internal"}, {"target": "mlx-q4"}],
                         ids=lambda options: "-".join(options.values()))
def test_programs_that_tell_one_row_of_logits_refuse_it(tmp_path, options):
    session = export(TINY, output=tmp_path / "bundle", context=128, prefill_chunk=16, **options).session()
    with pytest.raises(LfmEdgeError, match=r"a lookahead of 1: .* a step's last token only"):
        generate(session, [1, 5], max_tokens=4, lookahead=1)
