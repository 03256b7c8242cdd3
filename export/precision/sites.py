"""Which products of a graph can be quantised: those of a value with constant weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from numpy.typing import NDArray

MIN_WEIGHTS = 1 << 12
"""Smaller matrices gain nothing in int8."""
_FRONT = "front_"


@dataclass(frozen=True)
class Site:
    """One product: value [..., K] @ weights [K, N].

    Attributes:
        node: The MatMul.
        value: What it multiplies, a name in the graph.
        weights: The constant's name.
        bias: The bias that an Add puts on top right after it, a name in the graph; None where there is none.
    """

    node: str
    value: str
    weights: str
    bias: str | None

    @property
    def label(self) -> str:
        """How reports call it."""
        return self.node


def sites_of(model: ir.Model) -> list[Site]:
    """The products that int8 can take over, in the graph's order.

    Products of two values (attention's scores and sums) stay: they are a small part of the work, and softmax's output
    is what eight bits fit worst. So do the class head (its weights are exchanged without recalibration), a front's
    resize, the projection as an input, and convolutions. A patch embedding is a product already (`rewrites.patches`).
    """
    found = []
    for node in model.graph:
        if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx") or (node.name or "").startswith(_FRONT):
            continue
        value, weights = node.inputs[0], node.inputs[1]
        if value is None or weights is None or not _is_matrix(model, weights) or _is_head(node):
            continue
        found.append(Site(node.name or "", value.name or "", weights.name or "", _bias(node)))
    return found


def constant(model: ir.Model, name: str) -> NDArray[np.float32]:
    """A float32 initializer's numbers."""
    value = model.graph.initializers[name].const_value
    if value is None:
        raise KeyError(name)
    return np.asarray(value.numpy(), dtype=np.float32)


def flops(model: ir.Model, site: Site) -> int:
    """Multiplications of one row: K · N, the measure of what a site costs."""
    return int(np.prod(constant(model, site.weights).shape))


def _is_matrix(model: ir.Model, weights: ir.Value) -> bool:
    held = model.graph.initializers.get(weights.name or "")
    fixed = held is weights and held.const_value is not None and weights not in model.graph.inputs
    if not fixed or weights.const_value is None:
        return False
    tensor = weights.const_value
    return tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 2 and tensor.size >= MIN_WEIGHTS


def _is_head(node: ir.Node) -> bool:
    """Whether it multiplies the finished embedding: the class head."""
    given = node.inputs[0]
    return given is not None and given.is_graph_output()


def _bias(node: ir.Node) -> str | None:
    users = list(node.outputs[0].uses())
    if len(users) != 1 or users[0].node.op_type != "Add":
        return None
    other = users[0].node.inputs[1 - users[0].idx]
    fixed = other is not None and other.const_value is not None and len(other.const_value.shape) == 1
    return other.name if fixed and other is not None and len(list(other.uses())) == 1 else None
