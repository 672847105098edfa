"""Conversations as token ids with loss weights, the ids as the checkpoint's own tokenizer gives them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tasks import TASKS, Message, prompts

from lfm_edge.checkpoint.tokenizer import SMALLEST_VOCABULARY, SPECIAL_TOKENS, TextTokenizer, chatml_tokenizer

PROMPT_WEIGHT = 0.02  # of tokens that nobody could predict, so that they have a sensible distribution too
MARK, UNMARK = "\x01", "\x02"
START, TURN, END = (SPECIAL_TOKENS.index(name) for name in ("<|startoftext|>", "<|im_start|>", "<|im_end|>"))


@dataclass(frozen=True)
class Sequence:
    """Token ids of a whole conversation, and the weight of each in the loss."""

    ids: list[int]
    weights: list[float]


class Encoder:
    """Writes ASCII conversations as the chat template does, much faster; the assistant's words weigh 1."""

    def __init__(self) -> None:
        self.ids = _ascii_ids()

    def __call__(self, messages: list[Message]) -> Sequence:
        """MARK in a user's text gives weight 1 to what follows, up to UNMARK; neither becomes a token."""
        ids, weights = [START], [0.0]
        for message in messages:
            own = message["role"] == "assistant"
            head = [TURN, *self._text(message["role"] + "\n")]
            body, marks = self._marked(message["content"], own)
            ids += [*head, *body, END, *self._text("\n")]
            weights += [PROMPT_WEIGHT] * len(head) + marks + [1.0 if own else PROMPT_WEIGHT, PROMPT_WEIGHT]
        return Sequence(ids, weights)

    def _text(self, text: str) -> list[int]:
        return [self.ids[char] for char in text]

    def _marked(self, text: str, on: bool) -> tuple[list[int], list[float]]:
        ids, weights = [], []
        for char in text:
            if char in (MARK, UNMARK):
                on = char == MARK
                continue
            ids.append(self.ids[char])
            weights.append(1.0 if on else PROMPT_WEIGHT)
        return ids, weights


@cache
def _ascii_ids() -> dict[str, int]:
    backend = chatml_tokenizer(SMALLEST_VOCABULARY)
    return {char: backend.encode(char, add_special_tokens=False).ids[0] for char in map(chr, range(128))}


def check_encoder(directory: Path) -> None:
    """Raises ValueError where Encoder gives other ids than the tokenizer in `directory`."""
    encoder, tokenizer = Encoder(), TextTokenizer(directory)
    for example in (example for task in TASKS for example in prompts(task, 20, seed=5)):
        asked = tokenizer.chat(example.messages)
        answer = tokenizer.encode(example.answer + "<|im_end|>\n", special=False)
        if encoder(example.conversation()).ids != asked + answer:
            raise ValueError(f"{directory}: its tokenizer and Encoder disagree on {example}")
