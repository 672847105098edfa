"""Writes docs/reference/command-line.md from what `--help` tells: `make docs`. A test holds the page to it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from lfm_edge.cli import app

PAGE = Path(__file__).parent / "reference/command-line.md"
HEAD = """\
# Command line

Every command with every option, as `lfm-edge COMMAND --help` prints them. (`make docs` writes this page.)

`lfm-edge --version` shows the version. `lfm-edge --install-completion` makes your shell complete commands, options and
targets.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a check failed: parity or quality in `verify`, the budget or memory limit in `bench`, `--max-drop` in `eval` |
| 2 | bad usage or bad input: standard error says what was wrong, and where; for files and values in one line |
| 128 + N | ended by signal N: 130 after Ctrl-C |

A failed or interrupted command leaves nothing half-written, and never damages what was there.
"""


def page() -> str:
    """The whole page."""
    command = typer.main.get_command(app)
    return "\n".join([HEAD, *(line for name, one in command.commands.items() for line in _section(name, one))])


def _section(name: str, command: Any) -> Iterator[str]:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option"]
    required = [f"{option.opts[0]} {_metavar(option)}" for option in options if option.required]
    usage = ["lfm-edge", name, *(_name(one) for one in arguments), *required, *(["[OPTIONS]"] if options else [])]
    yield f"## {name}\n"
    yield f"{_text(command.help)}\n"
    yield f"    {' '.join(usage)}\n"
    if arguments or options:
        yield "| | | default |\n|---|---|---|"
        for one in arguments:
            yield f"| `{_name(one)}` | {_text(one.help)} | required |"
        for one in options:
            words = ", ".join(f"`{part}`" for part in (*one.opts, *one.secondary_opts))
            given = "" if one.is_flag else f" `{_text(_metavar(one))}`"
            help_, _, default = _text(one.help).rpartition(" (default: ")
            if not help_:
                help_, default = _text(one.help), ""
            yield f"| {words}{given} | {help_} | {_default(one, default)} |"
        yield ""


def _name(argument: Any) -> str:
    return argument.name.upper() + "..." * (argument.nargs == -1)


def _metavar(option: Any) -> str:
    """What stands for the value: that of the help, or else its type."""
    kinds = {"int": "N", "float": "X", "Path": "PATH"}
    annotation = str(option.type_descriptor.annotation)
    return option.metavar or next((shown for kind, shown in kinds.items() if kind in annotation), option.name.upper())


def _default(option: Any, told: str) -> str:
    if option.required:
        return "required"
    if told:
        return told.rstrip(")")
    if option.is_flag or option.default is None:
        return "on" if option.default is True else ""
    return f"`{option.default:g}`" if isinstance(option.default, float) else f"`{option.default}`"


def _text(help_: str | None) -> str:
    """On one line of a table."""
    return " ".join((help_ or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
