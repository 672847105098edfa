"""The Snapdragon chips whose NPU (Hexagon Tensor Processor, HTP) graphs are compiled for."""

from __future__ import annotations

from dataclasses import dataclass

from lfm_edge.errors import ExportError


@dataclass(frozen=True)
class Soc:
    """One system on a chip.

    name: its part number in small letters; product: as it is sold
    htp_arch: the architecture of its NPU; model: its number in Qualcomm's AI runtime
    machine_id: what Linux on it has in /sys/devices/soc0/soc_id
    """

    name: str
    product: str
    htp_arch: int
    model: int
    machine_id: int


SOCS: dict[str, Soc] = {soc.name: soc for soc in (
    Soc("sm8350", "Snapdragon 888", 68, 30, 415),
    Soc("sm8550", "Snapdragon 8 Gen 2", 73, 43, 519),
    Soc("sm8650", "Snapdragon 8 Gen 3", 75, 57, 557),
    Soc("sm8750", "Snapdragon 8 Elite", 79, 69, 618),
    Soc("sm8850", "Snapdragon 8 Elite Gen 5", 81, 87, 660),
)}
DEFAULT_SOC = "sm8750"


def socs_named(names: str) -> tuple[Soc, ...]:
    """The chips of a list such as `sm8650,sm8750`, in its order, each once. Raises ExportError for unknown ones."""
    found: dict[str, Soc] = {}
    for name in (part.strip().lower() for part in names.split(",")):
        if name not in SOCS:
            raise ExportError(f"--soc {names}: '{name}' is no chip that is known here; known are {', '.join(SOCS)}")
        found[name] = SOCS[name]
    return tuple(found.values())
