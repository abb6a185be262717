"""BEiT pre-training, fine-tuning and segmentation. Importing this package imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beit_pretrain.tools.load import Loaded, load

__version__ = "0.1.0"
__all__ = ["Loaded", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """`beit_pretrain.load`, which brings torch, is imported when it is asked for."""
    if name in ("load", "Loaded"):
        from beit_pretrain.tools import load as module

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
