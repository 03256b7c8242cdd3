"""Names for what merges compute, so that a quantiser can be told to leave it alone.

An int8 residual stream would cost far more than the product that moves tokens is worth, and int8 similarities would
pair other tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

MERGE_NODES = "merge_"
"""What the names of those nodes and of their outputs start with."""


def name_merges(model: ir.Model) -> tuple[str, ...]:
    """Names the products of every merge: `merge_0_similarity`, `merge_0_move`, `merge_1_similarity` and so on.

    Args:
        model: A tower's graph; changed in place.

    Returns:
        The names, in the graph's order.
    """
    names: list[str] = []
    merge = -1
    for node in model.graph:
        if node.op_type != "MatMul":
            continue
        if any(use.node.op_type == "ArgMax" for use in node.outputs[0].uses()):
            merge, part = merge + 1, "similarity"
        elif _is_move(node):
            part = "move"
        else:
            continue
        node.name = node.outputs[0].name = f"{MERGE_NODES}{merge}_{part}"
        names.append(node.name)
    return tuple(names)


def _is_move(node: ir.Node) -> bool:
    """Whether the left side is places divided by how many tokens go there."""
    value = node.inputs[0]
    for kinds in (("Div",), ("Mul", "Cast"), ("Cast", "Equal"), ("Equal",)):
        maker = None if value is None else value.producer()
        if maker is None or maker.op_type not in kinds:
            return False
        if maker.op_type == "Equal":
            return True
        value = maker.inputs[0]
    return False
