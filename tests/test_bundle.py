"""Bundles: written whole or not at all, and opened only when nothing about them has changed."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lfm_edge.bundle.bundle import Bundle, new_bundle, open_bundle
from lfm_edge.bundle.manifest import Manifest
from lfm_edge.errors import BundleError, ConfigError, ExportError
from tests.helpers import contents, fill_bundle


@pytest.fixture
def output(tmp_path):
    """Where a bundle is to be written; everything beside it counts as left behind."""
    return tmp_path / "exports" / "out"


@pytest.fixture
def bundle(output):
    """A bundle that is there already."""
    write(output)
    return output


def write(output, artifact=b"old program", force=False):
    with new_bundle(output, force) as directory:
        fill_bundle(directory, artifact)


def beside(output):
    """What is in the directory that holds the bundle."""
    return sorted(path.name for path in output.parent.iterdir()) if output.parent.exists() else []


def edit_manifest(bundle, change):
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def refusal(bundle, error=BundleError):
    """The one line with which opening is refused."""
    with pytest.raises(error) as raised:
        open_bundle(bundle)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# --- writing ------------------------------------------------------------------------------------------------------


def test_a_new_bundle_appears_whole_under_its_name(output):
    with new_bundle(output, force=False) as directory:
        fill_bundle(directory)
        assert not output.exists()
        assert directory.parent.parent == output.parent

    assert beside(output) == ["out"]
    assert open_bundle(output).manifest.source == "made by a test"


def test_missing_parent_directories_are_made(tmp_path):
    write(tmp_path / "a" / "b" / "c")

    assert open_bundle(tmp_path / "a/b/c")


def test_a_relative_output_is_found_after_a_change_of_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with new_bundle(Path("out"), force=False) as directory:
        fill_bundle(directory)
        monkeypatch.chdir("/")

    assert open_bundle(tmp_path / "out")


def test_an_existing_output_is_refused_without_force(bundle):
    before = contents(bundle)

    with pytest.raises(ExportError, match="exists already; give --force to replace it"):
        write(bundle, b"new program")

    assert contents(bundle) == before
    assert beside(bundle) == ["out"]


def test_force_replaces_a_bundle(bundle):
    (bundle / "stale-file").write_text("of the old bundle")

    write(bundle, b"new program", force=True)

    assert open_bundle(bundle).artifact.read_bytes() == b"new program"
    assert not (bundle / "stale-file").exists()
    assert beside(bundle) == ["out"]


def test_until_the_new_bundle_is_whole_the_old_one_stays(bundle):
    before = contents(bundle)

    with new_bundle(bundle, force=True) as directory:
        fill_bundle(directory, b"new program")
        assert contents(bundle) == before


def test_force_writes_where_nothing_or_an_empty_directory_is(output):
    write(output, force=True)
    shutil.rmtree(output)
    output.mkdir()
    write(output, force=True)

    assert open_bundle(output)


@pytest.mark.parametrize("make", [
    lambda path: (path.mkdir(), (path / "thesis.tex").write_text("years of work")),
    lambda path: path.write_text("a file"),
], ids=["a directory of something else", "a file"])
def test_force_replaces_bundles_only(output, make):
    output.parent.mkdir()
    make(output)
    before = contents(output.parent)

    with pytest.raises(ExportError, match="is not a bundle; --force replaces bundles only"):
        write(output, force=True)

    assert contents(output.parent) == before


def test_behind_a_link_the_bundle_is_replaced_and_the_link_stays(bundle, tmp_path):
    link = tmp_path / "latest"
    link.symlink_to(bundle)

    write(link, b"new program", force=True)

    assert link.is_symlink()
    assert open_bundle(bundle).artifact.read_bytes() == open_bundle(link).artifact.read_bytes() == b"new program"
    assert beside(bundle) == ["out"]


class Killed(BaseException):
    pass


FAILURES = [RuntimeError("the backend failed"), ExportError("refused"), KeyboardInterrupt(), SystemExit(143), Killed()]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_a_failure_leaves_nothing(output, failure):
    with pytest.raises(type(failure)) as raised, new_bundle(output, force=False) as directory:
        fill_bundle(directory)
        raise failure

    assert raised.value is failure
    assert beside(output) == []


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_a_failure_leaves_an_existing_bundle_as_it_was(bundle, failure):
    before = contents(bundle)

    with pytest.raises(type(failure)), new_bundle(bundle, force=True) as directory:
        fill_bundle(directory, b"new program")
        raise failure

    assert contents(bundle) == before
    assert beside(bundle) == ["out"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_leaves_nothing(output, code):
    with pytest.raises(ExportError) as raised, new_bundle(output, force=False) as directory:
        (directory / "model.pte").write_bytes(b"half")
        raise OSError(code, os.strerror(code), str(directory / "model.pte"))

    assert str(raised.value) == f"{output}: no space left on the disk; nothing was written"
    assert beside(output) == []


def test_a_really_full_disk_is_one_line(output):
    with pytest.raises(ExportError, match="no space left on the disk"), new_bundle(output, force=False), \
            Path("/dev/full").open("wb", buffering=0) as file:
        file.write(b"x")

    assert beside(output) == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EIO])
def test_an_unwritable_place_is_one_line_that_names_it(output, monkeypatch, code):
    def refuse(self, *_, **__):
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)

    with pytest.raises(ExportError, match=rf"{output.parent}: cannot be written \({os.strerror(code)}\)"):
        write(output)


def test_a_file_in_the_way_is_one_line_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(ExportError, match=r"file: cannot be written|file/deeper: cannot be written"):
        write(tmp_path / "file" / "deeper" / "out")


def test_a_name_too_long_is_one_line(tmp_path):
    with pytest.raises(ExportError, match="cannot be written"):
        write(tmp_path / ("x" * 300))


def test_when_the_swap_fails_the_old_bundle_comes_back(bundle, monkeypatch):
    before = contents(bundle)
    rename = Path.rename

    def rename_but_the_new_one(self, target):
        if self.name == "new" and not target.exists():
            raise PermissionError(errno.EACCES, "no", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_but_the_new_one)
    with pytest.raises(ExportError, match="cannot be written"):
        write(bundle, b"new program", force=True)
    monkeypatch.undo()

    assert contents(bundle) == before
    assert beside(bundle) == ["out"]


# --- opening ------------------------------------------------------------------------------------------------------


def test_what_is_written_reads_back_the_same(bundle):
    manifest = Manifest.read(bundle)

    assert set(manifest.files) == set(contents(bundle)) - {"manifest.json"}
    assert manifest.files["model.pte"]["bytes"] == len(b"old program")
    manifest_again = replace(manifest, files={})
    manifest_again.write(bundle)
    assert Manifest.read(bundle) == manifest


def test_a_bundle_can_be_moved(bundle, tmp_path):
    opened = open_bundle(shutil.move(bundle, tmp_path / "elsewhere"))

    assert opened.artifact == tmp_path / "elsewhere" / "model.pte"
    assert opened.target.name == "android-q4"
    assert opened.tokenizer().decode([7], skip_special=False) == "<|im_end|>"


@pytest.mark.parametrize("name", ["model.pte", "tokenizer.json", "chat_template.jinja"])
def test_a_single_changed_byte_is_found(bundle, name):
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)

    assert refusal(bundle) == f"{bundle / name}: changed since the export (SHA-256 differs from the manifest's)"


@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content + b"x", lambda _: b""])
def test_another_size_is_found(bundle, change):
    path = bundle / "model.pte"
    path.write_bytes(change(path.read_bytes()))

    assert f"{path}: {path.stat().st_size} bytes, the manifest says 11" in refusal(bundle)


@pytest.mark.parametrize("name", ["model.pte", "tokenizer.json"])
def test_a_missing_file_is_named(bundle, name):
    (bundle / name).unlink()

    assert refusal(bundle) == f"{bundle / name}: missing from the bundle"


def test_a_directory_in_a_file_s_place_is_refused(bundle):
    (bundle / "model.pte").unlink()
    (bundle / "model.pte").mkdir()

    assert "missing from the bundle" in refusal(bundle)


OUTSIDE = ["../../etc/passwd", "../out/model.pte", "/etc/passwd", "..\\..\\windows", "sub/../../x", "..", "", None, 3]


@pytest.mark.parametrize("path", OUTSIDE)
def test_an_artifact_outside_the_bundle_is_refused(bundle, path):
    edit_manifest(bundle, lambda manifest: manifest["parts"][0].update(artifact=path))

    assert "leads out of the bundle" in refusal(bundle)


@pytest.mark.parametrize("path", [path for path in OUTSIDE if isinstance(path, str)])
def test_a_listed_file_outside_the_bundle_is_refused(bundle, path):
    entry = {"bytes": Path("/etc/passwd").stat().st_size, "sha256": "0" * 64}
    edit_manifest(bundle, lambda manifest: manifest["files"].update({path: entry}))

    assert "leads out of the bundle" in refusal(bundle)


@pytest.mark.parametrize("content, opens", [(b"old program", True), (b"0ld program", False)])
def test_a_link_leads_to_what_was_exported_or_the_bundle_does_not_open(bundle, tmp_path, content, opens):
    (tmp_path / "elsewhere").write_bytes(content)
    (bundle / "model.pte").unlink()
    (bundle / "model.pte").symlink_to(tmp_path / "elsewhere")

    if opens:
        assert open_bundle(bundle).artifact.read_bytes() == content
    else:
        assert "changed since the export" in refusal(bundle)


def test_an_artifact_that_is_not_listed_is_refused(bundle):
    edit_manifest(bundle, lambda manifest: manifest["files"].pop("model.pte"))

    assert "files does not list the artifact model.pte" in refusal(bundle)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b'"text"', b"{}", b"\xff\xfe\x00",
                                     b"[" * 100_000, b'{"schema_version": 2}'])
def test_a_manifest_that_is_none_is_refused(bundle, content):
    (bundle / "manifest.json").write_bytes(content)

    assert "manifest.json: malformed" in refusal(bundle)


def test_every_entry_of_the_manifest_is_needed(bundle):
    whole = (bundle / "manifest.json").read_text()

    for entry in json.loads(whole):
        edit_manifest(bundle, lambda manifest, entry=entry: manifest.pop(entry))
        assert entry in refusal(bundle)
        (bundle / "manifest.json").write_text(whole)


@pytest.mark.parametrize("entry, value", [
    ("files", []), ("files", {"model.pte": 3}), ("files", {"model.pte": {}}), ("options", []), ("options", {}),
    ("target", ["android-q4"]), ("runtime", None), ("source", 3), ("licence", {}), ("parts", []), ("parts", [{}]),
    ("parts", 3), ("state_layout", {}), ("state_layout", {"window": "append"}),
    ("files", {"model.pte": {"bytes": float("inf"), "sha256": ""}}),
    ("state", {}), ("state", []), ("recipe", {}), ("recipe", {"body": 3, "head": 3, "activations": ""}),
    ("state", {"context": 64, "tensors": [{"name": "x"}]}), ("state", {"context": "x", "tensors": []}),
])
def test_an_entry_of_another_kind_is_refused(bundle, entry, value):
    edit_manifest(bundle, lambda manifest: manifest.update({entry: value}))

    assert "manifest.json" in refusal(bundle)


def test_a_manifest_with_an_impossible_config_is_refused(bundle):
    edit_manifest(bundle, lambda manifest: manifest["config"].update(num_key_value_heads=3))

    assert "num_key_value_heads" in refusal(bundle, ConfigError)


@pytest.mark.parametrize("version", [0, 1, 4, "2", True, 3.0, None])
def test_another_schema_version_is_refused(bundle, version):
    edit_manifest(bundle, lambda manifest: manifest.update(schema_version=version))

    assert f"schema version {version}; this lfm-edge reads 2 and 3" in refusal(bundle)


def test_an_unknown_target_is_refused_with_the_known_ones(bundle):
    edit_manifest(bundle, lambda manifest: manifest.update(target="toaster-q1"))

    assert "unknown target 'toaster-q1'; this lfm-edge knows android-q4" in refusal(bundle)


def test_what_is_no_bundle_is_refused(tmp_path):
    assert "no such bundle directory" in refusal(tmp_path / "missing")
    assert "not a bundle (no manifest.json)" in refusal(tmp_path)
    (tmp_path / "file").write_text("")
    assert "no such bundle directory" in refusal(tmp_path / "file")


def test_without_the_check_a_changed_file_goes_unnoticed_but_paths_do_not(bundle):
    (bundle / "model.pte").write_bytes(b"changed")
    assert Bundle.open(bundle, check=False)

    edit_manifest(bundle, lambda manifest: manifest["parts"][0].update(artifact="../model.pte"))
    with pytest.raises(BundleError, match="leads out of the bundle"):
        Bundle.open(bundle, check=False)


def test_an_exported_bundle_holds_what_the_clients_look_for(tiny_bundle):
    names = set(contents(tiny_bundle.directory))

    assert names >= {"manifest.json", "model.pte", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                     "generation_config.json"}
    assert set(tiny_bundle.manifest.files) == names - {"manifest.json"}
    assert tiny_bundle.manifest.source == "checkpoint"
    assert tiny_bundle.manifest.state.context == 1024
    assert beside(tiny_bundle.directory) == [tiny_bundle.directory.name]
