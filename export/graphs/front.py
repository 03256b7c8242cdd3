"""Pixels in the graph: a front that takes uint8 images of any size and resizes and crops them as Pillow does.

`resize` is ONNX's Resize on the bytes themselves, then a crop. `matmul` is Pillow's resize and crop as matrix products,
of operators that TensorRT can build: Pillow resizes in two passes, rows first; each is a weighted sum whose weights are
whole multiples of 2^-22, rounded half up and clipped to a byte. A weight of 22 bits times a byte does not fit a float32
(24 bits), let alone TensorFloat-32 (11 bits), which TensorRT takes for products unless told otherwise. So a weight is
split, 2^22·w = 2^12·high + low, both whole and of 11 bits at most: every product is exact in either, and so is every
sum below 2^24.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import onnx_ir as ir

from invariclip.artifact.manifest import IMAGE_INPUT
from invariclip.errors import ArtifactError, InputError
from invariclip.export.graphs.front_weights import (
    FIXED_POINT_BITS,
    LOW_BITS,
    CropWindow,
    Pen,
    crop_window,
    pillow_weights,
    resize_axes,
)
from invariclip.export.graphs.nodes import FRONT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from invariclip.export.graphs.front_weights import Axis
    from invariclip.preprocessing.pixels import PixelSpec

TALLEST = 100
"""Above this, Pillow shortens a tall image by columns first, which no front does: up to 28 levels off."""
FrontForm: TypeAlias = Literal["resize", "matmul"]
"""`resize` for ONNX Runtime's CPU provider alone; `matmul` also for OpenVINO (in float32) and TensorRT."""
FITTED = f"{FRONT}fitted"
"""The value that ends a front: [batch, S, S, 3], uint8 after `resize`, whole numbers in float32 after `matmul`."""
_ANY_DTYPE = ("Cast", "Shape")
"""What towers do with their pixels first: the latter where they need the batch's size."""
MIN_OPSET = 18
"""The first whose Resize knows antialiasing."""
_FILTERS: dict[str, dict[str, str | float]] = {
    "bicubic": {"mode": "cubic", "cubic_coeff_a": -0.5},
    "bilinear": {"mode": "linear"},
}


@dataclass(frozen=True)
class FrontBounds:
    """What a front keeps on an image of any size and content; the reference is `preprocessing.pixels`.

    Attributes:
        max_levels: Largest difference of any channel of any pixel, in levels of 255.
        share_off: Share of one image's channel values that differ at all.
    """

    max_levels: int
    share_off: float


BOUNDS = {
    ("matmul", "bicubic"): FrontBounds(1, 0.01),
    ("matmul", "bilinear"): FrontBounds(1, 0.01),
    ("resize", "bicubic"): FrontBounds(2, 0.15),
    ("resize", "bilinear"): FrontBounds(2, 0.50),
}
"""By form and `PixelSpec.interpolation`, with room over the worst that was found.

Of a thousand random images each, `matmul` was equal to the host on 99.6 % (bicubic) and on all (bilinear), and else a
few values in a million were one level off. `resize` was equal on 53 % and 63 %; the worst had 0.7 % and 22 % of their
values off. A search among small ratios of whole numbers, which put many sums halfway between two levels, found 7 % of a
image of waves (28 × 32 to 32) and 35 % of one in black and white (16 × 20 to 40). They hold for images up to
`TALLEST` times as tall as wide.
"""


def require_form(form: str) -> None:
    """Makes sure that a form is one of `FrontForm`.

    Raises:
        InputError: It is not.
    """
    if form not in get_args(FrontForm):
        raise InputError(
            f"pixels in the graph: form {form!r} is not known; available: {', '.join(get_args(FrontForm))}"
        )


