"""Scales of an 8-bit KV cache whose kernel wants them as constants: one for each channel of keys and values.

They come from the quantized model itself, run over a text layer by layer: no more than one layer is in float32
at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lfm_edge.config import ATTENTION, ModelConfig
from lfm_edge.errors import BundleError
from lfm_edge.model.decoder import DecoderLayer
from lfm_edge.model.lowering import Lowering
from lfm_edge.model.weights import LayerWeights, Weights
from lfm_edge.quantization.recipe import EMBEDDING
from lfm_edge.quantization.tensor import QuantizedTensor
from lfm_edge.state import StateSpec

KV_SCALES_FILE = "kv_scales.safetensors"
CALIBRATION_TOKENS = 512
_HEADROOM = 1.25  # how far other texts may go beyond this one before they are clipped


def calibrate_kv(config: ModelConfig, weights: Weights, activations: str, tokens: Sequence[int],
                 progress: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
    """`model.layers.N.self_attn.k_scale` and `.v_scale` of every attention layer, float32 [kv_heads, head_dim].

    activations: how the target rounds the inputs of linear layers; progress: called after each layer
    """
    spec = StateSpec.of(config, len(tokens))
    lowering, state = Lowering(activations), spec.fresh()
    scales: dict[str, Tensor] = {}
    with torch.no_grad():
        place = lowering.positions(config, len(tokens))(torch.tensor([0]), len(tokens))
        x = _embed(weights[EMBEDDING], tokens)
        for index, kind in enumerate(config.layer_types):
            prefix = f"model.layers.{index}"
            layer = DecoderLayer(LayerWeights(weights, prefix, lowering), kind, config)
            x, updated = layer(x, place, [state[i] for i in spec.of_layer(index)])
            if kind == ATTENTION:
                for name, cache in zip(("k_scale", "v_scale"), updated, strict=True):
                    largest = cache[0].abs().amax(0)  # [kv_heads, D]
                    scales[f"{prefix}.self_attn.{name}"] = (largest * _HEADROOM / 127).clamp(min=2.0 ** -20)
            progress()
    return scales


def _embed(table: Tensor | QuantizedTensor, tokens: Sequence[int]) -> Tensor:
    """float32 [1, T, hidden], without the rest of the table in float32."""
    ids = torch.tensor(tokens)
    if isinstance(table, QuantizedTensor):
        return QuantizedTensor(table.ints[ids], table.scales[ids], table.bits).dequantize()[None]
    return table[ids][None]


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
