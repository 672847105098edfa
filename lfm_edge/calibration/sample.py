"""Text that checks and calibration run on when the user gives none, and how a user's file of prompts is read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lfm_edge.checkpoint.checkpoint import TASKS_FILE
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.checkpoint.tokenizer import TextTokenizer
from lfm_edge.errors import BundleError, LfmEdgeError
from lfm_edge.files import read_text, text

LEAST_CALIBRATION_TOKENS = 256
MOST_CALIBRATION_TOKENS = 8192
_WINDOW = 512  # tokens after which calibration begins a new text

Conversation = list[dict[str, str]]  # messages with `role` and `content`

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


_EXCHANGES = (
    ("Which is larger, 7/12 or 0.58?",
     "7/12 is 0.58333..., so it is larger than 0.58, by one part in three hundred."),
    ("Write a Python function that returns the n-th Fibonacci number without recursion.",
     "def fibonacci(n: int) -> int:\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n"),
    ("Summarize in one sentence: The ferry was late because fog had closed the harbour at six, and the captain would "
     "not leave before he could see the second buoy. Passengers were given tea.",
     "Fog closed the harbour and delayed the ferry, so the waiting passengers were served tea."),
    ("Übersetze ins Deutsche: Could you tell me where the nearest pharmacy is?",
     "Könnten Sie mir sagen, wo die nächste Apotheke ist?"),
    ("Give me a JSON object for a book: title, author, year, tags.",
     '{"title": "The Waves", "author": "Virginia Woolf", "year": 1931, "tags": ["novel", "modernism"]}'),
    ("Why is the sky blue?",
     "Air scatters short waves of sunlight far more than long ones. Blue light therefore reaches our eyes from every "
     "direction of the sky, while the red comes almost straight from the sun."),
    ("A train leaves at 14:35 and travels 186 km at 62 km/h. When does it arrive?",
     "It needs 186 / 62 = 3 hours, so it arrives at 17:35."),
    ("List three things to check before a long bicycle tour.",
     "1. Tyres: pressure, cracks, a spare tube.\n2. Brakes: pads at least 2 mm thick, cables that move freely.\n"
     "3. Chain: clean, oiled, and not worn beyond 0.75 %."),
    ("请用一句话解释什么是光合作用。", "光合作用是植物利用阳光把二氧化碳和水变成糖和氧气的过程。"),
    ("Fix the grammar: Me and him has went to the market yesterday.", "He and I went to the market yesterday."),
    ("What does `git rebase --onto main topic~3 topic` do?",
     "It takes the last three commits of `topic` and replays them on top of `main`; `topic` points at the result."),
    ("Escribe un mensaje corto para felicitar a una colega por su ascenso.",
     "¡Enhorabuena, Lucía! Te lo has ganado con trabajo y buen humor. Me alegro muchísimo por ti."),
    ("Is 2,147,483,647 prime?", "Yes. It is 2^31 - 1, a Mersenne prime; Euler proved it in 1772."),
    ("Antworte mit ja oder nein: Ist ein Wal ein Fisch?", "Nein."),
    ("SELECT the three customers who spent most in 2023 from orders(customer, total, day).",
     "SELECT customer, SUM(total) AS spent\nFROM orders\nWHERE day >= '2023-01-01' AND day < '2024-01-01'\n"
     "GROUP BY customer\nORDER BY spent DESC\nLIMIT 3;"),
    ("I feel tired all the time lately. What could help?",
     "Regular sleep, daylight in the morning, movement, and less coffee after noon often help. If it lasts longer than "
     "a few weeks, or you lose weight without trying, please see a doctor."),
)
PROMPTS: tuple[Conversation, ...] = tuple(
    [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for question, answer in _EXCHANGES)


def read_prompts(path: Path) -> tuple[Conversation, ...]:
    """A user's file of prompts. Raises LfmEdgeError where there are none."""
    return prompts_in(read_text(path))


def prompts_in(text: str) -> tuple[Conversation, ...]:
    """Prompts, separated by blank lines, each as a user's turn."""
    prompts = [prompt.strip() for prompt in re.split(r"\n\s*\n", text)]
    return tuple([{"role": "user", "content": prompt}] for prompt in prompts if prompt)