def add_front(model: ir.Model, spec: PixelSpec, form: FrontForm) -> None:
    """Makes an image graph take RGB images of any size, resized and cropped as the host's Pillow does.

    Afterwards the input `pixels` is uint8 [batch, height, width, 3] with all three free; everything else is computed
    from its shape. An image that has the tower's size already passes unchanged. How near the result is to the host's,
    and for which images, is at `BOUNDS`.

    An engine must run `matmul` in float32: in bfloat16, which OpenVINO takes by default on some CPUs, a third of the
    values are up to 2 levels off. Products in TensorFloat-32 lose nothing, since their operands fit its 11 bits.
    TensorRT needs a profile of `pixels` alone: no shape is an input.

    Args:
        model: A graph with the input `pixels`, uint8 [batch, S, S, 3], opset 18 or later. Changed in place.
        spec: How its tower wants images: `shortest` with a square tower, or `squash`.
        form: See `FrontForm`. TensorRT refuses `resize`, and OpenVINO answers it wrongly, without an error.

    Raises:
        InputError: The form is unknown, or the spec is one that a front cannot follow exactly.
        ArtifactError: The graph has no such input, has a front already, or its opset is too old.
    """
    require_form(form)
    _check_spec(spec)
    old = _image_input(model, spec)
    graph = model.graph
    batch = "batch" if old.shape is None else old.shape[0]
    pixels = ir.Value(
        name=IMAGE_INPUT, shape=ir.Shape([batch, "height", "width", 3]), type=ir.TensorType(ir.DataType.UINT8)
    )
    graph.inputs[graph.inputs.index(old)] = pixels
    pen = Pen(graph)
    axes = resize_axes(pen, pixels, spec)
    fitted = (write_products if form == "matmul" else write_resize)(pen, pixels, axes, spec)
    fitted.name = FITTED
    if form == "matmul":
        # Who asks for no bytes takes the floats as they are: TensorRT knows uint8 at a graph's edge only
        for node, place in tuple(old.uses()):
            if node.op_type in _ANY_DTYPE:
                node.replace_input_with(place, fitted)
        if old.uses():
            fitted = pen.op("Cast", fitted, to=ir.DataType.UINT8)
    old.replace_all_uses_with(fitted, replace_graph_outputs=True)


def front_alone(model: ir.Model) -> ir.Model:
    """The front of a graph as a graph of its own: `pixels` to `front_fitted`, as engines can run it.

    Args:
        model: A graph that went through `add_front`; left as it is.

    Raises:
        ArtifactError: The graph has no front.
    """
    if not any(value.name == FITTED for node in model.graph for value in node.outputs):
        raise ArtifactError("this graph has no front; export it with pixels in the graph")
    graph = ir.convenience.extract(model.graph, [IMAGE_INPUT], [FITTED])
    return ir.Model(graph, ir_version=model.ir_version)


def form_of(model: ir.Model) -> FrontForm:
    """The form of a graph's front, read off its nodes: an ONNX Resize of the front's own, or products.

    Args:
        model: A graph that went through `add_front`, or what `front_alone` made of it.
    """
    own = (node for node in model.graph if (node.name or "").startswith(FRONT))
    return "resize" if any(node.op_type == "Resize" for node in own) else "matmul"


def _check_spec(spec: PixelSpec) -> None:
    if spec.resize_mode == "longest" or (spec.resize_mode == "shortest" and spec.image_size[0] != spec.image_size[1]):
        raise InputError(
            f"pixels in the graph: resize mode {spec.resize_mode!r} to {spec.image_size} rounds a float64 ratio, which "
            "no portable graph can follow; available: 'shortest' to a square, 'squash'; or resize on the host"
        )


def _image_input(model: ir.Model, spec: PixelSpec) -> ir.Value:
    opset = model.opset_imports.get("", 0)
    if opset < MIN_OPSET:
        raise ArtifactError(f"pixels in the graph: opset {opset} is too old; export with opset {MIN_OPSET} or later")
    for value in model.graph.inputs:
        if value.name == IMAGE_INPUT:
            break
    else:
        names = ", ".join(str(value.name) for value in model.graph.inputs)
        raise ArtifactError(f"pixels in the graph: no input {IMAGE_INPUT!r}; the graph's inputs: {names}")
    wanted = [*spec.image_size, 3]
    shape = None if value.shape is None else [side if isinstance(side, int) else side.value for side in value.shape]
    if value.dtype != ir.DataType.UINT8 or shape is None or shape[1:] != wanted:
        raise ArtifactError(
            f"pixels in the graph: input {IMAGE_INPUT!r} is {value.dtype} {shape}, not UINT8 ['batch', "
            f"{', '.join(map(str, wanted))}]; a front is added once, to the tower that the pixels belong to"
        )
    return value


def write_resize(pen: Pen, pixels: ir.Value, axes: tuple[Axis, Axis], spec: PixelSpec) -> ir.Value:
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


def write_products(pen: Pen, pixels: ir.Value, axes: tuple[Axis, Axis], spec: PixelSpec) -> ir.Value:
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
        windows = [crop_window(pen, axis, spec.interpolation) for axis in axes]
        firsts = pen.row(*(window.first for window in windows))
        ends = pen.row(*(window.end for window in windows))
        image = pen.op("Slice", image, firsts, ends, pen.whole([1, 2]))
    else:
        windows = [CropWindow(pen.whole(0), axis.given) for axis in axes]
    planes = pen.op("Transpose", image, perm=[0, 3, 1, 2])
    vertical, horizontal = (
        pillow_weights(pen, axis, window, spec.interpolation) for axis, window in zip(axes, windows, strict=True)
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
