"""Bundles and the float32 model as models of lm-evaluation-harness, on small local tasks."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file

from lfm_edge import export
from lfm_edge.errors import LfmEdgeError
from lfm_edge.harness.evaluation import Change, Score
from lfm_edge.harness.lm_eval import Answer, EdgeLM
from lfm_edge.session.sampling import Sampling
from tests.client_helpers import tasks
from tests.helpers import REPO, TINY, in_process

PROMPTS = [(task["messages"][0]["content"], task["answer"]) for task in tasks(each=2) if len(task["messages"]) == 1]
OTHERS = ["41", "no", "w4 y2"]
CHAT = "<|startoftext|><|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def requests(*arguments):
    """As lm-eval gives them."""
    return [SimpleNamespace(args=each) for each in arguments]


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setenv("TQDM_DISABLE", "1")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of tasks, one of each kind, as lm-eval reads them."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": question, "answer": answer, "choices": [*OTHERS, answer], "label": len(OTHERS)}
            for question, answer in PROMPTS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
              "test_split": "test"}
    mean = {"aggregation": "mean", "higher_is_better": True}
    for task in ({"task": "answers", "output_type": "generate_until", "doc_to_text": "{{question}}",
                  "doc_to_target": "{{answer}}", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 64},
                  "metric_list": [{"metric": "exact_match", **mean}]},
                 {"task": "choices", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
                  "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}", "target_delimiter": "",
                  "metric_list": [{"metric": "acc", **mean}]},
                 {"task": "texts", "output_type": "loglikelihood_rolling", "doc_to_text": "",
                  "doc_to_target": "{{question}} {{answer}}",
                  "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte",
                                   "higher_is_better": False}]}):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task))
    return folder


@pytest.fixture(scope="module")
def ours():
    return EdgeLM(str(TINY), context=1024)


@pytest.fixture(scope="module")
def theirs():
    """lm-eval's own model over transformers: the implementation that this one is held against."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(TINY), dtype="float32", device="cpu", batch_size=1, max_length=1024)


# --- against lm-eval's own ----------------------------------------------------------------------------------------


def test_likelihoods_are_those_of_transformers(ours, theirs):
    asked = requests(*[(CHAT.format(question), end) for question, answer in PROMPTS for end in (answer, *OTHERS)],
                     ("", "23+19=42"), ("w4 y2 ", "w4"), ("a question", " and its answer"))
    for mine, its in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True), strict=True):
        assert mine[0] == pytest.approx(its[0], abs=1e-3) and mine[1] == its[1]


@pytest.mark.parametrize("length", [1024, 16])  # one window; several, as of a text beyond the context
def test_likelihoods_of_whole_texts_are_those_of_transformers(ours, theirs, monkeypatch, length):
    monkeypatch.setattr(ours, "max_length", length)
    monkeypatch.setattr(theirs, "_max_length", length)
    asked = requests(*[(f"{question} {answer}",) for question, answer in PROMPTS[:4]], ("a",))
    for mine, its in zip(ours.loglikelihood_rolling(asked), theirs.loglikelihood_rolling(asked, disable_tqdm=True),
                         strict=True):
        assert mine == pytest.approx(its, abs=1e-3)


def test_a_prompt_beyond_the_context_loses_its_beginning_as_there(ours, theirs, monkeypatch):
    for model, name in ((ours, "max_length"), (theirs, "_max_length")):
        monkeypatch.setattr(model, name, 24)
    asked = requests(*[(CHAT.format(question), answer) for question, answer in PROMPTS[:4]])
    for mine, its in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True), strict=True):
        assert mine[0] == pytest.approx(its[0], abs=1e-3)


@pytest.mark.parametrize("until", [["\n\n"], ["4"], ["d a", " "]])
def test_answers_are_those_of_transformers(ours, theirs, until):
    asked = requests(*[(CHAT.format(question), {"until": until, "max_gen_toks": 24}) for question, _ in PROMPTS[:6]],
                     ("copy: abc", {"until": until, "max_gen_toks": 8}))
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)


def test_prompts_become_the_same_text_and_tokens(ours, theirs):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " 23+19=? "}]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages)
    for beginning in ("The answer is", "The answer is ", "end", "im", "42"):
        begun = [*messages, {"role": "assistant", "content": beginning}]
        assert ours.apply_chat_template(begun, False) == theirs.apply_chat_template(begun, False)
    assert ours.chat_template(True) == theirs.chat_template(True)
    for text in ("23+19=?", "<|startoftext|>23+19=?", ours.apply_chat_template(messages)):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        assert ours.tok_encode(text, add_special_tokens=False) == theirs.tok_encode(text, add_special_tokens=False)
    assert ours.prefix_token_id == theirs.prefix_token_id and ours.eot_token_id == theirs.eot_token_id


