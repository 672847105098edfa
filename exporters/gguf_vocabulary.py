"""The tokenizer of a checkpoint as GGUF has it: what llama.cpp makes of a text are the same token ids."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer

from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.checkpoint.tokenizer import SPLIT_PATTERN, TextTokenizer
from lfm_edge.errors import ExportError

# llama.cpp knows splitting patterns by the names of models, and by the same name whether a piece of text that is a
# token as a whole becomes that token before any merge is tried. Both of these split by LFM2's pattern.
WHOLE_PIECES_FIRST, MERGES_ONLY = "lfm2", "smaug-bpe"

_END_KEYS = ("eos", "eot", "eom")  # of the tokens that end a generation, in GGUF


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs of a byte-level BPE tokenizer.

    first: the token that texts begin with, None where there is none
    tokens, types: of every id; merges: pairs with a space between, the first ones first
    pre: llama.cpp's name of how text is split
    add_bos, add_eos: whether a text gets a first and a last token
    """

    config: ModelConfig
    first: int | None
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    pre: str
    add_bos: bool
    add_eos: bool
    chat_template: str | None

    @classmethod
    def of(cls, tokenizer: TextTokenizer, config: ModelConfig) -> Vocabulary:
        """Raises ExportError for a tokenizer that llama.cpp would not follow."""
        raw = json.loads(tokenizer.backend.to_str())
        _check_kind(raw)
        if not 1 <= len(config.eos_token_ids) <= len(_END_KEYS):
            raise ExportError(f"eos_token_id: {len(config.eos_token_ids)} tokens end a generation; GGUF names 1 to "
                              f"{len(_END_KEYS)}, and where it names none llama.cpp takes one of its own")
        first = tokenizer.named("bos_token") if config.bos_token_id is None else config.bos_token_id
        tokens, types = _entries(tokenizer.backend, raw["added_tokens"], config.vocab_size)
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in raw["model"]["merges"]]
        # A file without merges is refused. No piece of text is ever a special token, so this one does nothing.
        merges = merges or [f"{tokens[config.eos_token_ids[0]]} {tokens[config.eos_token_ids[0]]}"]
        whole = raw["model"].get("ignore_merges") or _merges_reach_all(tokenizer.backend, raw["added_tokens"])
        return cls(config, first, tokens, types, merges, WHOLE_PIECES_FIRST if whole else MERGES_ONLY,
                   *_ends(tokenizer, first, config.eos_token_ids[0]), tokenizer.template)

    def add_to(self, writer: GGUFWriter) -> None:
        """Put it into a file's metadata."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        if self.first is not None:
            writer.add_bos_token_id(self.first)
        for key, token in zip(_END_KEYS, self.config.eos_token_ids, strict=False):
            getattr(writer, f"add_{key}_token_id")(token)
        if self.config.pad_token_id is not None:
            writer.add_pad_token_id(self.config.pad_token_id)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def _check_kind(raw: dict[str, Any]) -> None:
    """Raises ExportError where tokenizer.json is another kind of tokenizer than LFM2's."""
    model, steps = raw["model"], raw["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    expected = [{"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]
    is_known = len(steps) == len(expected) and all(
        step.get(key) == value for step, wanted in zip(steps, expected, strict=True) for key, value in wanted.items())
    odd = {
        "a model other than BPE": model["type"] != "BPE",
        "a normalizer": raw["normalizer"] is not None,
        "another splitting of text than LFM2's": not is_known,
        "marks inside or at the end of words": bool(model.get("continuing_subword_prefix")
                                                    or model.get("end_of_word_suffix")),
        "dropout": bool(model.get("dropout")), "byte fallback": bool(model.get("byte_fallback")),
        "added tokens that take spaces with them, or stand alone":
            any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in raw["added_tokens"]),
    }
    for what, is_there in odd.items():
        if is_there:
            raise ExportError(f"tokenizer.json: has {what}, which llama.cpp would not follow")


def _entries(backend: Tokenizer, added: list[dict[str, Any]], size: int) -> tuple[list[str], list[TokenType]]:
    """Text and type of every id. Ids without a token are there too: the embedding has a row for each."""
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [TokenType.UNUSED] * size
    known = {index: (token, TokenType.NORMAL) for token, index in backend.get_vocab(with_added_tokens=False).items()}
    known |= {token["id"]: (token["content"], TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED)
              for token in added}
    for index, (token, kind) in known.items():
        tokens[index], types[index] = token, kind
    if len(set(tokens)) < size:
        raise ExportError("tokenizer.json: two ids have the same text; llama.cpp tells tokens by their text")
    return tokens, types


def _merges_reach_all(backend: Tokenizer, added: list[dict[str, Any]]) -> bool:
    """Whether merges alone make each token of its own text. (Added tokens are found before any merge.)"""
    plain = backend.get_vocab(with_added_tokens=False).keys() - {token["content"] for token in added}
    return all(len(backend.model.tokenize(token)) == 1 for token in plain)


def _ends(tokenizer: TextTokenizer, first: int | None, last: int) -> tuple[bool, bool]:
    """Whether a text gets a first and a last token. Raises ExportError where it gets others than these."""
    plain, whole = tokenizer.encode("a", special=False), tokenizer.encode("a")
    for add_bos, add_eos in ((True, False), (False, False), (True, True), (False, True)):
        if whole == [*[first] * add_bos, *plain, *[last] * add_eos]:
            return add_bos, add_eos
    raise ExportError(f"tokenizer.json: puts {whole} around {plain}; llama.cpp puts bos_token_id and the first "
                      "eos_token_id there, or nothing")
