"""Checkpoints to test with, written by transformers, the independent implementation of the model."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Lfm2Config, Lfm2ForCausalLM, Lfm3Config, Lfm3ForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from lfm_edge import cli
from lfm_edge.bundle.bundle import Bundle
from lfm_edge.bundle.manifest import Manifest
from lfm_edge.bundle.options import ExportOptions
from lfm_edge.bundle.parts import DECODER, Part
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.checkpoint.tokenizer import SMALLEST_VOCABULARY, write_chatml_tokenizer
from lfm_edge.errors import LfmEdgeError
from lfm_edge.harness.verify import Verification, verify
from lfm_edge.quantization.recipe import recipe
from lfm_edge.targets import TARGETS

REPO = Path(__file__).parent.parent
TINY = REPO / "examples/tiny-model/checkpoint"

_SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "block_auto_adjust_ff_dim": False,
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    "num_attention_heads": 4, "num_key_value_heads": 2, "conv_L_cache": 3, "conv_bias": False,
    "tie_word_embeddings": True, "max_position_embeddings": 4096,
    "bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 0,
}

# Configurations that a hard-coded assumption breaks on. All widths are multiples of 32.
AWKWARD: dict[str, dict[str, Any]] = {
    "one conv tap": {"conv_L_cache": 1},
    "five conv taps": {"conv_L_cache": 5},
    "conv bias": {"conv_bias": True},
    "untied head": {"tie_word_embeddings": False},
    "attention first": {"layer_types": ["full_attention", "conv", "conv"]},
    "attention last": {"layer_types": ["conv", "conv", "full_attention"]},
    "conv only": {"layer_types": ["conv", "conv", "conv"]},
    "attention only": {"layer_types": ["full_attention", "full_attention"]},
    "one conv layer": {"layer_types": ["conv"]},
    "odd vocabulary": {"vocab_size": 333},
    "one key head per query head": {"num_key_value_heads": 4},
    "one key head for all": {"num_key_value_heads": 1},
    "wide feed-forward, one head": {"intermediate_size": 288, "num_attention_heads": 1, "num_key_value_heads": 1},
    "untied odd vocabulary, conv bias, four taps": {
        "vocab_size": 301, "tie_word_embeddings": False, "conv_bias": True, "conv_L_cache": 4,
        "layer_types": ["full_attention", "conv", "full_attention"]},
    "another rope base and norm epsilon": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}, "norm_eps": 1e-3},
}

# All of it in one model: the default run exports this one for every target, the heavy run each of them alone.
ALL_AT_ONCE = {"vocab_size": 301, "tie_word_embeddings": False, "conv_bias": True, "conv_L_cache": 5,
               "layer_types": ["full_attention", "conv", "full_attention"], "num_key_value_heads": 1}
_STRICT = 1e-5  # of the logits' spread, where the model's own noise floor is below it


_SMALL_LFM3: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "layer_types": ["conv", "conv", "full_attention", "conv", "sliding_attention", "conv"],
    "sliding_window": 256, "conv_L_cache": 7, "max_position_embeddings": 4096,
    "bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 0,
}

# Of LFM3, likewise.
AWKWARD_LFM3: dict[str, dict[str, Any]] = {
    "as published": {},
    "window of 8": {"sliding_window": 8},
    "no gate": {"use_attention_gate": False},
    "no sandwich norms": {"use_sandwich_norm": False},
    "sliding first, three taps, one key head": {
        "layer_types": ["sliding_attention", "full_attention", "conv", "sliding_attention"], "conv_L_cache": 3,
        "num_key_value_heads": 1},
    "sliding only": {"layer_types": ["conv", "sliding_attention", "sliding_attention"], "sliding_window": 16},
    "whole rotation, untied head, odd vocabulary": {
        "tie_word_embeddings": False, "vocab_size": 333, "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}}},
}


# All of it in one model, with a window that a short text leaves behind.
ALL_AT_ONCE_LFM3 = {
    "layer_types": ["sliding_attention", "conv", "full_attention", "conv", "sliding_attention"], "sliding_window": 8,
    "conv_bias": True, "vocab_size": 301, "tie_word_embeddings": False, "num_key_value_heads": 1}


def hf_config(**overrides: Any) -> Lfm2Config:
    """transformers' config of a small model: 4 layers, 64 wide, 300 tokens."""
    values = _SMALL | overrides
    return Lfm2Config(**values, num_hidden_layers=len(values["layer_types"]))


def hf_model(*, seed: int = 0, **overrides: Any) -> Lfm2ForCausalLM:
    """transformers' small model, float32, with seeded weights large enough that every layer moves the logits.

    transformers 5.23 runs a model without attention layers with `use_cache=False` only.
    """
    return _seeded(Lfm2ForCausalLM(hf_config(**overrides)), seed)


def lfm3_model(*, seed: int = 0, **overrides: Any) -> Lfm3ForCausalLM:
    """transformers' small LFM3, likewise."""
    values = _SMALL_LFM3 | overrides
    return _seeded(Lfm3ForCausalLM(Lfm3Config(**values, num_hidden_layers=len(values["layer_types"]))), seed)


