"""The text that checks and calibration run on: the user's, or this one."""

from __future__ import annotations

import re
from pathlib import Path

from lfm_edge.errors import LfmEdgeError
from lfm_edge.tokenizer import TextTokenizer

TEXT = """\
The harbour wakes before the town does. At four the first boats slip past the mole, their lamps low on the water, \
and by five the auction hall is loud with numbers. Marta has kept the books there for thirty-one years. She writes \
each lot by hand: 14 boxes of mackerel at 23.50, 6 of hake at 41.00, one swordfish, 112 kilograms, sold to the hotel \
on the hill. Then she types the same figures into a machine that the cooperative bought in 2009 and that nobody else \
has learned to use.

"Why both?" a visitor asked her once. She thought about it. "Because paper does not forget, and the machine adds \
faster than I do. You need one that remembers and one that counts."

A phone works under similar rules. It has a little memory that is quick and a lot that is slow; it can multiply \
without effort as long as nobody asks it to fetch a number from far away. So a language model that wants to live \
there must be careful with what it carries. Most of its layers look back only two or three words, the way one \
follows a tune. A few of them look back at everything, the way one checks a contract. Between the two, a sentence \
can be finished before the battery notices.

def settle(lots: list[tuple[str, int, float]]) -> float:
    total = 0.0
    for name, boxes, price in lots:
        total += boxes * price
    return round(total, 2)

Le soir, les filets sèchent sur le quai. Die Kinder zählen die Möwen: eins, zwei, drei, vier. En la plaza alguien \
toca la guitarra, and somebody else, two streets away, answers with an accordion that has lost one of its keys.
"""


def sample_tokens(tokenizer: TextTokenizer, vocab_size: int, count: int) -> list[int]:
    """`count` tokens of the built-in text, from its beginning, repeated where it is too short."""
    tokens = [token for token in tokenizer.encode(TEXT) if token < vocab_size]
    return (tokens * (count // len(tokens) + 1))[:count]


def read_text(path: Path) -> str:
    """A text file of the user's. Raises LfmEdgeError where it is missing, not UTF-8 or empty."""
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise LfmEdgeError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise LfmEdgeError(f"{path}: not UTF-8 text ({error})") from None
    if not text.strip():
        raise LfmEdgeError(f"{path}: holds no text")
    return text


def text_windows(tokenizer: TextTokenizer, vocab_size: int, text: str, length: int, most: int) -> list[list[int]]:
    """The first `most` tokens of a text, cut into windows of one length, at most `length`.

    Raises LfmEdgeError where there are fewer than two.
    """
    return _cut([token for token in tokenizer.encode(text) if token < vocab_size][:most], length)


def prompt_windows(tokenizer: TextTokenizer, vocab_size: int, text: str, length: int, most: int) -> list[list[int]]:
    """Prompts, separated by blank lines, as the model meets them: each as a user's turn in the chat template.

    One after the other, and cut as `text_windows` cuts.
    """
    prompts = [prompt.strip() for prompt in re.split(r"\n\s*\n", text)]
    chats = [tokenizer.chat([{"role": "user", "content": prompt}]) for prompt in prompts if prompt]
    return _cut([token for chat in chats for token in chat if token < vocab_size][:most], length)


def _cut(tokens: list[int], length: int) -> list[list[int]]:
    """Windows of one length; what is left over at the end is less than one token for each."""
    if len(tokens) < 2:
        raise LfmEdgeError("the text has fewer than 2 tokens of the model's vocabulary")
    count = -(-len(tokens) // length)
    size = len(tokens) // count
    return [tokens[start:start + size] for start in range(0, count * size, size)]
