"""Answers: what `generate` and `chat` make of prompts and options, and how they say it."""

import json
import random
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from lfm_edge import Chat, Sampling, generate, open_bundle
from lfm_edge.bundle.bundle import Bundle
from lfm_edge.checkpoint.checkpoint import open_checkpoint
from lfm_edge.checkpoint.tokenizer import TextTokenizer
from lfm_edge.errors import LfmEdgeError
from lfm_edge.session.generation import text_pieces
from tests.helpers import REPO, TINY, code_of, in_process, lfm_edge

SWITCH = ("{%- if enable_thinking is defined and enable_thinking -%}{{- '<think>' -}}{%- endif -%}"
          "{%- if style == 'short' -%}{{- 'brief' -}}{%- endif -%}")


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer(TINY)


@pytest.fixture
def with_template(tiny_bundle, tmp_path):
    """The trained toy's bundle, with something before its chat template or in its place, and other settings."""
    def make(before="", template=None, generation=None):
        directory = shutil.copytree(tiny_bundle.directory, tmp_path / "changed")
        path = directory / "chat_template.jinja"
        path.write_text(before + path.read_text() if template is None else template)
        if generation is not None:
            file = directory / "generation_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | generation))
        Bundle.open(directory, check=False).manifest.write(directory)
        return open_bundle(directory)

    return make


# --- generate -----------------------------------------------------------------------------------------------------


def test_a_first_question_gets_the_answer_that_chat_gives(tiny_bundle):
    asked = lfm_edge("generate", tiny_bundle.directory, "--prompt", "23+19=?")
    said = lfm_edge("chat", tiny_bundle.directory, input="23+19=?\n")

    assert asked.stdout == said.stdout == "42\n", asked.stderr + said.stderr


def test_raw_continues_the_text_as_it_is(tiny_bundle):
    session, tokenizer = tiny_bundle.session(), tiny_bundle.tokenizer()
    prompt = "<|im_start|>user\n23+19=?<|im_end|>\n<|im_start|>assistant\n"
    expected = list(generate(session, tokenizer.encode(prompt), max_tokens=9, stop=[7]))

    run = in_process("generate", tiny_bundle.directory, "--raw", "--prompt", prompt, "--max-tokens", 9)

    assert run.stdout == tokenizer.decode(expected) + "\n" == "42\n"


def test_without_a_chat_template_a_prompt_is_continued(with_template):
    bundle = with_template()
    (bundle.directory / "chat_template.jinja").unlink()
    config = bundle.directory / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": None}))
    Bundle.open(bundle.directory, check=False).manifest.write(bundle.directory)

    plain, raw = (in_process("generate", bundle.directory, "--prompt", "The harbour", "--max-tokens", 8, *more)
                  for more in ([], ["--raw"]))

    assert plain.returncode == 0 and plain.stdout == raw.stdout


def test_a_system_prompt_is_the_conversation_s_first_message(tiny_bundle):
    chat = Chat(tiny_bundle.session(), tiny_bundle.tokenizer(), [7], system="Be kind.")
    expected = "".join(chat.answer("23+19=?", max_tokens=12))
    run = in_process("generate", tiny_bundle.directory, "--system", "Be kind.", "--prompt", "23+19=?",
                     "--max-tokens", 12)

    assert run.stdout == expected + "\n"
    assert chat.messages[0] == {"role": "system", "content": "Be kind."}
    assert "Be kind." in tiny_bundle.tokenizer().decode(chat.session.tokens, skip_special=False)
    chat.reset()
    assert [message["role"] for message in chat.messages] == ["system"]


@pytest.mark.parametrize("options, complaint", [
    (["--raw", "--system", "x"], "--raw: without the chat template there is no --system"),
    (["--raw", "--template-option", "a=1"], "--raw: without the chat template there is no --system"),
    (["--template-option", "a=1"], "the chat template of this bundle has no switch 'a'; it has none"),
    (["--template-option", "messages=1"], "has no switch 'messages'"),
    (["--template-option", "thinking"], "--template-option thinking: expected KEY=VALUE"),
    (["--template-option", "a-b=1"], "--template-option a-b=1: expected KEY=VALUE"),
    (["--greedy", "--top-k", "3"], "--greedy: takes the best token; leave out --top-k"),
    (["--greedy", "--repetition-penalty", "1.2"], "leave out --repetition-penalty"),
    (["--repetition-penalty", "0"], "repetition_penalty is 0.0; it must be above 0"),
    (["--top-p", "0"], "top_p is 0.0; it must be above 0"),
], ids=" ".join)
def test_what_does_not_go_together_is_one_line(tiny_bundle, options, complaint):
    run = in_process("generate", tiny_bundle.directory, "--prompt", "hi", *options)

    assert run.returncode == 2 and run.stderr.count("\n") == 1 and complaint in run.stderr