def _seeded(model: PreTrainedModel, seed: int) -> Any:
    """Weights large enough that every layer moves the logits."""
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.1 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:  # the embedding is the head's weight as well, so it gets the head's scale
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return model


def save_checkpoint(directory: Path, *, dtype: torch.dtype = torch.float32, max_shard_size: str | int | None = None,
                    tokenizer: bool = True, seed: int = 0, **lfm2_config_overrides: Any) -> Path:
    """Write `hf_model` with transformers' own `save_pretrained`, sharded by `max_shard_size`.

    tokenizer: write a ChatML tokenizer as well, where the vocabulary is large enough for one
    """
    return save_model(directory, hf_model(seed=seed, **lfm2_config_overrides), dtype=dtype,
                      max_shard_size=max_shard_size, tokenizer=tokenizer)


def save_model(directory: Path, model: PreTrainedModel, *, dtype: torch.dtype = torch.float32,
               max_shard_size: str | int | None = None, tokenizer: bool = True) -> Path:
    """The same of a model that is there already."""
    model = model.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(directory, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
    if tokenizer and model.config.vocab_size >= SMALLEST_VOCABULARY:
        write_chatml_tokenizer(Path(directory), model.config.vocab_size)
        ids = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        (Path(directory) / "generation_config.json").write_text(json.dumps(ids))
    return Path(directory)


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a checkpoint's file, given and taken as a dictionary."""
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def assert_verified(bundle: Bundle) -> Verification:
    """Every check of `verify` but quality, with a tighter tolerance than a user's. (Random models have no quality.)"""
    result = verify(bundle)
    assert result.weights.passed and result.weights.blobs > 0
    assert result.rounding.passed, result.rounding
    assert all(limit.logit_error < 1.0 for limit in result.limits.phases.values())
    for row in result.parity:
        assert row.within(result.limits), row
    assert result.typical_error <= max(_STRICT, 3 * result.typical_floor)
    assert result.greedy.passed
    return result


def fill_bundle(directory: Path, artifact: bytes = b"not a real program", target: str = "android-q4",
                name: str = "model.pte") -> None:
    """Write a sealed bundle into `directory` whose artifact no runtime can load. name: of the artifact's first file"""
    (directory / name).write_bytes(artifact)
    config = ModelConfig.from_dict(hf_config().to_dict())
    write_chatml_tokenizer(directory, config.vocab_size)
    made = manifest_of(config, target, name if name.endswith(".onnx") else name.split("/")[0], context=64,
                       prefill_chunk=16, compute_dtype="float32", kv_dtype="float32")
    replace(made, versions={"lfm-edge": "0"}).write(directory)


def manifest_of(config: ModelConfig, target: str, artifact: str | None = None, **options: Any) -> Manifest:
    """The manifest of a bundle that nobody has exported."""
    row = TARGETS[target]
    chosen = ExportOptions(**options).checked(row).for_model(config)
    return Manifest(
        target=target, runtime=row.runtime.name, options=chosen,
        parts=(Part(DECODER, DECODER, artifact or row.artifact),), config=config,
        recipe=recipe(row.bits, chosen.group_size, chosen.head_bits, row.arithmetic.activations,
                      row.arithmetic.two_level),
        state=chosen.state_spec(config, row.state_layout), state_layout=row.state_layout, source="made by a test",
        source_sha256="0" * 64, licence="none", weights_sha256="0" * 64, versions={})


def code_of(page: str, language: str, containing: str) -> str:
    """The one block of code of a page below docs/ that contains this."""
    text = (REPO / "docs" / page).read_text()
    blocks = re.findall(rf"^```{language}\b[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    found, = (block for block in blocks if containing in block)
    return found


def example(name: str) -> ModuleType:
    """A program of examples/python as a module."""
    return program(f"examples/python/{name}.py")


def program(path: str) -> ModuleType:
    """A file of the project that is in no package, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, REPO / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_process(*arguments: str | Path, **options: Any) -> SimpleNamespace:
    """As `lfm_edge`, in this process: so nothing is imported again."""
    result = CliRunner().invoke(cli.app, list(map(str, arguments)), **options)
    if result.exception is None or isinstance(result.exception, SystemExit):
        return SimpleNamespace(returncode=result.exit_code, stdout=result.stdout, stderr=result.stderr)
    if not isinstance(result.exception, LfmEdgeError):
        raise result.exception
    return SimpleNamespace(returncode=2, stdout=result.stdout, stderr=f"{result.stderr}error: {result.exception}\n")


reads_proc = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells on Linux only what is mapped")


def resident(path: Path) -> int:
    """Bytes of the pages that this process has mapped of a file, as Linux counts them."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    return sum(1024 * int(next(line for line in lines if line.startswith("Rss:")).split()[1])
               for line in lines if line.endswith(f" {path}"))


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below `directory`, byte for byte."""
    return {path.relative_to(directory).as_posix(): path.read_bytes()
            for path in sorted(directory.rglob("*")) if path.is_file()}


def lfm_edge(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "120"} | options.pop("env", {})
    return subprocess.run([sys.executable, "-m", "lfm_edge.cli", *map(str, arguments)], capture_output=True,
                          text=True, env=environment, timeout=options.pop("timeout", 300), check=False,
                          **options)
