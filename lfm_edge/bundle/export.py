"""`export`: from a checkpoint to a bundle, for any target."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import lfm_edge
from lfm_edge.backends.socs import DEFAULT_SOC, Soc, socs_named
from lfm_edge.bundle.baking import SystemPrompt, bake
from lfm_edge.bundle.bundle import Bundle, Manifest, new_bundle, weights_digest
from lfm_edge.bundle.job import Artifact, ExportJob
from lfm_edge.calibration.gptq import MOST_TOKENS, WINDOW, write_windows
from lfm_edge.calibration.kv_scales import KV_WINDOW, MOST_KV_TOKENS, calibrate_kv, write_kv_scales
from lfm_edge.calibration.quantize import quantize_checkpoint
from lfm_edge.calibration.sample import (
    TEXT,
    Conversation,
    calibration_tokens,
    default_prompts,
    prompt_windows,
    prompts_in,
    read_prompts,
    whole_chunks,
    windows_of,
)
from lfm_edge.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.checkpoint.presets import DEFAULT_MODEL
from lfm_edge.checkpoint.sources import remember
from lfm_edge.checkpoint.tokenizer import TextTokenizer
from lfm_edge.errors import ExportError
from lfm_edge.model.weights import Weights
from lfm_edge.progress import Progress
from lfm_edge.quantization.recipe import GPTQ, GROUP_SIZES, HEAD_BITS, NEAREST, ROUNDINGS, MixedBits, Recipe
from lfm_edge.quantization.recipe import recipe as recipe_of
from lfm_edge.quantization.tensor import WeightsFile
from lfm_edge.session.state import StateSpec
from lfm_edge.targets import Target, target_named

DEFAULT_CONTEXT = 4096
DEFAULT_PREFILL_CHUNK = 128


def export(model: str | Path = DEFAULT_MODEL, *, target: str, output: str | Path, context: int | None = None,
           prefill_chunk: int = DEFAULT_PREFILL_CHUNK, group_size: int = 32, head_bits: int = 8,
           compute_dtype: str | None = None, kv_dtype: str | None = None, state: str = "explicit",
           soc: str | None = None, rounding: str = NEAREST, calibration: str | Path | None = None,
           recipe: str | Path | None = None, bake_prompt: str | Path | None = None,
           force: bool = False, progress: Progress | None = None) -> Bundle:
    """Export a checkpoint to a bundle directory and open it.

    model: a local Hugging Face directory, a hub id, or `random:PRESET`
    context: positions that the KV cache holds; 4096, or the model's own limit where that is lower
    prefill_chunk: most tokens that one step takes
    group_size: columns that share a 4-bit scale; head_bits: width of embedding and head
    compute_dtype: what the program computes in; the target's own where none is given
    kv_dtype: of the KV cache; the compute type where none is given and the target's caches have it
    soc: chips to compile for, such as `sm8650,sm8750`, where the target is compiled for chips
    rounding: `nearest`, or `gptq`
    calibration: a text file with prompts separated by blank lines, for all that is measured on a text
    recipe: a file that says which linear layers have 4 bits and which 8, as `sensitivity` writes it
    bake_prompt: a UTF-8 text file, the system prompt that the bundle prefills now, for sessions to start from
    force: replace an existing bundle, once the new one is whole

    The bundle is written beside `output` and renamed when complete: an interrupted export leaves nothing,
    and an existing bundle is never damaged. Raises LfmEdgeError for bad input, where another export is writing
    `output`, where something else has come there meanwhile, and where the disk is full.
    """
    progress = progress or Progress()
    chosen = target_named(target)
    chosen.check_installed()
    compute_dtype = compute_dtype or chosen.compute_dtypes[0]
    converted = chosen.converts_kv or compute_dtype not in chosen.kv_dtypes
    kv_dtype = kv_dtype or (chosen.kv_dtypes[0] if converted else compute_dtype)
    _check_options(chosen, context, prefill_chunk, group_size, head_bits, compute_dtype, kv_dtype, state, rounding)
    socs = _socs(chosen, soc)
    mixed = _mixed_bits(recipe, group_size, head_bits)
    if bake_prompt is not None and state != "explicit":
        raise ExportError(f"--bake-prompt {bake_prompt}: with --state {state} the program keeps the state, and none "
                          "can be shipped")
    checkpoint = open_checkpoint(model)
    context = _context(checkpoint.config, context)
    prefill_chunk = min(prefill_chunk, context)
    bits = recipe_of(chosen.bits, mixed.group_size, mixed.head_bits, chosen.activations, chosen.two_level, rounding,
                     mixed.linear_bits)
    # Conv states come and go as real numbers, where the program computes in integers.
    layout = StateSpec.of(checkpoint.config, context, kv_dtype, chosen.state_layout,
                          "float32" if compute_dtype == "int16" else compute_dtype, prefill_chunk)
    given = _prompts(chosen, calibration, chosen.calibrated or layout.needs_kv_scales or rounding == GPTQ)
    job = ExportJob(checkpoint.config, {}, bits, layout, compute_dtype, state, prefill_chunk, socs=socs,
                    source=checkpoint.source, licence=checkpoint.licence)
    with new_bundle(Path(output), force) as directory:
        checkpoint.copy_text_files(directory)
        prompt = None if bake_prompt is None else SystemPrompt.of(Path(bake_prompt), TextTokenizer(directory), context)
        with WeightsFile(directory.parent) as file:  # beside what is sealed, and closed before that is renamed
            manifest, usage = _write(checkpoint, chosen, job, given, file, directory, progress)
        if socs:
            _give_memory_back()  # the compilers need it
            compiled = chosen.exporter().compile_for(socs, directory, progress.stage)
            manifest = replace(manifest, lowering=manifest.lowering | compiled)
        if prompt:
            progress.stage("bake the prompt", -(-len(prompt.tokens) // prefill_chunk))
            manifest = bake(directory, manifest, prompt, progress)
        progress.stage("seal the bundle")
        (directory / "README.md").write_text(_readme(manifest, usage), "utf-8", "replace")
        manifest.write(directory)
    remember(manifest.source_sha256, checkpoint.place)
    return Bundle.open(output)


def _write(checkpoint: Checkpoint, target: Target, job: ExportJob, given: tuple[Conversation, ...] | None,
           file: WeightsFile, directory: Path, progress: Progress) -> tuple[Manifest, str]:
    """Quantize and write the artifact of a job without weights; the manifest, and how each client loads the artifact.

    given: the user's prompts to calibrate on; file: for the quantized weights
    """
    config, state = job.config, job.state
    windows = _calibration_windows(config, directory, given) if job.recipe.rounding == GPTQ else None
    progress.stage("quantize", len(checkpoint.names))
    weights = quantize_checkpoint(checkpoint, job.recipe, lambda _: progress.advance(), windows, file)
    digest = weights_digest(weights)
    texts: tuple[list[int], ...] = ()
    if target.calibrated or state.needs_kv_scales:
        measured_on = partial(calibration_tokens, TextTokenizer(directory), config, given or default_prompts(directory))
        if state.needs_kv_scales:
            weights |= _kv_scales(config, state, weights, job.recipe, measured_on(MOST_KV_TOKENS), directory, progress)
        if target.calibrated:
            texts = whole_chunks(measured_on(), job.prefill_chunk, state.context, config.bos_token_id)
    job = replace(job, weights=weights, prompts=texts)
    artifact = target.exporter().export(job, directory, progress.stage)
    return _manifest(checkpoint, target, job, artifact, digest), artifact.usage


def _give_memory_back() -> None:
    """Free traces of the network, which refer to themselves, and return what is free to the system."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim:
        trim(0)


