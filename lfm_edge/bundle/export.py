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
from lfm_edge.backends.socs import socs_named
from lfm_edge.bundle.baking import SystemPrompt, bake
from lfm_edge.bundle.bundle import Bundle, new_bundle, weights_digest
from lfm_edge.bundle.job import Artifact, ExportJob
from lfm_edge.bundle.manifest import Manifest
from lfm_edge.bundle.options import ExportOptions
from lfm_edge.bundle.parts import DECODER, Part
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
from lfm_edge.quantization.recipe import GPTQ, Recipe
from lfm_edge.quantization.recipe import recipe as recipe_of
from lfm_edge.quantization.tensor import WeightsFile
from lfm_edge.session.state import StateSpec
from lfm_edge.targets import Target, target_named


def export(model: str | Path = DEFAULT_MODEL, *, target: str, output: str | Path, force: bool = False,
           progress: Progress | None = None, **options: Any) -> Bundle:
    """Export a checkpoint to a bundle directory and open it.

    model: a local Hugging Face directory, a hub id, or `random:PRESET`
    force: replace an existing bundle, once the new one is whole
    options: those of `ExportOptions`, by name; TypeError for another one

    The bundle is written beside `output` and renamed when complete: an interrupted export leaves nothing,
    and an existing bundle is never damaged. Raises LfmEdgeError for bad input, where another export is writing
    `output`, where something else has come there meanwhile, and where the disk is full.
    """
    progress = progress or Progress()
    chosen = target_named(target)
    chosen.check_installed()
    asked = ExportOptions(**options)
    mixed = asked.mixed_bits(chosen)
    asked = asked.checked(chosen, mixed)
    checkpoint = open_checkpoint(model)
    asked = asked.for_model(checkpoint.config)
    arithmetic = chosen.arithmetic
    bits = recipe_of(chosen.bits, mixed.group_size, mixed.head_bits, arithmetic.activations, arithmetic.two_level,
                     asked.rounding, mixed.linear_bits)
    layout = asked.state_spec(checkpoint.config, chosen.state_layout)
    given = _prompts(chosen, asked, layout.needs_kv_scales)
    job = ExportJob(checkpoint.config, {}, bits, layout, asked, source=checkpoint.source, licence=checkpoint.licence)
    with new_bundle(Path(output), force) as directory:
        checkpoint.copy_text_files(directory)
        prompt = None if asked.bake_prompt is None else SystemPrompt.of(
            Path(asked.bake_prompt), TextTokenizer(directory), layout.context)
        with WeightsFile(directory.parent) as file:  # beside what is sealed, and closed before that is renamed
            manifest, usage = _write(checkpoint, chosen, job, given, file, directory, progress)
        if asked.soc:
            _give_memory_back()  # the compilers need it
            compiled = chosen.exporter().compile_for(socs_named(asked.soc), directory, progress.stage)
            part = manifest.decoder
            manifest = replace(manifest, parts=(replace(part, lowering={**part.lowering, **compiled}),))
        if prompt:
            progress.stage("bake the prompt", -(-len(prompt.tokens) // asked.prefill_chunk))
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
    if target.arithmetic.fixed_ranges or state.needs_kv_scales:
        measured_on = partial(calibration_tokens, TextTokenizer(directory), config, given or default_prompts(directory))
        if state.needs_kv_scales:
            weights |= _kv_scales(config, state, weights, job.recipe, measured_on(MOST_KV_TOKENS), directory, progress)
        if target.arithmetic.fixed_ranges:
            texts = whole_chunks(measured_on(), job.options.prefill_chunk, state.context, config.bos_token_id)
    job = replace(job, weights=weights, prompts=texts)
    artifact = target.exporter().export(job, directory, progress.stage)
    return _manifest(checkpoint, target, job, artifact, digest), artifact.usage


def _give_memory_back() -> None:
    """Free traces of the network, which refer to themselves, and return what is free to the system."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim:
        trim(0)


def _prompts(target: Target, options: ExportOptions, needs_kv_scales: bool) -> tuple[Conversation, ...] | None:
    """The user's prompts to calibrate on, if there are any."""
    if options.calibration is None:
        return None
    if not (target.arithmetic.fixed_ranges or needs_kv_scales or options.rounding == GPTQ):
        raise ExportError(f"--calibration {options.calibration}: {target.name} measures nothing on a text with these "
                          "options; only --rounding gptq would, an int8 KV cache of onnx targets, and NPU targets")
    return read_prompts(Path(options.calibration))


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
    bits, options = job.recipe, job.options
    precision = {"linear layers": f"int{bits.linear_bits}", "embedding and head": f"int{bits.head.bits}",
                 "inputs of linear layers": options.compute_dtype if bits.activations == "float" else bits.activations,
                 "everything else": options.compute_dtype, "KV cache": options.kv_dtype}
    part = Part(DECODER, DECODER, artifact.path, artifact.files, artifact.inputs, artifact.outputs, precision,
                artifact.lowering, artifact.activation_ranges, artifact.scored)
    return Manifest(
        target=target.name, runtime=target.runtime.name, options=options, parts=(part,),
        config=job.config, recipe=bits, state=job.state, state_layout=target.state_layout,
        source=checkpoint.name, source_sha256=checkpoint.digest(), licence=checkpoint.licence, weights_sha256=digest,
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
{state.context} tokens; a step takes 1 to {manifest.options.prefill_chunk}. `manifest.json` has the whole layout of the
state.
{baked}
    lfm-edge verify .
    lfm-edge bench .
    lfm-edge chat .

{usage}"""
