"""Draws docs/images/terminal.svg, a first session with the small model, as it was run: `make docs`."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

ROOT = Path(__file__).parents[1]
PICTURE = Path(__file__).parent / "images/terminal.svg"
COMMANDS = ("lfm-edge export --target android-q4 --model my-model -o my-bundle", "lfm-edge verify my-bundle",
            'lfm-edge generate my-bundle --prompt "23+19=?"')
THEME = TerminalTheme((250, 250, 248), (36, 41, 47), [(36, 41, 47), (180, 35, 24), (6, 110, 70), (150, 100, 0),
                                                      (9, 80, 160), (130, 60, 130), (0, 110, 120), (110, 119, 129)])


def main() -> None:
    """Run the commands in a fresh folder, and draw what they print."""
    with Path(os.devnull).open("w") as nothing, TemporaryDirectory() as folder:
        screen = Console(record=True, width=88, file=nothing)
        shutil.copytree(ROOT / "examples/tiny-model/checkpoint", Path(folder, "my-model"))
        for command in COMMANDS:
            arguments = [sys.executable, "-m", "lfm_edge.cli", *shlex.split(command)[1:]]
            environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "88"}
            said = subprocess.run(arguments, cwd=folder, env=environment, check=True, capture_output=True, text=True)
            screen.print(Text(f"$ {command}", style="bold"))
            for line in said.stdout.rstrip().splitlines():
                screen.print(Text(line, style="bold green" if line.startswith("PASSED") else ""))
            screen.print()
    drawn = screen.export_svg(title="lfm-edge", theme=THEME, unique_id="terminal")
    PICTURE.write_text(re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL))  # no fonts from elsewhere


if __name__ == "__main__":
    main()
