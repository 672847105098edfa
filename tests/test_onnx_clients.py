"""One ONNX bundle, unchanged, in three other clients: the same token ids from a text, the same greedy answers."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from lfm_edge import export
from lfm_edge.session.generation import generate
from tests.client_helpers import (
    CONVERSATION,
    TEXTS,
    ClientFailed,
    assert_ours_or_tied,
    long_prompt,
    our_answers,
    output_of,
    tasks,
    through_stop,
)
from tests.helpers import ALL_AT_ONCE, AWKWARD, REPO, TINY, save_checkpoint

ONNXRUNTIME, GENAI, TRANSFORMERS_JS = "onnxruntime", "onnxruntime-genai", "transformers.js"
CLIENTS = (ONNXRUNTIME, GENAI, TRANSFORMERS_JS)
WITH_TOKENIZER = (GENAI, TRANSFORMERS_JS)
CONTEXT = 1024

# What a client cannot do, and what it says. Each is a limit of the client, not of the bundle.
TOO_LONG = {
    ONNXRUNTIME: "cos_cache dimension 0 shall not be less than total_sequence_length",
    GENAI: r"max_length \(1026\) cannot be greater than model context_length \(1024\)",
    TRANSFORMERS_JS: "cos_cache dimension 0 shall not be less than total_sequence_length",
}
REFUSED = {
    (GENAI, "one conv tap"): "Model input was not found: past_conv.0",
    (TRANSFORMERS_JS, "conv only"): "Unable to determine sequence length from the cache.",
    (TRANSFORMERS_JS, "one conv layer"): "Unable to determine sequence length from the cache.",
}

def run(client, bundle, jobs):
    """The client's results, one for each job. Raises ClientFailed."""
    return json.loads(output_of(command(client), json.dumps({"directory": str(bundle.directory), "jobs": jobs})))


def command(client):
    if client == TRANSFORMERS_JS:
        return [node(), str(REPO / "tests/javascript/greedy.mjs")]
    script = {ONNXRUNTIME: "greedy_onnxruntime.py", GENAI: "greedy_genai.py"}[client]
    return [sys.executable, str(REPO / "tests/clients" / script)]


