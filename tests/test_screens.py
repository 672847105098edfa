"""What people look at first: verdicts that lead, names that are whole, screens of 80 columns."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

import lfm_edge as package
from lfm_edge.errors import ExportError
from lfm_edge.harness.bench_tables import _spread
from lfm_edge.harness.stats import Spread
from lfm_edge.harness.tables import verification_tables
from lfm_edge.harness.verdict import verdict_lines, verification_checks
from lfm_edge.harness.verify import WeightCheck, verify
from lfm_edge.targets import TARGETS, target_named
from tests.helpers import TINY, in_process, lfm_edge

NARROW = {"COLUMNS": "80"}


@pytest.fixture(scope="module")
def result(tiny_bundle):
    return verify(tiny_bundle)


def test_verify_leads_with_its_verdict_and_five_lines(result, tiny_bundle, monkeypatch):
    monkeypatch.setattr("lfm_edge.harness.verify.verify", lambda *_, **__: result)
    run = in_process("verify", tiny_bundle.directory, env=NARROW)
    detailed = in_process("verify", tiny_bundle.directory, "--details", env=NARROW)
    lines = run.stdout.splitlines()

    assert lines == verdict_lines(result) == detailed.stdout.splitlines()[:5] and "exact answers" in detailed.stdout
    assert re.fullmatch(r"PASSED  android-q4  (\d+) of \1 checks", lines[0])
    assert [line.split()[0] for line in lines[1:]] == ["weights", "parity", "quality", "tasks"]
    assert lines[1].endswith("116 of 116 identical to the quantizer's") and "266 of 266" in lines[4]
    assert all(len(line) <= 80 for line in lines)


def test_what_failed_is_named_whole_and_the_command_exits_with_1(result):
    names = ["model.layers.7.feed_forward.w2.weight: codes", "model.layers.3.self_attn.out_proj.weight: scales"]
    failed = replace(result, weights=WeightCheck(116, names))

    lines = verdict_lines(failed)

    assert lines[0].startswith("FAILED  android-q4  ") and "114 of 116" in lines[1]
    assert lines[-1].startswith("  FAILED   weights: 2 of 116") and all(name in lines[-1] for name in names)


def test_each_check_is_counted_once(result):
    checks = list(verification_checks(result))

    assert len({name for name, _, _ in checks}) == len(checks)
    assert all(passed for _, passed, _ in checks) == result.passed


def test_the_tables_behind_details_cut_no_name_at_80_columns(result):
    console = Console(width=80, record=True, file=StringIO())
    missing = WeightCheck(116, ["model.layers.7.feed_forward.w2.weight"])
    console.print(*verification_tables(replace(result, weights=missing)))
    text = console.export_text()

    assert "…" not in text and "model.layers.7.feed_forward.w2.weight" in re.sub(r"\s", "", text)
    assert all(re.search(rf"^{row.phase} .* ok *$", text, flags=re.MULTILINE) for row in result.parity)


def test_export_ends_with_what_it_made_and_what_comes_next(tmp_path):
    run = in_process("export", "--target", "onnx-q4", "--model", TINY, "-o", tmp_path / "out", "--context", 64)

    assert run.stdout.splitlines()[0] == f"written to {tmp_path / 'out'}"
    assert "context 64, steps of up to 64 tokens" in run.stdout
    assert f"next: lfm-edge verify {tmp_path / 'out'}" in run.stdout
    assert "MatMulNBits" not in run.stdout and "MatMulNBits" in in_process("inspect", tmp_path / "out").stdout


@pytest.mark.parametrize("values, shown", [
    ([0.004], "4.0 ms"), ([0.004, 0.0051, 0.0062], "5.1 ms (4.0 to 6.2)"), ([3.0, 3.5], "3.25 s (3.00 to 3.50)"),
    ([2.5], "2.50 s")])
def test_short_times_are_milliseconds_and_one_round_has_no_range(values, shown):
    assert _spread(Spread.of(values), 2, "s") == shown


def test_targets_fit_80_columns_and_find_a_platform():
    lines = lfm_edge("targets", env=NARROW).stdout.splitlines()

    assert all(len(line.rstrip()) <= 80 for line in lines) and not any("…" in line for line in lines)
    rows = {line.split()[0]: line for line in lines if line.split()}
    assert rows.keys() >= TARGETS.keys()
    assert {name for name, line in rows.items() if "ios" in line.lower()} >= {"coreml-q4", "mlx-q4", "onnx-q4"}


@pytest.mark.parametrize("name, said", [
    ("andriod-q4", "unknown target 'andriod-q4'; did you mean android-q4? known targets are"),
    ("mlx-q5", "did you mean mlx-q"), ("toaster", "unknown target 'toaster'; known targets are android-q4"),
    ("iOS", "unknown target 'iOS'; for it there are android-q4"), ("web", "for it there are onnx-q4, onnx-q8")])
def test_a_target_that_is_none_says_what_may_be_meant(name, said):
    with pytest.raises(ExportError) as raised:
        target_named(name)
    assert said in str(raised.value)


def test_the_version_is_told():
    run = lfm_edge("--version")

    assert (run.returncode, run.stdout) == (0, f"lfm-edge {package.__version__}\n")


def test_a_shell_can_complete_targets():
    asked = {"_LFM_EDGE_COMPLETE": "complete_bash", "COMP_WORDS": "lfm-edge export --target coreml", "COMP_CWORD": "3"}
    run = subprocess.run([Path(sys.executable).with_name("lfm-edge")], capture_output=True, text=True, check=False,
                         env=os.environ | asked)

    assert run.stdout.split() == ["coreml-q4", "coreml-q8"]
