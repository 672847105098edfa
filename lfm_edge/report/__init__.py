"""The last step: results in files become a page, JUnit XML and a summary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lfm_edge.files import check_outputs, replacing, write_text
from lfm_edge.report.junit import junit_xml
from lfm_edge.report.markdown import summary
from lfm_edge.report.page import render
from lfm_edge.report.results import Check, checks, read_results


def write_report(results: Sequence[Path], output: Path, junit: Path | None = None, markdown: Path | None = None,
                 ) -> list[Check]:
    """Read results and write the page, and what else is asked for; returns the checks in them that failed.

    results: files, or directories of them
    Raises LfmEdgeError where one cannot be read, or a file would be written over one of them or over another, and
    nothing is written then, or where a file cannot be written.
    """
    read = read_results(results)
    check_outputs({"--output": output, "--junit": junit, "--markdown": markdown}, [file.path for file in read])
    write_text(output, render(read))
    if junit is not None:
        with replacing(junit) as file:
            file.write(junit_xml(read))
    if markdown is not None:
        write_text(markdown, summary(read))
    return [check for file in read for check in checks(file.result) if check.passed is False]
