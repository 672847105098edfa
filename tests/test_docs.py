"""The docs name only commands, options, files and targets that exist, and what the guides say to do works."""

import os
import re
import shlex
import shutil
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
from tests.helpers import REPO, TINY, code_of, program

PAGES = [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md")), REPO / "CHANGELOG.md",
         REPO / "examples/tiny-model/README.md"]
GUIDES = sorted((REPO / "docs/guides").glob("*.md"))
COMMAND = typer.main.get_command(app)
NEEDS = {f"needs-{what}" for what in ("network", "install", "time", "mac", "phone", "browser", "snapdragon")}


def name_of(page):
    return str(page.relative_to(REPO))


def command_lines(page):
    """Every `lfm-edge ...` line of the indented and fenced blocks. (The command line's own page shows usage.)"""
    text = page.read_text()
    fenced = re.findall(r"^```sh[^\n]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^    (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    joined = "\n".join([*fenced, *indented]).replace("\\\n", " ")
    lines = re.findall(r"^(?:.+\| ?)?(?:/usr/bin/time -v )?lfm-edge (.+)$", joined, flags=re.MULTILINE)
    return lines if page.name != "command-line.md" else []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_line_parses(page):
    for line in command_lines(page):
        name, *arguments = shlex.split(line, comments=True)
        if name.startswith("--"):
            continue
        COMMAND.commands[name].make_context(name, arguments)  # raises for an unknown option or a missing argument


def test_the_readme_shows_every_command_and_target():
    text = (REPO / "README.md").read_text()
    assert set(re.findall(r"^    lfm-edge ([\w-]+)", text, flags=re.MULTILINE)) == set(COMMAND.commands)
    assert all(f"`{name}`" in text for name in TARGETS)
    assert len(text.splitlines()) < 110


def test_the_command_line_s_page_is_what_help_tells():
    told = program("docs/command_line.py").page()
    assert (REPO / "docs/reference/command-line.md").read_text() == told, "run `make docs`"


def anchors_of(page):
    """Of its headings, as they are linked to, and those that it sets itself."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", found) for found in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    found = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return found | set(re.findall(r'<a (?:id|name)="([^"]+)"', text))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_and_make_target_exists(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link, anchor in re.findall(r"\]\(\s*([^)#\s]*)(?:#([^)\s]+))?\)", text):
        if "://" not in link:
            other = page.parent / link if link else page
            assert other.exists(), link
            assert not anchor or other.suffix != ".md" or anchor in anchors_of(other), f"{link}#{anchor}"
    targets = set(re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), flags=re.MULTILINE))
    for target in re.findall(r"`make ([\w-]+)", text):
        assert target in targets, target


def test_every_page_is_linked_from_the_readme():
    text = (REPO / "README.md").read_text()
    assert all(f"({name_of(page)})" in text for page in (REPO / "docs").rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_figure_is_missing(page):
    assert "@@" not in page.read_text()


# --- the guides ---------------------------------------------------------------------------------------------------


def blocks_of(page):
    """Language, what it needs that is not there, and code of every fenced block."""
    return re.findall(r"^```(\w*) ?([^\n]*)\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_what_a_block_needs_is_known(page):
    assert {needs for _, needs, _ in blocks_of(page)} <= NEEDS | {""}
    assert not re.search(r"^    lfm-edge", page.read_text(), flags=re.MULTILINE)  # fenced, so that it is run


def installed_in(folder):
    """An environment in which `lfm-edge` is that of this checkout."""
    command = folder / "bin/lfm-edge"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m lfm_edge.cli "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(REPO)}


def run_guide(page, folder):
    """What it tells the reader to do, in order, in a folder with a checkpoint called my-model."""
    shutil.copytree(TINY, folder / "my-model")
    environment = installed_in(folder) | {"HF_HUB_OFFLINE": "1", "COLUMNS": "100"}
    done = 0
    for language, needs, code in blocks_of(page):
        if needs or language not in ("sh", "python"):
            continue
        run = ["bash", "-e", "-c", code] if language == "sh" else [sys.executable, "-c", code]
        finished = subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True, check=False,
                                  stdin=subprocess.DEVNULL)
        assert finished.returncode == 0, f"{code}\n{finished.stdout}\n{finished.stderr}"
        done += 1
    return done


def test_the_quickstart_does_what_it_says(tmp_path):
    assert run_guide(REPO / "docs/guides/quickstart.md", tmp_path) >= 4


@pytest.mark.heavy
@pytest.mark.parametrize("page", [page for page in GUIDES if page.stem != "quickstart"], ids=name_of)
def test_a_guide_does_what_it_says(page, tmp_path):
    run_guide(page, tmp_path)


# --- what apps are told -------------------------------------------------------------------------------------------


def test_the_hub_example_gives_it_folders_that_it_takes(tmp_path, monkeypatch):
    """By the rule of qai-hub 0.56: exactly one `.onnx`, at most one `.bin`, and nothing else."""
    code = code_of("guides/snapdragon-npu.md", "python", "import qai_hub")
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
    android, ios = ((REPO / f"docs/guides/{name}.md").read_text() for name in ("android", "ios"))
    assert "Module.LOAD_MODE_MMAP" in android and "Armv8.2" in android
    assert all("loadMode: .mmap" in line for line in ios.splitlines() if "Module(filePath:" in line)
    assert all(re.search(r"valid[\s/]+until the next call", text) for text in (android, ios))


def test_no_version_of_a_phone_s_package_is_named_that_may_not_be_published():
    for page in PAGES:
        assert not re.search(r"onnxruntime-android:\d", page.read_text())


# --- the structure ------------------------------------------------------------------------------------------------


def test_the_tower_in_the_docs_is_the_one_that_lint_holds():
    page = (REPO / "docs/internals/architecture.md").read_text()
    floors = re.search(r"^## The tower\n.*?^```\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)[1].splitlines()
    shown = [re.split(r" {3,}", floor)[0].split() for floor in floors]
    contracts = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    held = [[module.strip().replace(".", "/") for module in layer.split("|")] for layer in layers]
    assert [[name.removesuffix(".py") for name in floor] for floor in shown] == held
    inside = {f"lfm_edge/{path.stem}" for path in (REPO / "lfm_edge").iterdir() if not path.name.startswith("_")}
    assert inside == {name for floor in held for name in floor if name.startswith("lfm_edge/")}


# --- the workflow of docs/guides/ci.md ----------------------------------------------------------------------------


WORKFLOW = yaml.safe_load(code_of("guides/ci.md", "yaml", "jobs:"))
JOBS = {name: job["steps"] for name, job in WORKFLOW["jobs"].items()}


def scripts(steps):
    return [step["run"] for step in steps if "run" in step]


def test_the_workflow_is_one():
    assert WORKFLOW[True] == ["push", "pull_request"]  # YAML 1.1, which Python's reader follows, takes `on` for true
    assert "MODEL" in WORKFLOW["env"]
    assert {name: job["runs-on"].split("-")[0] for name, job in WORKFLOW["jobs"].items()} == {
        "linux": "ubuntu", "apple": "macos"}
    steps = [step for steps in JOBS.values() for step in steps]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"]) for step in steps if "uses" in step)


@pytest.mark.parametrize("job, names", [("linux", ["export", "verify", "bench", "report"]),
                                        ("apple", ["export", "export", "verify", "verify", "report"])])
def test_every_command_of_the_workflow_parses(job, names):
    lines = [line for script in scripts(JOBS[job]) for line in script.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("lfm-edge ")]
    assert [words[1] for words in commands] == names
    for words in commands:
        COMMAND.commands[words[1]].make_context(words[1], words[2:])
    assert all("--budget" in words for words in commands if words[1] == "bench")


@pytest.mark.parametrize("steps", JOBS.values(), ids=JOBS)
def test_the_workflow_installs_what_it_exports_to(steps):
    install, = (script for script in scripts(steps) if "pip install" in script)
    extras = re.search(r"lfm-edge\[([\w,]+)\]", install)[1].split(",")
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert re.search(r"torch==[\d.]+", install)[0] in project["dependencies"]
    targets = re.findall(r"--target (\S+)", "\n".join(scripts(steps)))
    assert {TARGETS[target].exporter_name for target in targets} == set(extras) <= set(project["optional-dependencies"])


@pytest.mark.heavy
@pytest.mark.parametrize("steps", JOBS.values(), ids=JOBS)
def test_the_workflow_runs_and_leaves_what_it_uploads(steps, tmp_path):
    """Its steps but the installation, with the small trained model, on this machine."""
    environment = installed_in(tmp_path) | {"MODEL": str(TINY), "GITHUB_STEP_SUMMARY": str(tmp_path / "step-summary")}
    for script in scripts(steps):
        if "pip install" not in script:
            subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, env=environment, check=True)
    assert "checks passed" in (tmp_path / "step-summary").read_text()
    kept = steps[-1]["with"]["path"].split()
    assert len(kept) == 3 and all(list(tmp_path.glob(pattern)) for pattern in kept)
