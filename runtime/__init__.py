"""invariclip: CLIP answers from an exported artifact, without torch.

>>> import invariclip
>>> model = invariclip.load("name.icm")            # doctest: +SKIP
>>> model.classify(["cat.jpg"])[0].label           # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from invariclip import errors
from invariclip.version import __version__

if TYPE_CHECKING:
    from invariclip.answers import Answer, Answers, Prediction, RankedClass
    from invariclip.live_site import LiveSite
    from invariclip.loading import load
    from invariclip.measuring import open_live_site
    from invariclip.predictor import Model
    from invariclip.projection import Projection, read_projection
    from invariclip.site import Site, read_site, write_site

__all__ = [
    "Answer", "Answers", "LiveSite", "Model", "Prediction", "Projection", "RankedClass", "Site", "__version__",
    "errors", "load", "open_live_site", "read_projection", "read_site", "write_site",
]  # fmt: skip

_HOMES = {
    "Answer": "answers", "Answers": "answers", "LiveSite": "live_site", "Model": "predictor", "Prediction": "answers",
    "Projection": "projection", "RankedClass": "answers", "Site": "site", "load": "loading",
    "open_live_site": "measuring", "read_projection": "projection", "read_site": "site", "write_site": "site",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Loads a module of the public API, and with it NumPy or an engine, when something of it is first asked for."""
    if name in _HOMES:
        return getattr(import_module(f"invariclip.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'invariclip' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public API."""
    return sorted(__all__)
