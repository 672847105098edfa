"""Whether a manifest is one that an export writes: its values held against its own configuration and its target.

A manifest comes with the bundle and is not trusted. Whoever reads it allocates, indexes and prints by what it says.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from lfm_edge.calibration.gptq import WINDOWS_FILE
from lfm_edge.calibration.kv_scales import KV_SCALES_FILE
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.quantization.recipe import GPTQ
from lfm_edge.session.layout import EXPLICIT
from lfm_edge.targets import RUNTIMES

if TYPE_CHECKING:
    from lfm_edge.bundle.manifest import Manifest
    from lfm_edge.bundle.parts import Part

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LARGEST_DIMENSION, _MOST_PARAMETERS = 1 << 24, 1 << 40


def check_manifest(manifest: Manifest) -> None:
    """Raises ValueError, or LfmEdgeError, with one line about the first value that no export writes.

    It is held against itself, not against what today's targets would make of the same model.
    """
    _check_config(manifest.config)
    _check_options(manifest)
    _check_state(manifest)
    manifest.recipe.schemes(manifest.config.weights())
    for name, digest in (("source_sha256", manifest.source_sha256), ("weights_sha256", manifest.weights_sha256),
                         *((f"the sha256 of {name}", entry["sha256"]) for name, entry in manifest.files.items())):
        if not _SHA256.fullmatch(digest):
            raise ValueError(f"{name} is {digest!r}, no SHA-256")
    if not all(isinstance(version, str) for version in manifest.versions.values()):
        raise ValueError("versions holds something else than text")
    if len(manifest.parts) != 1:
        raise ValueError(f"{len(manifest.parts)} parts; a text bundle has one, its decoder")
    for part in manifest.parts:
        _check_part(manifest, part)
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


def _check_options(manifest: Manifest) -> None:
    """What was chosen must fit the model, and itself."""
    options, limit = manifest.options, manifest.config.max_position_embeddings
    if options.context != manifest.state.context:
        raise ValueError(f"options have a context of {options.context}, the state one of {manifest.state.context}")
    if options.context > limit:
        raise ValueError(f"a context of {options.context}, and a model of {limit} positions")
    if options.prefill_chunk > options.context:
        raise ValueError(f"prefill_chunk is {options.prefill_chunk}, more than the context of {options.context}")


def _check_state(manifest: Manifest) -> None:
    """The state must be that of the configuration at its context, in the layout that the manifest names."""
    expected = manifest.options.state_spec(manifest.config, manifest.state_layout)
    if manifest.state == expected:
        return
    found = {tensor.name: tensor for tensor in manifest.state.tensors}
    for tensor in expected.tensors:
        there = found.get(tensor.name)
        if there != tensor:
            raise ValueError(f"state: {tensor.name} is {there and _shown(there)}; by the configuration it is "
                             f"{_shown(tensor)}")
    raise ValueError("state: other tensors than the configuration has, or another order")


def _check_part(manifest: Manifest, part: Part) -> None:
    """What a session loads and reads of it, and what is printed."""
    runtime = RUNTIMES.get(manifest.runtime)
    if runtime is None:
        raise ValueError(f"runtime is {manifest.runtime!r}; known are {', '.join(RUNTIMES)}")
    if not part.artifact.endswith(runtime.opens):
        raise ValueError(f"artifact is {part.artifact!r}; {runtime.name} opens names that end with {runtime.opens}")
    is_directory = any(name.startswith(f"{part.artifact}/") for name in manifest.files)
    if not is_directory and (part.artifact not in manifest.files or not runtime.opens):
        raise ValueError(f"files does not list the artifact {part.artifact}")
    for name in part.files:
        if name not in manifest.files:
            raise ValueError(f"files does not list {name}, of the part {part.name}")
    if part.scored > manifest.options.prefill_chunk:
        raise ValueError(f"scored is {part.scored}, more than the {manifest.options.prefill_chunk} tokens of a step")
    for name, (low, high) in part.activation_ranges.items():
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise ValueError(f"activation_ranges: {name} goes from {low} to {high}")
    if not all(_is_scalar(value) or (isinstance(value, dict) and all(map(_is_scalar, value.values())))
               for value in part.lowering.values()):
        raise ValueError("lowering holds something else than numbers, text, and those by name")


def _check_listed(manifest: Manifest) -> None:
    """What is read of a bundle must be among the files that it was sealed with."""
    baked = manifest.baked_prompt
    needed = {"the scales of the KV cache": KV_SCALES_FILE if manifest.state.needs_kv_scales else None,
              "the text of the calibration": WINDOWS_FILE if manifest.recipe.rounding == GPTQ else None,
              "the baked prompt": baked and baked.file}
    for what, name in needed.items():
        if name is not None and name not in manifest.files:
            raise ValueError(f"files does not list {name}, {what}")
    if baked and (baked.tokens >= manifest.state.context or manifest.options.state != EXPLICIT):
        raise ValueError(f"a baked prompt of {baked.tokens} tokens, a context of {manifest.state.context}, and the "
                         f"state is {manifest.options.state}")


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float))


def _shown(tensor: Any) -> str:
    return f"{tensor.kind} {tensor.dtype} {list(tensor.shape)}"
