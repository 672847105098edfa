"""What clients with a tokenizer of their own share: the jobs of tests/client_helpers.py in, their results out."""

import json
import sys


def serve(client_of):
    """Read a job from standard input and print its results.

    client_of: the bundle's directory -> a client: `prompt(job)` and `greedy(prompt, max_tokens)` give token ids
    """
    given = json.load(sys.stdin)
    client, results = client_of(given["directory"]), []
    for job in given["jobs"]:
        prompt = client.prompt(job)
        results.append({"prompt": prompt,
                        "generated": client.greedy(prompt, job["max_tokens"]) if job["max_tokens"] else []})
    print(json.dumps(results))
