"""What the tests of clients share: prompts, how a client is run, and how its answers are held against ours.

Each client is a program of its own. It reads `{"directory": ..., "jobs": [...]}` from standard input; a job has a
prompt, as `tokens`, `text` or `messages`, and `max_tokens`. It prints one JSON line, for each job the `prompt` and
what was `generated`, both as token ids, a stop token included.
"""

import json
import os
import subprocess

from lfm_edge.session.generation import generate
from tests.helpers import TINY

TIE = 1e-3  # of the logits' spread: random models have near-ties, which another order of summation decides

CONVERSATION = [
    {"role": "system", "content": "You are \"terse\"."},
    {"role": "user", "content": "Grüße & <tags>, wie geht's?\n\n  漢字 🙂 \\n {{ 1 }}"},
    {"role": "assistant", "content": "Gut."},
    {"role": "user", "content": " 12345 + 1?\n"},
]
TEXTS = [
    "", " ", "a", "Hello, world!", "  leading", "trailing  ", "a  b   c    d", "two\n\nlines\n", "\n", "\n\n\n",
    "\r\n\r\n", "tabs\t\there\t", "def f(x):\n    return x\n\n\nf(1)", "1234567 12 1", "٣٤٥ ²³ Ⅷ", "it's we'LL I'M",
    "don\u2019t \u017f's", "Grüße 漢字 e\u0301 é", "नमस्ते العربية", "👩\u200d👩\u200d👧 🏳️ \U0001d49c",
    "\u00a0nbsp\u3000", "\u200b\u007f", "\ufeffmark", "_x_ __y__ $%^&*()", "…—“”", "x" * 300,
    "<|im_start|>user\nhi<|im_end|>", "<|im_start|", "<|startoftext|>twice",
]


class ClientFailed(Exception):
    """What a client wrote to standard error."""


def output_of(command, text="", **options):
    """What a program prints, offline. Raises ClientFailed."""
    environment = os.environ | {"ORT_DISABLE_TELEMETRY": "1"}
    finished = subprocess.run(command, input=text, capture_output=True, text=True, env=environment, timeout=300,
                              check=False, **options)
    if finished.returncode:
        raise ClientFailed(finished.stderr)
    return finished.stdout


def through_stop(bundle, tokens):
    """The tokens up to the first stop token, and that."""
    stops = [index for index, token in enumerate(tokens) if token in bundle.manifest.config.eos_token_ids]
    return tokens[:stops[0] + 1] if stops else tokens


def our_answers(bundle, prompts, max_tokens):
    session, answers = bundle.session(), []
    for prompt in prompts:
        session.reset()
        answers.append(through_stop(bundle, list(generate(session, prompt, max_tokens=max_tokens))))
    return answers


def assert_ours_or_tied(bundle, prompt, answer, max_tokens):
    """Our session, led along the answer, finds each of its tokens the best, or as good as the best."""
    assert answer == through_stop(bundle, answer)
    assert len(answer) == max_tokens or answer[-1] in bundle.manifest.config.eos_token_ids
    session = bundle.session()
    logits = session.prefill(prompt)
    for token in answer:
        assert logits.max() - logits[token] <= TIE * logits.std(), answer
        logits = session.decode(token)


def tasks(*, each):
    """So many examples of each task that the model was trained on."""
    examples = json.loads((TINY / "tasks.json").read_text())
    kinds = dict.fromkeys(example["task"] for example in examples)
    return [example for kind in kinds for example in [e for e in examples if e["task"] == kind][:each]]


def long_prompt(tokenizer, length):
    """A conversation of many turns, of `length` tokens: the first one, and as much of the end as there is room for."""
    turns = [message for example in tasks(each=20) if example["task"] == "chat"
             for message in (*example["messages"], {"role": "assistant", "content": example["answer"]})]
    tokens = tokenizer.chat(turns[:-1])
    return tokens[:1] + tokens[len(tokens) - length + 1:]
