"""Tokenizers: any text survives, transformers agrees id for id, chat templates cannot do harm."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from lfm_edge.checkpoint.checkpoint import open_checkpoint
from lfm_edge.checkpoint.tokenizer import SPECIAL_TOKENS, TextTokenizer, chatml_tokenizer, write_chatml_tokenizer
from lfm_edge.errors import BundleError, LfmEdgeError
from tests.helpers import save_checkpoint

SIZES = (272, 300, 65_536)
CONVERSATION = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "Grüße & <tags>, wie geht's?\n\n  漢字 🙂"},
    {"role": "assistant", "content": "Gut."},
    {"role": "user", "content": "12345 + 1?"},
]


@pytest.fixture(scope="module", params=SIZES)
def directory(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(f"tokenizer-{request.param}")
    write_chatml_tokenizer(path, request.param)
    return path


@pytest.fixture(scope="module")
def tokenizers():
    return {size: chatml_tokenizer(size) for size in SIZES}


def with_template(path, template):
    write_chatml_tokenizer(path, 300)
    (path / "chat_template.jinja").write_text(template)
    return TextTokenizer(path)


# --- the ChatML tokenizer of random models ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [272, 273, 300, 333, 1000, 65_536])
def test_the_vocabulary_has_exactly_the_size_asked_for(size):
    tokenizer = chatml_tokenizer(size)

    assert tokenizer.get_vocab_size(with_added_tokens=True) == size
    assert sorted(tokenizer.get_vocab().values()) == list(range(size))


@pytest.mark.parametrize("size", SIZES)
def test_special_tokens_have_the_ids_of_lfm2(tokenizers, size):
    published = {"<|pad|>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2, "<|im_start|>": 6, "<|im_end|>": 7,
                 "<|tool_call_start|>": 10, "<|tool_call_end|>": 11}

    assert {token: tokenizers[size].token_to_id(token) for token in published} == published
    for i, token in enumerate(SPECIAL_TOKENS):
        assert tokenizers[size].encode(token, add_special_tokens=False).ids == [i]


@pytest.mark.parametrize("size", [0, 16, 271])
def test_a_vocabulary_too_small_for_all_bytes_is_refused(size):
    with pytest.raises(ValueError, match="needs 272"):
        chatml_tokenizer(size)


@pytest.mark.parametrize("size", SIZES)
@given(text=st.text())
def test_any_text_survives_encoding(tokenizers, size, text):
    ids = tokenizers[size].encode(text, add_special_tokens=False).ids

    assert tokenizers[size].decode(ids, skip_special_tokens=False) == text
    assert all(0 <= i < size for i in ids)


@given(parts=st.lists(st.sampled_from([*SPECIAL_TOKENS, "a", " ", "\n", "ß", "<|", "|>", "🙂"])))
def test_texts_with_special_tokens_survive_encoding(tokenizers, parts):
    text = "".join(parts)

    assert tokenizers[300].decode(tokenizers[300].encode(text, add_special_tokens=False).ids,
                                  skip_special_tokens=False) == text


# --- agreement with transformers ----------------------------------------------------------------------------------


def test_transformers_agrees_on_ids(directory):
    ours, theirs = TextTokenizer(directory), AutoTokenizer.from_pretrained(directory)

    for text in ("", "Hello, world!", "  two  spaces\n\nand lines\t", "Grüße 漢字 🙂 e\u0301", "it's 1234567",
                 "<|im_start|>user\nhi<|im_end|>", "\x00\x7f\u200b"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text, special=False) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)


def test_transformers_agrees_on_the_special_ids_and_size(directory):
    theirs = AutoTokenizer.from_pretrained(directory)

    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 7, 0)
    assert len(theirs) == TextTokenizer(directory).backend.get_vocab_size()


@pytest.mark.parametrize("messages", [CONVERSATION, CONVERSATION[1:2], CONVERSATION[1:]])
def test_transformers_agrees_on_a_conversation(directory, messages):
    theirs = AutoTokenizer.from_pretrained(directory).apply_chat_template(messages, add_generation_prompt=True)

    assert TextTokenizer(directory).chat(messages) == theirs["input_ids"]


def test_a_text_begins_with_the_first_token_and_a_conversation_with_one_only(directory):
    tokenizer = TextTokenizer(directory)

    assert tokenizer.encode("hi")[0] == 1
    assert tokenizer.encode("hi", special=False)[0] != 1
    assert tokenizer.chat(CONVERSATION)[:2] == [1, 6]
    assert tokenizer.chat(CONVERSATION).count(1) == 1


def fields(**values):
    return lambda raw: raw.update(values)


def of_token(index, **values):
    """tokenizer_config.json's entry of a token."""
    return lambda raw: raw["added_tokens_decoder"].setdefault(str(index), {}).update(values)


