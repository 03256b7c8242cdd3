"""The form `matmul`: Pillow's resize and crop as matrix products, of operators that TensorRT can build.

Pillow resizes in two passes, rows first; each is a weighted sum whose weights are whole multiples of 2^-22, rounded
half up and clipped to a byte. A weight of 22 bits times a byte does not fit a float32 (24 bits), let alone
TensorFloat-32 (11 bits), which TensorRT takes for products unless told otherwise. So a weight is split,
2^22·w = 2^12·high + low, both whole and of 11 bits at most: every product is exact in either, and so is every sum
below 2^24.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from invariclip.export.graphs.front.weights import FIXED_POINT_BITS, LOW_BITS, CropWindow, seen, weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from invariclip.export.graphs.front.geometry import Axis
    from invariclip.export.graphs.front.nodes import Pen
    from invariclip.preprocessing.pixels import PixelSpec


def write(pen: Pen, pixels: ir.Value, axes: tuple[Axis, Axis], spec: PixelSpec) -> ir.Value:
    """uint8 [batch, height, width, 3] to float32 [batch, S, S, 3] of whole numbers from 0 to 255.

    Besides the weights it needs 12 bytes a pixel for the floats, and 24 more for those that the crop can see.

    Args:
        pen: Where the nodes go.
        pixels: The graph's input.
        axes: The vertical and the horizontal axis.
        spec: Gives the filter, and whether there is a crop.
    """
    # Cast comes first because TensorRT parses a uint8 input only then
    image = pen.op("Cast", pixels, to=ir.DataType.FLOAT)
    if spec.resize_mode == "shortest":
        windows = [seen(pen, axis, spec.interpolation) for axis in axes]
        firsts = pen.row(*(window.first for window in windows))
        ends = pen.row(*(window.end for window in windows))
        image = pen.op("Slice", image, firsts, ends, pen.whole([1, 2]))
    else:
        windows = [CropWindow(pen.whole(0), axis.given) for axis in axes]
    planes = pen.op("Transpose", image, perm=[0, 3, 1, 2])
    vertical, horizontal = (
        weights(pen, axis, window, spec.interpolation) for axis, window in zip(axes, windows, strict=True)
    )
    rows = _round(pen, [pen.op("MatMul", planes, pen.op("Transpose", part, perm=[1, 0])) for part in horizontal])
    square = _round(pen, [pen.op("MatMul", part, rows) for part in vertical])
    return pen.op("Transpose", square, perm=[0, 2, 3, 1])


def _round(pen: Pen, sums: Sequence[ir.Value]) -> ir.Value:
    """(2^12·high + low + 2^21) >> 22, clipped to a byte, in steps that float32 has no need to round."""
    unit = 2.0 ** (FIXED_POINT_BITS - LOW_BITS)
    carried = pen.op("Floor", pen.op("Mul", sums[1], pen.real(2.0**-LOW_BITS)))
    total = pen.op("Add", pen.op("Add", sums[0], carried), pen.real(unit / 2))
    return pen.op("Clip", pen.op("Floor", pen.op("Mul", total, pen.real(1 / unit))), pen.real(0), pen.real(255))
