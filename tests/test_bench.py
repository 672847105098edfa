"""What bench measures and refuses; never how fast anything is."""

import json
import os
import re
import sys
from dataclasses import replace

import pytest

from lfm_edge import cli
from lfm_edge.bundle.bundle import Bundle
from lfm_edge.errors import ContextFull, LfmEdgeError
from lfm_edge.harness import limit, memory
from lfm_edge.harness.bench import SCHEMA, Settings, Subject, bench
from lfm_edge.harness.bench_tables import bench_tables, budget_lines, leading_lines
from lfm_edge.harness.devices import DEVICES, project
from lfm_edge.harness.memory import Memory, parse_bytes, read_memory, reset_peak
from lfm_edge.harness.roofline import read_bandwidth
from lfm_edge.harness.round import FILL, PROMPT, Moment, OverTheLimit, Plan, Point, Round, run_round
from lfm_edge.harness.stats import Ratio, Spread
from lfm_edge.session.session import Session
from lfm_edge.session.state import StateSpec, StateTensor
from tests.helpers import fill_bundle, lfm_edge

MB = 10**6


@pytest.fixture(scope="module")
def result(tiny_bundle):
    """One run with all there is: two prompts, a fill, a limit that is far away, sustained decode."""
    return bench([tiny_bundle], Settings(
        prompt_tokens=(150, 40), generate_tokens=4, fills=(1024,), threads=(1,), repeat=1, sustained_s=0.1,
        memory_limit=10**9))


@pytest.fixture
def plan(tiny_bundle):
    return Plan(str(tiny_bundle.directory), 1, (8,), 2)


def test_every_figure_is_measured(result):
    first, = result.benchmarks
    for spread in (first.load_s, first.first_token_s, *(point.decode_tps for point in first.points)):
        assert 0 < spread.low <= spread.median <= spread.high
    assert [(point.kind, point.tokens) for point in first.points] == [(PROMPT, 150), (PROMPT, 40), (FILL, 1024)]
    assert first.baseline_bytes > 50e6  # torch and the runtime, which are not counted as ours
    assert first.threads == 1
    assert len(first.sustained_tps) == 1 and first.sustained_tps[0] > 0
    assert result.read_bandwidth[1].low > 1e8
    assert result.benchmarks[0].points[0].efficiency.median > 0


def test_memory_is_noted_at_every_moment(result):
    moments = result.benchmarks[0].moments
    assert [(moment.after, moment.tokens) for moment in moments] == [
        ("load", 0), ("first prefill", 150), ("prefill", 150), ("decode", 154), ("prefill", 40), ("decode", 44),
        ("prefill", 1020), ("decode", 1024)]
    grown = moments[-1].memory.anonymous - moments[3].memory.anonymous
    row = result.benchmarks[0].predicted.kv_cache / 1024
    assert grown > 0.9 * row * (1024 - 154)  # the pages of the cache that no token was computed for
    assert result.benchmarks[0].peak_bytes == max(moment.memory.peak for moment in moments)


def test_the_json_has_all_of_it(result):
    raw = json.loads(json.dumps(result.to_dict("lfm-edge bench one two")))
    assert raw["schema"] == SCHEMA and raw["passed"] is True and raw["command"] == "lfm-edge bench one two"
    assert raw["host"]["cores"] >= 1 and raw["versions"]["lfm-edge"]
    entry = raw["benchmarks"][0]
    assert entry["within_budget"] is True
    assert entry["predicted"]["total"] == sum(value for name, value in entry["predicted"].items()
                                              if name not in ("filled", "total"))
    assert len(entry["rounds"]) == 1 and len(entry["rounds"][0]["moments"]) == len(entry["moments"])
    assert {"prefill_tps", "decode_tps", "step_bytes", "limit_tps", "efficiency"} <= set(entry["points"][0])
    assert raw["memory_limit"]["bytes"] == 10**9 and raw["memory_limit"]["counts"]


