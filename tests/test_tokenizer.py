"""Tokenizers: any text survives, transformers agrees id for id, chat templates cannot do harm."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lfm_edge.errors import BundleError
from lfm_edge.tokenizer import SPECIAL_TOKENS, TextTokenizer, chatml_tokenizer, write_chatml_tokenizer

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
