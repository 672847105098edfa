"""What a lookahead is worth: what a step of several tokens costs, and how many tokens come from a step.

    python examples/python/lookahead.py BUNDLE

The first table is of this machine and of a model of this size; its weights do not matter. The second is of the tasks
that the bundle ships, where it ships some: of what the model says.
"""

import statistics
import sys
import time
from collections import defaultdict

from lfm_edge import open_bundle
from lfm_edge.harness.quality import read_tasks
from lfm_edge.session.generation import generate

LENGTHS = (1, 2, 3, 4, 6, 8)
LOOKAHEADS = (3, 7)
BEFORE, ROUNDS, MAX_TOKENS = 128, 20, 64


def step_costs(session):
    """Median seconds of a step of so many tokens after 128 others, all lengths in turn."""
    prompt = [20 + index % 200 for index in range(BEFORE)]
    spent = defaultdict(list)
    session.prefill(prompt)
    for _ in range(ROUNDS):
        for length in LENGTHS:
            start = time.perf_counter()
            session.prefill_scored(prompt[:length], length)
            spent[length].append(time.perf_counter() - start)
            session.take_back()
    return {length: statistics.median(times) for length, times in spent.items()}


def tokens_per_step(bundle, session, lookahead):
    """By task: tokens that were said, the stop token included, over the steps that said them."""
    tokenizer, stop = bundle.tokenizer(), bundle.manifest.config.eos_token_ids
    said, steps = defaultdict(int), defaultdict(int)
    for task in read_tasks(bundle):
        name, prompt = task["task"], tokenizer.chat(task["messages"])
        session.reset()
        taken = count_steps(session)
        answer = list(generate(session, prompt, max_tokens=MAX_TOKENS, stop=stop, lookahead=lookahead))
        said[name] += len(answer) + 1
        steps[name] += len(taken) - (len(prompt) - 1) // session.chunk  # the last step of the prompt says a token
    return {name: said[name] / steps[name] for name in said}


def count_steps(session):
    """A list that gets an entry for each step that the session runs from now on."""
    taken, run = [], type(session)._scored_step

    def counted(tokens, count):
        taken.append(len(tokens))
        return run(session, tokens, count)

    session._scored_step = counted
    return taken


def main(directory):
    bundle = open_bundle(directory)
    session = bundle.session()
    if session.scored < max(LENGTHS):
        sys.exit(f"{directory}: tells the logits of {session.scored} tokens of a step, {max(LENGTHS)} are needed")
    costs = step_costs(session)
    for length, seconds in costs.items():
        print(f"a step of {length} tokens: {1e3 * seconds:.1f} ms, {seconds / costs[1]:.2f} times that of one")
    for lookahead in LOOKAHEADS if read_tasks(bundle) else ():
        found = tokens_per_step(bundle, session, lookahead)
        print(f"--lookahead {lookahead}, tokens from a step: "
              + ", ".join(f"{name} {value:.2f}" for name, value in found.items()))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