def read_tasks(directory: Path) -> list[dict[str, Any]]:
    """The prompts that a checkpoint ships, each with `task`, `messages` and `answer`; none where it ships none.

    Raises BundleError where the file is malformed.
    """
    path = directory / TASKS_FILE
    if not path.is_file():
        return []
    try:
        return [{"task": text(task["task"]), "answer": text(task["answer"]),
                 "messages": [{"role": text(message["role"]), "content": text(message["content"])}
                              for message in task["messages"]]}
                for task in json.loads(path.read_text())]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"{path}: malformed ({error})") from None


def default_prompts(directory: Path) -> tuple[Conversation, ...]:
    """What activations are measured on by default: a checkpoint's own prompts, or else the built-in ones.

    A model far from what it was trained on has other activations than in its use.
    """
    return tuple([*task["messages"], {"role": "assistant", "content": task["answer"]}]
                 for task in read_tasks(directory)) or PROMPTS


def calibration_tokens(tokenizer: TextTokenizer, config: ModelConfig, prompts: Sequence[Conversation],
                       most: int = MOST_CALIBRATION_TOKENS) -> list[int]:
    """Prompts through the chat template, one after the other, and then the built-in text as far as there is room.

    Of more than `most` tokens, evenly chosen prompts.
    Raises LfmEdgeError where the prompts are too few to measure anything on.
    """
    tokens = _tokens_of(tokenizer, config.vocab_size, prompts, most)
    if len(tokens) < LEAST_CALIBRATION_TOKENS:
        raise LfmEdgeError(f"the prompts are {len(tokens)} tokens; calibration needs at least "
                           f"{LEAST_CALIBRATION_TOKENS}")
    text = [token for token in tokenizer.encode(TEXT) if token < config.vocab_size]
    return (tokens + text)[:most]


def _tokens_of(tokenizer: TextTokenizer, vocab_size: int, prompts: Sequence[Conversation], most: int) -> list[int]:
    """Prompts as the model meets them, through the chat template, one after the other, at most `most` tokens.

    Of more, evenly chosen prompts: files tend to have one kind of prompt after the other.
    """
    texts = [[token for token in _as_the_model_meets(tokenizer, prompt) if token < vocab_size] for prompt in prompts]
    count = min(len(texts), math.ceil(len(texts) * most / max(1, sum(map(len, texts)))))
    return [token for index in range(count) for token in texts[index * len(texts) // count]][:most]


def _as_the_model_meets(tokenizer: TextTokenizer, prompt: Conversation) -> list[int]:
    if tokenizer.template is None:
        return tokenizer.encode("\n".join(message["content"] for message in prompt))
    return tokenizer.chat(prompt)


def whole_chunks(tokens: Sequence[int], chunk: int, context: int, first: int | None) -> tuple[list[int], ...]:
    """Texts of whole chunks that fit a context, each with the token that texts begin with, where they begin with one.

    What is left over is left out.
    """
    begin = [] if first is None else [first]
    length = max(min(context, _WINDOW) // chunk, 1) * chunk
    room = length - len(begin)
    texts = ([*begin, *tokens[start:start + room]] for start in range(0, len(tokens), room)) if room else (begin,)
    return tuple(text[:len(text) // chunk * chunk] for text in texts if len(text) >= chunk)


def text_windows(tokenizer: TextTokenizer, vocab_size: int, text: str, length: int, most: int) -> list[list[int]]:
    """The first `most` tokens of a text, cut into windows of one length, at most `length`.

    Raises LfmEdgeError where there are fewer than two.
    """
    return windows_of([token for token in tokenizer.encode(text) if token < vocab_size][:most], length)


def prompt_windows(tokenizer: TextTokenizer, vocab_size: int, prompts: Sequence[Conversation], length: int,
                   most: int) -> list[list[int]]:
    """Prompts as the model meets them, through the chat template, evenly chosen of more than `most` tokens, in windows.

    Raises LfmEdgeError where there are fewer than two.
    """
    return windows_of(_tokens_of(tokenizer, vocab_size, prompts, most), length)


def windows_of(tokens: list[int], length: int) -> list[list[int]]:
    """Windows of one length, at most `length`; what is left over at the end is less than one token for each.

    Raises LfmEdgeError where there are fewer than two tokens.
    """
    if len(tokens) < 2:
        raise LfmEdgeError("the text has fewer than 2 tokens of the model's vocabulary")
    count = -(-len(tokens) // length)
    size = len(tokens) // count
    return [tokens[start:start + size] for start in range(0, count * size, size)]
