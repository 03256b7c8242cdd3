"""What Pillow computes from an image's size, computed in the graph: the resize, the crop, the weights of each pass.

A weight is filter(t) over the sum of its row, in whole multiples of 2^-22, here to its last bit. Plain float32 gets
some wrong by one (28 % of images then differ from the host's somewhere, against 0.4 %), and float64 is not for
TensorRT. But a weight needs few bits at a time: the cubic at the nearest 64th of t is a whole number of 2^-19, what is
missing is small, and so is the remainder of the first of two divisions. Whole numbers stay below 2^31, because OpenVINO
has no longer ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from invariclip.export.graphs.nodes import FRONT, initializer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from invariclip.preprocessing.pixels import PixelSpec


class Pen:
    """Writes nodes before everything that stood in a graph, in the order of the calls."""

    def __init__(self, graph: ir.Graph) -> None:
        """Takes a graph of one node or more; changed in place."""
        self._graph = graph
        self._anchor = next(iter(graph))
        self._count = 0
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: str | float | Sequence[int]) -> ir.Value:
        """One node of one output; its shape and dtype are left to shape inference.

        Args:
            op_type: Operator of the default domain.
            inputs: Its inputs; None leaves an optional one out.
            attributes: Its attributes.
        """
        self._count += 1
        name = f"{FRONT}{self._count:03d}_{op_type.lower()}"
        node = ir.node(op_type, inputs, attributes, outputs=[ir.Value(name=name)], name=f"{name}_node")
        self._graph.insert_before(self._anchor, node)
        return node.outputs[0]

    def row(self, *scalars: ir.Value) -> ir.Value:
        """int64 scalars as one int64 [n]."""
        return self.op("Concat", *(self.op("Unsqueeze", scalar, self.whole([0])) for scalar in scalars), axis=0)

    def whole(self, value: int | Sequence[int]) -> ir.Value:
        """An int64 constant: a scalar for a number, [n] for a sequence."""
        return self._constant(np.array(value, dtype=np.int64))

    def real(self, value: float) -> ir.Value:
        """A float32 scalar constant."""
        return self._constant(np.array(value, dtype=np.float32))

    def _constant(self, array: np.ndarray[tuple[int, ...], np.dtype[np.int64 | np.float32]]) -> ir.Value:
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"{FRONT}constant_{len(self._constants):02d}"
            self._constants[key] = initializer(self._graph, name, array)
        return self._constants[key]


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


FIXED_POINT_BITS = 22
"""Pillow's: 32 bits less 8 for the byte and 2 for overshoot."""
LOW_BITS = 12
"""So |high| ≤ 1152 (a weight reaches 1.125 at a border) and |low| ≤ 2048: 11 bits hold both."""
SUPPORT = {"bicubic": 2, "bilinear": 1}
"""Where each filter reaches zero."""
_CUBIC_UNIT = 2.0**19


@dataclass(frozen=True)
class CropWindow:
    """The places of one side that the crop can see; int64 scalars in the graph.

    Attributes:
        first: The first place.
        end: The first place after it.
    """

    first: ir.Value
    end: ir.Value


def crop_window(pen: Pen, axis: Axis, filter_: str) -> CropWindow:
    """The window of an axis: in half places from the image's middle, nothing is seen beyond kept + support units."""
    unit = pen.op("Max", axis.given, axis.resized)
    far = pen.op("Mul", axis.given, pen.whole(axis.kept))
    far = pen.op("Add", far, pen.op("Mul", unit, pen.whole(2 * SUPPORT[filter_])))
    reach = pen.op("Add", pen.op("Div", far, axis.resized), pen.whole(1))
    end = pen.op("Sub", axis.given, pen.whole(1))
    first = pen.op("Div", pen.op("Max", pen.op("Sub", end, reach), pen.whole(0)), pen.whole(2))
    last = pen.op("Div", pen.op("Add", end, reach), pen.whole(2))
    return CropWindow(first, pen.op("Min", pen.op("Add", last, pen.whole(1)), axis.given))


def pillow_weights(pen: Pen, axis: Axis, window: CropWindow, filter_: str) -> tuple[ir.Value, ir.Value]:
    """The weights times 2^22 as 2^12·high + low: whole numbers in float32 [kept, places of the window], twice.

    Pillow's own bounds of the places need no test: they lie where the filter is zero.
    """
    apart, unit = _distances(pen, axis, window)
    if filter_ == "bilinear":
        return _split(pen, pen.op("Max", pen.op("Sub", unit, apart), pen.whole(0)), None)
    return _split(pen, *_cubic(pen, pen.op("Min", apart, pen.op("Mul", unit, pen.whole(2))), unit))


