"""Phones by their published memory bandwidth, for projections. Nothing here was measured on them.

Only figures with a source are listed. Where the source gives the data rate, the bandwidth is that over the 64-bit bus
that these chips have (four channels of 16 bits), and the entry says so.
"""

from __future__ import annotations

from dataclasses import dataclass

_BUS_BYTES = 8


@dataclass(frozen=True)
class Device:
    """A phone. bandwidth: bytes per second, the peak that is published for its chip; cores: of its CPU, by kind"""

    name: str
    chip: str
    cores: str
    bandwidth: float
    source: str


def _bus(transfers_per_s: float) -> float:
    """Bytes per second of a 64-bit bus."""
    return transfers_per_s * _BUS_BYTES


DEVICES = (
    Device("Galaxy S25 Ultra", "Snapdragon 8 Elite", "2 + 6", 84.8e9,
           "geektopia.es, 2024-10-22: LPDDR5X at 5300 MHz, 84.8 GB/s; cores: xda-developers.com, 2024-10-21"),
    Device("Galaxy S24 Ultra", "Snapdragon 8 Gen 3", "1 + 5 + 2", _bus(9.6e9),
           "droidholic.com: LPDDR5X up to 4800 MHz, two transfers a cycle, over 64 bits"),
    Device("vivo X200", "Dimensity 9400", "1 + 3 + 4", _bus(10.7e9),
           "semivoice.com: LPDDR5X at 10.7 Gbit/s, over 64 bits"),
    Device("iPhone 17 Pro", "A19 Pro", "2 + 4", 75.8e9,
           "partofstyle.com: LPDDR5X at 9600 MT/s, 75.80 GB/s, six cores; Apple publishes no figure"),
    Device("iPhone 17", "A19", "2 + 4", 68.26e9,
           "inews.zoombangla.com: LPDDR5X at 8533 MT/s, 68.26 GB/s, six cores; Apple publishes no figure"),
)


@dataclass(frozen=True)
class Projection:
    """Tokens per second that a phone would decode if it reached the same share of its bandwidth as this machine.

    A projection, no measurement: phones share their bandwidth with all else that runs, and throttle.
    """

    device: str
    chip: str
    bandwidth: float
    decode_tps: float
    source: str


def project(step_bytes: int, efficiency: float) -> tuple[Projection, ...]:
    """For every device: bandwidth * efficiency / bytes of a step. efficiency: share of the bandwidth, 0 to 1"""
    return tuple(Projection(device.name, device.chip, device.bandwidth,
                            device.bandwidth * efficiency / step_bytes, device.source) for device in DEVICES)
