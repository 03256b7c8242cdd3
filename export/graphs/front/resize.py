"""The form `resize`: ONNX Resize on the bytes themselves, then a crop. For ONNX Runtime's CPU provider."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from invariclip.export.graphs.front.geometry import Axis
    from invariclip.export.graphs.front.nodes import Pen
    from invariclip.preprocessing.pixels import PixelSpec

_FILTERS: dict[str, dict[str, str | float]] = {
    "bicubic": {"mode": "cubic", "cubic_coeff_a": -0.5},
    "bilinear": {"mode": "linear"},
}


def write(pen: Pen, pixels: ir.Value, axes: tuple[Axis, Axis], spec: PixelSpec) -> ir.Value:
    """uint8 [batch, height, width, 3] to uint8 [batch, S, S, 3].

    The resize takes the bytes: there ONNX Runtime works in Pillow's 22-bit fixed point and rounds between the passes;
    after a cast to float it does not, and is up to 22 levels off.

    Args:
        pen: Where the nodes go.
        pixels: The graph's input.
        axes: The vertical and the horizontal axis.
        spec: Gives the filter.
    """
    batch = pen.op("Gather", pen.op("Shape", pixels), pen.whole(0))
    resized = pen.op(
        "Resize", pixels, None, None, pen.row(batch, *(axis.resized for axis in axes), pen.whole(3)),
        antialias=1, exclude_outside=1, coordinate_transformation_mode="half_pixel", **_FILTERS[spec.interpolation],
    )  # fmt: skip
    if spec.resize_mode == "squash":
        return resized
    starts = pen.row(*(axis.start for axis in axes))
    ends = pen.op("Add", starts, pen.whole([axis.kept for axis in axes]))
    return pen.op("Slice", resized, starts, ends, pen.whole([1, 2]))