CUT = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
FILLED = {"strategy": {"Fixed": 13}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
          "pad_token": "<|pad|>"}
NEW = {"content": "<new>", "special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}

# What trainers leave: changes of tokenizer.json and of tokenizer_config.json.
LEFT_BEHIND = {
    "truncation": (fields(truncation=CUT), None),
    "padding": (fields(padding=FILLED), None),
    "both": (fields(truncation=CUT, padding=FILLED), None),
    "a longest text": (None, fields(model_max_length=8)),
    "no first token, which tokenizer.json adds": (None, fields(add_bos_token=False)),
    "a last token, which tokenizer.json does not add": (None, fields(add_eos_token=True)),
    "clean up": (None, fields(clean_up_tokenization_spaces=True)),
    "sides and lengths": (None, fields(padding_side="left", truncation_side="left", max_length=8, truncation=True)),
    "a token that takes spaces": (None, of_token(7, lstrip=True)),
    "a token that is special in one file only": (lambda raw: raw["added_tokens"][6].update(special=False), None),
    "a token that is not special in one file": (None, of_token(6, special=False)),
    "a token of the config alone": (None, of_token(300, **NEW)),
    "an additional token": (None, fields(additional_special_tokens=["<new>"])),
    "a token that only has a purpose": (lambda raw: raw["added_tokens"].pop(7), lambda raw: raw.pop(
        "added_tokens_decoder")),
    "special tokens as text": (None, fields(split_special_tokens=True)),
}


@pytest.mark.parametrize("json_file, config_file", LEFT_BEHIND.values(), ids=LEFT_BEHIND)
def test_transformers_agrees_on_ids_whatever_training_left_in_the_files(tmp_path, json_file, config_file):
    write_chatml_tokenizer(tmp_path, 300)
    for name, change in (("tokenizer.json", json_file), ("tokenizer_config.json", config_file)):
        raw = json.loads((tmp_path / name).read_text())
        (change or fields())(raw)
        (tmp_path / name).write_text(json.dumps(raw))
    ours, theirs = TextTokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)

    for text in ("hi", "The harbour wakes before the town does. At four the first boats slip past , y's",
                 "<|im_start|>user\nhi <|im_end|>\n", "a <new> b <|tool_call_start|> c"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text, special=False) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert ours.chat(CONVERSATION) == theirs.apply_chat_template(CONVERSATION, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("json_file, config_file", [LEFT_BEHIND["both"], LEFT_BEHIND["a token that takes spaces"],
                                                    LEFT_BEHIND["an additional token"]])
def test_a_bundle_s_tokenizer_json_alone_makes_the_same_ids(tmp_path, json_file, config_file):
    """Other clients read that file and nothing else."""
    source, bundle = tmp_path / "model", tmp_path / "bundle"
    bundle.mkdir()
    save_checkpoint(source, vocab_size=301)
    chatml_tokenizer(300).save(str(source / "tokenizer.json"))
    for name, change in (("tokenizer.json", json_file), ("tokenizer_config.json", config_file)):
        raw = json.loads((source / name).read_text())
        (change or fields())(raw)
        (source / name).write_text(json.dumps(raw))

    open_checkpoint(source).copy_text_files(bundle)

    alone, theirs = Tokenizer.from_file(str(bundle / "tokenizer.json")), AutoTokenizer.from_pretrained(source)
    assert alone.truncation is None and alone.padding is None
    for text in ("hi", "a <new> b <|im_end|> c " * 9):
        assert alone.encode(text).ids == theirs.encode(text)


@pytest.mark.parametrize("config", [{"added_tokens_decoder": [7]}, {"added_tokens_decoder": {"x": {"content": "y"}}},
                                    {"added_tokens_decoder": {"7": 7}}, {"extra_special_tokens": 7}])
def test_tokens_that_are_none_are_one_line(tmp_path, config):
    write_chatml_tokenizer(tmp_path, 300)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    with pytest.raises(BundleError, match=r"tokenizer_config\.json: malformed tokens"):
        TextTokenizer(tmp_path)


@pytest.mark.parametrize("text", ["caf\udce9", "\ud83d"])
def test_text_that_is_no_utf_8_is_one_line(directory, text):
    tokenizer = TextTokenizer(directory)

    for encode in (tokenizer.encode, lambda said: tokenizer.chat([{"role": "user", "content": said}])):
        with pytest.raises(LfmEdgeError, match="the text is not UTF-8"):
            encode(text)


# What the templates of published LFM2.5 checkpoints use beyond plain jinja.
PUBLISHED_FEATURES = {
    "generation tag": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
                      "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "json without HTML escapes": "{{ messages | tojson }}",
    "indented json": "{{ messages | tojson(indent=2) }}",
    "namespace and slices": "{% set ns = namespace(text='') %}{% for m in messages[1:] %}"
                            "{% set ns.text = ns.text + m['content'] | trim %}{% endfor %}{{ ns.text }}",
    "loop controls": "{% for m in messages %}{% if loop.index0 == 2 %}{% break %}{% endif %}"
                     "{{ m.content }}{% endfor %}",
    "macro": "{%- macro show(m) -%}{{ m.role }}: {{ m.content }}\n{%- endmacro -%}{{ show(messages[0]) }}",
    "past thinking": "{{ '<think>x</think> y'.split('</think>')[-1] | trim }}{{ bos_token }}",
    "tests of absent things": "{{ keep_past_thinking | default(false) }}{% if tools %}tools{% endif %}"
                              "{% if messages[0].thinking is defined %}?{% endif %}",
    "the year": "{{ strftime_now('%Y') }}",
}


@pytest.mark.parametrize("template", PUBLISHED_FEATURES.values(), ids=PUBLISHED_FEATURES)
def test_templates_mean_what_they_mean_in_transformers(tmp_path, template):
    ours = with_template(tmp_path, template)
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(CONVERSATION, add_generation_prompt=True)

    assert ours.chat(CONVERSATION) == theirs["input_ids"]


def test_of_several_named_templates_the_default_one_is_taken(tmp_path):
    write_chatml_tokenizer(tmp_path, 300)
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = TextTokenizer(tmp_path)

    assert tokenizer.decode(tokenizer.chat(CONVERSATION)) == "plain"


# --- one template in a bundle -------------------------------------------------------------------------------------


def templates_in(directory):
    """What genai and llama.cpp, transformers.js, and transformers take from a directory."""
    held = json.loads((directory / "tokenizer_config.json").read_text())["chat_template"]
    theirs = AutoTokenizer.from_pretrained(directory).chat_template
    files = {"default": (directory / "chat_template.jinja").read_text()} | {
        path.stem: path.read_text() for path in (directory / "additional_chat_templates").glob("*.jinja")}
    return (files, {"default": held} if isinstance(held, str) else {one["name"]: one["template"] for one in held},
            {"default": theirs} if isinstance(theirs, str) else theirs)


OF_A_CHECKPOINT = {
    "only in the config": ({}, "old", {"default": "old"}),
    "only in the file": ({"chat_template.jinja": "new"}, None, {"default": "new"}),
    "the same in both": ({"chat_template.jinja": "new"}, "new", {"default": "new"}),
    "another one in the file": ({"chat_template.jinja": "new"}, "old", {"default": "new"}),
    "line ends of Windows": ({"chat_template.jinja": "new\r\nline"}, "old", {"default": "new\nline"}),
    "several in the config": ({}, [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}],
                              {"default": "a", "tool_use": "b"}),
    "one in the file, several in the config": (
        {"chat_template.jinja": "new"}, [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}],
        {"default": "new"}),
    "several files": ({"chat_template.jinja": "new", "additional_chat_templates/tool_use.jinja": "tools"}, "old",
                      {"default": "new", "tool_use": "tools"}),
}


