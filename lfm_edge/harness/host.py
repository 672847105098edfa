"""The machine that measured, and what ran on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lfm_edge
from lfm_edge.cores import usable_cores

_PACKAGES = ("torch", "numpy", "executorch", "onnxruntime", "onnxruntime-genai", "coremltools", "mlx", "mlx-lm", "gguf",
             "llama-cpp-python")


@dataclass(frozen=True)
class Host:
    """Processor, how many cores of it this process may use, bytes of memory and of the last cache (0: unknown)."""

    cpu: str
    cores: int
    memory_bytes: int
    cache_bytes: int
    system: str
    python: str

    @classmethod
    def here(cls) -> Host:
        """This machine. It is not named."""
        return cls(_processor(), usable_cores(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
                   _cache_bytes(), f"{platform.system()} {platform.release()} {platform.machine()}",
                   platform.python_version())


def provenance(schema: str, command: str) -> dict[str, Any]:
    """What every JSON result begins with: its schema, when it was made, the command that makes it again, and where."""
    return {"schema": schema, "made": datetime.now(UTC).isoformat(timespec="seconds"), "command": command,
            "host": asdict(Host.here()), "versions": versions()}


def versions() -> dict[str, str]:
    """Versions of lfm-edge and of what it runs on, as far as installed."""
    found = {"lfm-edge": lfm_edge.__version__}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    text = described.read_text() if described.is_file() else ""
    match = re.search(r"^(?:model name|Hardware|Model)\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return match[1].strip() if match else _sysctl("machdep.cpu.brand_string") or platform.processor() or "unknown"


def _cache_bytes() -> int:
    """Of the last level, as Linux or macOS tells it."""
    sizes = []
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with suppress(OSError, ValueError):
            sizes.append(int(index.read_text().strip().removesuffix("K")) * 1024)
    return max(sizes, default=int(_sysctl("hw.l3cachesize") or _sysctl("hw.l2cachesize") or 0))


def _sysctl(name: str) -> str:
    if sys.platform != "darwin":
        return ""
    return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False).stdout.strip()
