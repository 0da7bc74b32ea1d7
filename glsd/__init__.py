"""glsd: global and local self-distillation of Vision Transformers, and retrieval fine-tuning on top of it.

``glsd.load("runs/mine").embed("photos")`` uses what a run has learned. Everything is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glsd.errors import UserError
    from glsd.inference.model import Model, list_images, load
    from glsd.inference.search import search
    from glsd.inference.vectors import read_vectors

__version__ = "0.1.0"
__all__ = ["Model", "UserError", "__version__", "list_images", "load", "read_vectors", "search"]

# Public name -> module that holds it.
_FACE = {
    "load": "glsd.inference.model",
    "list_images": "glsd.inference.model",
    "Model": "glsd.inference.model",
    "read_vectors": "glsd.inference.vectors",
    "search": "glsd.inference.search",
    "UserError": "glsd.errors",
}


def __getattr__(name: str) -> Any:
    """Import a public name, or a public room such as ``glsd.losses``, when it is first asked for."""
    if name in _FACE:
        return getattr(importlib.import_module(_FACE[name]), name)
    if name in ("geometry", "losses", "metrics"):
        return importlib.import_module(f"glsd.{name}")
    raise AttributeError(f"module 'glsd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "geometry", "losses", "metrics"]