@pytest.mark.parametrize("files, held, expected", OF_A_CHECKPOINT.values(), ids=OF_A_CHECKPOINT)
def test_every_file_of_a_bundle_has_the_template_that_transformers_takes(tmp_path, files, held, expected):
    source, bundle = save_checkpoint(tmp_path / "model"), tmp_path / "bundle"
    bundle.mkdir()
    (source / "chat_template.jinja").unlink()
    (source / "additional_chat_templates").mkdir()
    config = json.loads((source / "tokenizer_config.json").read_text()) | {"chat_template": held}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (source / name).write_text(text, newline="")
    theirs = AutoTokenizer.from_pretrained(source).chat_template

    open_checkpoint(source).copy_text_files(bundle)

    assert ({"default": theirs} if isinstance(theirs, str) else theirs) == expected
    assert templates_in(bundle) == (expected,) * 3
    assert TextTokenizer(bundle).templates == TextTokenizer(source).templates == expected


@pytest.mark.parametrize("held", [[{"name": "../../evil", "template": "x"}], [{"name": "a/b", "template": "x"}], 7,
                                  [{"name": "default", "template": 7}], {"": "x"}])
def test_a_template_without_a_proper_name_is_one_line_and_leads_nowhere(tmp_path, held):
    source, bundle = save_checkpoint(tmp_path / "model"), tmp_path / "bundle"
    bundle.mkdir()
    (source / "chat_template.jinja").unlink()
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": held}))

    with pytest.raises(LfmEdgeError, match=r"tokenizer_config\.json: chat_template: "):
        open_checkpoint(source).copy_text_files(bundle)
    assert not list(tmp_path.rglob("*evil*"))


