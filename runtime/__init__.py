"""invariclip: CLIP answers from an exported artifact, without torch.

>>> import invariclip
>>> model = invariclip.load("name.icm")            # doctest: +SKIP
>>> model.classify(["cat.jpg"])[0].label           # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from invariclip import errors

if TYPE_CHECKING:
    from invariclip.loading import load
    from invariclip.measuring import open_live_site
    from invariclip.predictor import Model, Prediction

__version__ = "0.1.0"
__all__ = ["Model", "Prediction", "__version__", "errors", "load", "open_live_site"]


def __getattr__(name: str) -> Any:
    """Loads the predictor, and with it the inference engine, when it is first asked for."""
    if name in ("Model", "Prediction", "load", "open_live_site"):
        from invariclip import loading, measuring, predictor

        return getattr({"load": loading, "open_live_site": measuring}.get(name, predictor), name)
    raise AttributeError(f"module 'invariclip' has no attribute {name!r}")
