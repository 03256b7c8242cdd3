"""How many floating-point operations a graph needs: its products alone, counted from the shapes.

A product of [M, K] and [K, N] is 2·M·K·N operations, a convolution 2 per output value and weight that it meets. What is
between products (norms, softmax, activations) is under a percent and left out, as published counts do.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import onnx

from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from onnx import NodeProto

COUNTED = ("Conv", "Gemm", "MatMul")
SMALL = 1024
"""Values up to which an initializer may be a shape or an axis, which inference has to read."""


def graph_flops(path: Path, batch: int) -> float:
    """Operations of one run.

    Args:
        path: An ONNX file whose first dimension is the batch.
        batch: Rows of the run.

    Raises:
        InputError: `batch` is below 1, or the shape of a product's operand cannot be found out.
    """
    if batch < 1:
        raise InputError(f"batch must be at least 1, not {batch}")
    model = onnx.load(str(path), load_external_data=False)
    weights = {value.name for value in model.graph.initializer}  # older files list them among the inputs too
    images = [value for value in model.graph.input if value.name not in weights]
    names = {value.type.tensor_type.shape.dim[0].dim_param for value in images}
    written = {value.name: _shape(value, {name: batch for name in names if name}) for value in model.graph.value_info}
    for value in images:
        value.type.tensor_type.shape.dim[0].dim_value = batch
    for value in (*model.graph.output, *model.graph.value_info):
        value.type.tensor_type.ClearField("shape")  # written for any batch; found anew for this one
    del model.graph.value_info[:]
    _drop_weights(model.graph)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    found = {value.name: _shape(value) for value in (*inferred.value_info, *inferred.input, *inferred.output)}
    # what inference cannot follow, such as a shape that is computed on the way, the file may say itself
    shapes = written | {name: shape for name, shape in found.items() if shape and all(side > 0 for side in shape)}
    shapes.update({value.name: tuple(value.dims) for value in inferred.initializer})
    return float(sum(_of(node, shapes) for node in inferred.node if node.op_type in COUNTED))


def _drop_weights(graph: onnx.GraphProto) -> None:
    """Turns weights into inputs of their shape: inference needs no more, and copying them would take seconds."""
    small = [value for value in graph.initializer if prod(value.dims) <= SMALL]
    for value in graph.initializer:
        if prod(value.dims) > SMALL:
            graph.input.append(onnx.helper.make_tensor_value_info(value.name, value.data_type, list(value.dims)))
    del graph.initializer[:]
    graph.initializer.extend(small)


def _of(node: NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    given, answer = [_known(node, name, shapes) for name in node.input[:2]], _known(node, node.output[0], shapes)
    if node.op_type == "Conv":  # weights [out, in / groups, *kernel]
        return 2 * prod(answer) * prod(given[1][1:])
    if node.op_type == "Gemm":
        turned = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        return 2 * prod(answer) * given[0][0 if turned else 1]
    return 2 * prod(answer) * given[0][-1]


def _known(node: NodeProto, name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is None or any(side < 1 for side in shape):
        raise InputError(f"{node.op_type} {node.name or node.output[0]}: the shape of {name} cannot be found out")
    return shape


def _shape(value: onnx.ValueInfoProto, named: Mapping[str, int] | None = None) -> tuple[int, ...]:
    """Sides, by name where they have one; 0 where one is not known."""
    return tuple(dim.dim_value or (named or {}).get(dim.dim_param, 0) for dim in value.type.tensor_type.shape.dim)
