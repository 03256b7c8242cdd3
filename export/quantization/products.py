"""Which products of a graph can be int8: those of a value with constant weights.

A convolution is one too, of windows: what each output position looks at, as a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from numpy.lib.stride_tricks import sliding_window_view

from invariclip.export.graphs.nodes import FRONT, numbers_of, only_user

if TYPE_CHECKING:
    from numpy.typing import NDArray

MIN_WEIGHTS = 1 << 12
"""Fewer weights gain nothing in int8."""


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
        """What its rows are, as a name: products with the same name multiply the same rows."""
        return self.value if self.window is None else f"{self.value} in {self.window}"


def products_of(model: ir.Model) -> list[Product]:
    """The products that int8 can take over, in the graph's order.

    Products of two values (attention's scores and sums) stay: they are a small part of the work, and softmax's output
    is what eight bits fit worst. So do the class head (its weights are exchanged without recalibration), a front's
    resize, the projection as an input, and convolutions by groups. A patch embedding is a product already
    (`rewrites.stem`).
    """
    products = []
    for node in model.graph:
        if node.domain not in ("", "ai.onnx") or (node.name or "").startswith(FRONT) or len(node.inputs) < 2:
            continue
        value, weights = node.inputs[0], node.inputs[1]
        if value is None or weights is None or not _is_constant(model, weights):
            continue
        rank = len(weights.const_value.shape) if weights.const_value is not None else 0
        if node.op_type == "MatMul" and rank == 2 and not _is_head(node):
            products.append(Product(node.name or "", value.name or "", weights.name or "", _added(node)))
        elif node.op_type == "Conv" and rank == 4:
            window = window_of(node)
            if window is not None:
                bias = node.inputs[2] if len(node.inputs) > 2 else None
                name = None if bias is None else bias.name
                products.append(Product(node.name or "", value.name or "", weights.name or "", name, window))
    return products


def constant(model: ir.Model, name: str) -> NDArray[np.float32]:
    """A float32 initializer's numbers."""
    numbers = numbers_of(model.graph.initializers[name], np.float32)
    if numbers is None:
        raise KeyError(name)
    return numbers


def matrix(model: ir.Model, product: Product) -> NDArray[np.float32]:
    """float32 [K, N], a product's weights as its rows meet them."""
    weights = constant(model, product.weights)
    return weights if product.window is None else np.ascontiguousarray(weights.reshape(len(weights), -1).T)


def flops(model: ir.Model, product: Product) -> int:
    """Multiplications of one image, as far as the graph's shapes tell: the measure of what a product costs."""
    node = next(node for node in model.graph if node.name == product.node)
    shape = node.outputs[0].shape
    places = () if shape is None else shape[1:-1] if product.window is None else shape[2:]
    return int(np.prod(constant(model, product.weights).shape)) * prod(side for side in places if isinstance(side, int))


def _is_constant(model: ir.Model, weights: ir.Value) -> bool:
    held = model.graph.initializers.get(weights.name or "")
    fixed = held is weights and held.const_value is not None and weights not in model.graph.inputs
    if not fixed or weights.const_value is None:
        return False
    return weights.const_value.dtype == ir.DataType.FLOAT and weights.const_value.size >= MIN_WEIGHTS


def _is_head(node: ir.Node) -> bool:
    """Whether it multiplies the finished embedding: the class head."""
    value = node.inputs[0]
    return value is not None and value.is_graph_output()


def _added(node: ir.Node) -> str | None:
    output = node.outputs[0]
    add = only_user(output)
    if add is None or add.op_type != "Add":
        return None
    other = next(value for value in add.inputs if value is not output)
    if other is None or other.const_value is None or len(other.const_value.shape) != 1:
        return None
    return other.name if only_user(other) is not None else None


@dataclass(frozen=True)
class ConvWindow:
    """What one output position of a two-dimensional convolution reads, over all channels.

    Attributes:
        kernel: Height and width.
        strides: Down and across.
        pads: Zeros above, left, below and right.
        dilations: Steps between the numbers read, down and across.
    """

    kernel: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]

    def __str__(self) -> str:
        """One name for each window."""
        parts = (self.kernel, self.strides, self.pads, self.dilations)
        return "/".join("x".join(map(str, part)) for part in parts)

    def rows(self, planes: NDArray[np.float32], most: int | None = None) -> NDArray[np.float32]:
        """[N, C, H, W] → [N · positions, C · kh · kw]: the convolution is these rows times `matrix`.

        Args:
            planes: float32.
            most: Take about so many positions of each image, on a grid; None takes all.
        """
        top, left, bottom, right = self.pads
        padded = np.pad(planes, ((0, 0), (0, 0), (top, bottom), (left, right)))
        reach = [(size - 1) * step + 1 for size, step in zip(self.kernel, self.dilations, strict=True)]
        seen = sliding_window_view(padded, reach, axis=(2, 3))
        down, across = self.strides
        chosen = seen[:, :, ::down, ::across, :: self.dilations[0], :: self.dilations[1]]
        if most is not None:
            step = max(1, round((chosen.shape[2] * chosen.shape[3] / most) ** 0.5))
            chosen = chosen[:, :, ::step, ::step]
        by_place = chosen.transpose(0, 2, 3, 1, 4, 5)
        return np.asarray(by_place.reshape(-1, planes.shape[1] * self.kernel[0] * self.kernel[1]))


def window_of(conv: ir.Node) -> ConvWindow | None:
    """What a Conv reads; None of one that int8 leaves alone: by groups, not of two dimensions, or padding by itself."""
    attributes, weights = conv.attributes, conv.inputs[1]
    if weights is None or weights.const_value is None or attributes.get_int("group", 1) != 1:
        return None
    shape = weights.const_value.numpy().shape
    if len(shape) != 4 or attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    high, wide = shape[2:]
    down, across = attributes.get_ints("strides", [1, 1])
    top, left, bottom, right = attributes.get_ints("pads", [0, 0, 0, 0])
    tall, broad = attributes.get_ints("dilations", [1, 1])
    return ConvWindow((high, wide), (down, across), (top, left, bottom, right), (tall, broad))