@pytest.fixture
def made_up(monkeypatch):
    """Rounds of no process: 40 MB, a prefill of 50 tokens a second, and a decode that is faster from round to round."""
    calls = []

    def run_round(plan, limit_bytes=None):
        calls.append(plan)
        points = tuple(Point(PROMPT, length, length, length / 50, plan.generate, plan.generate / len(calls))
                       for length in plan.prompts)
        moment = Moment("decode", max(plan.prompts) + plan.generate, Memory(30 * MB, 10 * MB, 40 * MB))
        return Round(1.0, 2.0, points, (moment,), Memory(0, 0, 0))

    monkeypatch.setattr("lfm_edge.harness.bench.run_round", run_round)
    monkeypatch.setattr("lfm_edge.harness.bench.read_bandwidth", lambda threads, cache_bytes: 1e9 * threads)
    return calls


def test_rounds_of_bundles_and_threads_take_turns_and_are_compared_in_pairs(tiny_bundle, made_up):
    result = bench([tiny_bundle, tiny_bundle], Settings((8, 16), 4, threads=(1, 2), repeat=3))
    assert [plan.threads for plan in made_up] == [1] + 3 * [1, 1, 2, 2]  # once to warm up, then rounds
    assert [bench.threads for bench in result.benchmarks] == [1, 1, 2, 2]
    assert [(entry.threads, entry.what, entry.tokens) for entry in result.comparisons] == [
        (threads, what, tokens) for threads in (1, 2) for tokens in (8, 16) for what in ("prefill", "decode")]
    prefill, decode = result.comparisons[:2]
    assert (prefill.ratio.low, prefill.ratio.ratio, prefill.ratio.high) == (1.0, 1.0, 1.0)
    assert decode.ratio.ratio == 7 / 6 and decode.ratio.rounds == 3  # medians of 3, 7, 11 over those of 2, 6, 10
    point = result.benchmarks[0].points[0]
    assert point.limit_tps == 1e9 / point.step_bytes
    assert (point.efficiency.low, point.efficiency.median, point.efficiency.high) == pytest.approx(
        [tps / point.limit_tps for tps in (2, 6, 10)])


def test_decode_is_held_against_the_bandwidth_beside_its_round(tiny_bundle, made_up, monkeypatch):
    """Memory that slows down with the rounds: decode that slows down with it is as near the limit as before."""
    rates = iter([8e9, 4e9, 3e9, 1e9])  # before and after each of two rounds
    monkeypatch.setattr("lfm_edge.harness.bench.read_bandwidth", lambda threads, cache_bytes: next(rates))
    result = bench([tiny_bundle], Settings((8,), 4, threads=(1,), repeat=2))
    point, rate = result.benchmarks[0].points[0], result.read_bandwidth[1]
    assert (rate.low, rate.median, rate.high) == (1e9, 3.5e9, 8e9)
    assert point.limit_tps == 4e9 / point.step_bytes  # between 6e9 and 2e9
    assert (point.efficiency.low, point.efficiency.high) == pytest.approx(  # decode of 2 and 3 tokens a second
        [2 * point.step_bytes / 6e9, 3 * point.step_bytes / 2e9])