# --- of its own ---------------------------------------------------------------------------------------------------


def test_what_prompts_share_is_computed_once(tiny_bundle):
    model = EdgeLM(str(tiny_bundle.directory))
    examples = " ".join(f"{question} {answer}" for question, answer in PROMPTS[:4])
    asked = requests(*[(f"{examples} {question}", answer) for question, answer in PROMPTS[4:] for answer in OTHERS])
    scores = model.loglikelihood(asked)
    assert model.prefilled_tokens < model.prompt_tokens / 2
    for request, (score, _) in list(zip(asked, scores, strict=True))[::5]:
        alone, = EdgeLM.loglikelihood(model, [request])
        assert alone[0] == pytest.approx(score, rel=0.05)  # another cut of the prompt is another draw of 8-bit noise


@pytest.mark.parametrize("options", [{"target": "android-q4", "state": "internal"}, {"target": "onnx-q4"}],
                         ids=lambda options: "-".join(options.values()))
def test_a_bundle_is_near_the_float_model(ours, tmp_path, options):
    bundle = export(TINY, output=tmp_path / "bundle", context=256, prefill_chunk=32, **options)
    model = EdgeLM(str(bundle.directory), threads=1)
    assert model.max_length == 256
    asked = requests(*[(CHAT.format(question), end) for question, answer in PROMPTS[:3] for end in (answer, "41")])
    for (mine, best), (exact, exactly) in zip(model.loglikelihood(asked), ours.loglikelihood(asked), strict=True):
        assert mine == pytest.approx(exact, abs=0.5, rel=0.1) and best == exactly
    assert model.generate_until(requests((CHAT.format("23+19=?"), {"until": [], "max_gen_toks": 24}))) == ["42"]


def test_only_what_follows_the_thoughts_is_the_answer(ours, monkeypatch):
    said = "so 20+20\nand then </think>\n 42\nQuestion: more"
    monkeypatch.setattr("lfm_edge.harness.lm_eval.generate", lambda *_, **__: (token for token in [1, 2]))
    monkeypatch.setattr("lfm_edge.harness.lm_eval.text_pieces", lambda *_: iter(re.findall("...?", said, re.DOTALL)))
    monkeypatch.setattr(ours, "think_end_token", "</think>")
    asked = Answer.of({"until": ["\n"]})
    assert ours._answer(5, asked, seed=0) == "42"
    monkeypatch.setattr(ours, "think_end_token", None)
    assert ours._answer(5, asked, seed=0) == "so 20+20"


@pytest.mark.parametrize("given, sampling", [
    ({}, Sampling()), ({"do_sample": False, "temperature": 0.9, "top_p": 0.5}, Sampling()),
    ({"do_sample": True, "temperature": 0.7, "top_k": 5, "num_beams": 1}, Sampling(0.7, top_k=5)),
    ({"do_sample": True}, Sampling(1.0)), ({"repetition_penalty": 1.1}, Sampling(repetition_penalty=1.1))])
def test_answers_are_sampled_as_the_task_asks(given, sampling):
    assert Answer.of(given).sampling == sampling


def test_what_cannot_be_honoured_is_refused(ours, tiny_bundle):
    with pytest.raises(LfmEdgeError, match="num_beams=4"):
        Answer.of({"num_beams": 4})
    with pytest.raises(LfmEdgeError, match="a temperature of 0"):
        Answer.of({"do_sample": True, "temperature": 0.0})
    with pytest.raises(LfmEdgeError, match="a continuation of 1200 tokens"):
        ours._loglikelihood_tokens([(None, [1], [7] * 1200)])
    with pytest.raises(LfmEdgeError, match="a continuation of 0 tokens"):
        ours._loglikelihood_tokens([(None, [1], [])])
    with pytest.raises(LfmEdgeError, match="think_end_token is empty"):
        EdgeLM(str(TINY), think_end_token="")
    with pytest.raises(LfmEdgeError, match="no room for a prompt in a context of 1024"):
        ours.generate_until(requests(("a", {"until": [], "max_gen_toks": 1024})))
    with pytest.raises(LfmEdgeError, match="batch_size=8: a bundle has a batch of 1"):
        EdgeLM(str(TINY), batch_size=8)
    with pytest.raises(LfmEdgeError, match="context=4096: this model takes 2 to 1024 tokens"):
        EdgeLM(str(tiny_bundle.directory), context=4096)
    with pytest.raises(LfmEdgeError, match="no switch 'thoughts'"):
        EdgeLM(str(TINY), template_options={"thoughts": True})


