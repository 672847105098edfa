"""The docs name only commands, options, files and targets that exist."""

import re
import shlex

import pytest
import typer.main

from lfm_edge.cli import app
from lfm_edge.targets import TARGETS
from tests.helpers import REPO

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
