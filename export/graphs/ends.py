"""Nodes and constants at a graph's end: what both kinds of class head are written and taken away with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

HEAD = "head_"
"""Every node of a class head is named so."""


def downstream(value: ir.Value) -> set[ir.Node]:
    """Every node that a value reaches."""
    reached: set[ir.Node] = set()
    waiting = list(value.consumers())
    while waiting:
        node = waiting.pop()
        if node not in reached:
            reached.add(node)
            waiting += [user for output in node.outputs for user in output.consumers()]
    return reached


def free_names(graph: ir.Graph, names: Iterable[str]) -> None:
    """Renames inner values and weights that bear a name that is about to be given."""
    wanted = set(names)
    inner = [output for node in graph.all_nodes() for output in node.outputs]
    for value in (*inner, *list(graph.initializers.values())):
        if value.name in wanted:
            value.name = f"{value.name}_inner"


def constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """A new initializer; its name must be free."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def append(
    graph: ir.Graph,
    operator: str,
    inputs: Sequence[ir.Value],
    name: str,
    shape: ir.Shape | Sequence[Any],
    attributes: Mapping[str, Any] | None = None,
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> ir.Value:
    """A node behind all others; its one output gets the name, the shape and the dtype."""
    node = ir.node(operator, inputs, dict(attributes or {}), name=f"{HEAD}{name}")
    (output,) = node.outputs
    output.name, output.shape, output.type = name, ir.Shape(shape), ir.TensorType(dtype)
    graph.append(node)
    return output
