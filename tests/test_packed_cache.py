"""The cache: a damaged entry is noticed and made again, or not used; what is there can be seen and cleared."""

import json
import os
import shutil
import time

import numpy as np
import pytest

from lfm_edge import cached, export
from lfm_edge.bundle.bundle import Bundle
from lfm_edge.checkpoint import sources
from lfm_edge.errors import BundleError
from runtimes import onnxruntime as runtime
from tests.helpers import lfm_edge, save_checkpoint

TOKENS = [1, 30, 40, 41, 9]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    return export(save_checkpoint(folder / "model", layer_types=["conv", "full_attention"]), target="onnx-q4",
                  output=folder / "bundle", context=32, prefill_chunk=16)


@pytest.fixture(scope="module")
def packed(bundle, tmp_path_factory):
    """A cache with the packed graph in it, to copy."""
    folder = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        assert runtime.packed_graph(bundle) != bundle.artifact
    return folder


@pytest.fixture
def cache(packed, tmp_path, monkeypatch):
    """A cache that a session has used; the place of its entry."""
    shutil.copytree(packed, tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def place(bundle, cache):
    return runtime.packed_directory(bundle)


@pytest.fixture(scope="module")
def expected(bundle):
    own = runtime.OnnxSession(runtime.load(bundle.artifact), bundle.manifest.state,
                              bundle.manifest.config.vocab_size, 16)
    return own.prefill(TOKENS)


def zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


def zeroed_at_the_same_time(path):
    """As a restored backup or a copy tool may leave it: the time of writing says nothing."""
    times = path.stat()
    zeroed(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


DAMAGE = {
    "data gone": lambda place: (place / "model.onnx_data").unlink(),
    "data cut": lambda place: os.truncate(place / "model.onnx_data", 5000),
    "data zeroed": lambda place: zeroed(place / "model.onnx_data"),
    "data zeroed, its time kept": lambda place: zeroed_at_the_same_time(place / "model.onnx_data"),
    "graph gone": lambda place: (place / "model.onnx").unlink(),
    "graph empty": lambda place: (place / "model.onnx").write_bytes(b""),
    "graph garbage": lambda place: (place / "model.onnx").write_bytes(b"\xff" * 300),
    "graph a directory": lambda place: ((place / "model.onnx").unlink(), (place / "model.onnx").mkdir()),
    "seal gone": lambda place: (place / "seal.json").unlink(),
    "seal garbage": lambda place: (place / "seal.json").write_bytes(b"\xff{"),
    "seal of something else": lambda place: (place / "seal.json").write_text('{"files": {"model.onnx": 3}}'),
    "an empty place of an older version": lambda place: (shutil.rmtree(place), place.mkdir()),
    "a file in its place": lambda place: (shutil.rmtree(place), place.write_text("")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_made_again_and_no_answer_is_wrong(bundle, place, expected, damage):
    damage(place)
    assert np.array_equal(bundle.session().prefill(TOKENS), expected)
    assert cached.is_whole(place) and runtime.packed_graph(bundle) == place / "model.onnx"
    assert [path.name for path in place.parent.iterdir()] == [place.name]


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_that_cannot_be_made_again_is_not_used(bundle, place, expected, damage, monkeypatch):
    damage(place)

    def unwritable(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cached.tempfile, "mkdtemp", unwritable)
    assert runtime.packed_graph(bundle) == bundle.artifact
    assert np.array_equal(bundle.session().prefill(TOKENS), expected)


def test_a_file_that_was_only_touched_is_read_once_and_kept(bundle, place, monkeypatch):
    os.utime(place / "model.onnx_data")
    before = (place / "model.onnx_data").stat()
    assert runtime.packed_graph(bundle) == place / "model.onnx"
    assert (place / "model.onnx_data").stat().st_ino == before.st_ino
    monkeypatch.setattr(cached, "sha256", lambda path: pytest.fail("read again"))
    assert runtime.packed_graph(bundle) == place / "model.onnx"


def test_a_whole_entry_in_a_cache_that_cannot_be_written_is_used(bundle, place, monkeypatch):
    monkeypatch.setattr(cached.os, "utime", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert runtime.packed_graph(bundle) == place / "model.onnx"


def test_a_sealed_graph_that_does_not_load_is_packed_anew(bundle, place, expected):
    (place / "model.onnx").write_bytes(b"\xff" * 300)
    cached.seal(place)
    assert np.array_equal(bundle.session().prefill(TOKENS), expected)
    assert (place / "model.onnx").stat().st_size > 300


def test_where_no_packed_graph_loads_the_bundle_s_own_is_used(bundle, place, expected, monkeypatch):
    load = runtime.load

    def no_packed(path, *arguments, **options):
        if path == place / "model.onnx":
            raise BundleError("of another build")
        return load(path, *arguments, **options)

    monkeypatch.setattr(runtime, "load", no_packed)
    assert np.array_equal(bundle.session().prefill(TOKENS), expected)


def test_all_of_an_entry_is_on_the_disk_before_it_is_in_its_place(bundle, place, monkeypatch):
    """A crash after the rename may otherwise leave files of the right size, full of zeros."""
    shutil.rmtree(place)
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(cached.os, "fsync", lambda file: (flushed.append((os.fstat(file).st_ino, place.exists())),
                                                          fsync(file)))
    runtime.packed_graph(bundle)
    for name in ("model.onnx", "model.onnx_data", "seal.json", "."):
        assert ((place / name).stat().st_ino, False) in flushed, name
    assert (place.parent.stat().st_ino, True) in flushed


def test_external_data_under_another_name_has_a_place_of_its_own(bundle, tmp_path):
    """The same graph, whose data file is named otherwise and holds other weights."""
    copy = tmp_path / "copy"
    shutil.copytree(bundle.directory, copy)
    data = copy / "onnx" / "weights.bin"
    data.write_bytes(b"some weights")
    places = set()
    for content in (b"some weights", b"other weights"):
        data.write_bytes(content)
        Bundle.open(bundle.directory).manifest.write(copy)
        places.add(runtime.packed_directory(Bundle.open(copy)))
    assert len(places) == 2 and runtime.packed_directory(bundle) not in places


# --- what is there ------------------------------------------------------------------------------------------------


def test_the_first_load_of_a_command_says_what_it_keeps_and_the_second_nothing(bundle, tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path / "new")}
    first, second = (lfm_edge("generate", bundle.directory, "--prompt", "x", "--max-tokens", "1", env=environment)
                     for _ in range(2))
    assert first.returncode == second.returncode == 0
    line, = first.stderr.splitlines()
    assert str(tmp_path / "new" / "lfm-edge" / "onnxruntime") in line and " MB)" in line
    assert "lfm-edge cache" in line and second.stderr == "" and first.stdout == second.stdout


def test_a_library_s_user_is_told_nothing(bundle, place, capfd):
    shutil.rmtree(place)
    bundle.session()
    assert capfd.readouterr().err == ""


def listed(*options):
    run = lfm_edge("cache", *options, "--json", "-", env=dict(os.environ))
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout), run.stderr


def test_the_cache_is_shown_and_cleared(bundle, cache, place):
    left = place.parent / ".partial-killed"
    left.mkdir()
    (left / "half").write_bytes(b"x" * 1000)
    os.utime(left, (0, 0))
    shown, _ = listed()
    assert shown["directory"] == str(cache / "lfm-edge") and len(shown["entries"]) == 2
    partial, entry = shown["entries"]
    assert partial["state"] == "left by a process that ended" and partial["bytes"] == 1000
    assert entry["path"] == str(place) and entry["of"] == str(bundle.directory) and entry["state"] == "ready"
    assert entry["bytes"] == sum(path.stat().st_size for path in place.iterdir())
    assert shown["bytes"] == entry["bytes"] + 1000
    table = lfm_edge("cache", env=os.environ | {"COLUMNS": "300"})
    assert place.name in table.stdout and "in all: " in table.stdout

    removed, _ = listed("--clear", "--older-than", "30")
    assert [entry["path"] for entry in removed["entries"]] == [str(left)] and place.is_dir()
    removed, _ = listed("--clear")
    assert removed["removed"] and not place.exists()
    assert listed()[0]["entries"] == [] and listed("--clear")[0]["bytes"] == 0


def test_where_checkpoints_lie_is_neither_shown_nor_cleared(bundle, cache):
    source = bundle.manifest.source_sha256
    sources.remember(source, "somewhere")
    result = lfm_edge("cache", "--clear", env={"XDG_CACHE_HOME": str(cache)})
    assert result.returncode == 0 and source not in result.stdout
    assert sources.place_of(source) == "somewhere"


def test_what_another_process_is_making_stays(place):
    with cached.work_directory(place) as work:
        os.utime(work, (0, 0))
        shown, warning = listed("--clear")
        assert f"{work}: stays (being made)" in warning and work.is_dir()
        assert [entry["path"] for entry in shown["entries"]] == [str(place)]
        with cached.work_directory(place):
            assert work.is_dir()
    assert list(place.parent.iterdir()) == []


def test_what_is_not_used_for_long_goes_when_another_is_made(bundle, place):
    old, young = (place.with_name(name) for name in ("old", "young"))
    for other, days in ((old, cached.UNUSED_DAYS + 1), (young, cached.UNUSED_DAYS - 1)):
        other.mkdir()
        cached.seal(other)
        then = time.time() - days * 86_400
        os.utime(other / "seal.json", (then, then))
    runtime.packed_graph(bundle, anew=True)
    assert not old.exists() and young.exists() and place.exists()


def test_use_is_remembered(bundle, place):
    os.utime(place / "seal.json", (0, 0))
    assert cached.entries(unused_days=1)
    bundle.session()
    assert not cached.entries(unused_days=1)


def test_an_empty_or_missing_cache_is_no_error(tmp_path):
    run = lfm_edge("cache", "--clear", env={"XDG_CACHE_HOME": str(tmp_path / "nowhere")})
    assert run.returncode == 0 and "0.0 MB" in run.stdout
