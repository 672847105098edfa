"""The families of models, by the `model_type` of their config.json."""

from lfm_edge.checkpoint.families.lfm2 import LFM2
from lfm_edge.checkpoint.families.lfm3 import LFM3

FAMILIES = {family.model_type: family for family in (LFM2, LFM3)}
