"""Ctrl-C in `chat`: it ends an answer, or leaves; the file of the conversation is whole either way."""

import json

import pytest
from safetensors import safe_open

from lfm_edge import cli
from lfm_edge.session.session import Session


class Typed:
    """Standard input of a person: lines, and Ctrl-C in the place of one."""

    def __init__(self, lines, terminal=True):
        self.lines, self.terminal = list(lines), terminal

    def isatty(self):
        return self.terminal

    def readline(self):
        line = self.lines.pop(0) if self.lines else ""
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return f"{line}\n" if line else ""


@pytest.fixture
def talk(tiny_bundle, tmp_path, monkeypatch):
    """Chat with the lines that are typed, interrupted after so many steps; the messages and tokens that are saved."""
    def chat(*lines, after=None, terminal=True, loses_state=False):
        take, steps = Session._take, 0

        def interrupted(self, tokens):
            nonlocal steps
            steps += 1
            if steps == after:
                if loses_state:
                    monkeypatch.setattr(type(self), "_replace", lambda *_: 1 / 0)
                raise KeyboardInterrupt
            take(self, tokens)

        with monkeypatch.context() as patch:
            patch.setattr(Session, "_take", interrupted)
            patch.setattr(cli.sys, "stdin", Typed(lines, terminal))
            try:
                chat.code = cli.app(["chat", str(tiny_bundle.directory), "--session", str(tmp_path / "talk"),
                                     "--max-tokens", "8"], standalone_mode=False)
            finally:
                monkeypatch.undo() if loses_state else None
        return saved(tmp_path / "talk")

    return chat


def saved(path):
    with safe_open(str(path), framework="pt") as file:
        return json.loads(file.metadata()["messages"]), file.get_tensor("tokens").tolist()


def test_an_answer_ends_and_the_conversation_goes_on_as_if_the_question_had_not_been(talk, tmp_path):
    messages, _ = talk("23+19=?", "copy: w4 y2 v1", after=3)
    expected = [entry["content"] for entry in messages]
    (tmp_path / "talk").unlink()
    plain, _ = talk("copy: w4 y2 v1")
    assert expected == [entry["content"] for entry in plain] and expected[0] == "copy: w4 y2 v1"


def test_at_the_prompt_it_leaves_and_saves(talk):
    messages, tokens = talk("23+19=?", KeyboardInterrupt)
    assert len(messages) == 2 and tokens


def test_in_a_script_it_ends_the_command_and_what_was_said_before_is_saved(talk, tmp_path):
    messages, _ = talk("23+19=?", "copy: w4 y2 v1", "23+19=?", after=5, terminal=False)
    assert talk.code == 130  # as a shell has it
    assert [entry["content"] for entry in messages][:1] == ["23+19=?"] and len(messages) == 2
    goes_on, _ = talk("copy: w4 y2 v1")
    (tmp_path / "talk").unlink()
    plain, _ = talk("23+19=?", "copy: w4 y2 v1")
    assert goes_on == plain


def test_of_a_broken_session_the_conversation_is_saved_and_no_wrong_state(talk):
    messages, tokens = talk("23+19=?", "copy: w4 y2 v1", KeyboardInterrupt, after=5, loses_state=True)
    assert [entry["content"] for entry in messages][:1] == ["23+19=?"] and len(messages) == 2
    assert tokens == []
