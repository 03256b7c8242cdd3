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
    from invariclip.predictor import Model, Prediction

__version__ = "0.1.0"
__all__ = ["Model", "Prediction", "__version__", "errors", "load"]


def __getattr__(name: str) -> Any:
    """Loads the predictor, and with it the inference engine, when it is first asked for."""
    if name in ("Model", "Prediction", "load"):
        from invariclip import loading, predictor

        return getattr(loading if name == "load" else predictor, name)
    raise AttributeError(f"module 'invariclip' has no attribute {name!r}")
