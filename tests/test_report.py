"""`report`: what the results say is on the page, in the JUnit XML and in the summary; nothing they hold breaks out."""

import copy
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm_edge import cli, export
from lfm_edge.bundle.bundle import Bundle
from lfm_edge.errors import LfmEdgeError
from lfm_edge.harness.bench import Settings, bench
from lfm_edge.harness.devices import project
from lfm_edge.harness.evaluation import Evaluated, Evaluation, Score
from lfm_edge.harness.evaluation import Settings as EvalSettings
from lfm_edge.harness.sensitivity import analyse
from lfm_edge.harness.verify import verify
from lfm_edge.report import charts, write_report
from lfm_edge.report.charts import Bar, Dot, Series, Value
from tests.helpers import REPO, example, save_checkpoint

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>|`@team`\x00\ud800 [a](http://b)"


def evaluated(bundle):
    """Three documents of one task and a text, by a bundle and the model that it was made from."""
    models = [Evaluated(name, computed, True, (Score("sums", "acc", sum(each) / 3, 0.3, 3, True, each),
                                               Score("texts", "bits", bits, None, 1, False)), (), 0, 90, 60, 1.5)
              for name, computed, each, bits in (("model", "float32", (1.0, 1.0, 0.0), 2.0),
                                                 (bundle, "android-q4", (1.0, 0.0, 0.0), 2.125))]
    return Evaluation.of(EvalSettings(("sums", "texts"), max_drop=0.5), models)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Real results: two bundles benched in turn, one verified, and a sensitivity, as JSON holds them."""
    folder = tmp_path_factory.mktemp("results")
    source = save_checkpoint(folder / "model", layer_types=["conv", "full_attention"])
    one = export(source, target="android-q4", output=folder / "one", context=128, prefill_chunk=32)
    two = Bundle.open(shutil.copytree(one.directory, folder / "two"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lfm_edge.harness.bench._Run.warm_up", lambda run: None)  # its processes measure nothing
        speeds = bench([one, two], Settings((8, 16), 4, fills=(64,), threads=(1,), repeat=2))
    parts, bits, chosen = analyse(source, tokens=32, most_bytes=70_000)  # 50 kB at 4 bits, 89 kB at 8
    results = {"bench": speeds.to_dict("lfm-edge bench one two"), "verify": verify(one).to_dict("lfm-edge verify one"),
               "eval": evaluated(str(one.directory)).to_dict("lfm-edge eval one"),
               "sensitivity": parts.to_dict("lfm-edge sensitivity", chosen, bits)}
    return json.loads(json.dumps(results))


@pytest.fixture
def results(made):
    return copy.deepcopy(made)


@pytest.fixture
def report(tmp_path, monkeypatch, capfd):
    """Write results to files and run the command on them."""

    def call(*results, also=()):
        paths = []
        for number, result in enumerate(results):
            paths.append(tmp_path / f"result-{number}.json")
            paths[-1].write_text(result if isinstance(result, str) else json.dumps(result))
        return Reported(tmp_path, monkeypatch, capfd, [*paths, *also])

    return call


class Reported:
    """What a run of `lfm-edge report` left behind."""

    def __init__(self, folder, monkeypatch, capfd, paths):
        page, xml, markdown = (folder / name for name in ("page.html", "checks.xml", "summary.md"))
        monkeypatch.setattr(sys, "argv", ["lfm-edge", "report", *map(str, paths), "-o", str(page), "--junit", str(xml),
                                          "--markdown", str(markdown)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        self.code, self.err = end.value.code, capfd.readouterr().err
        self.written = page.exists(), xml.exists(), markdown.exists()
        if all(self.written):
            self.page, self.markdown = Page(page.read_text()), markdown.read_text()
            self.suites = ElementTree.parse(xml).getroot()

    def cases(self, kind):
        """(class, name, message) of the test cases that have an element of a kind."""
        return [(case.get("classname"), case.get("name"), found.get("message"))
                for case in self.suites.iter("testcase") for found in case.findall(kind)]


class Page(HTMLParser):
    """The page as a browser takes it: elements, and the text of those that are asked for."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, html):
        super().__init__()
        self.html, self.elements, self.open, self.words, self.codes, self.failures = html, [], [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append((tag, dict(attributes).get("class", "")))
        if tag == "code":
            self.codes.append("")
        if tag == "li" and ("ul", "failures") in self.open:
            self.failures.append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        inside = [tag for tag, _ in self.open]
        if "style" not in inside:
            self.words.append(data)
        if "code" in inside:
            self.codes[-1] += data
        if ("ul", "failures") in self.open and "li" in inside:
            self.failures[-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    @property
    def sections(self):
        return [attributes["id"] for tag, attributes in self.elements if tag == "section"]

    def svgs(self):
        """Every chart, parsed as XML."""
        return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", self.html, flags=re.DOTALL)]


# --- what is on the page ------------------------------------------------------------------------------------------


def test_the_page_says_all_that_the_results_say(results, report):
    done = report(results["bench"], results["verify"], results["sensitivity"])
    assert done.code == 0, done.err
    page = done.page
    assert page.sections == ["targets", "speed", "compared", "limit", "memory", "time", "parity", "quality",
                             "sensitivity", "missing", "hosts"]
    assert "checks passed" in page.text and page.failures == []
    first, second = results["bench"]["benchmarks"]
    for entry in (first, second):
        assert f"{entry['points'][0]['decode_tps']['median']:,.1f} tok/s" in page.text
        assert f"{entry['peak_bytes'] / 1e6:,.1f} MB" in page.text
    cost = results["verify"]["quality"]
    assert f"{cost['perplexity']:,.3f}" in page.text and f"{cost['kl_divergence']:.4f}" in page.text
    for row in results["verify"]["parity"]:
        assert row["phase"] in page.text and f"{row['logit_error']:.1e}" in page.text
    for entry in results["bench"]["comparisons"]:
        ratio = entry["ratio"]
        assert f"{ratio['ratio']:.3f}" in page.text and f"{ratio['low']:.3f} to {ratio['high']:.3f}" in page.text
    assert results["bench"]["host"]["cpu"] in page.text and results["bench"]["versions"]["torch"] in page.text
    assert "no result of verify was given" in page.text  # of the second bundle
    assert "bench ran without --sustained" in page.text
    assert "fits the cache" in page.text


def test_scores_of_tasks_are_on_the_page_and_a_drop_is_a_failure(results, report):
    done = report(results["verify"], results["eval"])
    assert done.code == 0 and done.page.sections == ["targets", "parity", "quality", "evaluation", "missing", "hosts"]
    for shown in ("sums, acc", "0.667 \u00b10.300", "-0.333 \u00b10.333", "texts, bits", "+0.125", "may lose 0.5"):
        assert shown in done.page.text + str(ElementTree.tostring(done.suites)), shown
    names = {case.get("name") for case in done.suites.iter("testcase")}
    assert {"sums: acc", "texts: bits"} <= names
    results["eval"]["models"][1]["left_out"] = ["sums, f1"]
    done = report(results["eval"])
    assert done.code == 1 and [name for _, name, _ in done.cases("failure")] == ["sums, f1"]
    results["eval"]["models"][1]["left_out"] = []
    results["eval"]["settings"]["max_drop"] = 0.2
    done = report(results["eval"])
    assert done.code == 1 and [name for _, name, _ in done.cases("failure")] == ["sums: acc"]
    assert "**sums: acc**" in done.markdown


def test_every_figure_has_the_command_that_makes_it_again(results, report):
    page = report(results["bench"], results["verify"], results["sensitivity"]).page
    assert set(page.codes) == {"lfm-edge bench one two", "lfm-edge verify one", "lfm-edge sensitivity"}
    assert page.codes.count("lfm-edge bench one two") == 6  # five sections of figures, and the list of all


def test_the_page_needs_nothing_else_and_its_charts_are_drawn(results, report):
    page = report(results["bench"], results["verify"], results["sensitivity"]).page
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object"}
    assert all(value.startswith("#") for _, attributes in page.elements
               for name, value in attributes.items() if name in ("href", "src"))
    assert "url(" not in page.html and "@import" not in page.html
    drawn = [svg for svg in page.svgs() if svg.get("role") == "img"]
    assert len(drawn) == 2 + 1 + 1 + 2 + 1 + 1  # speed, compared, parts, time, parity, sensitivity
    assert all(svg.get("aria-label") for svg in drawn)
    for svg in drawn:  # nothing outside its box
        _, _, width, height = map(float, svg.get("viewBox").split())
        for text in svg.iter("text"):
            assert 0 <= float(text.get("x", 0)) <= width and 0 <= float(text.get("y", 0)) <= height


def test_spreads_are_drawn_as_ranges(results, report):
    point = results["bench"]["benchmarks"][0]["points"][0]
    point["decode_tps"] = {"median": 50.0, "low": 40.0, "high": 60.0}
    page = report(results["bench"]).page
    assert "50 (40 to 60) at 8" in page.html and page.html.count('class="whisker"') > 0
    assert "40.0 to 60.0" in page.text


def test_projections_are_called_projections_and_nothing_else_is(results, report):
    assert "PROJECTION" not in report(results["bench"]).page.text
    for point in results["bench"]["benchmarks"][0]["points"]:
        point |= {"fits_cache": False, "limit_tps": 100.0,
                  "projections": [vars(entry) for entry in project(10**9, 0.5)]}
    done = report(results["bench"])
    assert "projections" in done.page.sections
    assert "PROJECTION, not measured: decode" in done.page.text and "No phone ran any of this" in done.page.text
    assert "%) of 100 tok/s" in done.page.text  # the roofline has figures now
    assert "Galaxy" not in done.markdown


def test_sustained_decode_is_shown_where_it_was_measured(results, report):
    results["bench"]["settings"]["sustained_s"] = 20.0
    for entry in results["bench"]["benchmarks"]:
        entry["sustained_tps"] = [80.0, 40.0]
    page = report(results["bench"]).page
    assert "sustained" in page.sections and "-50%" in page.text and "--sustained" not in page.text.replace(
        "lfm-edge bench", "")


def test_one_length_is_bars_and_one_round_has_no_confidence(results, report):
    raw = results["bench"]
    for entry in raw["benchmarks"]:
        entry["points"] = entry["points"][:1]
    raw["comparisons"] = raw["comparisons"][:1]
    raw["comparisons"][0]["ratio"] |= {"low": None, "high": None, "rounds": 1}
    page = report(raw).page
    assert "Decode: 8 positions" in page.text
    assert "needs more than one round" in page.text and "one round has none" in page.text


def test_bundles_that_were_not_measured_are_there_with_the_reason(results, report):
    results["bench"]["not_measured"] = [{"bundle": "mlx", "target": "mlx-q4", "reason": "runs on Apple silicon",
                                         "artifact_bytes": 786_200_000, "state_bytes": 1}]
    results["verify"]["skipped"] = {"after restore": "the state is inside the program"}
    done = report(results["bench"], results["verify"])
    assert done.code == 0
    for told in ("not measured", "runs on Apple silicon", "786.2 MB", "the state is inside the program"):
        assert told in done.page.text
    assert "<code>mlx</code> | <code>mlx-q4</code> | 786.2 MB | not verified |  |  |  | not measured" in done.markdown
    assert done.cases("skipped") == [("mlx", "measured", "runs on Apple silicon"), (
        results["verify"]["bundle"], "parity: after restore", "the state is inside the program")]


def test_a_bundle_that_was_to_keep_to_a_budget_and_was_not_measured_fails(results, report):
    results["bench"]["not_measured"] = [{"bundle": "mlx", "target": "mlx-q4", "reason": "runs on Apple silicon",
                                         "artifact_bytes": 786_200_000, "state_bytes": 1}]
    results["bench"]["settings"]["budget"] = 900_000_000
    for entry in results["bench"]["benchmarks"]:
        entry["budget_bytes"] = 900_000_000
    done = report(results["bench"])
    line = "not measured, so the budget of 900.0 MB was not checked: runs on Apple silicon"
    assert done.code == 1 and done.err == f"mlx: measured: {line}\n"
    assert done.cases("failure") == [("mlx", "measured", line)] and done.cases("skipped") == []
    assert done.page.failures == [f"mlx: measured {line}"] or line in done.page.failures[0]
    assert "❌ not measured" in done.markdown


def test_a_budget_that_only_the_full_context_breaks_fails(results, report):
    entry = results["bench"]["benchmarks"][0]
    entry["budget_bytes"] = entry["peak_bytes"] + 1
    entry["at_full_context"]["kv_cache"] += 50_000_000
    done = report(results["bench"])
    assert done.code == 1
    (_, name, message), = done.cases("failure")
    assert name == "memory budget, 1 thread" and "at the full context of 128, over the budget" in message


def test_a_result_of_an_older_verify_is_refused_in_one_line(results, report):
    results["verify"]["schema"] = "lfm-edge/verify/1"
    done = report(results["verify"])
    assert done.code == 2 and not any(done.written)
    assert len(done.err.splitlines()) == 1 and "lfm-edge/verify/1" in done.err and "lfm-edge/verify/2" in done.err


def test_limits_of_other_phases_are_damage(results, report):
    del results["verify"]["limits"]["phases"]["after reset"]
    done = report(results["verify"])
    assert done.code == 2 and "limits.phases: not the phases of parity" in done.err


def test_a_bundle_that_was_verified_only_is_there_too(results, report):
    done = report(results["verify"])
    assert "no result of bench" in done.page.text and "speed" not in done.page.sections
    assert "| not measured |" in done.markdown


def test_the_choice_of_bits_is_shown(results, report):
    page = report(results["sensitivity"]).page
    bits = results["sensitivity"]["linear_bits"]
    assert set(bits.values()) == {4, 8}
    assert f"{results['sensitivity']['chosen']['kl_divergence']:.6f}" in page.text
    assert "8 bits in the choice" in page.text and "Nothing was held against a limit" in page.text


def test_several_numbers_of_threads_are_told_apart(results, report):
    twice = copy.deepcopy(results["bench"]["benchmarks"][0])
    results["bench"]["benchmarks"].append(twice | {"threads": 2})
    page = report(results["bench"]).page
    assert "one, 1 thread" in page.text and "one, 2 threads" in page.text


# --- checks -------------------------------------------------------------------------------------------------------


def _break_limit(raw):
    entry = raw["bench"]["benchmarks"].pop(0)
    raw["bench"]["over_limit"] = [{key: entry[key] for key in ("bundle", "target", "artifact_bytes", "state_bytes")}
                                  | {"reason": f"{entry['bundle']}: does not live within 0.5 MB"}]


# How each check is broken in the results, its name, and what is said of it.
BROKEN = {
    "weights": (lambda raw: raw["verify"]["weights"]["missing"].append("layers.1.w1: codes"), "layers.1.w1: codes"),
    "rounding": (lambda raw: raw["verify"]["rounding"]["wrong"].append("layers.1.w1"), "are not the checkpoint's"),
    "parity: decode": (lambda raw: raw["verify"]["parity"][2].update(logit_error=9.0), "logit error 9.0e+00"),
    "parity: after reset": (lambda raw: raw["verify"]["parity"][3].update(kl_divergence=float("nan")), "KL nan nats"),
    "parity: median of all": (lambda raw: raw["verify"].update(typical_error=0.9), "median logit error 9.0e-01"),
    "greedy answer": (lambda raw: raw["verify"]["greedy"].update(exact=0, ties=1), "0 are the reference's"),
    "baked prompt": (lambda raw: raw["verify"].update(baked_prompt={
        "phase": "baked prompt", "positions": 8, "logit_error": 5.0, "cosine": 1.0, "kl_divergence": 0.0,
        "top1_agreement": 1.0}), "logit error 5.0e+00"),
    "quality": (lambda raw: raw["verify"]["quality"].update(passed=False, kl_divergence=0.75), "KL 0.7500 nats"),
    "task: sums": (lambda raw: raw["verify"].update(tasks=[{
        "task": "sums", "prompts": 20, "float_accuracy": 1.0, "accuracy": 0.5, "passed": False}]), "50.0% of 20"),
    "memory budget, 1 thread": (lambda raw: raw["bench"]["benchmarks"][0].update(budget_bytes=1000),
                                "is over the budget of 1.0 kB"),
    "memory limit": (_break_limit, "does not live within 0.5 MB"),
}


@pytest.mark.parametrize(("name", "broken"), BROKEN.items(), ids=BROKEN)
def test_a_check_that_failed_is_in_all_three_outputs(results, report, name, broken):
    breaking, line = broken
    breaking(results)
    done = report(results["bench"], results["verify"])
    assert done.code == 1 and all(done.written)
    assert len(done.err.splitlines()) == 1 and name in done.err and line in done.err
    only, = done.page.failures
    assert f"one: {name}" in only and line in only
    assert "1 of" in done.page.text and "checks failed" in done.page.text
    (_, case, message), = done.cases("failure")
    assert case == name and line in message
    assert done.suites.get("failures") == "1"
    shown = [text for text in done.markdown.splitlines() if text.startswith("- ")]
    assert len(shown) == 1 and f"**{name}**" in shown[0] and "1 of" in done.markdown.splitlines()[0]


def test_what_passed_has_no_failure_anywhere(results, report):
    done = report(results["bench"], results["verify"], results["sensitivity"])
    assert done.cases("failure") == [] and done.page.failures == [] and "FAILED" not in done.page.text
    assert "FAILED" not in done.markdown and "❌" not in done.markdown and done.err == ""
    names = {case.get("name") for case in done.suites.iter("testcase")}
    assert names == {"weights", "rounding", "parity: full prefill", "parity: chunked prefill", "parity: decode",
                     "parity: after reset", "parity: after restore", "parity: lookahead", "parity: median of all",
                     "greedy answer", "quality", "memory budget, 1 thread"}


def test_junit_has_a_suite_for_each_file_with_counts_and_figures(results, report):
    _break_limit(results)
    suites = list(report(results["bench"], results["verify"], results["sensitivity"]).suites)
    assert [suite.tag for suite in suites] == ["testsuite"] * 3
    for suite in suites:
        cases = suite.findall("testcase")
        assert [child.tag for child in suite] == ["properties"] + ["testcase"] * len(cases)
        assert int(suite.get("tests")) == len(cases)
        for kind, element in (("failures", "failure"), ("skipped", "skipped"), ("errors", "error")):
            assert int(suite.get(kind)) == len(suite.findall(f"testcase/{element}"))
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.get("timestamp"))
    figures = {entry.get("name"): entry.get("value") for entry in suites[0].iter("property")}
    measured = results["bench"]["benchmarks"][0]
    assert figures["command"] == "lfm-edge bench one two"
    assert figures[f"{measured['bundle']}.1_threads.peak_bytes"] == str(measured["peak_bytes"])
    assert float(figures[f"{measured['bundle']}.1_threads.prompt_8.decode_tps"]) == pytest.approx(
        measured["points"][0]["decode_tps"]["median"], rel=1e-4)


def test_what_a_result_claims_of_itself_is_not_believed(results, report):
    results["bench"]["passed"] = results["bench"]["benchmarks"][0]["within_budget"] = True
    results["bench"]["benchmarks"][0]["budget_bytes"] = 1
    assert report(results["bench"]).code == 1


# --- results are not trusted --------------------------------------------------------------------------------------


def hostile(value):
    """A result in which every text is hostile."""
    if isinstance(value, dict):
        return {key: hostile(entry) if key != "schema" else entry for key, entry in value.items()}
    if isinstance(value, list):
        return [hostile(entry) for entry in value]
    return HOSTILE if isinstance(value, str) else value


def test_no_text_of_a_result_breaks_out(results, report):
    _break_limit(results)
    results["verify"]["skipped"] = {"phase": "reason"}
    results["verify"]["weights"]["missing"] = ["name"]
    results["verify"]["limits"]["phases"] = {HOSTILE: results["verify"]["limits"]["phases"]["decode"]}
    done = report(*(hostile(result) for result in results.values()))
    assert done.code == 1
    tags = {tag for tag, _ in done.page.elements}
    assert not tags & {"script", "img", "a"} - {"a"}
    assert not any(name.startswith("on") for _, attributes in done.page.elements for name in attributes)
    assert all(svg.tag == "svg" for svg in done.page.svgs())  # well-formed: nothing closed a chart
    assert "<script>alert(1)</script>" in done.page.text  # as text, that is
    assert set(re.findall(r"<[^>]*>?", done.markdown)) == {"<code>", "</code>"}
    assert "@team" not in done.markdown and "](" not in done.markdown
    rows = [line for line in done.markdown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    message = done.cases("failure")[0][2]
    assert "<script>" in message and "\ufffd" in message


DAMAGED = {
    "no JSON": ("{", "not JSON"), "no object": ("[]", "expected an object"), "empty": ("", "not JSON"),
    "something else": ('{"name": "package"}', "its schema is None"),
    "another schema": ('{"schema": "lfm-edge/bench/1"}', "its schema is 'lfm-edge/bench/1'"),
    "a schema that is no text": ('{"schema": []}', "its schema is []"),
    "nothing in it": ('{"schema": "lfm-edge/verify/2"}', "made: is missing"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_file_that_is_no_result_is_one_line(report, content, message):
    done = report(content)
    assert done.code == 2 and done.written == (False, False, False)
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert message in done.err and "result-0.json" in done.err


WRONG = {
    "benchmarks[1].points[0].decode_tps.median": lambda raw: raw["benchmarks"][1]["points"][0]["decode_tps"].update(
        median="fast"),
    "benchmarks[0].peak_bytes": lambda raw: raw["benchmarks"][0].update(peak_bytes=1.5),
    "host.cores": lambda raw: raw["host"].update(cores=True),
    "versions['torch']": lambda raw: raw["versions"].update(torch=2),
    "read_bandwidth": lambda raw: raw["read_bandwidth"].update(many={}),
    "settings.repeat": lambda raw: raw["settings"].update(repeat=10**30),
    "comparisons": lambda raw: raw.update(comparisons={}),
    "benchmarks[0].predicted": lambda raw: raw["benchmarks"][0].pop("predicted"),
}


@pytest.mark.parametrize(("place", "damage"), WRONG.items(), ids=WRONG)
def test_damage_is_named_with_its_place(results, report, place, damage):
    damage(results["bench"])
    done = report(results["bench"])
    assert done.code == 2 and f"damaged: {place}" in done.err and done.err.count("\n") == 1


def test_what_a_later_version_added_is_left_alone(results, report):
    results["bench"]["benchmarks"][0]["energy_j"] = 3
    results["verify"]["more"] = {"new": True}
    assert report(results["bench"], results["verify"]).code == 0


LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([]), st.just({}),
                   st.sampled_from([0, -1, 0.0, -1e300, 1e308, 5e-324, float("nan"), float("inf"), 2**62]))


def _leaves(value, path=()):
    if isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(entry, (*path, key))
    elif path != ("schema",) and "rounds" not in path:
        yield path


@settings(max_examples=150)
@given(data=st.data())
def test_whatever_stands_in_a_result_is_refused_or_reported(made, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    changed = copy.deepcopy(made[data.draw(st.sampled_from(sorted(made)))])
    for path in data.draw(st.lists(st.sampled_from(list(_leaves(changed))), min_size=1, max_size=4, unique=True)):
        place = changed
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = data.draw(LEAVES)
    (folder / "result.json").write_text(json.dumps(changed))
    try:
        write_report([folder / "result.json"], folder / "page.html", folder / "checks.xml", folder / "summary.md")
    except LfmEdgeError as error:
        assert "result.json: " in str(error) and "\n" not in str(error)
        return
    page = Page((folder / "page.html").read_text())
    assert page.sections and all(svg.tag == "svg" for svg in page.svgs())
    coordinates = " ".join(re.findall(r' (?:d|x|y|width|transform|viewBox)="([^"]*)"', page.html))
    assert coordinates or changed["schema"].startswith("lfm-edge/eval")  # which has no chart
    assert not re.search("nan|inf", coordinates)
    ElementTree.parse(folder / "checks.xml")


# --- files --------------------------------------------------------------------------------------------------------


def test_a_directory_stands_for_the_results_in_it(results, report, tmp_path):
    (tmp_path / "all").mkdir()
    (tmp_path / "all/b.json").write_text(json.dumps(results["verify"]))
    (tmp_path / "all/a.json").write_text(json.dumps(results["bench"]))
    (tmp_path / "all/notes.txt").write_text("no result")
    done = report(also=[tmp_path / "all", tmp_path / "all/a.json"])
    assert done.code == 0
    assert [suite.get("name") for suite in done.suites] == [str(tmp_path / "all/a.json"), str(tmp_path / "all/b.json")]


def test_an_empty_directory_and_a_missing_file_are_one_line(report, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no *.json in this directory" in report(also=[tmp_path / "empty"]).err
    done = report(also=[tmp_path / "missing.json"])
    assert done.code == 2 and done.err == f"error: {tmp_path}/missing.json: no such file\n"


def test_a_report_is_replaced_when_the_new_one_is_whole(results, report, tmp_path):
    (tmp_path / "page.html").write_text("the old one")
    assert report("{").code == 2
    assert (tmp_path / "page.html").read_text() == "the old one"
    assert report(results["verify"]).code == 0
    assert (tmp_path / "page.html").read_text().rstrip().endswith("</html>")
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_a_place_that_cannot_be_written_is_one_line(results, tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(results["verify"]))
    with pytest.raises(LfmEdgeError, match="cannot be written"):
        write_report([tmp_path / "result.json"], tmp_path / "no/such/place.html")


# --- charts -------------------------------------------------------------------------------------------------------


def test_charts_draw_every_figure_once_and_leave_out_what_is_none():
    points = [(64.0, Value(2.0, 1.0, 3.0)), (4096.0, Value.alone(4.0)), (8.0, Value.alone(float("nan")))]
    svg = charts.lines([Series("a", 0, points), Series("b", 1, points[:1])], title="t", x_title="x", y_title="y",
                       logarithmic=True)
    assert len(re.findall(r'class="mark" transform', svg)) == 3 and svg.count('class="whisker"') == 2
    assert charts.lines([Series("a", 0, points[2:])], title="t", x_title="x", y_title="y") == ""
    stacked = charts.bars([Bar("a", [1.0, 2.0], mark=4.0)], title="t", x_title="x", part_names=["p", "q"])
    assert stacked.count("<rect") == 2 and stacked.count('class="tick"') == 1
    drawn, nothing = charts.pairs([("a", [Dot("d", Value.alone(0.1), limit=0.2, floor=0.05, bad=True)]), ("b", [])],
                                  title="t", x_title="x")
    assert drawn.count('class="limit solid"') == 1 and drawn.count('class="floor"') == 1 and 'class="bad"' in drawn
    assert nothing == ""


def test_bars_are_as_long_as_their_figures():
    svg = charts.bars([Bar("a", [10.0]), Bar("b", [5.0])], title="t", x_title="x")
    first, second = (float(width) for width in re.findall(r'<rect class="part"[^>]*width="([\d.]+)"', svg))
    assert first == pytest.approx(2 * second, abs=0.2)


def test_names_in_charts_are_escaped_and_long_ones_cut():
    name = "<b>" + "x" * 80
    svg = str(charts.bars([Bar(name, [1.0])], title=name, x_title=name))
    assert "<b>" not in svg and "\u2026" in svg
    ElementTree.fromstring(svg)


def test_the_same_bundle_has_the_same_colour_and_mark_and_others_have_not():
    looks = {(charts.colour(index), charts.shape(index)) for index in range(40)}
    assert len(looks) == 40


# --- around it ----------------------------------------------------------------------------------------------------


def test_every_result_says_where_it_comes_from(made):
    for name, raw in made.items():
        assert raw["schema"] == f"lfm-edge/{name}/{1 if name in ('sensitivity', 'eval') else 2}"
        assert raw["command"].startswith(f"lfm-edge {name}")
        assert raw["host"]["cpu"] and raw["versions"]["torch"] and re.match(r"\d{4}-\d\d-\d\dT", raw["made"])


@pytest.fixture(scope="module")
def figures():
    return example("figures")


def test_the_page_s_figures_are_replaced_between_their_markers(figures, results, tmp_path):
    (tmp_path / "bench.json").write_text(json.dumps(results["bench"]))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{figures.START}\nold\n{figures.END}\nafter\n")
    text = figures.figures("random:lfm2.5-1.2b", [tmp_path / "bench.json"])
    figures.replace_figures(readme, text)
    lines = readme.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert "`make figures MODEL=random:lfm2.5-1.2b`" in lines[2] and results["bench"]["made"][:10] in lines[2]
    assert f"{results['bench']['benchmarks'][1]['peak_bytes'] / 1e6:,.1f} MB" in readme.read_text()


def test_a_page_without_markers_is_left_alone(figures, tmp_path):
    (tmp_path / "README.md").write_text("text")
    with pytest.raises(LfmEdgeError, match="expected <!-- figures:start -->"):
        figures.replace_figures(tmp_path / "README.md", "figures")
    assert (tmp_path / "README.md").read_text() == "text"


def test_the_page_has_measured_figures(figures):
    page = (REPO / "docs/internals/measurements.md").read_text()
    block = re.search(f"{figures.START}(.*){figures.END}", page, flags=re.DOTALL)[1]
    assert "`make figures" in block and re.search(r"\d\d\d\d-\d\d-\d\d", block)
    assert block.count("✅ within") >= 4 and "FAILED" not in block
