"""Scales of an 8-bit KV cache whose kernel wants them as constants: one for each channel of keys and values.

They come from the quantized model itself, run over a text layer by layer, and the bundle keeps them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lfm_edge.calibration.walk import Walk
from lfm_edge.checkpoint.config import ModelConfig
from lfm_edge.checkpoint.layers import CONV
from lfm_edge.errors import BundleError
from lfm_edge.model.lowering import Lowering
from lfm_edge.model.weights import Weights

KV_SCALES_FILE = "kv_scales.safetensors"
KV_WINDOW, MOST_KV_TOKENS = 512, 2048  # of the prompts that a KV cache is measured on
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
        if kind != CONV:
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
