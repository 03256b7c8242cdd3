"""Which products of a graph can be quantised: those of a value with constant weights."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from invariclip.export.quantization.windows import ConvWindow, window_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

MIN_WEIGHTS = 1 << 12
"""Fewer weights gain nothing in int8."""
_FRONT = "front_"


@dataclass(frozen=True)
class Product:
    """One product: value [..., K] @ weights [K, N], or a convolution, which is one of windows of its value.

    Attributes:
        node: The MatMul or Conv.
        value: What it multiplies, a name in the graph.
        weights: The constant's name.
        bias: What an Add puts on top right after a MatMul, or a Conv's own bias, a name in the graph; None where there
            is none.
        window: What a Conv looks at; None of a MatMul.
    """

    node: str
    value: str
    weights: str
    bias: str | None
    window: ConvWindow | None = None

    @property
    def reading(self) -> str:
        """What its rows are, as a name: sites with the same name multiply the same rows."""
        return self.value if self.window is None else f"{self.value} in {self.window}"


def sites_of(model: ir.Model) -> list[Product]:
    """The products that int8 can take over, in the graph's order.

    Products of two values (attention's scores and sums) stay: they are a small part of the work, and softmax's output
    is what eight bits fit worst. So do the class head (its weights are exchanged without recalibration), a front's
    resize, the projection as an input, and convolutions by groups. A patch embedding is a product already
    (`rewrites.patches`).
    """
    found = []
    for node in model.graph:
        if node.domain not in ("", "ai.onnx") or (node.name or "").startswith(_FRONT) or len(node.inputs) < 2:
            continue
        value, weights = node.inputs[0], node.inputs[1]
        if value is None or weights is None or not _is_constant(model, weights):
            continue
        rank = len(weights.const_value.shape) if weights.const_value is not None else 0
        if node.op_type == "MatMul" and rank == 2 and not _is_head(node):
            found.append(Product(node.name or "", value.name or "", weights.name or "", _added(node)))
        elif node.op_type == "Conv" and rank == 4:
            window = window_of(node)
            if window is not None:
                bias = node.inputs[2] if len(node.inputs) > 2 else None
                name = None if bias is None else bias.name
                found.append(Product(node.name or "", value.name or "", weights.name or "", name, window))
    return found


def constant(model: ir.Model, name: str) -> NDArray[np.float32]:
    """A float32 initializer's numbers."""
    value = model.graph.initializers[name].const_value
    if value is None:
        raise KeyError(name)
    return np.asarray(value.numpy(), dtype=np.float32)


def matrix(model: ir.Model, site: Product) -> NDArray[np.float32]:
    """float32 [K, N], a site's weights as its rows meet them."""
    weights = constant(model, site.weights)
    return weights if site.window is None else np.ascontiguousarray(weights.reshape(len(weights), -1).T)


def flops(model: ir.Model, site: Product) -> int:
    """Multiplications of one image, as far as the graph's shapes tell: the measure of what a site costs."""
    node = next(node for node in model.graph if node.name == site.node)
    shape = node.outputs[0].shape
    places = () if shape is None else shape[1:-1] if site.window is None else shape[2:]
    return int(np.prod(constant(model, site.weights).shape)) * prod(side for side in places if isinstance(side, int))


def _is_constant(model: ir.Model, weights: ir.Value) -> bool:
    held = model.graph.initializers.get(weights.name or "")
    fixed = held is weights and held.const_value is not None and weights not in model.graph.inputs
    if not fixed or weights.const_value is None:
        return False
    return weights.const_value.dtype == ir.DataType.FLOAT and weights.const_value.size >= MIN_WEIGHTS


def _is_head(node: ir.Node) -> bool:
    """Whether it multiplies the finished embedding: the class head."""
    given = node.inputs[0]
    return given is not None and given.is_graph_output()


def _added(node: ir.Node) -> str | None:
    users = list(node.outputs[0].uses())
    if len(users) != 1 or users[0].node.op_type != "Add":
        return None
    other = users[0].node.inputs[1 - users[0].idx]
    fixed = other is not None and other.const_value is not None and len(other.const_value.shape) == 1
    return other.name if fixed and other is not None and len(list(other.uses())) == 1 else None
