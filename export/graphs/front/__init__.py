"""Pixels in the graph: a front that takes uint8 images of any size and resizes and crops them as Pillow does."""

from invariclip.export.graphs.front.bounds import BOUNDS, TALLEST, FrontBounds
from invariclip.export.graphs.front.graft import FITTED, FrontForm, add_front, form_of, front_alone

__all__ = [
    "BOUNDS",
    "FITTED",
    "TALLEST",
    "FrontBounds",
    "FrontForm",
    "add_front",
    "form_of",
    "front_alone",
]