def test_answers_are_drawn_anew_for_each_prompt_and_time_and_alike_on_every_run(ours):
    options = {"until": [], "max_gen_toks": 4, "do_sample": True, "temperature": 1e4}
    asked = requests(*[(CHAT.format(question), options) for question, _ in PROMPTS[:4]],
                     *[(CHAT.format(PROMPTS[0][0]), options)] * 3)
    first = ours.generate_until(asked)
    assert len(set(first)) == 7 and ours.generate_until(asked) == first
    assert ours.generate_until(asked[2:3]) == first[2:3]  # whatever else is asked


def test_a_text_without_tokens_begins_with_the_first_token(ours, monkeypatch):
    monkeypatch.setattr(ours, "tok_encode", lambda text, *_, **__: [] if not text.strip() else [40, 41])
    first = ours.prefix_token_id
    assert ours._loglikelihood_tokens([(None, [], [40, 41])]) == ours._loglikelihood_tokens([(None, [first], [40, 41])])
    assert ours.generate_until(requests((" ", {"until": [], "max_gen_toks": 2})))[0] is not None


def test_a_prompt_that_was_cut_is_counted(ours, monkeypatch):
    monkeypatch.setattr(ours, "max_length", 24)
    monkeypatch.setattr(ours, "cut_prompts", 0)
    ours.loglikelihood(requests((CHAT.format(PROMPTS[0][0]), "41"), ("a", "b")))
    assert ours.cut_prompts == 1


def test_logits_that_are_not_finite_are_no_score(ours, monkeypatch):
    monkeypatch.setattr(ours.session, "_step", lambda tokens: np.full(ours.session.vocab_size, np.nan, np.float32))
    with pytest.raises(LfmEdgeError, match="the logits are not finite"):
        ours.loglikelihood(requests(("a", "b")))


# --- the command --------------------------------------------------------------------------------------------------


def test_models_are_compared_with_the_first(tiny_bundle, folder, tmp_path):
    result = in_process("eval", TINY, tiny_bundle.directory, "--tasks", "answers,choices,texts", "--task-folder",
                        folder, "--limit", 6, "--max-drop", 0.5, "--json", tmp_path / "eval.json")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "PASSED  3 of 3 metrics are at most 0.5 worse than with checkpoint"
    assert lines[1:4] == ["answers, exact_match, 6 documents", "  checkpoint (float32)  1.000 ±0.000",
                          "  bundle (android-q4)   1.000 ±0.000   +0.000 ±0.000   0 better, 0 worse"]
    assert "texts, bits_per_byte (less is better), 6 documents" in lines
    written = json.loads((tmp_path / "eval.json").read_text())
    assert written["schema"] == "lfm-edge/eval/1" and written["passed"]
    assert [model["computed"] for model in written["models"]] == ["float32", "android-q4"]
    assert [model["model"] for model in written["models"]] == [str(TINY), str(tiny_bundle.directory)]
    assert [score["task"] for score in written["models"][0]["scores"]] == ["answers", "choices", "texts"]
    assert written["models"][1]["scores"][2]["value"] == pytest.approx(
        written["models"][0]["scores"][2]["value"] + written["changes"][2]["change"])


