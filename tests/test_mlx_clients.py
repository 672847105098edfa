"""One MLX bundle, unchanged, in other clients: mlx-lm, and programs that have MLX alone, in Python and in C++."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from exporters.mlx import unmet_by
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
)
from tests.helpers import ALL_AT_ONCE, AWKWARD, REPO, TINY, code_of, save_checkpoint

MLX = Path(mx.__file__).parent

# What mlx-lm cannot do: how it fails, and what the bundle's README says it needs. Limits of the client, not of the
# bundle. No published LFM2 has them.
REFUSED = {
    "one conv tap": ("cannot be broadcast", "two conv taps or more"),
    "untied head": ("Received 3 parameters not in model", "a tied head"),
    "conv only": ("list index out of range", "an attention layer"),
    "attention only": ("list index out of range", "a conv layer"),
    "one conv layer": ("list index out of range", "an attention layer"),
    "untied odd vocabulary, conv bias, four taps": ("Received 3 parameters not in model", "a tied head"),
    "narrow heads": (r"Expected shape \(16,\) but received shape \(8,\)",
                     "heads as wide as hidden_size / num_attention_heads"),
}
PROMPTS = [[1], [1, 20, 30, 40], [20 + 7 * index % 250 for index in range(40)]]
MODELS = AWKWARD | {"narrow heads": {"head_dim": 8}}


def run_mlx_lm(bundle, jobs):
    """mlx-lm's results, one for each job. Raises ClientFailed."""
    request = json.dumps({"directory": str(bundle.directory), "jobs": jobs})
    return json.loads(output_of([sys.executable, str(REPO / "tests/clients/greedy_mlx_lm.py")], request))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """In float32, where every client computes the same: in bfloat16 each rounds at places of its own."""
    return export(TINY, target="mlx-q4", output=tmp_path_factory.mktemp("mlx") / "bundle", context=1024,
                  compute_dtype="float32")


@pytest.fixture(scope="module")
def examples():
    return tasks(each=1)


@pytest.fixture(scope="module")
def prompts(bundle):
    """Of one token, a whole step, one more, and several steps."""
    chunk = bundle.manifest.options.prefill_chunk
    return [[1], *(long_prompt(bundle.tokenizer(), length) for length in (chunk, chunk + 1, 5 * chunk + 3))]


@pytest.fixture(scope="module")
def of_mlx_lm(bundle, examples, prompts):
    """What one process of mlx-lm makes of the conversations, then of the prompts."""
    return run_mlx_lm(bundle, [{"messages": example["messages"], "max_tokens": 32} for example in examples]
                      + [{"tokens": prompt, "max_tokens": 16} for prompt in prompts])


def test_mlx_lm_reads_the_same_conversations_and_gives_the_same_answers(bundle, examples, of_mlx_lm):
    results, tokenizer = of_mlx_lm[:len(examples)], bundle.tokenizer()
    conversations = [tokenizer.chat(example["messages"]) for example in examples]
    assert [result["prompt"] for result in results] == conversations
    assert [result["generated"] for result in results] == our_answers(bundle, conversations, 32)
    assert [tokenizer.decode(result["generated"]) for result in results] == [each["answer"] for each in examples]


def test_mlx_lm_gives_the_same_answers_to_prompts_of_one_token_and_beyond_a_step(bundle, prompts, of_mlx_lm):
    assert [len(prompt) for prompt in prompts] == [1, 128, 129, 643]
    assert [result["generated"] for result in of_mlx_lm[-len(prompts):]] == our_answers(bundle, prompts, 16)


