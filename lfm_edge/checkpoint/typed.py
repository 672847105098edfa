"""What people and tools say stays text, even where it spells a control token.

A chat template writes control tokens (`<|im_end|>`) around what was said, all into one text, and a tokenizer finds them
wherever they stand. So while the template runs, a control token that somebody spelled is a stand-in: one character that
is nowhere else, which no template can cut in two. Afterwards the template's own control tokens get a spelling that
nobody has used, by which a second tokenizer knows them, and each stand-in becomes what was said. The text is still
encoded in one piece.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import Tokenizer

from lfm_edge.errors import BundleError

_PRIVATE = range(0xF0000, 0xFFFFE)  # characters that Unicode gives no meaning, so nothing normalizes or strips them


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every text in it changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {mapped(key, change): mapped(entry, change) for key, entry in value.items()}
    return [mapped(entry, change) for entry in value] if isinstance(value, (list, tuple)) else value


def respelled(tokenizer: Tokenizer, control: Mapping[str, int], mark: str) -> Tokenizer:
    """The same tokenizer, but each control token is found as `mark` and its text; its id is a new one then."""
    raw = json.loads(tokenizer.to_str())
    for token in raw["added_tokens"]:
        token["content"] = (mark if token["content"] in control else "") + token["content"]
    return Tokenizer.from_str(json.dumps(raw))


class StandIns:
    """The stand-ins of one conversation.

    control: ids of the control tokens by their text; taken: every text that the stand-ins must not be in
    mark: a character before the template's own control tokens, that is in none of these texts
    """

    def __init__(self, tokenizer: Tokenizer, control: Mapping[str, int], taken: str) -> None:
        self._tokenizer, self._control = tokenizer, control
        self._free = (character for character in map(chr, _PRIVATE)
                      if character not in taken and _escaped(character) not in taken)
        self._said: dict[str, str] = {}  # what was said, by its stand-in
        self.mark = next(self._free)

    def __bool__(self) -> bool:
        return bool(self._said)

    def cover(self, text: str) -> str:
        """`text` with a stand-in for everything that the tokenizer would take for a control token."""
        encoding, covered, end = self._tokenizer.encode(text, add_special_tokens=False), "", 0
        ids = set(self._control.values())
        for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in ids and start >= end:
                # Some tokens take the spaces beside them, which templates may look at.
                said = text[start:stop].strip() or text[start:stop]
                start = text.index(said, start)
                covered += text[end:start] + self._stand_in(said)
                end = start + len(said)
        return covered + text[end:]

    def encode(self, text: str, respelled: Tokenizer) -> list[int]:
        """Token ids of what the template wrote. respelled: the tokenizer that knows control tokens by this mark

        Raises BundleError where the tokenizer makes control tokens of plain text.
        """
        longest_first = sorted(self._control, key=len, reverse=True)
        text = re.sub("|".join(map(re.escape, longest_first)), lambda found: self.mark + found[0], text)
        for character, said in self._said.items():
            text = text.replace(character, said).replace(_escaped(character), said)
        ids = {respelled.token_to_id(self.mark + token): index for token, index in self._control.items()}
        found = respelled.encode(text, add_special_tokens=False).ids
        if not set(self._control.values()).isdisjoint(found):
            raise BundleError("tokenizer.json: makes a control token of the letters that it is spelled with, so what "
                              "was said cannot be told from it; leave it out of the message")
        return [ids.get(token, token) for token in found]

    def _stand_in(self, said: str) -> str:
        character = next((known for known, other in self._said.items() if other == said), None)
        if character is None:
            character = next(self._free)
            self._said[character] = said
        return character


def _escaped(character: str) -> str:
    """A character as JSON in ASCII spells it, as templates may."""
    return json.dumps(character)[1:-1]
