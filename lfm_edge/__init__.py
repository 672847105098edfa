"""On-device export and deployment of Liquid AI's LFM2, LFM2.5 and LFM3 models.

    from lfm_edge import export, open_bundle
    bundle = export("LiquidAI/LFM2.5-1.2B-Instruct", target="android-q4", output="out")
    session = open_bundle("out").session(threads=2)

`Chat` and `generate` answer over a session, by a `Sampling` (docs/reference/python.md).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lfm_edge.bundle.bundle import open_bundle
    from lfm_edge.bundle.export import export
    from lfm_edge.session.generation import Chat, generate
    from lfm_edge.session.sampling import Sampling

__version__ = "0.1.0"
__all__ = ["Chat", "Sampling", "__version__", "export", "generate", "open_bundle"]

_HOMES = {"export": "lfm_edge.bundle.export", "open_bundle": "lfm_edge.bundle.bundle",
          "generate": "lfm_edge.session.generation", "Chat": "lfm_edge.session.generation",
          "Sampling": "lfm_edge.session.sampling"}


def __getattr__(name: str) -> Any:
    """Import the interface when it is used: `lfm-edge --help` needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lfm_edge' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
