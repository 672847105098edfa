"""The processor's cores, as far as they are ours."""

from __future__ import annotations

import os
from contextlib import suppress


def usable_cores() -> int:
    """How many cores this process may use: a container may have fewer than its machine."""
    with suppress(AttributeError):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
