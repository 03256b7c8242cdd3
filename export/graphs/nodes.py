"""What every edit of a graph is written with: nodes, constants, casts, and walks from one value to others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import DTypeLike, NDArray

HEAD, FRONT = "head_", "front_"
"""Prefixes of node names: of a class head, and of a resize in the graph. No other node's name starts so."""


def initializer(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """A new constant of a graph; its name must be free."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def make_node(
    operator: str,
    inputs: Sequence[ir.Value | None],
    output: str,
    shape: ir.Shape | Sequence[Any] | None,
    dtype: ir.DataType = ir.DataType.FLOAT,
    *,
    name: str | None = None,
    **attributes: Any,
) -> ir.Node:
    """A node with one output, not yet part of a graph.

    Args:
        operator: Of ONNX's own domain.
        inputs: Its inputs; None leaves an optional one out.
        output: Name of the output.
        shape: Shape of the output, or None where it is not known.
        dtype: Type of the output.
        name: Name of the node; None leaves it to the graph.
        attributes: The node's.
    """
    node = ir.node(operator, inputs, attributes, name=name)
    value = node.outputs[0]
    value.name, value.dtype, value.shape = output, dtype, None if shape is None else ir.Shape(shape)
    return node


def append(
    graph: ir.Graph,
    operator: str,
    inputs: Sequence[ir.Value],
    name: str,
    shape: ir.Shape | Sequence[Any],
    dtype: ir.DataType = ir.DataType.FLOAT,
    **attributes: Any,
) -> ir.Value:
    """The output, called `name`, of a class head's node that is put behind all others."""
    node = make_node(operator, inputs, name, shape, dtype, name=f"{HEAD}{name}", **attributes)
    graph.append(node)
    return node.outputs[0]


def numbers_of(value: ir.Value | None, dtype: DTypeLike = np.float64) -> NDArray[Any] | None:
    """A constant's numbers, in `dtype`; None for what is computed or fed."""
    if value is None or value.const_value is None:
        return None
    return np.asarray(value.const_value.numpy(), dtype=dtype)


def only_user(value: ir.Value) -> ir.Node | None:
    """The node that reads a value; None where it is read nowhere or more than once."""
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 else None


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


def remove_unread(graph: ir.Graph, node: ir.Node | None) -> None:
    """Removes a node and the chain of first inputs that led to it, back to what something else reads."""
    while node is not None and not any(value.uses() or value.is_graph_output() for value in node.outputs):
        source = node.inputs[0] if node.inputs else None
        graph.remove(node, safe=True)
        node = None if source is None else source.producer()


def free_names(graph: ir.Graph, names: Iterable[str]) -> None:
    """Renames inner values and weights that bear a name that is about to be given."""
    taken = set(names)
    inner = [output for node in graph.all_nodes() for output in node.outputs]
    for value in (*inner, *list(graph.initializers.values())):
        if value.name in taken:
            value.name = f"{value.name}_inner"
