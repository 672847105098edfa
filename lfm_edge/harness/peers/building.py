"""Artifacts of peers: built once, in a process of its own, and kept in the user's cache.

What a builder is given is not the user's checkpoint but one that lfm-edge has read and written again: the config in a
spelling that all of them read, one safetensors file, the tokenizer. So shards and older spellings are no hurdle to
any, and no code that a checkpoint may bring is where a builder would find it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file

from lfm_edge import cached
from lfm_edge.bundle.bundle import Bundle, new_bundle
from lfm_edge.checkpoint.checkpoint import Checkpoint
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.errors import LfmEdgeError
from lfm_edge.files import cache_directory
from lfm_edge.harness.memory import read_memory
from lfm_edge.harness.peers.peer import Arguments, Built, Peer
from lfm_edge.quantization.recipe import EMBEDDING

_FORMAT = 1  # of a directory in the cache; another one is made where this has changed
_PEAK = "peak.json"


def prepare(peer: Peer, bundle: Bundle, model: str | None, progress: Callable[[str], None]) -> Built:
    """The peer's artifact that comes nearest to a bundle, of the same checkpoint; from the cache where it is there.

    model: where the checkpoint is, if not where this machine exported it from; not needed where nothing is to be built
    Raises LfmEdgeError where the checkpoint is gone or another one, or the builder fails.
    """
    manifest = bundle.manifest
    arguments = peer.asked(manifest)
    place = cache_directory() / "peers" / f"{peer.name}-{_digest(peer, arguments, manifest.source_sha256)}"
    if cached.is_whole(place):
        progress(f"{peer.name}: built before, {place}")
        return Built.read(place)
    checkpoint = bundle.source(model)
    if place.is_dir():
        progress(f"{peer.name}: what was built before is damaged, {place}")
        shutil.rmtree(place)
    config = replace(checkpoint.config, max_position_embeddings=manifest.state.context)
    with new_bundle(place, force=False) as directory:
        scratch = directory / "scratch"
        progress(f"{peer.name}: write the checkpoint for its builder")
        _write_checkpoint(checkpoint, config, scratch / "checkpoint")
        progress(f"{peer.name}: its own builder")
        seconds, peak = _run_builder(peer, scratch, directory / "artifact", arguments, place)
        shutil.rmtree(scratch)
        (directory / "tokenizer").mkdir()
        checkpoint.copy_text_files(directory / "tokenizer")
        size = sum(path.stat().st_size for path in (directory / "artifact").rglob("*") if path.is_file())
        Built(directory, peer.name, arguments, peer.versions, manifest.source_sha256, config, seconds, peak,
              size).write()
        cached.seal(directory, of=str(bundle.directory.resolve()))
    progress(f"{peer.name}: built in {seconds:.0f} s, with at most {peak / 1e6:,.0f} MB of memory; kept in {place}")
    return Built.read(place)


def _digest(peer: Peer, arguments: Arguments, source_sha256: str) -> str:
    """What tells one artifact from another."""
    parts = [_FORMAT, peer.name, peer.versions, arguments, source_sha256]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _write_checkpoint(checkpoint: Checkpoint, config: ModelConfig, directory: Path) -> None:
    directory.mkdir(parents=True)
    checkpoint.copy_text_files(directory)
    tensors = {name: checkpoint.tensor(name).contiguous() for name in checkpoint.names}
    dtype = str(tensors[EMBEDDING].dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps({**config.to_dict(), "dtype": dtype}, indent=2) + "\n")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _run_builder(peer: Peer, scratch: Path, artifact: Path, arguments: Arguments, place: Path) -> tuple[float, int]:
    """Seconds and peak bytes of the process. Its output goes to a log, which is kept where it fails."""
    task = json.dumps({"peer": peer.name, "scratch": str(scratch), "artifact": str(artifact), "arguments": arguments})
    # Builders quantize, as `export` does: see lfm_edge/cli.py for why their threads sleep while they wait.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ, "HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"}
    log = scratch / "build.log"
    start = time.perf_counter()
    with log.open("wb") as output:
        finished = subprocess.run([sys.executable, "-m", "lfm_edge.harness.peers.building", task], env=environment,
                                  stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, check=False)
    seconds = time.perf_counter() - start
    if finished.returncode != 0 or not (scratch / _PEAK).is_file():
        kept = place.with_name(f"{place.name}.log")
        shutil.copyfile(log, kept)
        last = ([line for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["no output"])[-1]
        raise LfmEdgeError(f"--against {peer.name}: its builder failed ({last.strip()}); all it said is in {kept}")
    return seconds, json.loads((scratch / _PEAK).read_text())["bytes"]


def _main() -> None:
    from lfm_edge.harness.peers import PEERS

    task = json.loads(sys.argv[1])
    scratch = Path(task["scratch"])
    os.chdir(scratch)  # for what builders leave where they run
    PEERS[task["peer"]].build(scratch / "checkpoint", Path(task["artifact"]), task["arguments"])
    (scratch / _PEAK).write_text(json.dumps({"bytes": read_memory().peak}))


if __name__ == "__main__":
    _main()
