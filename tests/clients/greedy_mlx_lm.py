"""mlx-lm. Reads a job and prints its results as tests/client_helpers.py says."""

import mlx.core as mx
import mlx_lm
from jobs import serve
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


if __name__ == "__main__":
    serve(Client)