def test_the_program_in_the_bundle_s_readme_runs_as_printed_and_needs_neither_torch_nor_us(bundle):
    readme, tokenizer = (bundle.directory / "README.md").read_text(), bundle.tokenizer()
    program = re.search(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)[1]
    check = "\nimport sys\nassert not {'torch', 'lfm_edge', 'mlx_lm'} & set(sys.modules)"
    printed = output_of([sys.executable, "-c", program + check], cwd=bundle.directory)
    ours = generate(bundle.session(), tokenizer.encode("The harbour"), max_tokens=32,
                    stop=bundle.manifest.config.eos_token_ids)
    assert printed == tokenizer.decode(list(ours)) + "\n"


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_the_c_plus_plus_of_the_docs_gives_the_same_answers(bundle, tmp_path):
    """With a `main` that takes the layout, the prompt and what else it needs as constants."""
    manifest = bundle.manifest
    prompt = long_prompt(bundle.tokenizer(), manifest.options.prefill_chunk + 7)
    layout = ", ".join(f"{{{{{', '.join(map(str, tensor.shape))}}}, mx::{tensor.dtype}, "
                       f"{str(tensor.update == 'append').lower()}}}" for tensor in manifest.state.tensors)
    (tmp_path / "main.cpp").write_text(f"""
        #include <iostream>
        {code_of("guides/desktop.md", "cpp", '#include "mlx/mlx.h"')}
        int main() {{
          Session session("{bundle.directory}", {{{layout}}}, {manifest.options.prefill_chunk});
          int token = session.prefill({{{', '.join(map(str, prompt))}}});
          for (int i = 0; i < 16; ++i) {{ std::cout << token << " "; token = session.step({{token}}); }}
        }}""")
    subprocess.run(["c++", "-std=c++20", tmp_path / "main.cpp", "-o", tmp_path / "main", f"-I{MLX / 'include'}",
                    f"-L{MLX / 'lib'}", "-lmlx", f"-Wl,-rpath,{MLX / 'lib'}"], check=True)
    answer = [int(token) for token in output_of([tmp_path / "main"]).split()]
    assert answer == list(generate(bundle.session(), prompt, max_tokens=16))


def test_awkward_texts_and_an_awkward_model_get_the_same_tokens_and_answers_in_mlx_lm(tmp_path):
    """All that a hard-coded assumption breaks on, but for an untied head, and a vocabulary with many merges."""
    awkward = ALL_AT_ONCE | {"tie_word_embeddings": True, "vocab_size": 65_535}
    bundle = export(save_checkpoint(tmp_path / "model", **awkward), target="mlx-q4", output=tmp_path / "bundle",
                    context=64, prefill_chunk=16, compute_dtype="float32")
    tokenizer = bundle.tokenizer()
    results = run_mlx_lm(bundle, [{"text": text, "max_tokens": 0} for text in TEXTS]
                         + [{"messages": CONVERSATION, "max_tokens": 0}]
                         + [{"tokens": prompt, "max_tokens": 16} for prompt in PROMPTS])
    assert [result["prompt"] for result in results] == [
        *(tokenizer.encode(text) for text in TEXTS), tokenizer.chat(CONVERSATION), *PROMPTS]
    for result in results[-len(PROMPTS):]:
        assert_ours_or_tied(bundle, result["prompt"], result["generated"], 16)


def test_the_readme_names_only_clients_that_can_run_the_model(bundle, tmp_path):
    assert "mlx_lm.load" in (bundle.directory / "README.md").read_text()
    assert unmet_by(bundle.manifest.config) == []
    source = save_checkpoint(tmp_path / "model", **AWKWARD["one conv layer"])
    other = export(source, target="mlx-q4", output=tmp_path / "bundle", context=32, prefill_chunk=1)
    readme = (other.directory / "README.md").read_text()
    assert "mlx-lm and mlx-swift cannot run this model: their LFM2 needs an attention layer\n" in readme
    assert "mlx_lm" not in readme


@pytest.mark.heavy
@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("options", [{"target": "mlx-q4", "head_bits": 4}, {"target": "mlx-q8"}],
                         ids=lambda options: options["target"])
def test_awkward_models_get_the_same_answers_in_mlx_lm_or_are_refused(tmp_path, name, options):
    source = save_checkpoint(tmp_path / "model", **MODELS[name])
    bundle = export(source, output=tmp_path / "bundle", context=64, prefill_chunk=16, compute_dtype="float32",
                    **options)
    jobs = [{"tokens": prompt, "max_tokens": 16} for prompt in PROMPTS]
    message, need = REFUSED.get(name, ("", None))
    assert unmet_by(bundle.manifest.config) == ([need] if need else [])
    if need:
        with pytest.raises(ClientFailed, match=message):
            run_mlx_lm(bundle, jobs)
        return
    for prompt, result in zip(PROMPTS, run_mlx_lm(bundle, jobs), strict=True):
        assert_ours_or_tied(bundle, prompt, result["generated"], 16)