def _context(config: ModelConfig, context: int | None) -> int:
    limit = config.max_position_embeddings
    if context is None:
        return min(DEFAULT_CONTEXT, limit)
    if context > limit:
        raise ExportError(f"--context {context} is more than the model's {limit}")
    return context


def _socs(target: Target, names: str | None) -> tuple[Soc, ...]:
    if not target.compiled:
        if names is not None:
            raise ExportError(f"--soc {names}: {target.name} is not compiled for chips")
        return ()
    return socs_named(names or DEFAULT_SOC)


def _check_options(target: Target, context: int | None, prefill_chunk: int, group_size: int, head_bits: int,
                   compute_dtype: str, kv_dtype: str, state: str, rounding: str) -> None:
    """Refuse what the target cannot honour, with the reason."""
    kv_dtypes = tuple(dtype for dtype in target.kv_dtypes if target.converts_kv or dtype in ("int8", compute_dtype))
    choices: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
        ("--group-size", group_size, GROUP_SIZES), ("--head-bits", head_bits, HEAD_BITS),
        ("--compute-dtype", compute_dtype, target.compute_dtypes), ("--kv-dtype", kv_dtype, kv_dtypes),
        ("--state", state, target.state_modes), ("--rounding", rounding, ROUNDINGS))
    for option, value, allowed in choices:
        if value not in allowed:
            raise ExportError(f"{option} {value}: {target.name} takes {' or '.join(map(str, allowed))}")
    if target.bits == 8 and head_bits == 8 and group_size != 32:
        raise ExportError(f"--group-size {group_size}: {target.name} is quantized per channel and has no groups")
    if context is not None and context < 2:
        raise ExportError(f"--context {context}: a context holds at least 2 tokens")
    if prefill_chunk < 1:
        raise ExportError(f"--prefill-chunk {prefill_chunk}: a step takes at least 1 token")


