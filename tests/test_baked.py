"""Baked prompts: a session that starts from one is the session that prefilled it."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from lfm_edge import export, open_bundle
from lfm_edge.bundle.baking import BAKED_PROMPT_FILE, SystemPrompt, bake
from lfm_edge.bundle.bundle import Bundle, new_bundle, weights_digest
from lfm_edge.bundle.manifest import Manifest
from lfm_edge.calibration.quantize import quantize_checkpoint
from lfm_edge.checkpoint.checkpoint import open_checkpoint
from lfm_edge.checkpoint.tokenizer import TextTokenizer
from lfm_edge.errors import BundleError, ExportError, LfmEdgeError
from lfm_edge.harness import parity
from lfm_edge.harness.baked import FirstTokenTimes, baked_agreement, first_token_times
from lfm_edge.harness.bench import Settings, bench
from lfm_edge.harness.bench_tables import bench_tables
from lfm_edge.harness.verify import verify
from lfm_edge.progress import Progress
from lfm_edge.session.generation import Chat, generate
from lfm_edge.session.saved import Origin, SavedSession
from runtimes.reference import ReferenceSession
from tests.helpers import TINY, fill_bundle, lfm_edge, save_checkpoint

SYSTEM = "You answer questions about keys and sums, and you are brief."
QUESTION = [{"role": "user", "content": "What is 12+30?"}]


@pytest.fixture(scope="module")
def system_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("system") / "system.txt"
    path.write_bytes(b"\xef\xbb\xbf" + SYSTEM.encode() + b"\r\n\n")  # as an editor may leave it
    return path


@pytest.fixture(scope="module")
def android(tiny_bundle, system_file, tmp_path_factory):
    """The trained toy as `android-q4`, with a baked prompt put into a copy of the bundle that other tests use."""
    directory = shutil.copytree(tiny_bundle.directory, tmp_path_factory.mktemp("android") / "bundle")
    prompt = SystemPrompt.of(system_file, tiny_bundle.tokenizer(), 1024)
    bake(directory, tiny_bundle.manifest, prompt, Progress()).write(directory)
    return open_bundle(directory)


@pytest.fixture(scope="module")
def onnx(system_file, tmp_path_factory):
    """The trained toy as `onnx-q4`, exported with a baked prompt."""
    return export(TINY, target="onnx-q4", output=tmp_path_factory.mktemp("onnx") / "bundle", context=512,
                  bake_prompt=system_file)


@pytest.fixture(params=["android", "onnx"])
def bundle(request):
    return request.getfixturevalue(request.param)


def system_tokens(bundle):
    return bundle.tokenizer().chat([{"role": "system", "content": SYSTEM}], answer=False)


def check_token_identity(bundle):
    """Greedy answers, and the logits behind them, from the baked state and from prefilling the same tokens."""
    tokenizer, session = bundle.tokenizer(), bundle.session()
    question = tokenizer.encode("<|im_start|>user\nWhat is 12+30?<|im_end|>\n<|im_start|>assistant\n", special=False)
    session.prefill(system_tokens(bundle))
    prefilled = session.snapshot()
    answer, logits = list(generate(session, question, max_tokens=24)), session.decode(40)
    session.reset()
    session.load(bundle.baked_prompt)
    loaded = session.snapshot()
    assert (loaded.position, loaded.tokens) == (prefilled.position, prefilled.tokens)
    assert all(torch.equal(a, b) for a, b in zip(loaded.tensors, prefilled.tensors, strict=True))
    assert list(generate(session, question, max_tokens=24)) == answer
    assert np.array_equal(session.decode(40), logits)


# --- token-identical ----------------------------------------------------------------------------------------------


def test_answers_from_the_baked_prompt_are_those_after_prefilling_it(bundle):
    check_token_identity(bundle)


@pytest.mark.heavy
@pytest.mark.parametrize(("target", "options"), [
    ("mlx-q4", {}), ("coreml-q4", {}), ("gguf-q4", {}), ("android-q8", {"kv_dtype": "int8"}),
    ("onnx-q8", {"kv_dtype": "int8"})])
def test_so_they_are_on_every_other_target(target, options, system_file, tmp_path):
    check_token_identity(export(TINY, target=target, output=tmp_path / "bundle", context=256, bake_prompt=system_file,
                                **options))


def test_a_session_begins_at_position_0_all_the_same(bundle):
    session = bundle.session()
    assert session.position == 0 and session.tokens == []


def test_the_manifest_tells_of_it(bundle):
    assert bundle.manifest.baked_prompt.tokens == len(system_tokens(bundle))
    assert BAKED_PROMPT_FILE in bundle.manifest.files
    assert Manifest.read(bundle.directory) == bundle.manifest
    saved = SavedSession.read(bundle.baked_prompt)
    assert saved.messages == ({"role": "system", "content": SYSTEM},)
    assert {value.dtype for value in saved.snapshot.tensors} == {torch.float32}


def test_a_bundle_without_one_says_so(tiny_bundle):
    assert tiny_bundle.manifest.baked_prompt is None and tiny_bundle.baked_prompt is None
    assert "baked_prompt" not in json.loads((tiny_bundle.directory / "manifest.json").read_text())


# --- conversations ------------------------------------------------------------------------------------------------


def prefilled_by(session, work):
    """All tokens that a session takes while something is done."""
    taken, step = [], session._step
    session._step = lambda tokens: taken.extend(tokens) or step(tokens)
    try:
        work()
    finally:
        session._step = step
    return taken


def conversation(bundle, *, baked=True):
    return Chat(bundle.session(), bundle.tokenizer(), bundle.manifest.config.eos_token_ids,
                bundle.baked_prompt if baked else None)


def test_a_chat_starts_after_the_prompt_and_comes_back_to_it(android):
    chat, tokenizer, system = conversation(android), android.tokenizer(), system_tokens(android)
    whole = tokenizer.chat([{"role": "system", "content": SYSTEM}, *QUESTION])
    for _ in range(2):
        assert chat.session.tokens == system
        taken = prefilled_by(chat.session, lambda: list(chat.answer(QUESTION[0]["content"], max_tokens=8)))
        assert taken[:len(whole) - len(system)] == whole[len(system):]
        assert chat.session.tokens.count(tokenizer.encode("")[0]) == 1  # <|startoftext|> stands once
        assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]
        chat.reset()


def test_a_chat_answers_as_one_that_was_given_the_system_message(android):
    baked, told = conversation(android), conversation(android, baked=False)
    told.messages = [{"role": "system", "content": SYSTEM}]
    for text in ("What is 12+30?", "hello", "What is 7+7?"):
        assert list(baked.answer(text, max_tokens=16)) == list(told.answer(text, max_tokens=16))
    assert baked.messages == told.messages


def test_where_the_session_left_the_conversation_the_prompt_is_still_not_prefilled(android):
    chat, system = conversation(android), system_tokens(android)
    chat.session.prefill([30, 31, 32])
    taken = prefilled_by(chat.session, lambda: list(chat.answer("hello", max_tokens=4)))
    assert taken[:len(system)] != system
    chat.messages[0] = {"role": "system", "content": "Another one."}  # of which the baked prompt is no beginning
    text = "".join(chat.answer("hello", max_tokens=4))
    told = conversation(android, baked=False)
    told.messages = chat.messages[:-2]
    assert text == "".join(told.answer("hello", max_tokens=4))


def test_the_commands_start_after_it_unless_told_not_to(onnx):
    where = str(onnx.directory)
    session, tokenizer = onnx.session(), onnx.tokenizer()
    session.prefill(system_tokens(onnx))
    stop = onnx.manifest.config.eos_token_ids
    with_it = tokenizer.decode(list(generate(session, tokenizer.encode("12+30", special=False), max_tokens=8,
                                             stop=stop)))
    session.reset()
    without = tokenizer.decode(list(generate(session, tokenizer.encode("12+30"), max_tokens=8, stop=stop)))
    given = lfm_edge("generate", where, "--raw", "--prompt", "12+30", "--max-tokens", "8")
    assert (given.returncode, given.stdout) == (0, with_it + "\n"), given.stderr
    plain = lfm_edge("generate", where, "--raw", "--prompt", "12+30", "--max-tokens", "8", "--no-baked-prompt")
    assert (plain.returncode, plain.stdout) == (0, without + "\n"), plain.stderr


def test_a_chat_is_kept_in_a_file(onnx, tmp_path):
    file = tmp_path / "chat.safetensors"
    chat = conversation(onnx)
    whole = "".join("".join(chat.answer(text, max_tokens=8)) + "\n" for text in ("What is 12+30?", "hello"))
    first = lfm_edge("chat", onnx.directory, "--max-tokens", "8", "--session", file, input="What is 12+30?\n")
    second = lfm_edge("chat", onnx.directory, "--max-tokens", "8", "--session", file, input="hello\n")
    assert (first.returncode, second.returncode) == (0, 0), second.stderr
    assert first.stdout + second.stdout == whole
    assert first.stderr == ""
    assert "goes on after 3 messages" in second.stderr
    assert [message["role"] for message in SavedSession.read(file).messages] == [
        "system", "user", "assistant", "user", "assistant"]


def test_a_chat_does_not_begin_with_a_file_that_it_cannot_go_on_with(onnx, tmp_path):
    file = tmp_path / "chat.safetensors"
    file.write_bytes(b"years of work")
    ended = lfm_edge("chat", onnx.directory, "--session", file, input="hello\n")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"error: {file}: not a saved session\n"
    assert file.read_bytes() == b"years of work"


# --- another runtime ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("android", "onnx"), ("onnx", "android")], ids=" to ".join)
def test_a_saved_session_goes_on_in_another_runtime(names, request, tmp_path):
    """Their activations are rounded in other ways; what the trained toy knows for sure, it knows in both."""
    there, here = (request.getfixturevalue(name).session() for name in names)
    tokens = TextTokenizer(TINY).chat(json.loads((TINY / "tasks.json").read_text())[0]["messages"])
    right = list(generate(here, tokens, max_tokens=6))
    there.prefill(tokens[:-8])
    there.save(tmp_path / "session")
    here.load(tmp_path / "session")
    assert here.tokens == tokens[:-8]
    assert list(generate(here, tokens[-8:], max_tokens=6)) == right


@pytest.mark.parametrize("target", ["mlx-q4", pytest.param("coreml-q4", marks=pytest.mark.heavy)])
def test_where_nothing_is_rounded_runtimes_agree_closely(target, tmp_path):
    """Both ways between a runtime with heads first and channels last, and the reference with neither."""
    source = save_checkpoint(tmp_path / "model")
    bundle = export(source, target=target, output=tmp_path / "bundle", context=64, prefill_chunk=8,
                    compute_dtype="float32")
    weights = quantize_checkpoint(open_checkpoint(source), bundle.manifest.recipe)
    spec = bundle.manifest.state.for_reference(bundle.manifest.config)
    reference = ReferenceSession(bundle.manifest.config, weights, spec)
    reference.origin = Origin(weights_digest(weights))
    tokens = [1, 40, 41, 90, 200, 33, 17, 16, 55, 70, 71, 72, 3]
    for there, here in ((bundle.session(), reference), (reference, bundle.session())):
        there.reset()
        there.prefill(tokens)
        there.save(tmp_path / "session")
        here.load(tmp_path / "session")
        agreement = parity.compare("moved", [here.decode(9)], [there.decode(9)])
        assert agreement.logit_error < 1e-4


# --- what is refused ----------------------------------------------------------------------------------------------

BAD_FILES = {
    "empty": (b"", "is empty"), "blank": (b" \n\t\n", "is empty"), "a mark alone": (b"\xef\xbb\xbf\n", "is empty"),
    "not UTF-8": (b"hello \xff\xfe", "not UTF-8 text (byte 6)"), "UTF-16": ("hi".encode("utf-16"), "not UTF-8 text"),
    "too long": (b"word " * 50, "leave no room in a context of 64"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_no_prompt_is_refused_before_the_work(tmp_path, content, message):
    file = tmp_path / "system.txt"
    file.write_bytes(content)
    with pytest.raises(ExportError) as raised:
        export(TINY, target="android-q4", output=tmp_path / "out", context=64, bake_prompt=file)
    assert str(raised.value).startswith(f"--bake-prompt {file}: ") and message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("place", ["missing.txt", "."])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, place):
    with pytest.raises(ExportError, match="cannot be read"):
        SystemPrompt.of(tmp_path / place, TextTokenizer(TINY), 64)


def test_internal_state_is_refused(system_file, tmp_path):
    with pytest.raises(ExportError, match="with --state internal the program keeps the state"):
        export(TINY, target="android-q4", output=tmp_path / "out", state="internal", bake_prompt=system_file)
    assert list(tmp_path.iterdir()) == []


USER_ONLY = "{% for m in messages if m.role == 'user' %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
TEMPLATES = {
    "leaves it out": "{{ bos_token }}" + USER_ONLY,
    "puts nothing": USER_ONLY,
    "puts it into what the user says": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% if not loop.last %}"
                                       "\n{% endif %}{% endfor %}{% if messages|length == 1 %}!{% endif %}",
    "refuses": "{{ raise_exception('no system messages here') }}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_without_a_place_for_a_system_message_is_refused(system_file, tmp_path, template):
    copy = shutil.copytree(TINY, tmp_path / "model")
    (copy / "chat_template.jinja").write_text(template)
    with pytest.raises(ExportError, match=r"does not put a system message|no system messages here"):
        SystemPrompt.of(system_file, TextTokenizer(copy), 512)


def test_a_model_without_a_template_is_refused(system_file, tmp_path):
    shutil.copyfile(TINY / "tokenizer.json", tmp_path / "tokenizer.json")
    with pytest.raises(ExportError, match="no chat template"):
        SystemPrompt.of(system_file, TextTokenizer(tmp_path), 512)


def test_a_runtime_that_does_not_run_here_is_refused(system_file, tmp_path):
    with pytest.raises(ExportError, match="this machine cannot run the bundle"), \
            new_bundle(tmp_path / "out", force=False) as directory:
        fill_bundle(directory)  # whose artifact no runtime can load
        prompt = SystemPrompt(({"role": "system", "content": "x"},), (1, 6))
        bake(directory, Manifest.read(directory), prompt, Progress())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("entry", [{}, [], 3, {"file": "baked_prompt.safetensors"}, {"file": "x", "tokens": 0},
                                   {"file": "../x", "tokens": 3}, {"file": "/etc/passwd", "tokens": 3},
                                   {"file": "not-listed", "tokens": 3}], ids=str)
def test_a_manifest_that_is_wrong_about_it_is_refused(tmp_path, entry):
    with new_bundle(tmp_path / "bundle", force=False) as directory:
        fill_bundle(directory)
    path = tmp_path / "bundle/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"baked_prompt": entry}))
    with pytest.raises(BundleError, match=r"malformed|leads out of the bundle|does not list not-listed"):
        open_bundle(tmp_path / "bundle")


# --- verify and bench ---------------------------------------------------------------------------------------------


def tampered(bundle, directory):
    """A copy whose baked state has other numbers, sealed as if they were right."""
    directory = Path(shutil.copytree(bundle.directory, directory))
    saved = SavedSession.read(directory / BAKED_PROMPT_FILE)
    wrong = tuple(value * 1.5 for value in saved.snapshot.tensors)
    replace(saved, snapshot=replace(saved.snapshot, tensors=wrong)).write(directory / BAKED_PROMPT_FILE)
    bundle.manifest.write(directory)
    return Bundle.open(directory)


def test_the_state_in_the_bundle_is_that_of_prefilling_to_the_last_bit(bundle):
    agreement = baked_agreement(bundle.session(), bundle, range(40, 60))
    assert agreement.phase == "baked prompt" and agreement.positions == 8
    assert agreement.logit_error == 0 and agreement.top1_agreement == 1


def test_another_state_is_found(onnx, tmp_path):
    wrong = tampered(onnx, tmp_path / "bundle")
    assert baked_agreement(wrong.session(), wrong, range(40, 60)).logit_error > 0.1


def test_verify_reports_it_and_fails_where_it_is_wrong(system_file, tmp_path):
    source = save_checkpoint(tmp_path / "model", layer_types=["conv", "full_attention"])
    bundle = export(source, target="onnx-q4", output=tmp_path / "bundle", context=256, bake_prompt=system_file)
    right = verify(bundle)
    assert right.baked_passed and right.to_dict()["baked_prompt"]["passed"]
    wrong = verify(tampered(bundle, tmp_path / "wrong"))
    assert not wrong.baked_passed and not wrong.passed
    assert not wrong.to_dict()["baked_prompt"]["passed"]


def test_times_to_first_token_are_measured_with_and_without(onnx):
    session = onnx.session()
    session.prefill([1])
    times = first_token_times(session, onnx, [5, 6, 7, 8, 9])
    assert isinstance(times, FirstTokenTimes)
    assert times.with_s > 0 and times.without_s > 0 and times.system_tokens > 0
    assert first_token_times(session, onnx, [5] * 500) is None  # the context of 512 does not hold both


def test_bench_shows_them(onnx):
    result = bench([onnx], Settings((5,), 2, repeat=2))
    times = result.benchmarks[0].baked
    assert times.with_s.median > 0 and times.without_s.median > 0
    assert times.system_tokens == SavedSession.read(onnx.baked_prompt).snapshot.position
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(*bench_tables(result))
    assert "first token of 5 after the baked prompt" in console.export_text()


def test_what_cannot_be_timed_is_refused(onnx, tiny_bundle):
    with pytest.raises(LfmEdgeError, match="has no baked prompt"):
        first_token_times(tiny_bundle.session(), tiny_bundle, [5])
