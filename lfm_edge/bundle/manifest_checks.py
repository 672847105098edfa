"""Whether a manifest is one that an export writes: its values held against its own configuration and its target.

A manifest comes with the bundle and is not trusted. Whoever reads it allocates, indexes and prints by what it says.
"""

from __future__ import annotations

import math
import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from lfm_edge.calibration.gptq import WINDOWS_FILE
from lfm_edge.calibration.kv_scales import KV_SCALES_FILE
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.quantization.recipe import GPTQ
from lfm_edge.session.state import StateSpec
from lfm_edge.targets import Target

if TYPE_CHECKING:
    from lfm_edge.bundle.bundle import Manifest

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LARGEST_DIMENSION, _MOST_PARAMETERS = 1 << 24, 1 << 40


def check_manifest(manifest: Manifest, target: Target) -> None:
    """Raises ValueError, or LfmEdgeError, with one line about the first value that no export writes."""
    _check_config(manifest.config)
    _check_choices(manifest, target)
    _check_state(manifest, target)
    manifest.recipe.schemes(manifest.config.weights())
    for name, digest in (("source_sha256", manifest.source_sha256), ("weights_sha256", manifest.weights_sha256),
                         *((f"the sha256 of {name}", entry["sha256"]) for name, entry in manifest.files.items())):
        if not _SHA256.fullmatch(digest):
            raise ValueError(f"{name} is {digest!r}, no SHA-256")
    for name, (low, high) in manifest.activation_ranges.items():
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise ValueError(f"activation_ranges: {name} goes from {low} to {high}")
    if not all(isinstance(version, str) for version in manifest.versions.values()):
        raise ValueError("versions holds something else than text")
    if not all(_is_scalar(value) or (isinstance(value, dict) and all(map(_is_scalar, value.values())))
               for value in manifest.lowering.values()):
        raise ValueError("lowering holds something else than numbers, text, and those by name")
    _check_listed(manifest)


def _check_config(config: ModelConfig) -> None:
    sizes = {"vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "head_dim": config.head_dim,
             "intermediate_size": config.intermediate_size, "num_attention_heads": config.num_attention_heads,
             "num_key_value_heads": config.num_key_value_heads, "conv_L_cache": config.conv_taps,
             "max_position_embeddings": config.max_position_embeddings}
    for name, size in sizes.items():
        if size > _LARGEST_DIMENSION:
            raise ValueError(f"config: {name} is {size}; no model has more than {_LARGEST_DIMENSION}")
    if config.num_parameters > _MOST_PARAMETERS:
        raise ValueError(f"config: a model of {config.num_parameters:,} parameters")


def _check_choices(manifest: Manifest, target: Target) -> None:
    """What `export` lets a user choose, and what it chooses itself."""
    artifact = PurePosixPath(target.artifact).parts[0] if target.compiled else target.artifact
    for name, value, allowed in (("artifact", manifest.artifact, (artifact,)),
                                 ("compute_dtype", manifest.compute_dtype, target.compute_dtypes),
                                 ("state_mode", manifest.state_mode, target.state_modes)):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; {target.name} has {' or '.join(allowed)}")
    context, limit = manifest.state.context, manifest.config.max_position_embeddings
    if context > limit:
        raise ValueError(f"a context of {context}, and a model of {limit} positions")
    if not manifest.scored <= manifest.prefill_chunk <= context:
        raise ValueError(f"scored is {manifest.scored}, prefill_chunk {manifest.prefill_chunk}, the context {context}; "
                         "none may be more than the next")


def _check_state(manifest: Manifest, target: Target) -> None:
    """The state must be that of the configuration at its context, in the layout of its target."""
    conv_dtype = "float32" if manifest.compute_dtype == "int16" else manifest.compute_dtype
    context, found = manifest.state.context, {tensor.name: tensor for tensor in manifest.state.tensors}
    possible = [StateSpec.of(manifest.config, context, kv_dtype, target.state_layout, conv_dtype,
                             manifest.prefill_chunk) for kv_dtype in target.kv_dtypes]
    if manifest.state in possible:
        return
    nearest = max(possible, key=lambda spec: len(set(spec.tensors) & set(manifest.state.tensors)))
    for tensor in nearest.tensors:
        there = found.get(tensor.name)
        if there != tensor:
            raise ValueError(f"state: {tensor.name} is {there and _shown(there)}; by the configuration it is "
                             f"{_shown(tensor)}")
    raise ValueError("state: other tensors than the configuration has, or another order")


def _check_listed(manifest: Manifest) -> None:
    """What is read of a bundle must be among the files that it was sealed with."""
    if not any(name == manifest.artifact or name.startswith(f"{manifest.artifact}/") for name in manifest.files):
        raise ValueError(f"files does not list the artifact {manifest.artifact}")
    baked = manifest.baked_prompt
    needed = {"the scales of the KV cache": KV_SCALES_FILE if manifest.state.needs_kv_scales else None,
              "the text of the calibration": WINDOWS_FILE if manifest.recipe.rounding == GPTQ else None,
              "the baked prompt": baked and baked.file}
    for what, name in needed.items():
        if name is not None and name not in manifest.files:
            raise ValueError(f"files does not list {name}, {what}")
    if baked and (baked.tokens >= manifest.state.context or manifest.state_mode != "explicit"):
        raise ValueError(f"a baked prompt of {baked.tokens} tokens, a context of {manifest.state.context}, and the "
                         f"state is {manifest.state_mode}")


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float))


def _shown(tensor: Any) -> str:
    return f"{tensor.kind} {tensor.dtype} {list(tensor.shape)}"
