"""float16 weights, for size: half the file, float32 arithmetic."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from invariclip.errors import ContractError

MIN_WEIGHTS = 1 << 10
"""Smaller tensors stay float32: they are nothing of the size, and biases and norms cost the most for it."""
_LARGEST = float(np.finfo(np.float16).max)


def halve(model: ir.Model) -> int:
    """Stores every large float32 weight as float16 with a Cast behind it, in place.

    Args:
        model: A float32 graph.

    Returns:
        How many weights were halved.

    Raises:
        ContractError: A weight is too large for float16.
    """
    graph, count = model.graph, 0
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < MIN_WEIGHTS or value in graph.inputs:
            continue
        numbers = np.asarray(tensor.numpy())
        if np.abs(numbers).max() > _LARGEST:
            raise ContractError(f"{value.name}: holds numbers above {_LARGEST:g}, which float16 does not have")
        name, users = value.name or "", list(value.uses())
        if not users:
            continue
        graph.initializers.pop(name)
        half = ir.tensor(numbers.astype(np.float16), name=f"{name}_float16")
        held = ir.Value(
            name=f"{name}_float16", type=ir.TensorType(half.dtype), shape=ir.Shape(numbers.shape), const_value=half
        )
        graph.register_initializer(held)
        cast = ir.node("Cast", [held], {"to": int(ir.DataType.FLOAT)}, name=f"{name}_cast")
        cast.outputs[0].name, cast.outputs[0].dtype, cast.outputs[0].shape = (
            f"{name}_float32",
            ir.DataType.FLOAT,
            held.shape,
        )
        graph.insert_before(graph[0], [cast])
        for use in users:
            use.node.replace_input_with(use.idx, cast.outputs[0])
        count += 1
    return count