# --- hostile and broken files -------------------------------------------------------------------------------------

HOSTILE = {
    "classes of an object": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ raise_exception.__globals__['__builtins__']['__import__']('os')"
                             ".system('touch FILE') }}",
    "the environment": "{{ self.__init__.__globals__ }}",
    "attributes by filter": "{{ (''|attr('__class__')).__mro__ }}",
    "format string": "{{ '{0.__class__.__mro__}'.format(messages) ~ ''.__class__.x.y }}",
    "changing the conversation": "{{ messages.append('x') }}",
    "a giant range": "{{ range(10 ** 10) | list }}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "division by zero": "{{ 1 / 0 }}",
    "a file": "{% include '/etc/passwd' %}",
    "another template": "{% extends '/etc/passwd' %}",
    "no such method": "{{ messages[0].content.nothing() }}",
    "adding text and numbers": "{{ 'a' + 1 }}",
    "its own refusal": "{{ raise_exception('roles must alternate') }}",
    "bad syntax": "{% for m in messages %}",
    "unknown tag": "{% exec 'touch FILE' %}",
    "deep nesting": "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
}


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_or_broken_template_is_a_bundle_error_and_nothing_runs(tmp_path, template):
    marker = tmp_path / "executed"
    tokenizer = with_template(tmp_path, template.replace("FILE", str(marker)))

    with pytest.raises(BundleError, match="chat template: ") as refusal:
        tokenizer.chat(CONVERSATION)

    assert "\n" not in str(refusal.value)
    assert not marker.exists()


def test_the_refusal_of_a_template_is_shown(tmp_path):
    with pytest.raises(BundleError, match="chat template: roles must alternate"):
        with_template(tmp_path, "{{ raise_exception('roles must alternate') }}").chat(CONVERSATION)


def test_without_a_template_there_is_no_chat_but_text(tmp_path):
    chatml_tokenizer(300).save(str(tmp_path / "tokenizer.json"))
    tokenizer = TextTokenizer(tmp_path)

    with pytest.raises(BundleError, match="no chat template"):
        tokenizer.chat(CONVERSATION)
    assert tokenizer.decode(tokenizer.encode("hi")) == "hi"


def test_a_missing_tokenizer_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"tokenizer\.json: no tokenizer"):
        TextTokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"{", b"\xff\x00", b'{"model": {"type": "Nothing"}}'])
def test_a_damaged_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)

    with pytest.raises(BundleError, match=r"tokenizer\.json: not a tokenizer"):
        TextTokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_tokenizer_config_is_refused(tmp_path, content):
    write_chatml_tokenizer(tmp_path, 300)
    (tmp_path / "tokenizer_config.json").write_bytes(content)

    with pytest.raises(BundleError, match=r"tokenizer_config\.json"):
        TextTokenizer(tmp_path)


def test_a_template_that_is_no_text_is_refused(tmp_path):
    write_chatml_tokenizer(tmp_path, 300)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")

    with pytest.raises(BundleError, match=r"chat_template\.jinja: not text"):
        TextTokenizer(tmp_path)