def node():
    found = shutil.which("node", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None or not (REPO / "tests/javascript/node_modules").is_dir():
        pytest.fail("Node or transformers.js is missing: run `make test`, which installs both", pytrace=False)
    return found


def answers_in(client, bundle, prompts, max_tokens):
    """What the client answers. Plain ONNX Runtime knows no stop tokens."""
    results = run(client, bundle, [{"tokens": prompt, "max_tokens": max_tokens} for prompt in prompts])
    return [through_stop(bundle, result["generated"]) if client == ONNXRUNTIME else result["generated"]
            for result in results]


@pytest.fixture(scope="module", params=["onnx-q4", "onnx-q8"])
def bundle(request, tmp_path_factory):
    output = tmp_path_factory.mktemp(request.param) / "bundle"
    return export(TINY, target=request.param, output=output, context=CONTEXT)


@pytest.fixture(scope="module")
def awkward_bundle(tmp_path_factory):
    """Everything that a hard-coded assumption breaks on, and a vocabulary with many merges."""
    folder = tmp_path_factory.mktemp("awkward")
    source = save_checkpoint(folder / "model", **ALL_AT_ONCE | {"vocab_size": 65_535})
    return export(source, target="onnx-q4", output=folder / "bundle", context=64, prefill_chunk=16, kv_dtype="int8")


@pytest.mark.parametrize("client", WITH_TOKENIZER)
def test_a_conversation_becomes_the_same_tokens_and_gets_the_same_answer(bundle, client):
    conversations = [example["messages"] for example in tasks(each=3)]
    prompts = [bundle.tokenizer().chat(messages) for messages in conversations]
    results = run(client, bundle, [{"messages": messages, "max_tokens": 32} for messages in conversations])
    assert [result["prompt"] for result in results] == prompts
    assert [result["generated"] for result in results] == our_answers(bundle, prompts, 32)


def test_plain_onnxruntime_gives_the_same_answers(bundle):
    prompts = [bundle.tokenizer().chat(example["messages"]) for example in tasks(each=3)]
    assert answers_in(ONNXRUNTIME, bundle, prompts, 32) == our_answers(bundle, prompts, 32)


def test_the_program_in_the_bundle_s_readme_runs_as_printed(bundle):
    readme, tokenizer = (bundle.directory / "README.md").read_text(), bundle.tokenizer()
    program = re.search(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)[1]
    printed = output_of([sys.executable, "-c", program], cwd=bundle.directory)
    ours = generate(bundle.session(), tokenizer.encode("The harbour"), max_tokens=32,
                    stop=bundle.manifest.config.eos_token_ids)
    assert printed == tokenizer.decode(list(ours)) + "\n"


def test_the_answers_are_right(bundle):
    examples, tokenizer = tasks(each=3), bundle.tokenizer()
    answers = our_answers(bundle, [tokenizer.chat(example["messages"]) for example in examples], 32)
    assert [tokenizer.decode(answer) for answer in answers] == [example["answer"] for example in examples]


@pytest.mark.parametrize("client", CLIENTS)
def test_prompts_of_one_token_and_beyond_the_prefill_chunk_get_the_same_answers(bundle, client):
    chunk = bundle.manifest.options.prefill_chunk
    prompts = [[1], *(long_prompt(bundle.tokenizer(), length) for length in (chunk, chunk + 1, 5 * chunk + 3))]
    assert answers_in(client, bundle, prompts, 16) == our_answers(bundle, prompts, 16)


@pytest.mark.parametrize("client", CLIENTS)
def test_a_prompt_that_fills_the_context_but_one_gets_the_same_token(bundle, client):
    prompts = [long_prompt(bundle.tokenizer(), CONTEXT - 1)]
    assert answers_in(client, bundle, prompts, 1) == our_answers(bundle, prompts, 1)


@pytest.mark.parametrize("client", CLIENTS)
def test_no_client_goes_beyond_the_context(bundle, client):
    with pytest.raises(ClientFailed, match=TOO_LONG[client]):
        answers_in(client, bundle, [long_prompt(bundle.tokenizer(), CONTEXT)], 2)


@pytest.mark.parametrize("client", WITH_TOKENIZER)
def test_awkward_texts_become_the_same_tokens_with_one_first_token(awkward_bundle, client):
    tokenizer = awkward_bundle.tokenizer()
    results = run(client, awkward_bundle, [{"text": text, "max_tokens": 0} for text in TEXTS]
                  + [{"messages": CONVERSATION, "max_tokens": 0}])
    ours = [tokenizer.encode(text) for text in TEXTS] + [tokenizer.chat(CONVERSATION)]
    assert [result["prompt"] for result in results] == ours


def test_genai_ends_a_text_at_a_null_character_and_splits_some_blank_ends_elsewhere(awkward_bundle):
    """Limits of its own tokenizer: this fails when they are gone."""
    tokenizer = awkward_bundle.tokenizer()
    null, blank = run(GENAI, awkward_bundle, [{"text": text, "max_tokens": 0} for text in ("a\0b", "  \n ")])
    assert null["prompt"] == tokenizer.encode("a")
    assert blank["prompt"] != tokenizer.encode("  \n ")
    assert tokenizer.decode(blank["prompt"]) == "  \n "


@pytest.mark.parametrize("client", CLIENTS)
def test_an_awkward_model_with_8_bit_caches_gets_the_same_answers(awkward_bundle, client):
    assert_same_answers_of_random_model(awkward_bundle, client)


def assert_same_answers_of_random_model(bundle, client):
    prompts = [[1], [1, 20, 30, 40], [20 + 7 * index % 250 for index in range(40)]]
    for prompt, answer in zip(prompts, answers_in(client, bundle, prompts, 16), strict=True):
        assert_ours_or_tied(bundle, prompt, answer, 16)


@pytest.mark.heavy
@pytest.mark.parametrize("name", list(AWKWARD))
def test_awkward_models_get_the_same_answers_in_every_client(tmp_path, name):
    source = save_checkpoint(tmp_path / "model", **AWKWARD[name])
    bundle = export(source, target="onnx-q4", output=tmp_path / "bundle", context=64, prefill_chunk=16)
    for client in CLIENTS:
        if (client, name) in REFUSED:
            with pytest.raises(ClientFailed, match=REFUSED[client, name]):
                answers_in(client, bundle, [[1, 20, 30, 40]], 2)
        else:
            assert_same_answers_of_random_model(bundle, client)
