"""Made-up tasks with exact answers, as chat conversations: what the tiny model is trained and scored on.

Needs nothing but the standard library. Every prompt comes from a seed; the same seed gives the same prompts.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from string import ascii_lowercase, digits

Message = dict[str, str]

MOST_PAIRS = 40
MOST_BYTES = 480  # of the list of pairs, filler included
LARGEST = 49  # of any number in a sum or a difference

FILLER = [
    "the", "a", "old", "cold", "river", "boat", "stone", "wind", "tree", "house", "slow", "quiet", "under", "over",
    "near", "and", "then", "went", "came", "stood", "grey", "small", "bird", "field", "road", "long", "night", "snow",
    "hill", "door", "lamp",
]

FACTS = {
    "what colour is the sky?": "blue",
    "what colour is grass?": "green",
    "what colour is snow?": "white",
    "what colour is coal?": "black",
    "what colour is a ripe tomato?": "red",
    "what colour is a lemon?": "yellow",
    "how many legs has a spider?": "eight",
    "how many legs has an ant?": "six",
    "how many legs has a cat?": "four",
    "how many days are in a week?": "seven",
    "how many months are in a year?": "twelve",
    "how many sides has a triangle?": "three",
    "what is frozen water called?": "ice",
    "what do bees make?": "honey",
    "what do cows eat?": "grass",
    "what does a dog say?": "woof",
    "what does a cat say?": "meow",
    "what is the opposite of hot?": "cold",
    "what is the opposite of up?": "down",
    "what is the opposite of day?": "night",
    "which planet do we live on?": "earth",
    "which star is nearest?": "the sun",
    "which season follows winter?": "spring",
    "which day follows monday?": "tuesday",
    "who are you?": "a tiny model made for tests",
    "hello": "hello! ask me a sum or a key",
}


@dataclass(frozen=True)
class Example:
    """A conversation up to where the assistant speaks next, and the exact text it should say."""

    task: str
    messages: list[Message]
    answer: str

    def conversation(self) -> list[Message]:
        """The messages with the answer as the last one."""
        return [*self.messages, assistant(self.answer)]


def user(text: str) -> Message:
    """One user message."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """One assistant message."""
    return {"role": "assistant", "content": text}


def random_pairs(rng: random.Random, count: int) -> dict[str, str]:
    """`count` different keys such as `k7`, each with a number of two digits."""
    keys = rng.sample([letter + digit for letter in ascii_lowercase for digit in digits], count)
    return {key: str(rng.randint(10, 99)) for key in keys}


def random_text(rng: random.Random, words: int) -> str:
    """`words` words of filler."""
    return " ".join(rng.choices(FILLER, k=words))


def written_pairs(rng: random.Random, pairs: dict[str, str], filler_share: float = 0.5) -> str:
    """`k7=42 b3=17 ...`; for some lists, filler between the pairs as far as MOST_BYTES allows."""
    parts = [f"{key}={value}" for key, value in pairs.items()]
    room = MOST_BYTES - 6 * len(parts)
    for _ in range(rng.randint(1, 12) if rng.random() < filler_share else 0):
        filler = random_text(rng, rng.randint(1, 8))
        if len(filler) >= room:
            break
        parts.insert(rng.randint(0, len(parts)), filler)
        room -= len(filler) + 1
    return " ".join(parts)


def random_sum(rng: random.Random) -> tuple[str, str]:
    """A sum or a difference of numbers from 0 to LARGEST, none of which leaves that range, and its result."""
    first, second = sorted((rng.randint(0, LARGEST), rng.randint(0, LARGEST)))
    if rng.random() < 0.5:
        return f"{second}-{first}", str(second - first)
    # `second` is what the sum comes to, so that every sum stays in range
    return f"{first}+{second - first}", str(second)


def recall(rng: random.Random, most_pairs: int = MOST_PAIRS, filler_share: float = 0.5) -> Example:
    """`k7=42 b3=17 ... b3?` -> `17`"""
    pairs = random_pairs(rng, rng.randint(min(4, most_pairs), most_pairs))
    key = rng.choice(list(pairs))
    return Example("recall", [user(f"{written_pairs(rng, pairs, filler_share)} {key}?")], pairs[key])


def arithmetic(rng: random.Random) -> Example:
    """`23+45=?` -> `68`"""
    question, result = random_sum(rng)
    return Example("arithmetic", [user(f"{question}=?")], result)


def copy(rng: random.Random, most_words: int = 3, most_letters: int = 7) -> Example:
    """`repeat: qwe rtyui` -> `qwe rtyui`"""
    lengths = [rng.randint(2, most_letters) for _ in range(rng.randint(1, most_words))]
    words = ["".join(rng.choices(ascii_lowercase, k=length)) for length in lengths]
    return Example("copy", [user("repeat: " + " ".join(words))], " ".join(words))


def fact(rng: random.Random) -> Example:
    """`what colour is the sky?` -> `blue`"""
    question, answer = rng.choice(list(FACTS.items()))
    return Example("facts", [user(question)], answer)


def chat(rng: random.Random, most_pairs: int = 20, filler_share: float = 0.5) -> Example:
    """Two or three turns: pairs to remember, perhaps something else, then a key."""
    pairs = random_pairs(rng, rng.randint(2, most_pairs))
    key, other = rng.sample(list(pairs), 2)
    turns = [user(f"remember {written_pairs(rng, pairs, filler_share)}"), assistant("ok")]
    if rng.random() < 0.3:
        turns = [user(f"{written_pairs(rng, pairs, filler_share)} {other}?"), assistant(pairs[other])]
    if rng.random() < 0.4:
        turns += rng.choice((arithmetic, fact, copy))(rng).conversation()
    return Example("chat", [*turns, user(f"{key}?")], pairs[key])


MAKERS: dict[str, Callable[[random.Random], Example]] = {
    "recall": recall, "arithmetic": arithmetic, "copy": copy, "facts": fact, "chat": chat,
}
TASKS = tuple(MAKERS)


def prompts(task: str, count: int, seed: int) -> list[Example]:
    """`count` examples of one of TASKS. There are only len(FACTS) facts: asked for more, they come again.

    Raises KeyError for another task.
    """
    rng = random.Random(f"{task}/{seed}")
    if task == "facts":
        order = rng.sample(sorted(FACTS), len(FACTS))
        return [_fact(order[i % len(order)]) for i in range(count)]
    return [MAKERS[task](rng) for _ in range(count)]


def every_sum() -> list[Example]:
    """All sums and differences in the range of `arithmetic`, once each."""
    results = {}
    for first in range(LARGEST + 1):
        for second in range(LARGEST + 1):
            if first + second <= LARGEST:
                results[f"{first}+{second}"] = first + second
            if first >= second:
                results[f"{first}-{second}"] = first - second
    return [Example("arithmetic", [user(f"{question}=?")], str(result)) for question, result in results.items()]


def _fact(question: str) -> Example:
    return Example("facts", [user(question)], FACTS[question])
