"""What is specific to one `model_type`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lfm_edge.checkpoint.layers import AttentionNames

if TYPE_CHECKING:
    from lfm_edge.checkpoint.config import ModelConfig


@dataclass(frozen=True)
class Family:
    """All that depends on a `model_type`.

    architecture: transformers' class of it
    layer_types: the kinds of layers that it has
    keys: of config.json that `read` reads
    read: what config.json says, as fields of `ModelConfig`. Raises ConfigError for what it does not understand
    write: config.json, with every spelling that a published client reads, all saying the same
    presets: config.json and the published parameter count, by the preset's name
    """

    model_type: str
    architecture: str
    layer_types: tuple[str, ...]
    attention: AttentionNames
    keys: frozenset[str]
    read: Callable[[dict[str, Any]], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    presets: Mapping[str, tuple[dict[str, Any], int]]
