"""Published dimensions, for `random:PRESET` models: seeded random weights at a real model's exact size.

Each row states what the model's own config.json says, in the spelling of its generation; the exact
parameter count, where the model card or the checkpoint's own index publishes one, is checked by a test.
"""

from __future__ import annotations

from typing import Any

from lfm_edge.checkpoint.families import FAMILIES

DEFAULT_MODEL = "LiquidAI/LFM2.5-1.2B-Instruct"  # what the commands take where no model is named

PRESETS: dict[str, tuple[dict[str, Any], int]] = {
    name: preset for family in FAMILIES.values() for name, preset in family.presets.items()}