def test_a_template_that_shows_no_system_prompt_is_told(with_template):
    bundle = with_template(template="{{ messages[-1].content }}")
    run = in_process("generate", bundle.directory, "--prompt", "hi", "--system", "x")

    assert run.returncode == 2 and "does not show a system prompt to the model; leave it out" in run.stderr


@pytest.mark.parametrize("given, shown", [
    ({}, ""), ({"enable_thinking": True}, "<think>"), ({"enable_thinking": False}, ""), ({"style": "short"}, "brief")])
def test_a_template_s_switches_are_the_user_s(with_template, given, shown):
    bundle = with_template(before=SWITCH)
    tokenizer = bundle.tokenizer()

    Chat(bundle.session(), tokenizer, [7], options=given)
    text = tokenizer.decode(tokenizer.chat([{"role": "user", "content": "hi"}], options=given), skip_special=False)

    assert text.startswith(shown + "<|startoftext|>")
    with pytest.raises(LfmEdgeError, match="no switch 'thinking'; it has enable_thinking, style"):
        tokenizer.check_options({"thinking": True})


def test_a_template_that_cannot_be_parsed_is_one_line(with_template):
    bundle = with_template(template="{{ " + "(" * 3000 + "x" + ")" * 3000 + " }}")
    for options in ([], ["--template-option", "x=1"]):
        run = in_process("generate", bundle.directory, "--prompt", "hi", *options)

        assert run.returncode == 2 and run.stderr.count("\n") == 1


def test_switches_reach_the_template_from_the_command_line(with_template):
    bundle = with_template(before="{{- raise_exception('so it is ' ~ (enable_thinking is false) ~ level) -}}")
    run = in_process("generate", bundle.directory, "--prompt", "hi", "--template-option", "enable_thinking=false",
                   "--template-option", "level=3 a")

    assert run.returncode == 2 and "so it is True3 a" in run.stderr


# --- sampling -----------------------------------------------------------------------------------------------------


def test_the_checkpoint_s_sampling_is_the_default_and_greedy_goes_without(with_template, tiny_bundle):
    bundle = with_template(generation={"do_sample": True, "temperature": 30.0, "top_k": 0})
    assert bundle.sampling == Sampling(30.0)

    def said(where, *options):
        return in_process("generate", where.directory, "--prompt", "23+19=?", "--max-tokens", 24, *options).stdout

    wild = said(bundle, "--seed", 1)
    assert wild != said(bundle, "--seed", 2) and wild == said(bundle, "--seed", 1)
    assert said(bundle, "--greedy") == said(bundle, "--temperature", 0) == said(bundle, "--top-k", 1) == "42\n"
    assert said(tiny_bundle, "--temperature", 30, "--seed", 1) == wild
    assert in_process("chat", bundle.directory, "--greedy", input="23+19=?\n").stdout == "42\n"


def test_generation_settings_that_are_none_are_one_line(with_template):
    bundle = with_template(generation={"do_sample": True, "top_p": "most"})
    run = in_process("generate", bundle.directory, "--prompt", "hi")

    assert run.returncode == 2 and "generation_config.json: top_p is 'most'; expected a number" in run.stderr


# --- chat ---------------------------------------------------------------------------------------------------------


def test_chat_has_commands_and_says_so(tiny_bundle):
    run = in_process("chat", tiny_bundle.directory, input="/help\n/what\n23+19=?\n/quit\n1+1=?\n")

    assert run.stdout == "42\n" and run.returncode == 0
    for word in ("/reset", "/tool RESULT", "/quit", "/what: no such command; /help lists them"):
        assert word in run.stderr


def test_a_conversation_that_is_too_long_says_how_to_begin_anew(tiny_bundle):
    run = in_process("chat", tiny_bundle.directory, input="a" * 3000 + "\n/reset\n23+19=?\n")

    assert "the context holds 1024; /reset begins anew" in run.stderr and run.stdout == "\n42\n"
    alone = in_process("generate", tiny_bundle.directory, "--prompt", "a" * 3000)
    assert alone.returncode == 2 and alone.stderr.rstrip().endswith("the context holds 1024")


