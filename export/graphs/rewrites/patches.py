"""A patch embedding as one product: a convolution whose stride is its kernel does nothing else.

The pixels are cut into rows of kh · kw · 3 numbers and multiplied by a matrix, W' (x − m) + (b + Σ W' m). Taking a
level m in their middle away first is exact: the differences are whole numbers of at most 8 bits. It is there for what
follows in fewer bits, where the weights' rounding errors would otherwise all be multiplied by the mean brightness; and
an image needs no rounding at all to be uint8 with the zero point m.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from invariclip.export.graphs.rewrites.normalisation import STRIPS, initializer, pixels_of
from invariclip.export.graphs.rewrites.rewrite import RewriteNotApplicableError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from invariclip.export.graphs.rewrites.rewrite import Subject

PATCHES = "pixel_patches"
"""float32 [N, patches, kh · kw · 3]: whole numbers, pixels less their middle level."""
MIDDLE = "pixel_middle"
"""The level that was taken away, float32 []."""
SORTED, RAW = "pixel_strips_by_patch", "pixel_rows"
_NHWC_TO_NCHW = [0, 3, 1, 2]


@dataclass(frozen=True)
class _Stem:
    """What is replaced: pixels [N, H, W, 3] → Transpose → Conv → Reshape → Transpose → [N, patches, width]."""

    pixels: ir.Value
    conv: ir.Node
    end: ir.Node
    weights: NDArray[np.float64]
    bias: NDArray[np.float64]
    grid: tuple[int, int]


def unfold_patches(model: ir.Model, subject: Subject) -> str:
    """Writes the patch convolution of an image graph as a product.

    Raises:
        NotApplicableError: It is no patch convolution, or what follows it does not flatten its output into tokens.
    """
    stem = _stem(model)
    graph, (rows, columns) = model.graph, stem.grid
    width, channels, high, wide = stem.weights.shape
    middle = round(255 * float(np.mean(subject.pixels.image_mean)))
    matrix = stem.weights.transpose(2, 3, 1, 0).reshape(-1, width)
    bias = stem.bias + middle * matrix.sum(axis=0)

    def op(kind: str, name: str, *inputs: ir.Value, shape: list[int], **attributes: list[int]) -> ir.Value:
        node = ir.node(kind, inputs, attributes or None, name=name)
        value = node.outputs[0]
        batch = stem.pixels.shape[0] if stem.pixels.shape is not None else "batch"
        value.name, value.dtype, value.shape = name, ir.DataType.FLOAT, ir.Shape([batch, *shape])
        graph.insert_before(stem.conv, node)
        return value

    def constant(name: str, numbers: NDArray[np.generic]) -> ir.Value:
        return initializer(graph, name, numbers)

    long, count = high * wide * channels, rows * columns
    cut = np.array([0, rows, high, columns, wide * channels])
    strips = op("Reshape", STRIPS, stem.pixels, constant("pixel_strips_shape", cut), shape=[*map(int, cut[1:])])
    order = [rows, columns, high, wide * channels]
    sorted_ = op("Transpose", SORTED, strips, shape=order, perm=[0, 1, 3, 2, 4])
    flat = constant("pixel_patches_shape", np.array([0, count, long]))
    raw = op("Reshape", RAW, sorted_, flat, shape=[count, long])
    # last, where rows are long: engines are slow on rows of three numbers
    patches = op("Sub", PATCHES, raw, constant(MIDDLE, np.array(middle, np.float32)), shape=[count, long])
    weights = constant("patch_weight", matrix.astype(np.float32))
    product = op("MatMul", "patch_product", patches, weights, shape=[count, width])
    tokens = op("Add", "patch_tokens", product, constant("patch_bias", bias.astype(np.float32)), shape=[count, width])
    stem.end.outputs[0].replace_all_uses_with(tokens)
    _remove(graph, stem.end)
    return f"{count} patches of {long} numbers, less {middle}, times a matrix"


def patches_as_bytes(model: ir.Model) -> ir.Value | None:
    """Cuts patches from the pixels' bytes themselves, uint8 [N, patches, kh · kw · 3]: for int8, level m is zero.

    Returns:
        The bytes of `PATCHES`, before its level is taken away; None, and nothing is changed, where a front hands over
        floats.
    """
    made = {value.name: node for node in model.graph for value in node.outputs}
    floats = made[STRIPS].inputs[0]
    cast = None if floats is None else floats.producer()
    pixels = None if cast is None or cast.op_type != "Cast" else cast.inputs[0]
    if pixels is None or pixels.dtype != ir.DataType.UINT8:
        return None
    made[STRIPS].replace_input_with(0, pixels)
    for name in (STRIPS, SORTED, RAW):
        made[name].outputs[0].dtype = ir.DataType.UINT8
    made[PATCHES].outputs[0].replace_all_uses_with(made[RAW].outputs[0])
    model.graph.remove(made[PATCHES], safe=True)
    if cast is not None and not any(value.uses() for value in cast.outputs):
        model.graph.remove(cast, safe=True)
    return made[RAW].outputs[0]


def unfolded(model: ir.Model) -> str | None:
    """What is wrong with a graph whose patch convolution should be a product, or None."""
    node = next((node for node in model.graph if node.op_type == "MatMul" and _reads(node, PATCHES)), None)
    return None if node is not None else f"no product reads {PATCHES}"


def _stem(model: ir.Model) -> _Stem:
    planes = pixels_of(model.graph)
    turn = planes.producer()
    if turn is None or turn.op_type != "Transpose" or list(turn.attributes.get_ints("perm", [])) != _NHWC_TO_NCHW:
        raise RewriteNotApplicableError("its pixels do not come as planes from one transposition")
    users = [use.node for use in planes.uses()]
    if len(users) != 1 or users[0].op_type != "Conv":
        raise RewriteNotApplicableError("its pixels do not go into one convolution alone")
    conv, pixels = users[0], turn.inputs[0]
    weight = _constant(conv.inputs[1])
    if weight is None or pixels is None or not _is_patch(conv, weight.shape):
        raise RewriteNotApplicableError("its first convolution overlaps, pads or is grouped: no patch embedding")
    shape, end = conv.outputs[0].shape, _flattened(conv.outputs[0])
    if end is None or shape is None or not (isinstance(shape[2], int) and isinstance(shape[3], int)):
        raise RewriteNotApplicableError("what its first convolution answers is not flattened into tokens")
    grid, sides = (shape[2], shape[3]), None if pixels.shape is None else list(pixels.shape[1:3])
    if sides != [grid[0] * weight.shape[2], grid[1] * weight.shape[3]]:
        raise RewriteNotApplicableError("its images are no whole number of patches")
    given = _constant(conv.inputs[2] if len(conv.inputs) > 2 else None)
    bias = np.zeros(len(weight)) if given is None else given
    return _Stem(pixels, conv, end, weight, bias, grid)


def _is_patch(conv: ir.Node, shape: tuple[int, ...]) -> bool:
    numbers = conv.attributes
    plain = not any(numbers.get_ints("pads", [0])) and set(numbers.get_ints("dilations", [1])) == {1}
    alone = numbers.get_int("group", 1) == 1 and len(shape) == 4
    by_itself = numbers.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    return plain and alone and by_itself and list(numbers.get_ints("strides", [1, 1])) == list(shape[2:])


def _flattened(value: ir.Value) -> ir.Node | None:
    """The transposition that makes tokens [N, patches, width] of [N, width, rows, columns], where that is all."""
    users = [use.node for use in value.uses()]
    if len(users) != 1 or users[0].op_type not in ("Reshape", "Flatten"):
        return None
    flat = users[0].outputs[0]
    following = [use.node for use in flat.uses()]
    if len(following) != 1 or following[0].op_type != "Transpose" or flat.shape is None or len(flat.shape) != 3:
        return None
    return following[0] if list(following[0].attributes.get_ints("perm", [])) == [0, 2, 1] else None


def _constant(value: ir.Value | None) -> NDArray[np.float64] | None:
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy().astype(np.float64)


def _reads(node: ir.Node, name: str) -> bool:
    return any(value is not None and value.name == name for value in node.inputs)


def _remove(graph: ir.Graph, end: ir.Node) -> None:
    """Removes a chain from its end backwards, as far as nobody else reads it."""
    node: ir.Node | None = end
    while node is not None and not any(value.uses() or value.is_graph_output() for value in node.outputs):
        before = node.inputs[0].producer() if node.inputs[0] is not None else None
        graph.remove(node, safe=True)
        node = before
