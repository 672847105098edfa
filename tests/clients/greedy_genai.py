"""onnxruntime-genai. Reads a job and prints its results as tests/client_helpers.py says."""

import json

import onnxruntime_genai as genai
from jobs import serve


class Client:
    """A bundle's folder, as it is, with the tokenizer that genai reads from it."""

    def __init__(self, directory):
        self.model = genai.Model(directory)
        self.tokenizer = genai.Tokenizer(self.model)
        self.text_tokenizer = genai.Tokenizer(self.model)
        self.text_tokenizer.update_options(add_special_tokens="true")

    def prompt(self, job):
        if "tokens" in job:
            return job["tokens"]
        if "text" in job:
            return self.text_tokenizer.encode(job["text"]).tolist()
        text = self.tokenizer.apply_chat_template(json.dumps(job["messages"]), add_generation_prompt=True)
        return self.tokenizer.encode(text).tolist()

    def greedy(self, prompt, max_tokens):
        parameters = genai.GeneratorParams(self.model)
        parameters.set_search_options(max_length=len(prompt) + max_tokens, do_sample=False)
        generator = genai.Generator(self.model, parameters)
        generator.append_tokens(prompt)
        generated = []
        while not generator.is_done():
            generator.generate_next_token()
            generated.append(int(generator.get_next_tokens()[0]))
        return generated


if __name__ == "__main__":
    serve(Client)
