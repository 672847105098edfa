"""Ask a bundle some questions through its chat template, by the Python interface.

    python examples/python/ask.py BUNDLE

Where the bundle ships `tasks.json` (prompts with one right answer), a few of those are asked and the right
answer is shown beside the model's. Then one session is forked: a snapshot after a shared beginning answers
two different questions without reading the beginning twice.
"""

import json
import sys
from pathlib import Path

from lfm_edge import generate, open_bundle

PER_TASK = 2
MAX_TOKENS = 48
OTHERWISE = [{"task": "open", "messages": [{"role": "user", "content": "Say hello."}], "answer": None}]


def questions(directory):
    """A few prompts of each task that the bundle ships, or one open question."""
    path = Path(directory) / "tasks.json"
    if not path.is_file():
        return OTHERWISE
    chosen = {}
    for task in json.loads(path.read_text()):
        chosen.setdefault(task["task"], []).append(task)
    return [task for tasks in chosen.values() for task in tasks[:PER_TASK]]


def shortened(text, width=68):
    """The end of a long prompt, where the question is."""
    line = " / ".join(text.split("\n"))
    return line if len(line) <= width else "..." + line[3 - width:]


def main(directory):
    bundle = open_bundle(directory)
    tokenizer, session = bundle.tokenizer(), bundle.session()
    stop = bundle.manifest.config.eos_token_ids

    def answer(tokens):
        return tokenizer.decode(list(generate(session, tokens, max_tokens=MAX_TOKENS, stop=stop)))

    right = asked = 0
    for task in questions(directory):
        session.reset()
        said = answer(tokenizer.chat(task["messages"]))
        verdict = ""
        if task["answer"] is not None:
            asked += 1
            right += said == task["answer"]
            verdict = "   right" if said == task["answer"] else f"   WRONG, it is {task['answer']}"
        print(f"{task['task']:>10}: {shortened(task['messages'][-1]['content'])}\n{'':>10}  -> {said}{verdict}")
    if asked:
        print(f"\n{right} of {asked} right")

    session.reset()
    session.prefill(tokenizer.encode("One beginning for two "))
    fork = session.snapshot()
    ends = []
    for end in ("questions.", "answers."):
        session.restore(fork)
        ends.append(int(session.prefill(tokenizer.encode(end, special=False)).argmax()))
    print(f"\nforked at position {fork.position} ({fork.nbytes / 1e3:.0f} kB): next tokens {ends[0]} and {ends[1]}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
