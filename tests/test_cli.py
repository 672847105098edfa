"""The command line: exit codes, one clear line for bad input, and help without torch."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lfm_edge import cli
from lfm_edge.bundle.bundle import new_bundle
from tests.helpers import REPO, TINY, contents, fill_bundle, lfm_edge

COMMANDS = ("targets", "export", "inspect", "verify", "sensitivity", "bench", "report", "generate", "chat")

# Fails where anything imports torch or a backend.
LIGHT = """
import sys
from pathlib import Path
from types import SimpleNamespace
sys.modules.update(dict.fromkeys(("torch", "executorch", "transformers", "safetensors", "tokenizers")))
from lfm_edge.cli import main
sys.argv[0] = "lfm-edge"
main()
"""


@pytest.fixture
def bundle(tmp_path):
    """A sealed bundle whose artifact no runtime can load."""
    with new_bundle(tmp_path / "bundle", force=False) as directory:
        fill_bundle(directory)
    return tmp_path / "bundle"


@pytest.fixture
def run(monkeypatch, capfd):
    """Run the entry point in this process, which has torch loaded already; its exit code and output."""
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["lfm-edge", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        output = capfd.readouterr()
        return subprocess.CompletedProcess(sys.argv, end.value.code, output.out, output.err)

    yield call
    signal.signal(signal.SIGTERM, before)


def without_torch(*arguments):
    return subprocess.run([sys.executable, "-c", LIGHT, *arguments], capture_output=True, text=True, cwd=REPO,
                          timeout=60, check=False)


def the_line(ended):
    """The one line on standard error of a run that ended with bad input."""
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("error: "), ended.stderr
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert ended.stdout == ""
    return ended.stderr.strip()


# --- help ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_needs_no_torch(command):
    run = without_torch(command, "--help")

    assert run.returncode == 0, run.stderr
    assert f"Usage: lfm-edge {command}" in run.stdout
    assert run.stderr == ""


def test_help_names_every_command_and_needs_no_torch():
    run = without_torch("--help")

    assert run.returncode == 0, run.stderr
    assert all(command in run.stdout for command in COMMANDS)


def test_export_help_names_every_option_of_the_contract():
    text = without_torch("export", "--help").stdout

    for option in ("--target", "--model", "--output", "--context", "--prefill-chunk", "--group-size", "--head-bits",
                   "--kv-dtype", "--state", "--bake-prompt", "--force"):
        assert option in text


def test_targets_lists_the_targets_and_needs_no_torch():
    run = without_torch("targets")

    assert run.returncode == 0, run.stderr
    assert "android-q4" in run.stdout
    assert "android-q8" in run.stdout


def test_targets_says_how_to_install_a_missing_backend():
    script = LIGHT.replace("from lfm_edge.cli", "import importlib.util\nimportlib.util.find_spec = lambda name: None\n"
                           "from lfm_edge.cli")
    run = subprocess.run([sys.executable, "-c", script, "targets"], capture_output=True, text=True, cwd=REPO,
                         timeout=60, check=False, env={"COLUMNS": "200"})

    assert "pip install 'lfm-edge[executorch]'" in run.stdout
    assert "pip install 'lfm-edge[llamacpp]'" in run.stdout


# --- usage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [
    ["nonsense"], ["export"], ["export", "--target"], ["export", "--target", "android-q4", "--contxt", "64"],
    ["export", "--target", "android-q4", "--context", "many"], ["inspect"], ["verify"], ["bench"], ["report"],
    ["generate", "somewhere"], ["generate", "somewhere", "--prompt", "x", "--max-tokens", "0"],
    ["generate", "somewhere", "--prompt", "x", "--temperature", "-1"], ["bench", "somewhere", "--repeat", "0"],
    ["bench", "somewhere", "--threads", "0"], ["inspect", "one", "two"],
], ids=" ".join)
def test_usage_errors_exit_with_2_and_need_no_torch(arguments):
    run = without_torch(*arguments)

    assert run.returncode == 2
    assert "Error" in run.stderr
    assert "Traceback" not in run.stderr


# --- bad input ----------------------------------------------------------------------------------------------------

BAD_OPTIONS = {
    "unknown target": (["--target", "toaster-q1"], "unknown target 'toaster-q1'; known targets are android-q4"),
    "context of one": (["--context", "1"], "--context 1: a context holds at least 2 tokens"),
    "negative context": (["--context", "-5"], "--context -5: a context holds at least 2 tokens"),
    "context past the model's": (["--context", "999999"], "--context 999999 is more than the model's 2048"),
    "no prefill chunk": (["--prefill-chunk", "0"], "--prefill-chunk 0: a step takes at least 1 token"),
    "group size": (["--group-size", "48"], "--group-size 48: android-q4 takes 32 or 64 or 128"),
    "no group": (["--group-size", "0"], "--group-size 0: android-q4 takes 32 or 64 or 128"),
    "head bits": (["--head-bits", "5"], "--head-bits 5: android-q4 takes 4 or 8"),
    "no kv dtype": (["--kv-dtype", ""], "--kv-dtype : android-q4 takes float32 or int8"),
    "no compute dtype": (["--compute-dtype", ""], "--compute-dtype : android-q4 takes float32"),
    "kv dtype": (["--kv-dtype", "int4"], "--kv-dtype int4: android-q4 takes float32 or int8"),
    "state": (["--state", "magic"], "--state magic: android-q4 takes explicit or internal"),
    "groups where there are none": (["--target", "android-q8", "--group-size", "64"],
                                    "--group-size 64: android-q8 is quantized per channel and has no groups"),
    "model that is not there": (["--model", "/no/such/model"], "/no/such/model: no such directory"),
    "unknown preset": (["--model", "random:lfm9"], "random:lfm9: unknown preset; known are"),
    "rounding": (["--rounding", "up"], "--rounding up: android-q4 takes nearest or gptq"),
    "calibration of nothing": (["--calibration", "p.txt"], "measures nothing on a text with these options"),
    "no calibration text": (["--rounding", "gptq", "--calibration", "/no/text"], "/no/text: cannot be read (No such"),
    "calibration with a directory": (["--rounding", "gptq", "--calibration", "/"], "/: cannot be read (Is a"),
    "calibration with binary data": (["--rounding", "gptq", "--calibration", TINY / "model.safetensors"],
                                     "not UTF-8 text"),
    "no recipe": (["--recipe", "/no/recipe"], "/no/recipe: no such file"),
    "a recipe and a group size": (["--recipe", "r.json", "--group-size", "64"], "leave out --group-size"),
}


@pytest.mark.parametrize("options, message", BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_input_to_export_is_one_line_and_writes_nothing(run, tmp_path, options, message):
    ended = run("export", "--target", "android-q4", "--model", TINY, "--output", tmp_path / "out", *options)

    assert message in the_line(ended)
    assert not list(tmp_path.iterdir())


def test_from_a_fresh_process_too_bad_input_is_one_line_and_writes_nothing(tmp_path):
    """Whatever torch and the backend say while they are imported, the user sees one line."""
    ended = lfm_edge("export", "--target", "android-q4", "--model", "LiquidAI/LFM2-350M", "--output", tmp_path / "out",
                     env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")})

    assert the_line(ended).startswith("error: LiquidAI/LFM2-350M: cannot be fetched from the hub")
    assert [path.name for path in tmp_path.iterdir() if path.name != "hub"] == []


def test_a_directory_without_a_model_is_one_line(run, tmp_path):
    ended = run("export", "--target", "android-q4", "--model", tmp_path, "--output", tmp_path / "out")

    assert the_line(ended) == f"error: {tmp_path}/config.json: no such file"


def test_an_existing_output_is_refused_without_force(run, bundle):
    before = contents(bundle)

    ended = run("export", "--target", "android-q4", "--model", TINY, "--context", "64", "--output", bundle)

    assert the_line(ended) == f"error: {bundle}: exists already; give --force to replace it"
    assert contents(bundle) == before


def test_force_on_something_else_than_a_bundle_is_refused(run, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")

    ended = run("export", "--target", "android-q4", "--model", TINY, "--context", "64", "--output", tmp_path, "--force")

    assert "is not a bundle; --force replaces bundles only" in the_line(ended)
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


TAKE_A_BUNDLE = [["inspect"], ["verify"], ["bench"], ["generate", "--prompt", "hi"], ["chat"]]


@pytest.mark.parametrize("arguments", TAKE_A_BUNDLE, ids=" ".join)
def test_a_missing_bundle_is_one_line(run, tmp_path, arguments):
    assert the_line(run(*arguments, tmp_path / "missing")) == f"error: {tmp_path}/missing: no such bundle directory"


@pytest.mark.parametrize("arguments", TAKE_A_BUNDLE, ids=" ".join)
def test_a_corrupt_bundle_is_one_line(run, bundle, arguments):
    (bundle / "model.pte").write_bytes(b"not a real progran")

    assert "model.pte: changed since the export" in the_line(run(*arguments, bundle))


def test_a_corrupt_bundle_is_one_line_from_a_fresh_process_too(bundle):
    (bundle / "manifest.json").write_text("{")

    assert "manifest.json: malformed" in the_line(lfm_edge("verify", bundle))


@pytest.mark.parametrize("arguments", TAKE_A_BUNDLE, ids=" ".join)
def test_a_bundle_for_an_unknown_target_is_one_line(run, bundle, arguments):
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"target": "toaster-q1"}))

    assert "unknown target 'toaster-q1'" in the_line(run(*arguments, bundle))


@pytest.mark.parametrize("budget", ["lots", "-1GB", "0", "1TB", ""])
def test_a_bad_budget_is_one_line(run, bundle, budget):
    assert f"'{budget}' is no size" in the_line(run("bench", bundle, "--budget", budget))


BAD_TEXTS = {
    "empty": (b" \n\n ", "is empty"), "not UTF-8": (b"\xff\xfe", "not UTF-8 text"),
}


@pytest.mark.parametrize("content, message", BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_a_bad_text_is_one_line(run, tmp_path, content, message):
    (tmp_path / "text").write_bytes(content)

    assert message in the_line(run("sensitivity", "--model", TINY, "--text", tmp_path / "text"))


BAD_SENSITIVITY = {
    "group size": (["--group-size", "48"], "--group-size 48: it must be 32, 64 or 128"),
    "size": (["--max-size", "small"], "'small' is no size"),
    "too small a size": (["--max-size", "100kB"], "--max-size: the weights take 0.75 MB at 4 bits everywhere"),
    "nothing to write": (["--output", "r.json"], "--output r.json: there is a choice to write with --max-size only"),
    "model that is not there": (["--model", "/no/such/model"], "/no/such/model: no such directory"),
}


@pytest.mark.parametrize("options, message", BAD_SENSITIVITY.values(), ids=BAD_SENSITIVITY)
def test_bad_input_to_sensitivity_is_one_line(run, tmp_path, options, message):
    ended = run("sensitivity", "--model", TINY, "--tokens", "16", *options)

    assert ended.returncode == 2
    assert message in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


# --- text, numbers and output that go wrong -----------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--seed", "-1"], ["--temperature", "nan"]])
@pytest.mark.parametrize("command", [["generate", "somewhere", "--prompt", "hi"], ["chat", "somewhere"]], ids=" ".join)
def test_a_seed_or_a_temperature_that_is_none_is_a_usage_error(command, arguments):
    run = without_torch(*command, *arguments)

    assert run.returncode == 2
    assert arguments[0] in run.stderr and "Traceback" not in run.stderr


def test_a_prompt_that_is_no_utf_8_is_one_line(tiny_bundle):
    ended = subprocess.run([sys.executable, "-m", "lfm_edge.cli", "generate", str(tiny_bundle.directory), "--prompt",
                            b"caf\xe9"], capture_output=True, text=True, check=False)

    assert the_line(ended) == "error: the text is not UTF-8 (at character 4)"


PRINT = [["targets"], ["export", "--help"], ["inspect", "BUNDLE"]]


def printing(arguments, bundle, **options):
    command = [str(bundle) if argument == "BUNDLE" else argument for argument in arguments]
    return subprocess.Popen([sys.executable, "-m", "lfm_edge.cli", *command], stderr=subprocess.PIPE, text=True,
                            **options)


@pytest.mark.parametrize("arguments", PRINT, ids=" ".join)
def test_a_reader_that_has_gone_away_ends_every_command_quietly(bundle, arguments):
    reading, writing = os.pipe()
    os.close(reading)
    with printing(arguments, bundle, stdout=writing) as process:
        os.close(writing)
        said = process.stderr.read()

    assert (process.returncode, said) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", PRINT, ids=" ".join)
def test_an_output_that_is_full_is_one_line(bundle, arguments):
    with Path("/dev/full").open("w") as full, printing(arguments, bundle, stdout=full) as process:
        said = process.stderr.read()

    assert (process.returncode, said) == (2, "error: standard output: cannot be written (No space left on device)\n")


def test_an_output_that_was_closed_before_is_one_line(bundle):
    script = f"exec '{sys.executable}' -m lfm_edge.cli targets >&-"
    ended = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, check=False)

    assert the_line(ended) == "error: standard output: is closed; give /dev/null to throw it away"


def test_characters_that_the_terminal_lacks_are_escaped(tmp_path):
    """A path may have any, and a model may say any."""
    fill_bundle(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"source": "漢"}))

    ended = lfm_edge("inspect", tmp_path, env={"PYTHONIOENCODING": "ascii"})

    assert (ended.returncode, ended.stderr) == (0, "")
    assert r"\u6f22" in ended.stdout


# --- good input ---------------------------------------------------------------------------------------------------


def test_inspect_shows_what_the_bundle_is(bundle):
    ended = lfm_edge("inspect", bundle)

    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    for word in ("android-q4", "model.pte", "made by a test"):
        assert word in ended.stdout


def test_messages_have_no_colour_codes_where_there_is_no_terminal(run, tmp_path):
    assert not re.search("\x1b", run("inspect", tmp_path / "missing").stderr)


@pytest.mark.parametrize("command, policy", [
    (("export", "--target", "none"), "passive"), (("verify", "none"), "passive"),
    (("bench", "none"), None), (("generate", "none", "--prompt", "hi"), None), (("chat", "none"), None)])
def test_only_commands_that_quantize_say_how_threads_wait(run, monkeypatch, command, policy):
    """What `bench` measures runs with the user's own policy: llama.cpp decodes a third slower with this one."""
    monkeypatch.delenv("OMP_WAIT_POLICY")
    the_line(run(*command))
    assert os.environ.pop("OMP_WAIT_POLICY", None) == policy