def test_a_system_prompt_has_no_place_in_a_conversation_that_has_begun(tiny_bundle, tmp_path):
    command = ("chat", tiny_bundle.directory, "--session", tmp_path / "talk")
    first = in_process(*command, "--system", "Be kind.", input="23+19=?\n")
    again = in_process(*command, "--system", "Be rude.", input="x\n")
    goes_on = in_process(*command, input="11+11=?\n")

    assert first.returncode == 0 and "goes on after 3 messages" in goes_on.stderr
    assert again.returncode == 2 and "has begun already; leave it out" in again.stderr


def test_two_system_prompts_are_one_too_many(tiny_bundle, tmp_path):
    session = tiny_bundle.session()
    session.save(tmp_path / "baked")
    with pytest.raises(LfmEdgeError, match="leave one out"):
        Chat(session, tiny_bundle.tokenizer(), [7], tmp_path / "baked", system="x")


# --- the text as it comes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["plain words, and more", "Grüße, 世界! 👩\u200d👧 e\u0301 \u0627", " a  b\n\n\tc ",
                                  "\ufffd\ufffd x \ufffd", ""])
def test_pieces_are_the_text(tokenizer, text):
    ids = tokenizer.encode(text, special=False)

    pieces = list(text_pieces(tokenizer.shown, iter(ids)))

    assert "".join(pieces) == tokenizer.shown(ids) == text
    assert all(pieces)


@pytest.mark.parametrize("seed", range(40))
def test_pieces_of_any_tokens_are_their_text(tokenizer, seed):
    """Bytes that are no UTF-8 and markers among them."""
    choose = random.Random(seed)
    ids = [choose.randrange(272) for _ in range(choose.randrange(60))]

    assert "".join(text_pieces(tokenizer.shown, iter(ids))) == tokenizer.shown(ids)


def test_what_is_whole_is_said_at_once(tokenizer):
    ids = tokenizer.encode("ab é", special=False)
    heard = []
    pieces = text_pieces(tokenizer.shown, (heard.append(token) or token for token in ids))

    assert [(next(pieces), len(heard)) for _ in range(4)] == [("a", 1), ("b", 2), (" ", 3), ("é", 5)]


def test_a_long_answer_costs_no_more_a_token_than_a_short_one(tokenizer, monkeypatch):
    decoded = []
    shown = TextTokenizer.shown
    monkeypatch.setattr(TextTokenizer, "shown", lambda self, ids: decoded.append(len(ids)) or shown(self, ids))

    "".join(text_pieces(tokenizer.shown, iter(tokenizer.encode("straße, 世界! " * 200, special=False))))

    assert max(decoded) <= 8


def test_on_a_terminal_an_answer_ends_with_its_speed(tiny_bundle):
    command = shlex.join([sys.executable, "-m", "lfm_edge.cli", "generate", str(tiny_bundle.directory), "--prompt",
                          "23+19=?"])
    run = subprocess.run(["script", "--quiet", "--command", command, "/dev/null"], capture_output=True, text=True,
                         check=False, cwd=REPO)

    assert "loading ..." in run.stdout
    assert re.search(r"42\s+.*\[2 tokens, [\d.,]+ a second\]", run.stdout), run.stdout


# --- Python -------------------------------------------------------------------------------------------------------


def test_what_answers_take_is_reached_from_the_package(tiny_bundle):
    checkpoint = open_checkpoint(TINY)
    stop = tiny_bundle.manifest.config.eos_token_ids
    session, tokenizer = tiny_bundle.session(), tiny_bundle.tokenizer()
    tokens = generate(session, tokenizer.chat([{"role": "user", "content": "23+19=?"}]), max_tokens=8, stop=stop,
                      sampling=tiny_bundle.sampling)

    assert tokenizer.decode(list(tokens)) == "42" and stop == checkpoint.config.eos_token_ids


def test_the_program_in_the_docs_runs(tiny_bundle, tmp_path):
    program = code_of("reference/python.md", "python", "from lfm_edge import Chat, Sampling")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/tiny-model-android-q4").symlink_to(tiny_bundle.directory)

    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)

    assert run.returncode == 0 and run.stdout, run.stderr
