"""invariclip: CLIP answers from an exported artifact, without torch.

>>> import invariclip
>>> model = invariclip.load("name.icm")            # doctest: +SKIP
>>> model.classify(["cat.jpg"])[0].label           # doctest: +SKIP
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from invariclip import errors
from invariclip.version import __version__

# ONNX Runtime's official builds count events and look a host up for them; nothing that runs here phones home
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from invariclip.artifact.embeddings import Embeddings, read_embeddings, write_embeddings
    from invariclip.artifact.projection import Projection, read_projection
    from invariclip.artifact.quantized import QuantizedEmbeddings, quantize, read_quantized, search_recall
    from invariclip.embedding import embed_files
    from invariclip.loading import load
    from invariclip.model import Model
    from invariclip.results import Answer, Answers, Prediction, RankedClass
    from invariclip.sites.live_site import LiveSite
    from invariclip.sites.measuring import open_live_site
    from invariclip.sites.site import Site, read_site, write_site

__all__ = [
    "Answer", "Answers", "Embeddings", "LiveSite", "Model", "Prediction", "Projection", "QuantizedEmbeddings",
    "RankedClass", "Site", "__version__", "embed_files", "errors", "load", "open_live_site", "quantize",
    "read_embeddings", "read_projection", "read_quantized", "read_site", "search_recall", "write_embeddings",
    "write_site",
]  # fmt: skip

_HOMES = {
    "artifact.embeddings": ("Embeddings", "read_embeddings", "write_embeddings"),
    "artifact.projection": ("Projection", "read_projection"),
    "artifact.quantized": ("QuantizedEmbeddings", "quantize", "read_quantized", "search_recall"),
    "embedding": ("embed_files",),
    "loading": ("load",),
    "model": ("Model",),
    "results": ("Answer", "Answers", "Prediction", "RankedClass"),
    "sites.live_site": ("LiveSite",),
    "sites.measuring": ("open_live_site",),
    "sites.site": ("Site", "read_site", "write_site"),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Loads a module of the public API, and with it NumPy or an engine, when something of it is first asked for."""
    if name in _MODULES:
        return getattr(import_module(f"invariclip.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'invariclip' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public API."""
    return sorted(__all__)