def _distances(pen: Pen, axis: Axis, window: CropWindow) -> tuple[ir.Value, ir.Value]:
    """|place - centre|, int64 [kept, places], and how much of it is one unit of the filter's argument, a scalar.

    Both count in 1 / (2·resized) of a place: the distance of place x from the centre of X is (2x+1)·resized -
    (2X+1)·given. Measured from the middle of the image the two products are small.
    """
    one, two = pen.whole(1), pen.whole(2)
    places = pen.op("Range", window.first, window.end, one)
    places = pen.op("Sub", pen.op("Mul", places, two), pen.op("Sub", axis.given, one))
    centres = pen.op("Add", pen.op("Range", pen.whole(0), pen.whole(axis.kept), one), axis.start)
    centres = pen.op("Sub", pen.op("Mul", centres, two), pen.op("Sub", axis.resized, one))
    across = pen.op("Unsqueeze", pen.op("Mul", places, axis.resized), pen.whole([0]))
    down = pen.op("Unsqueeze", pen.op("Mul", centres, axis.given), pen.whole([1]))
    return pen.op("Abs", pen.op("Sub", across, down)), pen.op("Mul", pen.op("Max", axis.given, axis.resized), two)


def _cubic(pen: Pen, apart: ir.Value, unit: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Keys' cubic with a = -0.5 in 2^-19: a whole part, int64, and the rest, float32; both [kept, places].

    The whole part is the cubic at T/64, the multiple nearest to t = apart/unit, where it is a whole number:
    T²(3T - 320) + 2^19 within 1, (64 - T)(128 - T)² within 2. The rest is the Taylor series from there, which ends.
    """
    near = pen.op("Less", apart, unit)
    T = pen.op("Round", pen.op("Div", pen.op("Mul", _float(pen, apart), pen.real(64)), _float(pen, unit)))
    square, left = pen.op("Mul", T, T), pen.op("Sub", pen.real(128), T)
    inner = pen.op("Mul", square, pen.op("Sub", pen.op("Mul", T, pen.real(3)), pen.real(320)))
    inner = pen.op("Add", inner, pen.real(_CUBIC_UNIT))
    outer = pen.op("Mul", pen.op("Sub", pen.real(64), T), pen.op("Mul", left, left))
    whole = pen.op("Where", near, inner, outer)

    off = pen.op("Sub", pen.op("Mul", apart, pen.whole(64)), pen.op("Mul", _int(pen, T), unit))
    off = pen.op("Div", pen.op("Mul", _float(pen, off), pen.real(1 / 64)), _float(pen, unit))
    t = pen.op("Mul", T, pen.real(1 / 64))
    slope = _choose(pen, near, t, (4.5, -5.0, 0.0), (-1.5, 5.0, -4.0))
    bend = _choose(pen, near, t, (4.5, -2.5), (-1.5, 2.5))
    twist = pen.op("Where", near, pen.real(1.5), pen.real(-0.5))
    series = pen.op("Add", pen.op("Mul", off, twist), bend)
    series = pen.op("Add", pen.op("Mul", off, series), slope)
    return _int(pen, whole), pen.op("Mul", pen.op("Mul", off, pen.real(_CUBIC_UNIT)), series)


def _choose(pen: Pen, near: ir.Value, t: ir.Value, inner: tuple[float, ...], outer: tuple[float, ...]) -> ir.Value:
    """One polynomial within 1 and another within 2, by their coefficients from the highest power down."""
    branches = []
    for first, *others in (inner, outer):
        value = pen.real(first)
        for other in others:
            value = pen.op("Add", pen.op("Mul", value, t), pen.real(other))
        branches.append(value)
    return pen.op("Where", near, *branches)


def _split(pen: Pen, whole: ir.Value, rest: ir.Value | None) -> tuple[ir.Value, ir.Value]:
    """(whole + rest) over its row's sum, times 2^22 and rounded half away from zero as Pillow rounds, in two parts."""
    across, first = pen.whole([1]), 2 ** (FIXED_POINT_BITS - LOW_BITS)
    total = pen.op("ReduceSum", whole, across, keepdims=1)
    parts, divisor = _float(pen, whole), _float(pen, total)
    if rest is not None:
        rests = pen.op("ReduceSum", rest, across, keepdims=1)
        parts, divisor = pen.op("Add", parts, rest), pen.op("Add", divisor, rests)
    high = pen.op("Round", pen.op("Div", pen.op("Mul", parts, pen.real(first)), divisor))
    remainder = pen.op("Sub", pen.op("Mul", whole, pen.whole(first)), pen.op("Mul", _int(pen, high), total))
    remainder = _float(pen, remainder)
    if rest is not None:
        more = pen.op("Sub", pen.op("Mul", rest, pen.real(first)), pen.op("Mul", high, rests))
        remainder = pen.op("Add", remainder, more)
    low = pen.op("Div", pen.op("Mul", remainder, pen.real(2.0**LOW_BITS)), divisor)
    sign = pen.op("Where", pen.op("Less", whole, pen.whole(0)), pen.real(-1), pen.real(1))
    low = pen.op("Floor", pen.op("Add", pen.op("Mul", low, sign), pen.real(0.5)))
    return high, pen.op("Mul", low, sign)


def _float(pen: Pen, value: ir.Value) -> ir.Value:
    return pen.op("Cast", value, to=ir.DataType.FLOAT)


def _int(pen: Pen, value: ir.Value) -> ir.Value:
    return pen.op("Cast", value, to=ir.DataType.INT64)
