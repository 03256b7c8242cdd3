"""Pixels in the graph: a front that takes uint8 pictures of any size and resizes and crops them as Pillow does."""

from invariclip.export.graphs.front.agreement import (
    BOUNDS,
    TALLEST,
    FrontAgreement,
    FrontBounds,
    front_agreement,
    front_failures,
)
from invariclip.export.graphs.front.graft import FITTED, FrontForm, add_front, front_alone

__all__ = [
    "BOUNDS",
    "FITTED",
    "TALLEST",
    "FrontAgreement",
    "FrontBounds",
    "FrontForm",
    "add_front",
    "front_agreement",
    "front_alone",
    "front_failures",
]
