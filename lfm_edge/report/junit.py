"""The checks of results as JUnit XML, as CI systems read it: a test suite for each file, a test case for each check."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from lfm_edge.harness.bench import BenchResult
from lfm_edge.harness.evaluation import Evaluation
from lfm_edge.harness.verify import Verification
from lfm_edge.report.headline import same
from lfm_edge.report.results import Check, FoundSensitivity, ResultFile, checks


def junit_xml(results: Sequence[ResultFile]) -> bytes:
    """XML in UTF-8. Figures are properties of the suites; a check that was not run is a skipped case."""
    root = Element("testsuites", name="lfm-edge")
    for file in results:
        _suite(root, file)
    for key in ("tests", "failures", "errors"):
        root.set(key, str(sum(int(suite.get(key)) for suite in root)))
    ElementTree.indent(root)
    return ElementTree.tostring(root, "utf-8", xml_declaration=True)


def _suite(root: Element, file: ResultFile) -> None:
    found = checks(file.result)
    suite = SubElement(root, "testsuite", {
        "name": file.name, "tests": str(len(found)), "failures": str(sum(check.passed is False for check in found)),
        "errors": "0", "skipped": str(sum(check.passed is None for check in found)),
        "timestamp": file.provenance.made.removesuffix("+00:00")})
    properties = SubElement(suite, "properties")
    for name, value in _properties(file):
        SubElement(properties, "property", name=name, value=value)
    for check in found:
        _case(suite, check)


def _case(suite: Element, check: Check) -> None:
    case = SubElement(suite, "testcase", classname=same(check.subject), name=check.name, time="0")
    if check.passed is False:
        SubElement(case, "failure", message=check.line, type="check").text = check.line
    elif check.passed is None:
        SubElement(case, "skipped", message=check.line)
    else:
        SubElement(case, "system-out").text = check.line


def _properties(file: ResultFile) -> Iterator[tuple[str, str]]:
    origin, result = file.provenance, file.result
    yield "command", origin.command
    yield "host", f"{origin.host.cpu}, {origin.host.cores} cores, {origin.host.system}"
    yield from ((f"version.{name}", version) for name, version in origin.versions.items())
    if isinstance(result, BenchResult):
        yield from _of_bench(result)
    elif isinstance(result, Verification):
        cost = result.quality
        yield from ((f"{same(result.bundle)}.{name}", f"{value:g}") for name, value in (
            ("artifact_bytes", result.artifact_bytes), ("typical_error", result.typical_error),
            ("kl_divergence", cost.kl_divergence), ("perplexity", cost.perplexity),
            ("float_perplexity", cost.float_perplexity)))
    elif isinstance(result, Evaluation):
        yield from ((f"{same(model.model)}.{score.task}.{score.metric}", f"{score.value:g}")
                    for model in result.models for score in model.scores)
    elif isinstance(result, FoundSensitivity):
        yield "model", result.sensitivity.model
        yield "kl_divergence.8_bits", f"{result.sensitivity.eight_bits.kl_divergence:g}"
        yield "kl_divergence.4_bits", f"{result.sensitivity.four_bits.kl_divergence:g}"


def _of_bench(result: BenchResult) -> Iterator[tuple[str, str]]:
    for entry in result.benchmarks:
        stem = same(entry.bundle) + (f".{entry.threads}_threads" if entry.threads else "")
        yield f"{stem}.artifact_bytes", str(entry.artifact_bytes)
        yield f"{stem}.peak_bytes", str(entry.peak_bytes)
        yield f"{stem}.load_s", f"{entry.load_s.median:g}"
        for point in entry.points:
            yield f"{stem}.{point.kind}_{point.tokens}.prefill_tps", f"{point.prefill_tps.median:g}"
            yield f"{stem}.{point.kind}_{point.tokens}.decode_tps", f"{point.decode_tps.median:g}"
