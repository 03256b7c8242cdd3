"""A pen that writes nodes at the head of a graph; whoever holds it need not know onnx_ir."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Sequence

PREFIX = "front_"
"""Every node, value and initializer of a front is named so, and nothing else in a graph is."""


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
        name = f"{PREFIX}{self._count:03d}_{op_type.lower()}"
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
            name = f"{PREFIX}constant_{len(self._constants):02d}"
            tensor = ir.tensor(array, name=name)
            value = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self._graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]