def test_over_the_budget_exits_with_1_and_advice(tiny_bundle, made_up, monkeypatch, capfd):
    """The cache is what can shrink enough, and what is said."""
    monkeypatch.setattr(sys, "argv", ["lfm-edge", "bench", str(tiny_bundle.directory), "--repeat", "1",
                                      "--prompt-tokens", "500", "--budget", "39.5MB", "--json", "-"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    output = capfd.readouterr()
    assert end.value.code == 1
    line = output.err.splitlines()[-1]
    assert "peak memory 40.0 MB is over the budget of 39.5 MB; most of it: the runtime's own" in line
    assert line.endswith("an export with --context 192 would bring it under")
    raw = json.loads(output.out)
    assert raw["benchmarks"][0]["within_budget"] is False and raw["passed"] is False
    assert raw["command"].startswith("lfm-edge bench ")


def test_a_budget_that_only_the_full_context_breaks_is_broken(tiny_bundle, made_up, monkeypatch, capfd):
    """40 MB were measured with 10 positions filled; the cache of the other 1,014 takes some more."""
    state = tiny_bundle.manifest.state
    rest = state.nbytes_of(conv=False) * (state.context - 10) // state.context
    result, = bench([tiny_bundle], Settings((8,), 2, budget=40 * MB + rest)).benchmarks
    assert result.full_context_bytes == 40 * MB + rest and result.within_budget

    monkeypatch.setattr(sys, "argv", ["lfm-edge", "bench", str(tiny_bundle.directory), "--prompt-tokens", "8",
                                      "--generate-tokens", "2", "--budget", str(40 * MB + rest - 1), "--json", "-"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    output = capfd.readouterr()
    assert end.value.code == 1
    line = output.err.splitlines()[-1]
    assert "peak memory 40.0 MB with 10 positions filled grows to" in line
    assert "at the full context of 1,024, over the budget" in line and "--context 960" in line
    entry, = json.loads(output.out)["benchmarks"]
    assert entry["within_budget"] is False and entry["full_context_bytes"] == 40 * MB + rest
    assert entry["peak_bytes"] < entry["budget_bytes"]


def test_a_cache_that_was_taken_at_once_is_not_counted_twice(tiny_bundle, made_up):
    result, = bench([tiny_bundle], Settings((8,), 2)).benchmarks
    whole = replace(result, predicted=result.at_full_context)
    assert whole.full_context_bytes == whole.peak_bytes == 40 * MB


def test_a_peak_at_load_hides_what_the_cache_takes_later(tiny_bundle, made_up):
    result, = bench([tiny_bundle], Settings((8,), 2)).benchmarks
    load = Moment("load", 0, Memory(0, 0, 90 * MB))
    assert replace(result, moments=(load, *result.moments), peak_bytes=90 * MB).full_context_bytes == 90 * MB


@pytest.mark.parametrize(("kind", "events", "text", "files"), [
    (limit.CGROUP2, "memory.events", "max 7\noom 1\noom_kill {}\n", {"memory.max": "900", "memory.swap.max": "0"}),
    (limit.CGROUP1, "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n",
     {"memory.limit_in_bytes": "900", "memory.memsw.limit_in_bytes": "900"})])
def test_a_control_group_is_given_the_limit_without_swap_and_tells_its_kills(tmp_path, kind, events, text, files):
    """By the kernel's cgroup-v2.rst and cgroup-v1/memory.rst; the real thing is used where this machine allows it."""
    assert limit._limited(tmp_path, kind, 900)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files
    entered = limit.MemoryLimit(900, kind, str(tmp_path))
    for kills, hit in ((0, False), (1, True)):
        (tmp_path / events).write_text(text.format(kills))
        assert entered.was_hit(returncode=-9) is hit
    assert not entered.was_hit(returncode=0)


def test_a_version_2_group_must_hand_on_its_memory_controller(tmp_path):
    control = tmp_path / "cgroup.subtree_control"
    assert not limit._can_hold(tmp_path, limit.CGROUP2)
    control.write_text("cpu pids\n")
    assert not limit._can_hold(tmp_path, limit.CGROUP2)
    control.write_text("cpu memory pids\n")
    assert limit._can_hold(tmp_path, limit.CGROUP2)


def test_where_nothing_would_help_the_line_says_so(tiny_bundle, made_up):
    line, = budget_lines(bench([tiny_bundle], Settings((8,), 2, budget=10 * MB)))
    assert line.endswith("no smaller context, int8 KV cache or 4-bit head would bring it under")


def test_tables_show_what_was_measured(result):
    speed, memory_table, projected = bench_tables(result, projections=True)
    assert "decode at 1,024 filled" in list(speed.columns[0].cells)
    assert "  predicted: KV cache" in list(memory_table.columns[0].cells)
    assert "PROJECTION, not measured" in projected.title


def test_verdict_speed_and_peak_lead(result):
    over = replace(result, benchmarks=tuple(replace(one, budget_bytes=10**6) for one in result.benchmarks))

    figures = r": prefill [\d,.]+ tok/s, decode [\d,.]+ tok/s, peak [\d.]+ MB \(budget [\d,.]+ MB\)"
    for verdict, found in (("PASSED", result), ("FAILED", over)):
        assert all(re.fullmatch(rf"{verdict}  .*{figures}", line) for line in leading_lines(found))
        assert len(leading_lines(found)) == len(found.benchmarks)


def test_over_the_memory_limit_exits_with_1(tiny_bundle):
    ended = lfm_edge("bench", tiny_bundle.directory, "--prompt-tokens", "8", "--generate-tokens", "2", "--repeat", "2",
                     "--threads", "1", "--memory-limit", "500kB")
    assert ended.returncode == 1
    assert "does not live within 0.5 MB: the system ended it by" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_without_control_groups_the_limit_is_rlimit_data(plan, monkeypatch):
    monkeypatch.setattr(limit, "_parents", lambda: iter(()))
    with limit.memory_limit(10**6) as chosen:
        assert chosen.kind == limit.RLIMIT
    with pytest.raises(OverTheLimit, match="by RLIMIT_DATA at: load"):
        run_round(plan, 10**6)


def test_a_bundle_for_another_machine_is_not_measured(tmp_path, made_up, monkeypatch):
    monkeypatch.setattr("lfm_edge.targets.sys.platform", "linux")
    fill_bundle(tmp_path, target="mlx-q4", name="model.safetensors")
    result = bench([Bundle.open(tmp_path)])
    assert made_up == [] and result.benchmarks == () and result.passed
    assert result.not_measured[0].reason.endswith("Run this command there")
    table, = bench_tables(result)
    assert table.title == "not measured"


@pytest.mark.parametrize(("options", "asked"), [
    (("--budget", "1GB"), "the budget of 1,000.0 MB was not checked"),
    (("--memory-limit", "900MB"), "the memory limit of 900.0 MB was not checked"),
    (("--budget", "1GB", "--memory-limit", "900MB"), "the memory limit of 900.0 MB were not checked")], ids=str)
def test_a_budget_that_nobody_has_checked_is_not_met(tmp_path, made_up, monkeypatch, capfd, options, asked):
    monkeypatch.setattr("lfm_edge.targets.sys.platform", "linux")
    monkeypatch.setattr("lfm_edge.harness.bench._Run.warm_up", lambda run: None)
    fill_bundle(tmp_path, target="mlx-q4", name="model.safetensors")
    monkeypatch.setattr(sys, "argv", ["lfm-edge", "bench", str(tmp_path), *options, "--json", "-"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    output = capfd.readouterr()
    line, = output.err.splitlines()[-1:]
    assert end.value.code == 1
    assert line.startswith(f"{tmp_path}: not measured, so the ") and asked in line
    assert json.loads(output.out)["passed"] is False


@pytest.mark.parametrize(("options", "message"), [
    ({"prompt_tokens": (1024,)}, "do not fit its context of 1024"),
    ({"prompt_tokens": (8,), "fills": (2048,)}, "--fill 2048 is more than its context of 1024"),
    ({"prompt_tokens": (8,), "fills": (64,)}, "--fill 64: decoding 64 tokens ends there"),
])
def test_what_does_not_fit_the_context_is_refused(tiny_bundle, options, message):
    with pytest.raises(LfmEdgeError, match=message):
        bench([tiny_bundle], Settings(**options))


def test_all_fills_are_those_that_the_context_has(tiny_bundle):
    assert Settings((8,), 2, fills=None).plan(Subject.of_bundle(tiny_bundle), 1).fills == (1024,)


@pytest.mark.parametrize("options", [("--fill", "many"), ("--fill", "0"), ("--prompt-tokens", "8,,9"),
                                     ("--threads", "1,0"), ("--sustained", "-1")], ids=" ".join)
def test_bad_lists_are_usage_errors(options):
    ended = lfm_edge("bench", "somewhere", *options)
    assert ended.returncode == 2 and "Error" in ended.stderr and "Traceback" not in ended.stderr


def test_standing_at_a_position_repeats_the_rows_before():
    class Holder(Session):
        def _step(self, tokens):
            raise NotImplementedError

    cache = StateTensor("key", 0, "key", (1, 10, 1, 2), "float32", "append")
    conv = StateTensor("conv", 1, "conv", (1, 2, 2), "float32", "replace")
    session = Holder(StateSpec((cache, conv), 10), 4, 4)
    session.state[0][0, :3, 0, 0] = session.state[0].new_tensor([1, 2, 3])
    session.position = 3
    session.stand_at(8)
    assert session.position == 8
    assert session.state[0][0, :, 0, 0].tolist() == [1, 2, 3, 1, 2, 3, 1, 2, 0, 0]
    with pytest.raises(ContextFull):
        session.stand_at(11)


def test_a_spread_is_median_and_range():
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)


def test_a_ratio_is_sure_of_what_all_pairs_say():
    first = [10.0, 20.0, 12.0, 30.0, 11.0]  # a machine that drifts, and halves of pairs that drift alike
    ratio = Ratio.of(first, [2 * value for value in first])
    assert ratio == Ratio(2.0, 2.0, 2.0, 5)
    first, second = [10.0, 11.0, 12.0, 13.0, 14.0], [9.0, 12.0, 13.0, 16.0, 13.0]
    unsure = Ratio.of(first, second)
    assert unsure.low < unsure.ratio < unsure.high
    assert Ratio.of(first, second) == unsure  # seeded
    assert Ratio.of([10.0], [5.0]) == Ratio(0.5, None, None, 1)


def test_a_point_knows_its_mean_fill_and_speeds():
    assert Point(PROMPT, 100, 100, 2.0, 10, 5.0).mean_fill == 105
    point = Point(FILL, 100, 32, 2.0, 10, 5.0)
    assert (point.mean_fill, point.prefill_tps, point.decode_tps) == (95, 16.0, 2.0)


def test_projections_scale_with_bandwidth_and_name_their_source():
    projected = project(step_bytes=10**9, efficiency=0.5)
    assert [entry.decode_tps for entry in projected] == pytest.approx([d.bandwidth * 0.5e-9 for d in DEVICES])
    assert all(entry.source and 50e9 < entry.bandwidth < 100e9 for entry in projected)


def test_bandwidth_leaves_the_number_of_threads_alone():
    import torch

    before = torch.get_num_threads()
    assert read_bandwidth(1) > 0
    assert torch.get_num_threads() == before


def test_memory_counts_what_is_touched():
    before = read_memory()
    block = bytearray(b"x" * 50_000_000)
    during = read_memory()
    assert during.above(before).anonymous > 45_000_000
    del block
    reset_peak()
    assert read_memory().peak < during.peak


@pytest.mark.parametrize(("text", "value"), [("1GB", 10**9), ("800 MB", 8 * 10**8), ("512MiB", 2**29), ("1.5g", 1.5e9),
                                             ("2000000", 2_000_000), ("2kib", 2048)])
def test_sizes_are_read_as_written(text, value):
    assert parse_bytes(text) == value


def test_a_few_bytes_are_a_unit_that_was_forgotten():
    with pytest.raises(LfmEdgeError, match="'1' is 1 bytes; write the unit as well"):
        parse_bytes("1")


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "1 TB", "one GB", "1GB!", "nan"])
def test_other_sizes_are_refused(text):
    with pytest.raises(LfmEdgeError, match="is no size"):
        parse_bytes(text)


def test_on_a_mac_the_footprint_counts(monkeypatch):
    """By the layout of rusage_info_v4 in Apple's sys/resource.h: a UUID, then 64-bit fields."""
    class System:
        def proc_pid_rusage(self, process, version, fields):
            assert (process, version) == (os.getpid(), 4)
            fields[2 + 6], fields[2 + 7], fields[2 + 28] = 900, 600, 700  # resident, footprint, its largest so far
            return 0

    monkeypatch.setattr(memory.sys, "platform", "darwin")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: System())
    assert read_memory() == memory.Memory(anonymous=600, file_backed=300, peak=700)
