"""What holds for the export to every target: any path, nothing open when it is sealed, few descriptors, a full disk."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lfm_edge import export, open_bundle
from lfm_edge.bundle.manifest import Manifest
from lfm_edge.errors import ExportError
from lfm_edge.targets import TARGETS
from tests.helpers import REPO, contents, save_checkpoint

ODD = "-a $HOME `b` 'c' \"d\" \\e\nf é雪 #%41?*[x]&;|"
EACH = ["android-q4", "onnx-q4", "gguf-q4", "mlx-q4", "coreml-q4", "npu-q4"]  # one of each exporter
RUN = {"context": 64, "prefill_chunk": 8}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The smallest checkpoint, at a path of characters that mean something somewhere."""
    directory = tmp_path_factory.mktemp("model") / ODD
    directory.mkdir()
    (directory / "system.txt").write_text("Answer briefly.")
    return save_checkpoint(directory / "model $X", layer_types=["conv", "full_attention"])


@pytest.fixture
def installed(request):
    """The target, where it is installed."""
    target = TARGETS[request.param]
    if target.to_install:
        pytest.skip(f"needs {target.to_install}")
    return target.name


def each(*names):
    return pytest.mark.parametrize("installed", names or EACH, indirect=True)


def opened_in(directory):
    """Files in a directory that this process has open or mapped, but for the lock."""
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]  # noqa: PTH208
    found = [os.readlink(link) for link in links if link.is_symlink()]  # noqa: PTH115
    mapped = [line.split(maxsplit=5)[5:] for line in Path("/proc/self/maps").read_text().splitlines()]
    found += [name[0].replace("\\012", "\n") for name in mapped if name]
    return [name for name in found if name.startswith(str(directory)) and not name.endswith("/lock")]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells on Linux only what is open")
@each()
def test_at_any_path_a_bundle_is_sealed_with_nothing_open_and_runs(model, installed, tmp_path, monkeypatch):
    """With a baked prompt, so that the bundle's own session was open before."""
    open_at_seal = []
    write = Manifest.write

    def watched(self, directory):
        open_at_seal.append(opened_in(directory))
        write(self, directory)

    monkeypatch.setattr(Manifest, "write", watched)
    output = tmp_path / ODD / "-o $(x)"

    bundle = export(model, target=installed, output=output, bake_prompt=model.parent / "system.txt", **RUN)

    assert open_at_seal == [[], []]
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    session = open_bundle(output).session()
    session.prefill(bundle.tokenizer().encode("hi"))
    session.save(output.parent / "saved $X")
    before = session.decode(3)
    session.load(output.parent / "saved $X")
    assert (session.decode(3) == before).all()


def mounted(arguments, point):
    """Mount a file system, or skip with the reason."""
    tried = subprocess.run([*map(str, arguments), point], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"{arguments[0]}: {(tried.stderr.strip().splitlines() or ['refused'])[-1]}")


@pytest.mark.skipif(not shutil.which("bindfs"), reason="needs bindfs")
@each("gguf-q4", "onnx-q4", "mlx-q4", "android-q4")
def test_on_a_fuse_file_system_a_bundle_opens_and_nothing_is_left_beside_it(model, installed, tmp_path):
    """Where an open file that is removed lives on under a name of the system's."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "point").mkdir()
    mounted(["bindfs", tmp_path / "disk"], tmp_path / "point")
    try:
        output = tmp_path / "point" / "out"
        for _ in range(2):
            bundle = export(model, target=installed, output=output, force=True, **RUN)
            assert not [name for name in bundle.manifest.files if ".fuse_hidden" in name]
            assert [path.name for path in output.parent.iterdir()] == ["out"]
        assert open_bundle(output)
    finally:
        subprocess.run(["umount", "-l", tmp_path / "point"], check=True)


@each()
def test_a_full_disk_is_one_line_and_leaves_nothing(model, installed, tmp_path):
    """At whatever point of the export the disk becomes full."""
    export(model, target=installed, output=tmp_path / "whole", **RUN)
    size = sum(len(content) for content in contents(tmp_path / "whole").values())
    point = tmp_path / "point"
    point.mkdir()
    for share in (0.3, 0.6, 0.9):
        mounted(["mount", "-t", "tmpfs", "-o", f"size={int(size * share / 4096) * 4096}", "tmpfs"], point)
        try:
            with pytest.raises(ExportError) as raised:
                export(model, target=installed, output=point / "out", **RUN)
            assert str(raised.value) == f"{point / 'out'}: no space left on the disk; nothing was written"
            assert [*point.iterdir()] == []
        finally:
            subprocess.run(["umount", point], check=True)


FEW_DESCRIPTORS = """
import json, resource, sys
from lfm_edge import export
from lfm_edge.harness.verify import verify
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))  # as macOS has it
model, target, output = sys.argv[1:]
bundle = export(model, target=target, output=output, context=64, prefill_chunk=8)
print(json.dumps(verify(bundle, tokens=8).weights.passed))
"""


@pytest.fixture(scope="session")
def deep(tmp_path_factory):
    """A checkpoint of 190 weights and as many shards."""
    return save_checkpoint(tmp_path_factory.mktemp("deep") / "model", layer_types=["conv", "full_attention"] * 10,
                           intermediate_size=32, max_shard_size=1)


@each("gguf-q4", "onnx-q4", "mlx-q4", "coreml-q4",
      pytest.param("android-q4", marks=pytest.mark.heavy), pytest.param("npu-q4", marks=pytest.mark.heavy))
def test_256_descriptors_are_enough_for_a_model_of_many_weights(deep, installed, tmp_path):
    assert len([*deep.glob("*.safetensors")]) > 128
    ended = subprocess.run([sys.executable, "-c", FEW_DESCRIPTORS, deep, installed, tmp_path / "out"],
                           capture_output=True, text=True, cwd=REPO, check=False)

    assert ended.returncode == 0, ended.stderr[-2000:]
    assert json.loads(ended.stdout.splitlines()[-1]) is True
