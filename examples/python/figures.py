"""Export, verify and measure one model on every target, and put the figures into docs/internals/measurements.md.

    python examples/python/figures.py [MODEL]

Exports a bundle of each target whose backend is installed, verifies each, benches in turns those whose speed means
something on this machine, and writes results, bundles and the report under `out/figures/`. The table of that page is
replaced by the measured one. `make figures` runs this. NPU bundles are verified on the simulator, which takes minutes
for the small model and would take hours for another: they are left out then.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from lfm_edge.errors import LfmEdgeError
from lfm_edge.files import write_text
from lfm_edge.report.markdown import plain, target_table
from lfm_edge.report.results import read_results
from lfm_edge.targets import TARGETS

ROOT = Path(__file__).parents[2]
TINY = "examples/tiny-model/checkpoint"
START, END = "<!-- figures:start -->", "<!-- figures:end -->"
BENCH = ("--prompt-tokens", "512", "--generate-tokens", "64", "--fill", "all", "--repeat", "5", "--sustained", "10")
SIMULATED = ("--context", "1024", "--prefill-chunk", "32")  # what the simulator computes in minutes


def lfm_edge(*arguments):
    """Run a command; a check that fails is in its result, anything else ends this."""
    command = [*map(str, arguments)]
    print("\n$ " + shlex.join(["lfm-edge", *command]), flush=True)
    code = subprocess.run([sys.executable, "-m", "lfm_edge.cli", *command], check=False).returncode
    if code not in (0, 1):
        sys.exit(code)
    return code


def measure(model, directory):
    """The results of all installed targets that can be run in minutes, and whether all checks passed."""
    names = [target.name for target in TARGETS.values()
             if target.to_install is None and (model == TINY or not target.runtime.takes_chip)]
    bundles = [directory / name for name in names]
    results = [directory / f"verify-{name}.json" for name in names]
    for name, bundle, result in zip(names, bundles, results, strict=True):
        options = SIMULATED if TARGETS[name].runtime.takes_chip else ()
        lfm_edge("export", "--target", name, "--model", model, "--output", bundle, "--force", *options)
        result.unlink(missing_ok=True)  # what an earlier run left must not pass for this one's
        lfm_edge("verify", bundle, "--json", result)
    speeds = directory / "bench.json"
    speeds.unlink(missing_ok=True)
    lfm_edge("bench", *bundles, *BENCH, "--json", speeds)
    results.append(speeds)
    failed = lfm_edge("report", *results, "--output", directory / "report.html", "--junit", directory / "junit.xml",
                      "--markdown", directory / "report.md")
    return results, failed


def figures(model, results):
    """The page's text between the markers."""
    read = read_results(results)
    origin = read[-1].provenance
    host = f"{plain(origin.host.cpu)}, {origin.host.cores} cores, {plain(origin.host.system.split()[-1])}"
    command = "make figures" + ("" if model == TINY else f" MODEL={model}")
    return (f"{START}\n`{command}` on {host}, {origin.made[:10]}. Medians; what was checked, and how far it was from "
            f"its limit, is in the report that it writes.\n\n{target_table(read)}{END}")


def replace_figures(readme, text):
    """Put `text` in place of what is between the markers. Raises LfmEdgeError where they are not there."""
    before = readme.read_text()
    after, count = re.subn(f"{START}.*?{END}", lambda _: text, before, flags=re.DOTALL)
    if count != 1:
        raise LfmEdgeError(f"{readme}: expected {START} and {END} once, found them {count} times")
    write_text(readme, after)


def main(model=TINY):
    stem = re.sub(r"[^\w.-]", "-", model.rstrip("/").removesuffix("/checkpoint").rsplit("/", 1)[-1])
    directory = Path("out/figures") / stem
    directory.mkdir(parents=True, exist_ok=True)
    results, failed = measure(model, directory)
    replace_figures(ROOT / "docs/internals/measurements.md", figures(model, results))
    sys.exit(failed)


if __name__ == "__main__":
    if len(sys.argv) > 2 or sys.argv[1:2] == ["--help"]:
        sys.exit(__doc__)
    main(*sys.argv[1:])
