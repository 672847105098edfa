"""Tokenizer files: reading the checkpoint's, and a working ChatML tokenizer for `random:` models."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from lfm_edge.errors import BundleError
from lfm_edge.files import read_json_object
from lfm_edge.sandbox import BoundedSandbox, limited_time

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                   "special_tokens_map.json", "generation_config.json")

# Ids 0 to 15 of the published LFM2 / LFM2.5 vocabulary of 65,536 tokens.
SPECIAL_TOKENS = (
    "<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|fim_pre|>", "<|fim_mid|>", "<|fim_suf|>",
    "<|im_start|>", "<|im_end|>", "<|tool_list_start|>", "<|tool_list_end|>", "<|tool_call_start|>",
    "<|tool_call_end|>", "<|tool_response_start|>", "<|tool_response_end|>", "<|reserved_4|>", "<|reserved_5|>",
)
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256

# How LFM2's published tokenizer cuts text before byte-pair merges.
SPLIT_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                 r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

CHATML_TEMPLATE = (
    "{{- bos_token -}}\n"
    "{%- for message in messages -%}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "    {{- '<|im_start|>assistant\\n' -}}\n"
    "{%- endif -%}\n"
)


def chatml_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level tokenizer with LFM2's special ids that fills a vocabulary of any size from 272 on.

    Ids 0-15 are LFM2's special tokens, 16-271 the bytes, the rest pairs of bytes in a fixed order. It
    encodes and decodes any text; it is not the published vocabulary.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size={vocab_size}: a byte-level ChatML vocabulary needs {SMALLEST_VOCABULARY}")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _first(product(alphabet, alphabet), vocab_size - SMALLEST_VOCABULARY)
    entries = [*SPECIAL_TOKENS, *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(entries)}, merges=merges))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A", special_tokens=[("<|startoftext|>", SPECIAL_TOKENS.index("<|startoftext|>"))])
    return tokenizer


def _first(pairs: Iterator[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    return [pair for pair, _ in zip(pairs, range(count), strict=False)]


def write_chatml_tokenizer(directory: Path, vocab_size: int) -> None:
    """Write tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json."""
    chatml_tokenizer(vocab_size).save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1_000_000_000,
        "bos_token": "<|startoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>",
        "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False,
        "chat_template": CHATML_TEMPLATE,
        "added_tokens_decoder": {str(i): {"content": token, "special": True, "normalized": False, "lstrip": False,
                                          "rstrip": False, "single_word": False}
                                 for i, token in enumerate(SPECIAL_TOKENS)},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(CHATML_TEMPLATE)
    (directory / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 0}, indent=2) + "\n")


class TextTokenizer:
    """A tokenizer with its chat template, read from a directory of published files.

    Chat templates come with the checkpoint and are not trusted: they run in a sandbox, for a limited time.

    listed: names of the files that may be read, where others in the directory may not; None for all

    Raises BundleError where tokenizer.json is missing or unreadable.
    """

    def __init__(self, directory: Path, listed: Container[str] | None = None) -> None:
        def is_there(path: Path) -> bool:
            return (listed is None or path.name in listed) and path.is_file()

        path = directory / "tokenizer.json"
        if not is_there(path):
            raise BundleError(f"{path}: no tokenizer; text needs one")
        self._path = path
        with self._failures():
            self.backend = Tokenizer.from_file(str(path))
        config = directory / "tokenizer_config.json"
        self.config = read_json_object(config, BundleError) if is_there(config) else {}
        template = directory / "chat_template.jinja"
        try:
            self.template = (template.read_text() if is_there(template)
                             else default_template(self.config.get("chat_template")))
        except (OSError, ValueError) as error:
            raise BundleError(f"{template}: not text ({error})") from None

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Whatever the Rust library raises as ours: bare Exception, and a BaseException where it panics."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise BundleError(f"{self._path}: not a tokenizer that works ({error})") from None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`; with `special`, what the tokenizer puts around a text (LFM2: a first token) is there."""
        with self._failures():
            return self.backend.encode(text, add_special_tokens=special).ids

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        """The text of `ids`."""
        with self._failures():
            return self.backend.decode(ids, skip_special_tokens=skip_special)

    def chat(self, messages: list[dict[str, str]], *, answer: bool = True) -> list[int]:
        """Token ids of a conversation; with `answer`, up to where the assistant speaks next.

        Raises BundleError where there is no chat template, or the template refuses.
        """
        if self.template is None:
            raise BundleError("this bundle has no chat template; use `generate` with a plain prompt")
        environment = _environment()
        tokens = {name: _content(self.config.get(name, "")) for name in ("bos_token", "eos_token", "pad_token")}
        try:
            with limited_time():
                text = environment.from_string(self.template).render(
                    messages=messages, add_generation_prompt=answer, tools=None, **tokens)
        except Exception as error:  # a template is foreign code; it can raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BundleError(f"chat template: {reason}") from None
        return self.encode(text, special=False)


class _Generation(Extension):
    """`{% generation %}` marks what the assistant said, for training; here it is its own content."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> BoundedSandbox:
    """What published chat templates expect: the same tags, filters and functions as in transformers."""
    environment = BoundedSandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """JSON as it is; jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _content(token: Any) -> str:
    return token.get("content", "") if isinstance(token, dict) else str(token or "")


def default_template(template: Any) -> str | None:
    """The default template; published configs hold one text, or a list of named ones."""
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        return named.get("default")
    return template