def test_a_metric_that_drops_fails(folder, tmp_path):
    damaged = shutil.copytree(TINY, tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    save_file({name: tensor.flip(0) if "w1" in name else tensor for name, tensor in tensors.items()},
              damaged / "model.safetensors", metadata={"format": "pt"})
    result = in_process("eval", TINY, damaged, "--tasks", "answers", "--task-folder", folder, "--limit", 6,
                        "--max-drop", 0.1)
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    assert lines[0] == "FAILED  0 of 1 metrics are at most 0.1 worse than with checkpoint"
    assert re.fullmatch(r"  FAILED   damaged: answers, exact_match: -[01]\.\d+", lines[1])
    assert re.search(r"0 better, [3-6] worse", result.stdout)


def test_every_model_gets_the_same_examples(tiny_bundle, folder, monkeypatch):
    seen = []
    monkeypatch.setattr(EdgeLM, "generate_until", lambda self, asked, **_: seen.append(
        [request.args[0] for request in asked]) or [""] * len(asked))
    shots = folder / "shots.yaml"
    shots.write_text((folder / "answers.yaml").read_text().replace("task: answers", "task: shots")
                     + "fewshot_split: test\n")
    in_process("eval", TINY, tiny_bundle.directory, "--tasks", "shots", "--task-folder", folder, "--few-shot", 2,
               "--limit", 3)
    shots.unlink()
    assert seen[0] == seen[1] and seen[0][0].count("<|im_start|>user") == 3


def test_what_is_no_number_is_named_and_has_not_passed(folder, tiny_bundle, monkeypatch, tmp_path):
    metrics = {"alias": "task", "acc,none": float("nan"), "f1,none": [1.0], "em,none": np.float32(1)}
    found = {"results": {"task": metrics},
             "samples": {}, "higher_is_better": {}}
    monkeypatch.setattr("lfm_edge.harness.evaluation._run", lambda *_: found)
    result = in_process("eval", TINY, tiny_bundle.directory, "--tasks", "answers", "--task-folder", folder,
                        "--max-drop", 0.5, "--json", tmp_path / "eval.json")
    assert result.returncode == 1 and "no number, so not compared: task, acc; task, f1" in result.stdout
    written = json.loads((tmp_path / "eval.json").read_text(), parse_constant=pytest.fail)
    assert written["models"][0]["scores"][0]["value"] == 1.0


@pytest.mark.parametrize("arguments, said", [
    ([TINY, "--tasks", "answers", "--max-drop", 0.1], "nothing to compare with"),
    ([TINY, TINY, "--tasks", "answers"], "is given twice"),
    ([TINY, "--tasks", "answers", "--context", 99_999], "--context 99999: "),
    ([TINY, "--tasks", "answers", "--few-shot", 500, "--limit", 1], "lm-eval could not run answers"),
    ([TINY, "--tasks", "answers", "--json", TINY / "config.json"], "would be written over a file that is read"),
    (["nowhere", "--tasks", "answers"], "nowhere: no such directory"),
    ([TINY, "--tasks", "nothing"], "nothing: no such task"),
    ([TINY, "--tasks", ","], "no task was given"),
    ([TINY, "--tasks", "answers", "--task-folder", "nowhere"], "nowhere: no such folder"),
    ([TINY, "--tasks", "answers", "--raw", "--system", "Be brief."], "--raw: without the chat template"),
    ([TINY, "--tasks", "answers", "--limit", 1, "--context", 20], "leaves no room for a prompt in a context of 20")])
def test_what_cannot_be_evaluated_is_one_line(folder, arguments, said):
    if "--task-folder" not in arguments:
        arguments = [*arguments, "--task-folder", folder]
    result = in_process("eval", *arguments)
    assert result.returncode == 2 and said in result.stderr.splitlines()[-1]


def test_a_change_is_as_sure_as_its_documents_agree():
    base = Score("task", "acc", 0.5, None, 4, True, (1.0, 0.0, 1.0, 0.0))
    same, other = (Score("task", "acc", 0.5, None, 4, True, each) for each in ((1, 0, 1, 0), (0, 1, 1, 0)))
    unchanged, changed = (Change.of("model", base, score) for score in (same, other))
    assert (unchanged.stderr, unchanged.better, unchanged.worse) == (0.0, 0, 0)
    assert (changed.better, changed.worse) == (1, 1) and changed.stderr == pytest.approx(0.408, abs=1e-3)
    lower = Score("task", "bits", 2.0, None, 4, False, None)
    assert not Change.of("model", lower, Score("task", "bits", 2.3, None, 4, False)).within(0.2)
    assert Change.of("model", lower, Score("task", "bits", 1.0, None, 4, False)).within(0.2)


@pytest.mark.heavy  # lm-eval reads its own ten thousand files of tasks first
def test_lm_eval_s_own_command_line_knows_the_model(tiny_bundle, folder, tmp_path):
    command = [sys.executable, "-m", "lfm_edge.harness.lm_eval", "run", "--model", "lfm-edge", "--model_args",
               f"model={tiny_bundle.directory}", "--tasks", "answers", "--include_path", str(folder),
               "--apply_chat_template", "--output_path", str(tmp_path / "results")]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPO)
    assert finished.returncode == 0, finished.stderr
    assert re.search(r"exact_match.*?\|\s*1(\.0+)?\|", finished.stdout), finished.stdout
    assert list((tmp_path / "results").rglob("*.json"))
