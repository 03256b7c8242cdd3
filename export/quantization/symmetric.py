"""Q/DQ as TensorRT takes it: int8 on both sides of zero. Our own is uint8 with a zero point, which is a level finer.

TensorRT refuses some uint8 graphs and builds others, and what it computes for the latter is nowhere promised; so none
is handed to it. A range from low to high becomes one from -m to m, m the larger of the two, in 127 levels each way.
Patches that were cut from bytes are cast first, because TensorRT moves no uint8 around.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from invariclip.errors import ContractError

if TYPE_CHECKING:
    from collections.abc import Iterator

_MOVERS = ("Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Identity", "Gather")
_LEVELS, _BYTES = 127, 255


def to_symmetric(model: ir.Model) -> int:
    """Makes every uint8 value of a Q/DQ graph a symmetric int8 one, in place.

    Args:
        model: A graph whose uint8 values have one scale and one zero point each.

    Returns:
        How many values were changed.

    Raises:
        ContractError: A scale or a zero point is computed in the graph, or bytes take a way that cannot be cast.
    """
    changed = 0
    for node in list(model.graph):
        if node.op_type == "DequantizeLinear" and _zero(node) is not None:
            source = node.inputs[0]
            quantize = None if source is None else source.producer()
            if quantize is not None and quantize.op_type == "QuantizeLinear":
                _to_int8(model, quantize, node)
            else:
                _from_bytes(model, node)
            changed += 1
    return changed


def uint8_values(model: ir.Model) -> list[str]:
    """Names of what is dequantised from uint8; empty where TensorRT may have the graph."""
    return [node.name or "" for node in model.graph if node.op_type == "DequantizeLinear" and _zero(node) is not None]


def _zero(node: ir.Node) -> int | None:
    """The zero point of a node that dequantises uint8; None of any other."""
    point = node.inputs[2] if len(node.inputs) > 2 else None
    if point is None or point.dtype != ir.DataType.UINT8:
        return None
    return int(_numbers(point, node).reshape(()))


def _scale(node: ir.Node) -> float:
    held = node.inputs[1]
    return float(_numbers(held, node).reshape(()))


def _numbers(value: ir.Value | None, node: ir.Node) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    if value is None or value.const_value is None or value.const_value.size != 1:
        raise ContractError(f"{node.name}: its scale and zero point are not one constant each")
    return np.asarray(value.const_value.numpy(), dtype=np.float64)


def _wider(scale: float, zero: int) -> float:
    """The scale that covers the same range with levels from -127 to 127."""
    return scale * max(zero, _BYTES - zero) / _LEVELS


def _to_int8(model: ir.Model, quantize: ir.Node, dequantize: ir.Node) -> None:
    zero = _zero(dequantize)
    scale = _held(model, f"{dequantize.name}_symmetric", np.array(_wider(_scale(dequantize), zero or 0), np.float32))
    point = _held(model, f"{dequantize.name}_no_offset", np.array(0, np.int8))
    for node in (quantize, dequantize):
        node.replace_input_with(1, scale)
        node.replace_input_with(2, point)
    quantize.outputs[0].dtype = ir.DataType.INT8


def _from_bytes(model: ir.Model, dequantize: ir.Node) -> None:
    """Bytes → moved about → dequantised becomes bytes → cast → moved about → offset → int8 and back."""
    zero, scale = _zero(dequantize), _scale(dequantize)
    way = list(_way_back(dequantize))
    for mover in way:
        if len(list(mover.outputs[0].uses())) != 1:
            raise ContractError(f"{mover.name}: its bytes go elsewhere too, so they cannot be cast before it")
    first = way[-1] if way else dequantize
    start = first.inputs[0]
    if start is None or start.dtype != ir.DataType.UINT8:
        raise ContractError(f"{dequantize.name}: it is not known where its bytes come from")
    cast = _node("Cast", [start], f"{dequantize.name}_cast", start.shape, {"to": int(ir.DataType.FLOAT)})
    model.graph.insert_before(first, [cast])
    first.replace_input_with(0, cast.outputs[0])
    for mover in way:
        mover.outputs[0].dtype = ir.DataType.FLOAT
    shape = dequantize.outputs[0].shape
    moved = dequantize.inputs[0]
    offset = _held(model, f"{dequantize.name}_offset", np.array(zero, np.float32))
    width = _held(model, f"{dequantize.name}_width", np.array(scale, np.float32))
    wide = _held(model, f"{dequantize.name}_symmetric", np.array(_wider(scale, zero or 0), np.float32))
    point = _held(model, f"{dequantize.name}_no_offset", np.array(0, np.int8))
    steps = [_node("Sub", [moved, offset], f"{dequantize.name}_centred", shape)]
    if scale != 1:
        steps.append(_node("Mul", [steps[-1].outputs[0], width], f"{dequantize.name}_scaled", shape))
    quantize = _node(
        "QuantizeLinear", [steps[-1].outputs[0], wide, point], f"{dequantize.name}_int8", shape, dtype=ir.DataType.INT8
    )
    model.graph.insert_before(dequantize, [*steps, quantize])
    dequantize.replace_input_with(0, quantize.outputs[0])
    dequantize.replace_input_with(1, wide)
    dequantize.replace_input_with(2, point)


def _way_back(node: ir.Node) -> Iterator[ir.Node]:
    """Nodes that only move what `node` reads, from the nearest to the farthest."""
    value = node.inputs[0]
    while value is not None and (mover := value.producer()) is not None and mover.op_type in _MOVERS:
        yield mover
        value = mover.inputs[0]


def _held(model: ir.Model, name: str, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _node(
    operator: str,
    inputs: list[ir.Value | None],
    name: str,
    shape: ir.Shape | None,
    attributes: dict[str, int] | None = None,
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> ir.Node:
    node = ir.node(operator, inputs, attributes or {}, name=name)
    output = node.outputs[0]
    output.name, output.dtype, output.shape = f"{name}_out", dtype, shape
    return node
