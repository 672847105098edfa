"""llama-cpp-python's own client. Reads a job and prints its results as tests/client_helpers.py says."""

import llama_cpp
from jobs import serve
from llama_cpp.llama_chat_format import Jinja2ChatFormatter


class Client:
    """A bundle's GGUF, as it is, with the tokenizer and the chat template that are in it."""

    def __init__(self, directory):
        self.model = llama_cpp.Llama(f"{directory}/model.gguf", n_ctx=0, verbose=False)
        template = self.model.metadata.get("tokenizer.chat_template")
        bos, eos = (self.model.detokenize([token], special=True).decode()
                    for token in (self.model.token_bos(), self.model.token_eos()))
        self.formatter = template and Jinja2ChatFormatter(template, eos_token=eos, bos_token=bos)

    def prompt(self, job):
        if "tokens" in job:
            return job["tokens"]
        if "text" in job:
            return self.model.tokenize(job["text"].encode(), special=True)
        text = self.formatter(messages=job["messages"]).prompt
        return self.model.tokenize(text.encode(), add_bos=False, special=True)

    def greedy(self, prompt, max_tokens):
        self.model.reset()
        generated = []
        for token in self.model.generate(prompt, temp=0.0, repeat_penalty=1.0):
            generated.append(token)
            if len(generated) == max_tokens or token == self.model.token_eos():
                break
        return generated


if __name__ == "__main__":
    serve(Client)
