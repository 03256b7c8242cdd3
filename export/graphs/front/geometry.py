"""What Pillow would be asked for, computed in the graph: the size to resize to, and where the crop starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from invariclip.export.graphs.front.nodes import Pen
    from invariclip.preprocessing.pixels import PixelSpec


@dataclass(frozen=True)
class Axis:
    """One axis of the resize; all values are int64 scalars in the graph.

    Attributes:
        given: Length of the image's side, in pixels.
        resized: Length after the resize.
        start: First resized pixel that the crop keeps.
        kept: How many it keeps: the tower's side.
    """

    given: ir.Value
    resized: ir.Value
    start: ir.Value
    kept: int


def resize_axes(pen: Pen, pixels: ir.Value, spec: PixelSpec) -> tuple[Axis, Axis]:
    """The vertical and the horizontal axis of an image of unknown size.

    Args:
        pen: Where the nodes go.
        pixels: uint8 [batch, height, width, 3].
        spec: `squash`, or `shortest` with a square tower.
    """
    shape = pen.op("Shape", pixels)
    sides = tuple(pen.op("Gather", shape, pen.whole(place)) for place in (1, 2))
    if spec.resize_mode == "squash":
        resized = tuple(pen.whole(side) for side in spec.image_size)
    else:
        short = pen.op("Min", *sides)
        # int(S * long / short): the host divides in float64, which never reaches a whole number that the quotient
        # stays below (it would have to be 1/short close), so whole division gives the same; the short side gives S
        resized = tuple(
            pen.op("Div", pen.op("Mul", side, pen.whole(kept)), short)
            for side, kept in zip(sides, spec.image_size, strict=True)
        )
    vertical, horizontal = (
        Axis(given, scaled, _crop_start(pen, scaled, kept), kept)
        for given, scaled, kept in zip(sides, resized, spec.image_size, strict=True)
    )
    return vertical, horizontal


def _crop_start(pen: Pen, resized: ir.Value, kept: int) -> ir.Value:
    """round((resized - kept) / 2), half to even, in whole numbers; `resized` is never below `kept`."""
    two = pen.whole(2)
    surplus = pen.op("Sub", resized, pen.whole(kept))
    half = pen.op("Div", surplus, two)
    is_odd = pen.op("Sub", surplus, pen.op("Mul", half, two))
    half_is_odd = pen.op("Sub", half, pen.op("Mul", pen.op("Div", half, two), two))
    return pen.op("Add", half, pen.op("Mul", is_odd, half_is_odd))