# --- where things are written -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "with space", "$HOME", "it's", "-v", "[bold]", "ä", "a\nb"])
def test_the_command_that_comes_next_can_be_pasted_into_a_shell(name):
    word = cli._for_a_shell(Path(name))

    assert shlex.split(word) in ([name], [f"./{name}"])
    assert not word.startswith("-")


@pytest.mark.parametrize("arguments", [["verify"], ["bench"]], ids=" ".join)
def test_a_result_is_not_written_over_a_file_of_the_bundle(run, bundle, arguments):
    before = contents(bundle)

    ended = run(*arguments, bundle, "--json", bundle / "manifest.json")

    assert the_line(ended) == (f"error: --json {bundle}/manifest.json: would be written over a file that is read; give "
                               "another one")
    assert contents(bundle) == before


def test_a_session_is_not_saved_over_a_file_of_the_bundle(run, bundle):
    assert "would be written over a file that is read" in the_line(run("chat", bundle, "--session",
                                                                       bundle / "tokenizer.json"))


@pytest.mark.parametrize("options", [
    ["-o", "x.json"], ["-o", "./x.json"], ["-o", "link.json"], ["--junit", "x.json"], ["--markdown", "x.json"],
    ["-o", "p", "--junit", "p"], ["-o", "p", "--markdown", "./p"], ["--junit", "p", "--markdown", "p"]], ids=" ".join)
def test_a_report_is_not_written_over_its_input_or_over_itself(run, tmp_path, monkeypatch, options):
    (tmp_path / "x.json").write_text("a result")
    monkeypatch.setattr("lfm_edge.report.read_results", lambda paths: [SimpleNamespace(path=path) for path in paths])
    (tmp_path / "link.json").symlink_to("x.json")
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)

    assert re.search("would be written over a file that is read|is the same file", the_line(
        run("report", "x.json", *options)))

    assert contents(tmp_path) == before
