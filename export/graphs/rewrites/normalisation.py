"""Mean and standard deviation into the weights of the convolutions that read the pixels.

The graph computes W * ((x / 255 − mean) / std) + b. Where the convolution does not pad, that is W' * x + b' with
W' = W / (255 std) and b' = b − Σ W mean / std, products in float64 and rounded once. Where it pads, the border is zero
*after* normalisation, so the shift has to stay: W' * (x − 255 mean) + b, whose border is zero too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from invariclip.artifact.manifest import IMAGE_INPUT
from invariclip.export.graphs.rewrites.rewrite import RewriteNotApplicableError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from invariclip.export.graphs.rewrites.rewrite import Subject

STRIPS = "pixel_strips"
"""Where pixels go that are cut into patches instead of convolved (see `patches`)."""
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
        shifted = ir.node("Add", [start, initializer(model.graph, "pixel_shift", offset)])
        shifted.outputs[0].name = "shifted_pixels"
        shifted.outputs[0].type, shifted.outputs[0].shape = start.type, start.shape
        model.graph.insert_before(convolutions[0], shifted)
        source = shifted.outputs[0]
    for number, node in enumerate(convolutions):
        _fold(model.graph, node, end, keep_shift=bool(padded), source=source, number=number)
    _remove(model.graph, start, end.value)
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
        NotApplicableError: The graph takes no pixels.
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
    seen = _Affine(np.ones(_CHANNELS), np.zeros(_CHANNELS), start)
    while True:
        users = list(seen.value.uses())
        if len(users) != 1 or users[0].idx != 0 or users[0].node.op_type not in ("Div", "Mul", "Sub", "Add"):
            return seen
        node = users[0].node
        constant = _per_channel(node.inputs[1])
        if constant is None:
            return seen
        if node.op_type in ("Div", "Mul"):
            factor = 1 / constant if node.op_type == "Div" else constant
            seen.scale, seen.shift = seen.scale * factor, seen.shift * factor
        else:
            seen.shift = seen.shift + (constant if node.op_type == "Add" else -constant)
        seen.value = node.outputs[0]


def _per_channel(value: ir.Value | None) -> NDArray[np.float64] | None:
    """A constant that is one number, or one for each channel of [N, 3, H, W]; else None."""
    if value is None or value.const_value is None:
        return None
    numbers = value.const_value.numpy().astype(np.float64)
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
    bias = _bias(node)
    if bias is not None and bias.const_value is None:
        return "its first convolution has a bias that is not constant"
    if node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return "its first convolution pads by itself"
    return None


def _bias(node: ir.Node) -> ir.Value | None:
    return node.inputs[2] if len(node.inputs) > 2 else None


def _pads(node: ir.Node) -> bool:
    return any(node.attributes.get_ints("pads", [0]))


def _fold(graph: ir.Graph, node: ir.Node, end: _Affine, *, keep_shift: bool, source: ir.Value, number: int) -> None:
    old = node.inputs[1]
    weight = old.const_value.numpy().astype(np.float64)  # type: ignore[union-attr]
    scaled = weight * end.scale.reshape(1, _CHANNELS, 1, 1)
    node.replace_input_with(0, source)
    node.replace_input_with(1, initializer(graph, f"pixel_weight_{number}", scaled.astype(np.float32)))
    if keep_shift:
        return
    extra = (weight * end.shift.reshape(1, _CHANNELS, 1, 1)).sum(axis=(1, 2, 3))
    given = _bias(node)
    if given is not None:
        extra = extra + given.const_value.numpy().astype(np.float64)  # type: ignore[union-attr]
    bias = initializer(graph, f"pixel_bias_{number}", extra.astype(np.float32))
    if len(node.inputs) > 2:
        node.replace_input_with(2, bias)
        return
    node.resize_inputs(3)
    node.replace_input_with(2, bias)


def _remove(graph: ir.Graph, start: ir.Value, end: ir.Value) -> None:
    """Removes what led from the pixels to a value that nobody reads any more."""
    while end is not start and not end.uses():
        node = end.producer()
        if node is None or node.inputs[0] is None:
            return
        end = node.inputs[0]
        graph.remove(node, safe=True)


def initializer(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    """A constant of a graph."""
    tensor = ir.tensor(array)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def _only(value: ir.Value) -> ir.Node:
    return next(iter(value.uses())).node
