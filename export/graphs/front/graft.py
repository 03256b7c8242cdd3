"""Sets a front before an image graph, and takes it out again to be measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import onnx_ir as ir

from invariclip.artifact.manifest import IMAGE_INPUT
from invariclip.errors import ArtifactError, InputError
from invariclip.export.graphs.front import matmul, resize
from invariclip.export.graphs.front.geometry import resize_axes
from invariclip.export.graphs.front.nodes import PREFIX, Pen

if TYPE_CHECKING:
    from invariclip.preprocessing.pixels import PixelSpec

FrontForm: TypeAlias = Literal["resize", "matmul"]
"""`resize` for ONNX Runtime's CPU provider alone; `matmul` also for OpenVINO (in float32) and TensorRT."""

FITTED = f"{PREFIX}fitted"
"""The value that ends a front: [batch, S, S, 3], uint8 after `resize`, whole numbers in float32 after `matmul`."""
_ANY_DTYPE = ("Cast", "Shape")
"""What towers do with their pixels first: the latter where they need the batch's size."""
MIN_OPSET = 18
"""The first whose Resize knows antialiasing."""


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
    if form not in get_args(FrontForm):
        raise InputError(
            f"pixels in the graph: form {form!r} is not known; available: {', '.join(get_args(FrontForm))}"
        )
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
    fitted = matmul.write(pen, pixels, axes, spec) if form == "matmul" else resize.write(pen, pixels, axes, spec)
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
    own = (node for node in model.graph if (node.name or "").startswith(PREFIX))
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
    found = None if value.shape is None else [side if isinstance(side, int) else side.value for side in value.shape]
    if value.dtype != ir.DataType.UINT8 or found is None or found[1:] != wanted:
        raise ArtifactError(
            f"pixels in the graph: input {IMAGE_INPUT!r} is {value.dtype} {found}, not UINT8 ['batch', "
            f"{', '.join(map(str, wanted))}]; a front is added once, to the tower that the pixels belong to"
        )
    return value
