"""What bench measures and refuses; never how fast anything is."""

import json
import os

import pytest

from lfm_edge.errors import LfmEdgeError
from lfm_edge.harness import memory
from lfm_edge.harness.memory import parse_bytes, read_memory, reset_peak
from lfm_edge.harness.speed import bench
from tests.helpers import lfm_edge


@pytest.fixture(scope="module")
def result(tiny_bundle):
    return bench([tiny_bundle], prompt_tokens=150, generate_tokens=4, threads=1, repeat=2)[0]


def test_every_figure_is_measured(result):
    for spread in (result.load_s, result.first_token_s, result.prefill_tps, result.decode_tps):
        assert 0 < spread.low <= spread.median <= spread.high
    assert result.baseline_bytes > 50e6  # torch and the runtime, which are not counted as ours
    assert result.peak_bytes > 0
    assert result.threads == 1 and result.prompt_tokens == 150


def test_the_budget_decides_the_exit_code(tiny_bundle):
    options = ("--prompt-tokens", 8, "--generate-tokens", 2, "--repeat", 1)
    within = lfm_edge("bench", tiny_bundle.directory, *map(str, options), "--json", "-")
    assert within.returncode == 0, within.stderr
    assert json.loads(within.stdout)["benchmarks"][0]["within_budget"] is True
    over = lfm_edge("bench", tiny_bundle.directory, *map(str, options), "--budget", "1kB")
    assert over.returncode == 1
    assert "is over the budget of 1.0 kB" in over.stderr


def test_a_prompt_that_does_not_fit_the_context_is_refused(tiny_bundle):
    with pytest.raises(LfmEdgeError, match="do not fit its context of 1024"):
        bench([tiny_bundle], prompt_tokens=1024, generate_tokens=1)


def test_memory_counts_what_is_touched():
    before = read_memory()
    block = bytearray(b"x" * 50_000_000)
    during = read_memory()
    assert during.above(before).anonymous > 45_000_000
    del block
    reset_peak()
    assert read_memory().peak < during.peak


@pytest.mark.parametrize(("text", "value"), [("1GB", 10**9), ("800 MB", 8 * 10**8), ("512MiB", 2**29), ("1.5g", 1.5e9),
                                             ("1000", 1000), ("2kib", 2048)])
def test_sizes_are_read_as_written(text, value):
    assert parse_bytes(text) == value


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
