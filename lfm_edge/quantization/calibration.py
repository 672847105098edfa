"""What is calibrated on a text, and how a bundle keeps it.

Scales of an 8-bit KV cache whose kernel wants them as constants: one for each channel of keys and values. They come
from the quantized model itself, run over the text layer by layer. And the text that weights were rounded by
(`gptq`), which `verify` needs to do it again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lfm_edge.config import ATTENTION, ModelConfig
from lfm_edge.errors import BundleError
from lfm_edge.files import read_json_object
from lfm_edge.model.lowering import Lowering
from lfm_edge.model.weights import Weights
from lfm_edge.quantization.walk import Walk

KV_SCALES_FILE = "kv_scales.safetensors"
WINDOWS_FILE = "calibration.json"
KV_WINDOW, MOST_KV_TOKENS = 512, 2048  # of the prompts that a KV cache is measured on
WINDOW, MOST_TOKENS = 256, 4096  # of those that weights are rounded by
_HEADROOM = 1.25  # how far other texts may go beyond this one before they are clipped


def calibrate_kv(config: ModelConfig, weights: Weights, activations: str, windows: Tensor,
                 progress: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
    """`model.layers.N.self_attn.k_scale` and `.v_scale` of every attention layer, float32 [kv_heads, head_dim].

    activations: how the target rounds the inputs of linear layers; windows: int64 [B, T], the text
    progress: called after each layer
    """
    scales: dict[str, Tensor] = {}
    walk, lowering = Walk(config, windows), Lowering(activations)
    x = walk.embed(weights)
    for index, kind in enumerate(config.layer_types):
        x, state = walk.layer(index, weights, lowering)(x)
        if kind == ATTENTION:
            for name, cache in zip(("k_scale", "v_scale"), state, strict=True):
                largest = cache.abs().amax((0, 1))  # [kv_heads, D]
                scales[f"model.layers.{index}.self_attn.{name}"] = (largest * _HEADROOM / 127).clamp(min=2.0 ** -20)
        progress()
    return scales


def write_kv_scales(scales: dict[str, Tensor], directory: Path) -> None:
    """Put the scales into a bundle, for `verify`."""
    save_file(scales, directory / KV_SCALES_FILE)


def read_kv_scales(directory: Path) -> dict[str, Tensor]:
    """The scales of a bundle; none where it has none. Raises BundleError where they are unreadable."""
    path = directory / KV_SCALES_FILE
    if not path.is_file():
        return {}
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise BundleError(f"{path}: unreadable ({error})") from None


def write_windows(windows: Tensor, directory: Path) -> None:
    """Put the text of a calibrated rounding into a bundle, for `verify`: it does the same again."""
    lines = ",\n  ".join(json.dumps(window) for window in windows.tolist())
    (directory / WINDOWS_FILE).write_text(f'{{"windows": [\n  {lines}\n]}}\n')


def read_windows(directory: Path, config: ModelConfig) -> Tensor:
    """The text of a bundle's calibrated rounding, int64 [B, T]. Raises BundleError where there is none."""
    path = directory / WINDOWS_FILE
    try:
        windows = torch.tensor(read_json_object(path, BundleError)["windows"])
    except (LookupError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise BundleError(f"{path}: malformed ({type(error).__name__})") from None
    if windows.dtype != torch.int64 or windows.ndim != 2 or not windows.numel():
        raise BundleError(f"{path}: malformed (windows of tokens of one length are expected)")
    if windows.min() < 0 or windows.max() >= config.vocab_size:
        raise BundleError(f"{path}: tokens outside of the model's vocabulary")
    return windows
