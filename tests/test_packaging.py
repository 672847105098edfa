"""What an extra installs is what its code imports; what a wheel holds is all."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest

from lfm_edge.targets import TARGETS
from tests.helpers import REPO

OURS = ("lfm_edge", "exporters", "runtimes")
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
USES = {"eval": {"lfm_edge.harness.lm_eval", "lfm_edge.harness.evaluation"}}
for target in TARGETS.values():
    USES.setdefault(target.exporter_name, set()).add(f"exporters.{target.exporter_name}")
    USES.setdefault(target.runtime.extra, set()).add(f"runtimes.{target.runtime.name}")


def file_of(module):
    path = REPO / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def imports(module):
    """The modules that are imported when this one is: not those that a function asks for, nor those for types."""
    found = set()
    for node in ast.parse(file_of(module).read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name.startswith(OURS) and file_of(name).is_file() else node.module for name in inside}
    return found


def outside(modules):
    """Top-level names of others' packages that are imported with these modules."""
    seen, waiting, found = set(), list(modules), set()
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        for name in imports(module):
            if name.split(".")[0] in OURS:
                waiting.append(name)
            else:
                found.add(name.split(".")[0])
    return found - set(sys.stdlib_module_names)


def installed_by(requirements):
    """Names of packages, with those that they need themselves."""
    names, waiting = set(), list(requirements)
    while waiting:
        name, extra = re.match(r"([\w.-]+)(?:\[([\w,]+)\])?", waiting.pop()).groups()
        name = canonical(name)
        if name == PROJECT["name"]:
            waiting += PROJECT["optional-dependencies"][extra]
        elif name not in names:
            names.add(name)
            with suppress(importlib.metadata.PackageNotFoundError):  # of another platform
                waiting += [one for one in importlib.metadata.requires(name) or () if "extra ==" not in one]
    return names


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("extra", USES)
def test_an_extra_brings_what_its_code_imports(extra):
    homes = importlib.metadata.packages_distributions()
    brought = installed_by([*PROJECT["dependencies"], *PROJECT["optional-dependencies"][extra]])
    for name in outside(USES[extra]):
        assert brought & {canonical(home) for home in homes.get(name, ())}, f"{name}, for {extra}"


def test_the_command_line_starts_without_what_extras_bring():
    assert outside({"lfm_edge.cli"}) <= {"typer", "rich"}


def test_every_package_and_the_page_s_template_are_in_the_wheel():
    setup = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]
    there = {".".join(path.parent.relative_to(REPO).parts) for top in OURS for path in Path(REPO, top).rglob("*.py")}
    assert there == set(setup["packages"])
    for package, names in setup["package-data"].items():
        assert all((REPO / package.replace(".", "/") / name).is_file() for name in names)
