"""mlx-lm. Reads a job and prints its results as tests/test_onnx_clients.py says."""

import json
import sys

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import generate_step


class Client:
    """A bundle's folder, as it is, with the tokenizer that mlx-lm reads from it."""

    def __init__(self, directory):
        self.model, self.tokenizer = mlx_lm.load(directory)

    def prompt(self, job):
        if "tokens" in job:
            return job["tokens"]
        if "text" in job:
            return self.tokenizer.encode(job["text"])
        return self.tokenizer.apply_chat_template(job["messages"], add_generation_prompt=True)

    def greedy(self, prompt, max_tokens):
        generated = []
        for token, _ in generate_step(mx.array(prompt), self.model, max_tokens=max_tokens):
            generated.append(int(token))
            if token in self.tokenizer.eos_token_ids:
                break
        return generated

    def result(self, job):
        prompt = self.prompt(job)
        return {"prompt": prompt, "generated": self.greedy(prompt, job["max_tokens"]) if job["max_tokens"] else []}


if __name__ == "__main__":
    given = json.load(sys.stdin)
    client = Client(given["directory"])
    print(json.dumps([client.result(job) for job in given["jobs"]]))
