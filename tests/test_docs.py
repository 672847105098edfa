"""The docs name only commands, options, files and targets that exist."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import typer.main
import yaml

from lfm_edge.cli import app
from lfm_edge.targets import TARGETS
from tests.helpers import REPO, TINY

PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md")), REPO / "examples/tiny-model/README.md"]
COMMAND = typer.main.get_command(app)


def command_lines(page):
    """Every `lfm-edge ...` line of the indented and fenced blocks."""
    joined = page.read_text().replace("\\\n", " ")
    return re.findall(r"^(?:    |\$ )?(?:/usr/bin/time -v )?lfm-edge (.+)$", joined, flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_line_parses(page):
    for line in command_lines(page):
        name, *arguments = shlex.split(line, comments=True)
        if name == "--help":
            continue
        COMMAND.commands[name].make_context(name, arguments)  # raises for an unknown option or a missing argument


def test_the_readme_shows_every_command_and_target():
    text = (REPO / "README.md").read_text()
    shown = {line.split()[0] for line in command_lines(REPO / "README.md")}
    assert shown == set(COMMAND.commands)
    assert all(f"`{name}`" in text for name in TARGETS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_make_target_exists(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in link:
            assert (page.parent / link).exists(), link
    targets = set(re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), flags=re.MULTILINE))
    for target in re.findall(r"`make ([\w-]+)", text):
        assert target in targets, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_figure_is_missing(page):
    assert "@@" not in page.read_text()


# --- what apps are told -------------------------------------------------------------------------------------------


def test_the_hub_example_gives_it_folders_that_it_takes(tmp_path, monkeypatch):
    """By the rule of qai-hub 0.56: exactly one `.onnx`, at most one `.bin`, and nothing else."""
    text = (REPO / "docs/npu.md").read_text()
    code, = re.findall(r"^```python\n([^`]*qai_hub.*?)^```", text, re.DOTALL | re.MULTILINE)
    chip = tmp_path / "lfm2.5-1.2b-npu/npu/sm8650"
    chip.mkdir(parents=True)
    for name in ("prefill.onnx", "decode.onnx", "prefill_qnn.bin"):
        (chip / name).touch()
    hub = MagicMock()
    hub.upload_model.side_effect = lambda folder: sorted(path.name for path in Path(folder).iterdir())
    monkeypatch.setitem(sys.modules, "qai_hub", hub)
    monkeypatch.chdir(tmp_path)

    exec(code, {})

    (model,), _ = hub.submit_profile_job.call_args
    assert model == ["decode.onnx", "prefill_qnn.bin"]


def test_apps_are_told_to_map_the_program_and_where_it_runs():
    text = (REPO / "docs/executorch.md").read_text()
    assert "Module.LOAD_MODE_MMAP" in text
    assert all("loadMode: .mmap" in line for line in text.splitlines() if "Module(filePath:" in line)
    assert "Armv8.2" in text and "valid until the next call" in text


def test_no_version_of_a_phone_s_package_is_named_that_may_not_be_published():
    assert not re.search(r"onnxruntime-android:\d", (REPO / "docs/onnx.md").read_text())


# --- the structure ------------------------------------------------------------------------------------------------


def test_the_tower_in_the_docs_is_the_one_that_lint_holds():
    page = (REPO / "docs/architecture.md").read_text()
    floors = re.search(r"^## The tower\n.*?^```\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)[1].splitlines()
    shown = [re.split(r" {3,}", floor)[0].split() for floor in floors]
    contracts = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    held = [[module.strip().replace(".", "/") for module in layer.split("|")] for layer in layers]
    assert [[name.removesuffix(".py") for name in floor] for floor in shown] == held
    inside = {f"lfm_edge/{path.stem}" for path in (REPO / "lfm_edge").iterdir() if not path.name.startswith("_")}
    assert inside == {name for floor in held for name in floor if name.startswith("lfm_edge/")}


# --- the workflow of docs/ci.md -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workflow():
    block = re.search(r"^```yaml\n(.*?)^```", (REPO / "docs/ci.md").read_text(), flags=re.DOTALL | re.MULTILINE)[1]
    return yaml.safe_load(block)


@pytest.fixture(scope="module")
def steps(workflow):
    job, = workflow["jobs"].values()
    return job["steps"]


def scripts(steps):
    return [step["run"] for step in steps if "run" in step]


def test_the_workflow_is_one(workflow, steps):
    assert workflow[True] == ["push", "pull_request"]  # YAML 1.1, which Python's reader follows, takes `on` for true
    assert "MODEL" in workflow["env"]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]) for step in steps if "uses" in step)


def test_every_command_of_the_workflow_parses(steps):
    lines = [line for script in scripts(steps) for line in script.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("lfm-edge ")]
    assert [words[1] for words in commands] == ["export", "verify", "bench", "report"]
    for _, name, *arguments in commands:
        COMMAND.commands[name].make_context(name, arguments)
    assert "--budget" in commands[2]


def test_the_workflow_installs_what_there_is(steps):
    install, = (script for script in scripts(steps) if "pip install" in script)
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert re.search(r"lfm-edge\[([\w,]+)\]", install)[1] in project["optional-dependencies"]
    assert re.search(r"torch==\S+", install)[0] in project["dependencies"]


@pytest.mark.heavy
def test_the_workflow_runs_and_leaves_what_it_uploads(workflow, steps, tmp_path):
    """Its steps but the installation, with the small trained model."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin/lfm-edge"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m lfm_edge.cli "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{command.parent}:{os.environ['PATH']}", "MODEL": str(TINY), "PYTHONPATH": str(REPO),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "step-summary")}
    for script in scripts(steps):
        if "pip install" not in script:
            subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=environment, check=True)
    assert "checks passed" in (tmp_path / "step-summary").read_text()
    kept = steps[-1]["with"]["path"].split()
    assert len(kept) == 3 and all(list(tmp_path.glob(pattern)) for pattern in kept)
