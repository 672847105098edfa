"""Tokenizer files: reading the checkpoint's, and a working ChatML tokenizer for `random:` models."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cached_property
from itertools import groupby, product
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from lfm_edge.checkpoint.sandbox import BoundedSandbox, limited_time
from lfm_edge.checkpoint.typed import StandIns, mapped, respelled
from lfm_edge.errors import BundleError, LfmEdgeError
from lfm_edge.files import read_json_object

TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
CHAT_TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
TOKENIZER_FILES = (TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE, SPECIAL_TOKENS_MAP, GENERATION_CONFIG)
DEFAULT_TEMPLATE, TOOL_TEMPLATE = "default", "tool_use"  # as transformers names them

Message = dict[str, Any]  # `role` and `content`, and what else a chat template reads

# The tokens that tokenizer_config.json gives a purpose.
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TEMPLATE_NAME = re.compile(r"\w[\w.-]*")
_TO_TEMPLATES = ("bos_token", "eos_token", "pad_token")
_GIVEN = ("messages", "add_generation_prompt", "tools", *_TO_TEMPLATES)  # to chat templates
_PLAIN: list[Message] = [{"role": role, "content": "."} for role in ("user", "assistant", "user")]

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


def chatml_tokenizer(vocab_size: int, first_special: int = 0) -> Tokenizer:
    """A byte-level tokenizer with LFM2's special tokens that fills a vocabulary of any size from 272 on.

    first_special: id of the first of the 16 special tokens, which stand together; the other ids are the bytes, then
        pairs of bytes in a fixed order. It encodes and decodes any text; it is not the published vocabulary.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size={vocab_size}: a byte-level ChatML vocabulary needs {SMALLEST_VOCABULARY}")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _first(product(alphabet, alphabet), vocab_size - SMALLEST_VOCABULARY)
    ordinary = [*alphabet, *("".join(pair) for pair in merges)]
    entries = [*ordinary[:first_special], *SPECIAL_TOKENS, *ordinary[first_special:]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(entries)}, merges=merges))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A", special_tokens=[("<|startoftext|>", entries.index("<|startoftext|>"))])
    return tokenizer


