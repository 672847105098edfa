"""manifest.json: all that a runtime or an app needs to drive a bundle, and where it came from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lfm_edge.bundle.options import DEFAULT_GROUP_SIZE, ExportOptions
from lfm_edge.bundle.parts import DECODER, Part, files_of, plain_path
from lfm_edge.calibration.kv_scales import KV_SCALES_FILE
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.errors import BundleError, LfmEdgeError
from lfm_edge.files import one_of, sha256, text, whole_number
from lfm_edge.quantization.recipe import NEAREST, Recipe
from lfm_edge.session.layout import APPEND, RING, SHIFT, SLIDE, StateLayout
from lfm_edge.session.saved import Origin
from lfm_edge.session.state import StateSpec
from lfm_edge.targets import TARGETS

MANIFEST = "manifest.json"
SCHEMA_VERSION = 3


@dataclass(frozen=True)
class BakedPrompt:
    """A system prompt that was prefilled at export. file: the saved session; tokens: how many it has taken"""

    file: str
    tokens: int


@dataclass(frozen=True)
class Manifest:
    """What a bundle is.

    target: the row of the table that it was exported for; runtime: what runs it
    options: what was chosen; of files that were given the names alone
    parts: its programs; a text bundle has one, the decoder
    state_layout: how the target wanted the state to lie; state: so it does
    source: the checkpoint's name, which does not tell where it lies; source_sha256: its content
    weights_sha256: of the quantized integers and scales, the same for every target with this recipe
    files: size and SHA-256 of every other file, by its path inside the bundle
    baked_prompt: None where the bundle has none
    """

    target: str
    runtime: str
    options: ExportOptions
    parts: tuple[Part, ...]
    config: ModelConfig
    recipe: Recipe
    state: StateSpec
    state_layout: StateLayout
    source: str
    source_sha256: str
    licence: str
    weights_sha256: str
    versions: dict[str, str]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    baked_prompt: BakedPrompt | None = None

    @property
    def decoder(self) -> Part:
        """The part that takes tokens and gives logits."""
        return next(part for part in self.parts if part.kind == DECODER)

    @property
    def origin(self) -> Origin:
        """What the states of its sessions come from."""
        scales = self.files.get(KV_SCALES_FILE, {}) if self.state.needs_kv_scales else {}
        return Origin(self.weights_sha256, scales.get("sha256", ""))

    def write(self, directory: Path) -> None:
        """Seal `directory`: list every file in it with size and hash, and write manifest.json."""
        files = {path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
                 for path in sorted(directory.rglob("*")) if path.is_file() and path.name != MANIFEST}
        parts = [replace(part, files=tuple(dict.fromkeys((*files_of(part.artifact, files), *part.files))))
                 for part in self.parts]
        raw = {
            "schema_version": SCHEMA_VERSION, "target": self.target, "runtime": self.runtime,
            "options": self.options.to_dict(), "parts": [part.to_dict() for part in parts],
            "config": self.config.to_dict(), "recipe": self.recipe.to_dict(), "state": self.state.to_dict(),
            "state_layout": asdict(self.state_layout), "source": self.source, "source_sha256": self.source_sha256,
            "licence": self.licence, "weights_sha256": self.weights_sha256, "versions": self.versions, "files": files,
            **({"baked_prompt": asdict(self.baked_prompt)} if self.baked_prompt else {}),
        }
        (directory / MANIFEST).write_text(json.dumps(raw, indent=2) + "\n")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read manifest.json. Raises BundleError where it is missing, malformed, or of another version."""
        path = directory / MANIFEST
        if not path.is_file():
            raise BundleError(f"{directory}: not a bundle (no {MANIFEST})")
        try:
            raw = json.loads(path.read_bytes())
            version = raw["schema_version"]
            if version not in _READERS or type(version) is not int:
                raise BundleError(f"{path}: schema version {version}; this lfm-edge reads "
                                  f"{' and '.join(map(str, _READERS))}")
            target = text(raw["target"])
            if target not in TARGETS:
                raise BundleError(f"{path}: unknown target '{target}'; this lfm-edge knows {', '.join(TARGETS)}")
            return cls(
                target=target, config=ModelConfig.from_dict(raw["config"], f"{path}: config"),
                recipe=Recipe.from_dict(raw["recipe"]), state=StateSpec.from_dict(raw["state"]),
                source=text(raw["source"]), source_sha256=text(raw["source_sha256"]), licence=text(raw["licence"]),
                weights_sha256=text(raw["weights_sha256"]), versions=dict(raw["versions"].items()),
                files={plain_path(name): {"bytes": whole_number(entry["bytes"]), "sha256": text(entry["sha256"])}
                       for name, entry in raw["files"].items()},
                baked_prompt=_baked(raw["baked_prompt"]) if "baked_prompt" in raw else None, **_READERS[version](raw))
        except LfmEdgeError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise BundleError(f"{path}: malformed ({type(error).__name__}: {error})") from None