def _mixed_bits(recipe: str | Path | None, group_size: int, head_bits: int) -> MixedBits:
    """What the recipe's file says, or the options where there is none."""
    if recipe is None:
        return MixedBits(group_size, head_bits, {})
    if (group_size, head_bits) != (32, 8):
        raise ExportError(f"--recipe {recipe}: has a group size and the bits of the head; leave out --group-size and "
                          "--head-bits")
    return MixedBits.read(Path(recipe))


def _prompts(target: Target, calibration: str | Path | None, needed: bool) -> tuple[Conversation, ...] | None:
    """The user's prompts to calibrate on, if there are any."""
    if calibration is None:
        return None
    if not needed:
        raise ExportError(f"--calibration {calibration}: {target.name} calibrates nothing here"
                          + (" but with --kv-dtype int8 or --rounding gptq" if "int8" in target.kv_dtypes else
                             "; give --rounding gptq"))
    return read_prompts(Path(calibration))


def _calibration_windows(config: ModelConfig, directory: Path,
                         prompts: tuple[Conversation, ...] | None) -> torch.Tensor:
    """The windows to round the weights by, int64 [B, T]; the bundle keeps them."""
    length = min(WINDOW, config.max_position_embeddings)
    windows = torch.tensor(prompt_windows(TextTokenizer(directory), config.vocab_size, prompts or prompts_in(TEXT),
                                          length, MOST_TOKENS))
    write_windows(windows, directory)
    return windows


def _kv_scales(config: ModelConfig, layout: StateSpec, weights: Weights, bits: Recipe, tokens: list[int],
               directory: Path, progress: Progress) -> dict[str, torch.Tensor]:
    """Scales of an 8-bit KV cache, measured on a text; the bundle keeps them."""
    progress.stage("calibrate the 8-bit KV cache", config.num_layers)
    windows = torch.tensor(windows_of(tokens, min(KV_WINDOW, layout.context)))
    scales = calibrate_kv(config, weights, bits.activations, windows, progress.advance)
    write_kv_scales(scales, directory)
    return scales


def _manifest(checkpoint: Checkpoint, target: Target, job: ExportJob, artifact: Artifact, digest: str) -> Manifest:
    return Manifest(
        target=target.name, artifact=artifact.path, compute_dtype=job.compute_dtype, state_mode=job.state_mode,
        prefill_chunk=job.prefill_chunk, scored=artifact.scored,
        config=job.config, recipe=job.recipe, state=job.state, lowering=artifact.lowering,
        source=checkpoint.name, source_sha256=checkpoint.digest(), licence=checkpoint.licence,
        weights_sha256=digest, activation_ranges=artifact.activation_ranges,
        versions={"lfm-edge": lfm_edge.__version__,
                  **{package: importlib.metadata.version(package) for package in ("torch", *target.requires)}})


def _readme(manifest: Manifest, usage: str) -> str:
    """What the bundle is and how to load it, for someone who finds the directory."""
    recipe, state = manifest.recipe.to_dict(), manifest.state
    baked = f"""
`{manifest.baked_prompt.file}` holds the state after the system prompt: the tensors by their names, caches cut to its
{manifest.baked_prompt.tokens} tokens. An app that copies them into its own state goes on at that position.
""" if manifest.baked_prompt else ""
    name = Path(manifest.source).name.partition("@")[0]  # the commit of a hub's model is for the manifest
    return f"""# {name} for {manifest.target}

Made by lfm-edge {manifest.versions["lfm-edge"]} from `{name}` (licence: {manifest.licence}).
Linear layers have {manifest.recipe.linear_bits} bits, embedding and head {recipe["head"]["bits"]}. The context holds
{state.context} tokens; a step takes 1 to {manifest.prefill_chunk}. `manifest.json` has the whole layout of the state.
{baked}
    lfm-edge verify .
    lfm-edge bench .
    lfm-edge chat .

{usage}"""