def _first(pairs: Iterator[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    return [pair for pair, _ in zip(pairs, range(count), strict=False)]


def write_chatml_tokenizer(directory: Path, vocab_size: int, first_special: int = 0) -> None:
    """Write tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json."""
    chatml_tokenizer(vocab_size, first_special).save(str(directory / "tokenizer.json"))
    ids = {token: first_special + index for index, token in enumerate(SPECIAL_TOKENS)}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1_000_000_000,
        "bos_token": "<|startoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>",
        "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False,
        "chat_template": CHATML_TEMPLATE,
        "added_tokens_decoder": {str(i): {"content": token, "special": True, "normalized": False, "lstrip": False,
                                          "rstrip": False, "single_word": False}
                                 for token, i in ids.items()},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(CHATML_TEMPLATE)
    (directory / "generation_config.json").write_text(
        json.dumps({"bos_token_id": ids["<|startoftext|>"], "eos_token_id": ids["<|im_end|>"],
                    "pad_token_id": ids["<|pad|>"]}, indent=2) + "\n")


class TextTokenizer:
    """A tokenizer with its chat template, read from a directory of published files.

    It makes the tokens that transformers makes of the same files. Chat templates come with the checkpoint and are not
    trusted: they run in a sandbox, for a limited time.

    listed: names of the files that may be read, where others in the directory may not; None for all

    templates: by name; template: the one that is taken without tools, None where there is none
    Raises BundleError where tokenizer.json is missing or unreadable.
    """

    def __init__(self, directory: Path, listed: Container[str] | None = None) -> None:
        path = directory / TOKENIZER
        if not _is_there(directory, TOKENIZER, listed):
            raise BundleError(f"{path}: no tokenizer; text needs one")
        self._path = path
        with self._failures():
            self.backend = Tokenizer.from_file(str(path))
        self.config = _read_config(directory, listed)
        self.templates = chat_templates(directory, self.config, BundleError, listed)
        self.template = self.templates.get(DEFAULT_TEMPLATE)
        self._respelled: dict[str, Tokenizer] = {}
        self.backend.no_truncation()  # what training left there; the length of a text is the session's affair
        self.backend.no_padding()
        try:
            _add_tokens(self.backend, self.config)
        except (TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"{directory / TOKENIZER_CONFIG}: malformed tokens ({error})") from None

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
        """Token ids of `text`; with `special`, what the tokenizer puts around a text (LFM2: a first token) is there.

        Raises LfmEdgeError for text that has no UTF-8, such as bytes of another encoding on a command line.
        """
        _check_text(text)
        with self._failures():
            return self.backend.encode(text, add_special_tokens=special).ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`."""
        with self._failures():
            return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def shown(self, ids: Sequence[int]) -> str:
        """The text of `ids` for people: markers that are content (of tool calls, of thinking) are there."""
        return self.decode([token for token in ids if token not in self.structural], skip_special=False)

    def named(self, purpose: str) -> int | None:
        """The token with a purpose in tokenizer_config.json, such as `bos_token`; None where there is none."""
        return self.backend.token_to_id(_content(self.config.get(purpose)))

    @cached_property
    def structural(self) -> frozenset[int]:
        """Special tokens that are no content.

        Those with a purpose in tokenizer_config.json (first, last, padding, unknown ...), and those that the chat
        template puts around plain messages.
        """
        try:
            around = self._render(_PLAIN)
        except BundleError:  # a template of its own mind, or none
            around = ""
        named = {_content(self.config.get(name)) for name in _NAMED}
        return frozenset(index for index, token in self.backend.get_added_tokens_decoder().items()
                         if token.special and (token.content in named or token.content in around))

    @cached_property
    def control(self) -> dict[str, int]:
        """Ids of the tokens that templates and models write and nobody types, by their text.

        Special tokens, and others that tokenizer.json adds where a chat template spells them.
        """
        spelled = "\0".join(self.templates.values())
        return {token.content: index for index, token in self.backend.get_added_tokens_decoder().items()
                if token.special or (token.content in spelled
                                     and not token.content.isspace() and not token.content.isalnum())}

    def message(self, ids: Sequence[int]) -> Message:
        """What the model said, for `chat`: the text with every marker.

        tokens: the ids, there where the text alone would be read as other control tokens than these
        """
        text = self.decode(ids, skip_special=False)
        said: Message = {"role": "assistant", "content": text}
        control = set(self.control.values())
        read = [token for token in self.encode(text, special=False) if token in control]
        return said if read == [token for token in ids if token in control] else {**said, "tokens": list(ids)}

    def chat(self, messages: Sequence[Message], *, answer: bool = True, tools: Sequence[Any] | None = None,
             options: Mapping[str, Any] | None = None) -> list[int]:
        """Token ids of a conversation; with `answer`, up to where the assistant speaks next.

        Control tokens that a message spells are text, but those that the assistant said.
        tools: JSON schemas of the functions that the model may call, as the chat template takes them
        options: the template's own switches (`check_options`)

        Raises BundleError where there is no chat template, or the template refuses.
        """
        texts: list[str] = list(self.templates.values())
        mapped([messages, tools, options], lambda text: texts.append(_check_text(text)) or text)
        stand_ins = StandIns(self.backend, self.control, "\0".join(texts))
        text = self._render([self._covered(message, stand_ins) for message in messages], answer=answer,
                            tools=mapped(tools, stand_ins.cover), options=mapped(options, stand_ins.cover))
        if not stand_ins:
            return self.encode(text, special=False)
        if stand_ins.mark not in self._respelled:
            self._respelled = {stand_ins.mark: respelled(self.backend, self.control, stand_ins.mark)}
        return stand_ins.encode(text, self._respelled[stand_ins.mark])

    def chat_text(self, messages: Sequence[Message], *, answer: bool = True,
                  options: Mapping[str, Any] | None = None) -> str:
        """What the chat template makes of a conversation, as text. Raises as `chat` does.

        In it nothing tells a control token of the template's from one that a message spells: `chat` does.
        """
        return self._render(messages, answer=answer, options=options)

    def _covered(self, message: Message, stand_ins: StandIns) -> Message:
        """A message with stand-ins for what spells control tokens and is none."""
        if not isinstance(message, dict):
            raise BundleError(f"a message of a conversation is {type(message).__name__}; expected an object with role "
                              "and content")
        if message.get("role") != "assistant":
            return mapped(message, stand_ins.cover)
        plain = {key: value for key, value in message.items() if key != "tokens"}
        if "tokens" not in message:
            return plain
        control = set(self.control.values())
        parts = [(is_control, self.decode(list(run), skip_special=False))
                 for is_control, run in groupby(message["tokens"], control.__contains__)]
        return {**plain, "content": "".join(text if is_control else stand_ins.cover(text)
                                            for is_control, text in parts)}

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raises LfmEdgeError where the chat template has no such switch."""
        if not options:
            return
        environment, switches = _environment(), set()
        with limited_time():
            for template in self.templates.values():
                with suppress(Exception):  # a template is foreign code; what is wrong with it rendering says
                    switches |= find_undeclared_variables(environment.parse(template))
        switches -= {*_GIVEN, *environment.globals}
        for name in options:
            if name not in switches:
                raise LfmEdgeError(f"the chat template of this bundle has no switch '{name}'; it has "
                                   f"{', '.join(sorted(switches)) or 'none'}")

    def _render(self, messages: Sequence[Message], *, answer: bool = False, tools: Sequence[Any] | None = None,
                options: Mapping[str, Any] | None = None) -> str:
        """What the chat template makes of a conversation."""
        template = self.templates.get(TOOL_TEMPLATE, self.template) if tools is not None else self.template
        if template is None:
            raise BundleError("this bundle has no chat template; `generate --raw` continues a plain text")
        tokens = {name: _content(self.config.get(name, "")) for name in _TO_TEMPLATES}
        try:
            with limited_time():
                return _environment().from_string(template).render(
                    **{**(options or {}), "messages": messages, "add_generation_prompt": answer, "tools": tools,
                       **tokens})
        except Exception as error:  # a template is foreign code; it can raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BundleError(f"chat template: {reason}") from None


def _is_there(directory: Path, name: str, listed: Container[str] | None) -> bool:
    return (listed is None or name in listed) and (directory / name).is_file()


def _read_config(directory: Path, listed: Container[str] | None) -> dict[str, Any]:
    """tokenizer_config.json; an older one has the tokens with a purpose in a file of their own."""
    config, named = (read_json_object(directory / name, BundleError) if _is_there(directory, name, listed) else {}
                     for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP))
    return config if "added_tokens_decoder" in config else config | named


def _check_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LfmEdgeError(f"the text is not UTF-8 (at character {error.start + 1})") from None
    return text


def _add_tokens(backend: Tokenizer, config: dict[str, Any]) -> None:
    """Add tokens that tokenizer.json does not tell, or tells otherwise, as transformers does."""
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    entries = sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))
    told = [AddedToken(**entry) for _, entry in entries]
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    more = more if isinstance(more, list) else more.values()
    present = {"", *known, *(token.content for token in told)}
    names = dict.fromkeys(map(_content, [*map(config.get, _NAMED), *more]))
    told += [AddedToken(name, special=True, normalized=False) for name in names if name not in present]
    backend.add_tokens([token for token in told if repr(token) != repr(known.get(token.content))])
    backend.encode_special_tokens = config.get("split_special_tokens") is True


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


def chat_templates(directory: Path, config: dict[str, Any], failure: type[LfmEdgeError],
                   listed: Container[str] | None = None) -> dict[str, str]:
    """The chat templates of a directory by name, as transformers takes them: files before what the config holds.

    config: of tokenizer_config.json, which has one text, or a list of named ones
    listed: names of the files that may be read; None for all
    Raises `failure` where one is no text.
    """
    files = {DEFAULT_TEMPLATE: directory / CHAT_TEMPLATE} if _is_there(directory, CHAT_TEMPLATE, listed) else {}
    files |= {path.stem: path for path in sorted((directory / MORE_TEMPLATES).glob("*.jinja"))
              if _is_there(directory, f"{MORE_TEMPLATES}/{path.name}", listed)}
    if files:
        return {name: _read_template(path, failure) for name, path in files.items()}
    held = config.get("chat_template")
    if isinstance(held, list):
        held = {entry.get("name"): entry.get("template") for entry in held if isinstance(entry, dict)}
    templates = held if isinstance(held, dict) else {} if held is None else {DEFAULT_TEMPLATE: held}
    for name, template in templates.items():
        if not isinstance(template, str) or not _TEMPLATE_NAME.fullmatch(str(name)):
            raise failure(f"{directory / TOKENIZER_CONFIG}: chat_template: {str(name)!r} is not a template with a name")
    return templates


def _read_template(path: Path, failure: type[LfmEdgeError]) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise failure(f"{path}: not text ({error})") from None


def _content(token: Any) -> str:
    return token.get("content", "") if isinstance(token, dict) else str(token or "")