def _read_3(raw: dict[str, Any]) -> dict[str, Any]:
    """What schema 3 has in a form of its own."""
    return {"runtime": text(raw["runtime"]), "options": ExportOptions.from_dict(raw["options"]),
            "parts": tuple(Part.from_dict(part) for part in raw["parts"]), "state_layout": _layout(raw["state_layout"])}


def _read_2(raw: dict[str, Any]) -> dict[str, Any]:
    """The same of schema 2, in which a bundle was one program, and what ran it was in its target's row."""
    target = TARGETS[raw["target"]]
    kv_dtypes = [tensor["dtype"] for tensor in raw["state"]["tensors"] if tensor["kind"] == "key"]
    schemes = [raw["recipe"]["body"], raw["recipe"]["head"], *raw["recipe"].get("mixed", {}).values()]
    groups = [scheme["group_size"] for scheme in schemes if scheme["group_size"] != "channel"]
    options = {
        "context": raw["state"]["context"], "prefill_chunk": raw["prefill_chunk"],
        "group_size": groups[0] if groups else DEFAULT_GROUP_SIZE, "head_bits": raw["recipe"]["head"]["bits"],
        "compute_dtype": raw["compute_dtype"], "state": raw["state_mode"],
        "kv_dtype": kv_dtypes[0] if kv_dtypes else target.arithmetic.kv_choices(raw["compute_dtype"])[0],
        "rounding": raw["recipe"].get("rounding", NEAREST)}
    part = {
        "name": DECODER, "kind": DECODER, "artifact": raw["artifact"],
        "files": files_of(plain_path(raw["artifact"]), raw["files"]), "inputs": [], "outputs": [], "precision": {},
        "lowering": raw["lowering"], "activation_ranges": raw["activation_ranges"], "scored": raw.get("scored", 1)}
    return {"runtime": target.runtime.name, "options": ExportOptions.from_dict(options),
            "parts": (Part.from_dict(part),), "state_layout": target.state_layout}


_READERS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {2: _read_2, 3: _read_3}


def is_manifest_of_ours(raw: dict[str, Any]) -> bool:
    """Whether a manifest.json is of a bundle, of any version; other programs have files of that name too."""
    return {"schema_version", "target", "files"} <= raw.keys() and bool({"artifact", "parts"} & raw.keys())


def _layout(raw: dict[str, Any]) -> StateLayout:
    flags = {name: one_of((True, False), raw[name]) for name in ("kv_heads_first", "keys_transposed",
                                                                 "conv_channels_last")}
    return StateLayout(**flags, window=one_of((APPEND, RING, SLIDE, SHIFT), raw["window"]))


def _baked(raw: dict[str, Any]) -> BakedPrompt:
    return BakedPrompt(plain_path(raw["file"]), whole_number(raw["tokens"], at_least=1))
