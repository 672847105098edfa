"""Tool calls: their markers are shown, the history keeps them, and functions reach the chat template."""

import io
import json
import signal
import sys

import numpy as np
import pytest
from transformers import AutoTokenizer

from lfm_edge import cli
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.checkpoint.tokenizer import SPECIAL_TOKENS, TextTokenizer, write_chatml_tokenizer
from lfm_edge.errors import LfmEdgeError
from lfm_edge.session.generation import Chat, generate, read_tools, text_pieces
from lfm_edge.session.session import Session
from lfm_edge.session.state import StateSpec
from tests.helpers import fill_bundle, hf_config

CALL = '<|tool_call_start|>[weather(city="Oslo")]<|tool_call_end|>'
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Of a city, in <b>°C</b>.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]

# As LFM2's: functions in the system message, what a function gave between markers, and thoughts that are past left out.
TEMPLATE = """\
{{- bos_token -}}
{%- if tools -%}
    {{- '<|im_start|>system\\nList of tools: <|tool_list_start|>' -}}
    {%- for tool in tools -%}{{- tool | tojson -}}{%- if not loop.last -%}{{- ', ' -}}{%- endif -%}{%- endfor -%}
    {{- '<|tool_list_end|><|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set content = message['content'] -%}
    {%- if message['role'] == 'tool' -%}
        {%- set content = '<|tool_response_start|>' + content + '<|tool_response_end|>' -%}
    {%- endif -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


class Scripted(Session):
    """A session whose model says what it is told to, whatever it is asked. prefills: how many tokens each step took"""

    def __init__(self, tokenizer, *answers):
        config = ModelConfig.from_dict(hf_config().to_dict())
        super().__init__(StateSpec.of(config, 512), config.vocab_size, 512)
        self.script = [token for answer in answers for token in (*tokenizer.encode(answer, special=False), 7)]
        self.steps = []

    def _step(self, tokens):
        self.steps.append(len(tokens))
        logits = np.zeros(self.vocab_size, np.float32)
        logits[self.script.pop(0)] = 1.0
        return logits


@pytest.fixture
def tokenizer(tmp_path):
    write_chatml_tokenizer(tmp_path, 300)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return TextTokenizer(tmp_path)


def said(chat, text, **options):
    return "".join(chat.answer(text, max_tokens=100, **options))


# --- shown and kept -----------------------------------------------------------------------------------------------


def test_what_structures_a_conversation_is_hidden_and_every_other_marker_is_content(tokenizer):
    hidden = {"<|pad|>", "<|startoftext|>", "<|im_start|>", "<|im_end|>"}
    for index, token in enumerate(SPECIAL_TOKENS):
        around = tokenizer.encode("a", special=False)
        assert tokenizer.shown([*around, index, *around]) == ("aa" if token in hidden else f"a{token}a")


def test_markers_are_content_without_a_chat_template_too(tmp_path):
    write_chatml_tokenizer(tmp_path, 300)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('not today') }}")
    tokenizer = TextTokenizer(tmp_path)

    assert tokenizer.shown(tokenizer.encode(CALL)) == CALL


def test_a_stream_shows_the_markers_of_a_tool_call(tokenizer):
    session = Scripted(tokenizer, CALL)

    assert "".join(text_pieces(tokenizer.shown, generate(session, [1], max_tokens=100, stop=[7]))) == CALL


def test_chat_shows_a_tool_call_and_keeps_it_so_that_the_next_turn_prefills_what_is_new_only(tokenizer):
    session = Scripted(tokenizer, f"Let me see.{CALL}", "4 degrees.", "Bring gloves.")
    chat = Chat(session, tokenizer, [7], tools=TOOLS)

    assert said(chat, "Is it cold in Oslo?") == f"Let me see.{CALL}"
    assert chat.messages[-1] == {"role": "assistant", "content": f"Let me see.{CALL}"}
    for text, role, answer in (('{"celsius": 4}', "tool", "4 degrees."), ("And now?", "user", "Bring gloves.")):
        held = list(session.tokens)
        session.steps.clear()
        assert said(chat, text, role=role) == answer
        turn = tokenizer.chat(chat.messages[:-1], tools=TOOLS)
        assert turn[:len(held)] == held
        assert session.steps[0] == len(turn) - len(held)
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "assistant", "user",
                                                              "assistant"]


def test_what_a_tool_gave_stands_where_the_template_puts_it(tokenizer):
    chat = Chat(Scripted(tokenizer, CALL, "4."), tokenizer, [7], tools=TOOLS)
    said(chat, "Oslo?")
    said(chat, "4", role="tool")

    assert "<|tool_response_start|>4<|tool_response_end|>" in tokenizer.decode(chat.session.tokens, skip_special=False)


# --- functions for the template -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tools", [TOOLS, [TOOLS[0]["function"]], [*TOOLS, *TOOLS], None])
def test_transformers_agrees_on_a_conversation_with_tools(tmp_path, tokenizer, tools):
    messages = [{"role": "user", "content": "Oslo?"}, {"role": "assistant", "content": CALL},
                {"role": "tool", "content": "4"}]
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, tools=tools,
                                                                        add_generation_prompt=True)

    assert tokenizer.chat(messages, tools=tools) == theirs["input_ids"]


@pytest.mark.parametrize("where", ["file", "config"])
def test_a_template_of_its_own_for_tools_is_taken_with_tools_as_in_transformers(tmp_path, where):
    write_chatml_tokenizer(tmp_path, 300)
    templates = {"default": "plain", "tool_use": "tools: {{ tools | tojson }}"}
    if where == "file":
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "chat_template.jinja").write_text(templates["default"])
        (tmp_path / "additional_chat_templates/tool_use.jinja").write_text(templates["tool_use"])
    else:
        (tmp_path / "chat_template.jinja").unlink()
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = TextTokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    asked = [{"role": "user", "content": "hi"}]

    for tools in (None, TOOLS):
        assert ours.chat(asked, tools=tools) == theirs.apply_chat_template(
            asked, tools=tools, add_generation_prompt=True)["input_ids"]


def test_a_template_that_takes_no_tools_is_told(tmp_path):
    write_chatml_tokenizer(tmp_path, 300)
    tokenizer = TextTokenizer(tmp_path)

    with pytest.raises(LfmEdgeError, match="chat template of this bundle does not show them to the model"):
        Chat(Scripted(tokenizer), tokenizer, [7], tools=TOOLS)


@pytest.mark.parametrize("content", [TOOLS, TOOLS[0], TOOLS[0]["function"], [TOOLS[0]["function"]]])
def test_a_file_holds_one_function_or_a_list_of_them(tmp_path, content):
    (tmp_path / "tools.json").write_text(json.dumps(content))

    assert read_tools(tmp_path / "tools.json") == (content if isinstance(content, list) else [content])


BAD = {
    "not JSON": (b"{", "not JSON"), "not UTF-8": (b'["\xff"]', "not UTF-8 text (byte 2)"), "empty": (b"", "is empty"),
    "deep": (b"[" * 100_000, "not JSON"), "none": (b"[]", "is no function"), "a number": (b"7", "7 is no function"),
    "no name": (b'[{"description": "?"}]', "is no function"), "a name that is none": (b'{"name": 1}', "is no function"),
    "a function that is none": (b'{"type": "function", "function": "weather"}', "is no function"),
}


@pytest.mark.parametrize("content, message", BAD.values(), ids=BAD)
def test_a_file_of_anything_else_is_one_line(tmp_path, content, message):
    (tmp_path / "tools.json").write_bytes(content)

    with pytest.raises(LfmEdgeError) as refusal:
        read_tools(tmp_path / "tools.json")

    assert str(refusal.value).startswith(f"{tmp_path}/tools.json: ") and message in str(refusal.value)
    assert "\n" not in str(refusal.value)


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def talk(tmp_path, monkeypatch, capfd):
    """`chat` over lines of standard input, with a model that says what it is told to; exit code, output, session."""
    before = signal.getsignal(signal.SIGTERM)

    def run(lines, *answers, options=(), template=TEMPLATE):
        from lfm_edge.bundle.bundle import Bundle

        bundle = tmp_path / "bundle"
        bundle.mkdir()
        fill_bundle(bundle)
        (bundle / "tools.json").write_text(json.dumps(TOOLS))
        (bundle / "chat_template.jinja").write_text(template)
        tokenizer = TextTokenizer(bundle)
        fill = Scripted(tokenizer, *answers)
        monkeypatch.setattr(Bundle, "_check_files", lambda self: None)
        monkeypatch.setattr(Bundle, "session", lambda self, threads=None: fill)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), "utf-8"))
        monkeypatch.setattr(sys, "argv", ["lfm-edge", "chat", str(bundle), *map(str, options)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, capfd.readouterr(), fill

    yield run
    signal.signal(signal.SIGTERM, before)


def test_chat_hands_functions_to_the_template_and_answers_a_call_with_a_line(talk, tmp_path):
    code, output, session = talk(b"Oslo?\n/tool 4 degrees\n", CALL, "Cold.",
                                 options=["--tools", tmp_path / "bundle/tools.json"])
    held = TextTokenizer(tmp_path / "bundle").decode(session.tokens, skip_special=False)

    assert (code, output.out, output.err) == (0, f"{CALL}\nCold.\n", "")
    assert json.dumps(TOOLS[0], ensure_ascii=False) in held
    assert "<|im_start|>tool\n<|tool_response_start|>4 degrees<|tool_response_end|>" in held


def test_chat_says_that_a_template_takes_no_tools(talk, tmp_path):
    code, output, _ = talk(b"Oslo?\n", options=["--tools", tmp_path / "bundle/tools.json"], template="plain")

    assert code == 2
    assert output.err.startswith("error: tools: the chat template of this bundle") and output.err.count("\n") == 1


def test_a_line_that_is_no_text_costs_that_line_only(talk):
    code, output, _ = talk(b"caf\xe9\nOslo?\n", "Cold.")

    assert (code, output.out) == (0, "\nCold.\n")
    assert output.err == "error: the text is not UTF-8 (at character 4)\n"
