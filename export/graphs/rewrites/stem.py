"""Rewrites of a traced graph's first layer: normalisation folded into its weights, a patch convolution as one product.

Normalisation: the graph computes W * ((x / 255 − mean) / std) + b. Where the convolution does not pad, that is
W' * x + b' with W' = W / (255 std) and b' = b − Σ W mean / std, products in float64 and rounded once. Where it pads,
the border is zero *after* normalisation, so the shift has to stay: W' * (x − 255 mean) + b, whose border is zero too.

Patches: a convolution whose stride is its kernel does nothing but multiply patches by a matrix. The pixels are cut into
rows of kh · kw · 3 numbers and multiplied, W' (x − m) + (b + Σ W' m). Taking a level m in their middle away first is
exact: the differences are whole numbers of at most 8 bits. It is there for what follows in fewer bits, where the
weights' rounding errors would otherwise all be multiplied by the mean brightness; and an image needs no rounding at all
to be uint8 with the zero point m.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from invariclip.artifact.manifest import IMAGE_INPUT
from invariclip.export.graphs.nodes import initializer, make_node, numbers_of, only_user, remove_unread
from invariclip.export.graphs.rewrites import RewriteNotApplicableError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from invariclip.export.graphs.rewrites import Subject


STRIPS = "pixel_strips"
"""Where pixels go that are cut into patches instead of convolved (see `unfold_patches`)."""
_CHANNELS = 3


@dataclass
class _Affine:
    """What has been done to the pixels so far: scale · x + shift, float64 [3] each, and the value that holds it."""

    scale: NDArray[np.float64]
    shift: NDArray[np.float64]
    value: ir.Value


def fold_normalisation(model: ir.Model, subject: Subject) -> str:
    """Takes the normalisation out of the image graph."""
    del subject
    start = pixels_of(model.graph)
    end = _followed(start)
    if end.value is start:
        raise RewriteNotApplicableError("its pixels are not normalised before the first convolution")
    convolutions = [use.node for use in end.value.uses()]
    for node in convolutions:
        reason = _why_not(node)
        if reason:
            raise RewriteNotApplicableError(reason)
    padded = [node for node in convolutions if _pads(node)]
    source = start
    if padded:
        offset = (end.shift / end.scale).astype(np.float32).reshape(1, _CHANNELS, 1, 1)
        shift = initializer(model.graph, "pixel_shift", offset)
        shifted = make_node("Add", [start, shift], "shifted_pixels", start.shape)
        model.graph.insert_before(convolutions[0], shifted)
        source = shifted.outputs[0]
    for number, node in enumerate(convolutions):
        _fold(model.graph, node, end, keep_shift=bool(padded), source=source, number=number)
    remove_unread(model.graph, end.value.producer())
    kind = "scale only, because it pads" if padded else "scale and shift"
    return f"{kind}, into {len(convolutions)} convolution{'s' if len(convolutions) > 1 else ''}"


def not_normalised(model: ir.Model) -> str | None:
    """What is wrong with a graph whose normalisation should be gone, or None."""
    value = pixels_of(model.graph)
    if any(user.node.outputs[0].name == STRIPS for user in value.uses()):
        return None
    kinds = {use.node.op_type for use in value.uses()}
    if kinds == {"Conv"} or (kinds == {"Add"} and {u.node.op_type for u in _only(value).outputs[0].uses()} == {"Conv"}):
        return None
    return f"pixels still go through {', '.join(sorted(kinds))}"


def pixels_of(graph: ir.Graph) -> ir.Value:
    """The pixels as float32 [N, 3, H, W]: after the cast and the transpose.

    Raises:
        RewriteNotApplicableError: The graph takes no pixels.
    """
    value = next((item for item in graph.inputs if item.name == IMAGE_INPUT), None)
    if value is None:
        raise RewriteNotApplicableError(f"the graph has no input {IMAGE_INPUT}")
    while True:
        users = list(value.uses())
        if len(users) != 1 and {user.node.op_type for user in users} - {"Shape"} != {"Cast"}:
            return value
        following = [user.node for user in users if user.node.op_type in ("Cast", "Transpose")]
        if len(following) != 1:
            return value
        value = following[0].outputs[0]


def _followed(start: ir.Value) -> _Affine:
    """Follows multiplications and additions of constants from the pixels on."""
    affine = _Affine(np.ones(_CHANNELS), np.zeros(_CHANNELS), start)
    while True:
        node = only_user(affine.value)
        if node is None or node.inputs[0] is not affine.value or node.op_type not in ("Div", "Mul", "Sub", "Add"):
            return affine
        constant = _per_channel(node.inputs[1])
        if constant is None:
            return affine
        if node.op_type in ("Div", "Mul"):
            factor = 1 / constant if node.op_type == "Div" else constant
            affine.scale, affine.shift = affine.scale * factor, affine.shift * factor
        else:
            affine.shift = affine.shift + (constant if node.op_type == "Add" else -constant)
        affine.value = node.outputs[0]


def _per_channel(value: ir.Value | None) -> NDArray[np.float64] | None:
    """A constant that is one number, or one for each channel of [N, 3, H, W]; else None."""
    numbers = numbers_of(value)
    if numbers is None:
        return None
    if numbers.size == 1:
        return np.full(_CHANNELS, numbers.item())
    if numbers.size == _CHANNELS and numbers.ndim >= 3 and numbers.shape[-3] == _CHANNELS:
        return np.asarray(numbers.reshape(_CHANNELS))
    return None


def _why_not(node: ir.Node) -> str | None:
    if node.op_type != "Conv":
        return f"its normalised pixels go into {node.op_type}, not into a convolution"
    weight = node.inputs[1]
    if weight is None or weight.const_value is None or int(node.attributes.get_int("group", 1)) != 1:
        return "its first convolution is grouped, or its weights are not constant"
    bias = _bias_of(node)
    if bias is not None and bias.const_value is None:
        return "its first convolution has a bias that is not constant"
    if node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return "its first convolution pads by itself"
    return None


def _bias_of(node: ir.Node) -> ir.Value | None:
    return node.inputs[2] if len(node.inputs) > 2 else None


def _pads(node: ir.Node) -> bool:
    return any(node.attributes.get_ints("pads", [0]))


def _fold(graph: ir.Graph, node: ir.Node, end: _Affine, *, keep_shift: bool, source: ir.Value, number: int) -> None:
    weight = numbers_of(node.inputs[1])
    assert weight is not None  # noqa: S101 - `_why_not` has seen that it is constant
    scaled = weight * end.scale.reshape(1, _CHANNELS, 1, 1)
    node.replace_input_with(0, source)
    node.replace_input_with(1, initializer(graph, f"pixel_weight_{number}", scaled.astype(np.float32)))
    if keep_shift:
        return
    extra = (weight * end.shift.reshape(1, _CHANNELS, 1, 1)).sum(axis=(1, 2, 3))
    own = numbers_of(_bias_of(node))
    bias = initializer(graph, f"pixel_bias_{number}", (extra if own is None else extra + own).astype(np.float32))
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, bias)


def _only(value: ir.Value) -> ir.Node:
    return next(iter(value.uses())).node


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
        RewriteNotApplicableError: It is no patch convolution, or its output is not flattened into tokens.
    """
    stem = _stem(model)
    graph, (rows, columns) = model.graph, stem.grid
    width, channels, high, wide = stem.weights.shape
    middle = round(255 * float(np.mean(subject.pixels.image_mean)))
    matrix = stem.weights.transpose(2, 3, 1, 0).reshape(-1, width)
    bias = stem.bias + middle * matrix.sum(axis=0)
    batch = stem.pixels.shape[0] if stem.pixels.shape is not None else "batch"

    def op(kind: str, name: str, *inputs: ir.Value, shape: list[int], **attributes: Any) -> ir.Value:
        node = make_node(kind, inputs, name, [batch, *shape], name=name, **attributes)
        graph.insert_before(stem.conv, node)
        return node.outputs[0]

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
    remove_unread(graph, stem.end)
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
    conv, pixels = only_user(planes), turn.inputs[0]
    if conv is None or conv.op_type != "Conv":
        raise RewriteNotApplicableError("its pixels do not go into one convolution alone")
    weight = numbers_of(conv.inputs[1])
    if weight is None or pixels is None or not _is_patch(conv, weight.shape):
        raise RewriteNotApplicableError("its first convolution overlaps, pads or is grouped: no patch embedding")
    shape, end = conv.outputs[0].shape, _flattened(conv.outputs[0])
    if end is None or shape is None or not (isinstance(shape[2], int) and isinstance(shape[3], int)):
        raise RewriteNotApplicableError("what its first convolution answers is not flattened into tokens")
    grid, sides = (shape[2], shape[3]), None if pixels.shape is None else list(pixels.shape[1:3])
    if sides != [grid[0] * weight.shape[2], grid[1] * weight.shape[3]]:
        raise RewriteNotApplicableError("its images are no whole number of patches")
    bias = numbers_of(_bias_of(conv))
    return _Stem(pixels, conv, end, weight, np.zeros(len(weight)) if bias is None else bias, grid)


def _is_patch(conv: ir.Node, shape: tuple[int, ...]) -> bool:
    numbers = conv.attributes
    plain = not any(numbers.get_ints("pads", [0])) and set(numbers.get_ints("dilations", [1])) == {1}
    alone = numbers.get_int("group", 1) == 1 and len(shape) == 4
    by_itself = numbers.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    return plain and alone and by_itself and list(numbers.get_ints("strides", [1, 1])) == list(shape[2:])


def _flattened(value: ir.Value) -> ir.Node | None:
    """The transposition that makes tokens [N, patches, width] of [N, width, rows, columns], where that is all."""
    flatten = only_user(value)
    if flatten is None or flatten.op_type not in ("Reshape", "Flatten"):
        return None
    flat = flatten.outputs[0]
    turn = only_user(flat)
    if turn is None or turn.op_type != "Transpose" or flat.shape is None or len(flat.shape) != 3:
        return None
    return turn if list(turn.attributes.get_ints("perm", [])) == [0, 2, 1] else None


def _reads(node: ir.Node, name: str) -> bool:
    return any(value is not None and value.name == name for value in node.inputs)
