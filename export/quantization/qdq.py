"""int8 in a graph: QuantizeLinear and DequantizeLinear around the products that are chosen.

The form is ONNX's own (Q/DQ), which ONNX Runtime, OpenVINO and TensorRT all read: a value is uint8 with one scale and a
zero point, from the range that it had on the calibration images; weights are int8 with a scale for each output. What
rounding the weights does to the mean of the output is known, and goes into the bias.

TensorRT refuses some uint8 graphs and builds others, and what it computes for the latter is nowhere promised; so none
is handed to it. `to_symmetric` makes int8 on both sides of zero of them, which is a level coarser: a range from low to
high becomes one from -m to m, m the larger of the two, in 127 levels each way. Patches that were cut from bytes are
cast first, because TensorRT moves no uint8 around.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from invariclip.console import silent
from invariclip.errors import ContractError
from invariclip.export.graphs.nodes import initializer, make_node, numbers_of
from invariclip.export.graphs.rewrites.stem import MIDDLE, PATCHES, patches_as_bytes
from invariclip.export.quantization.products import constant, matrix
from invariclip.export.quantization.ranges import clipped, step
from invariclip.export.quantization.rounding import compensated, factors, nearest, sharing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from invariclip.console import Progress
    from invariclip.export.quantization.products import Product
    from invariclip.export.quantization.ranges import Flow

_MOVERS = ("Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Identity", "Gather")
_LEVELS, _BYTES = 127, 255


def _named(
    operator: str,
    inputs: list[ir.Value | None],
    name: str,
    shape: ir.Shape | None,
    dtype: ir.DataType = ir.DataType.FLOAT,
    **attributes: int,
) -> ir.Node:
    return make_node(operator, inputs, f"{name}_out", shape, dtype, name=name, **attributes)


@dataclass(frozen=True)
class QuantizationRecipe:
    """How a graph is quantised.

    Attributes:
        smoothing: α of SmoothQuant for values that come from a LayerNormalization; None leaves them as they are.
        compensate: Round weights by GPTQ rather than to the nearest.
        clip: Cut off a value's outermost numbers where that errs less, see `ranges.clipped`.
    """

    smoothing: float | None = None
    compensate: bool = True
    clip: bool = False


@dataclass(frozen=True)
class Rounded:
    """One product's weights in int8.

    Attributes:
        levels: int8 [K, N].
        scales: float32 [N].
        correction: float64 [N], what is added to the bias so that the mean output stays.
        divisor: float32 [K] that the value is divided by first, or None.
    """

    levels: NDArray[np.int8]
    scales: NDArray[np.float32]
    correction: NDArray[np.float64]
    divisor: NDArray[np.float32] | None


def rounded(
    model: ir.Model,
    products: Sequence[Product],
    flows: Mapping[str, Flow],
    recipe: QuantizationRecipe,
    *,
    progress: Progress = silent,
) -> dict[str, Rounded]:
    """Every product's weights in int8, by the product's node.

    Args:
        model: The float32 graph.
        products: Its products.
        flows: Of every value that they read.
        recipe: How.
        progress: `console.bar` or `console.silent`.
    """
    divisors: dict[str, NDArray[np.float32]] = {}
    if recipe.smoothing is not None:
        for value in smoothable(model, products):
            matrices = [matrix(model, product) for product in products if product.value == value]
            divisors[value] = factors(flows[value].peaks, matrices, recipe.smoothing)
    int8: dict[str, Rounded] = {}
    shares: dict[str, NDArray[np.float32]] = {}
    for product in progress(list(products), total=len(products), desc="weights to int8"):
        divisor, flow = divisors.get(product.value), flows[product.reading]
        weights, mean = matrix(model, product), flow.mean
        if divisor is not None:
            weights, mean = weights * divisor[:, None], mean / divisor
        if recipe.compensate:
            if product.reading not in shares:
                moments = flow.moments if divisor is None else flow.moments / np.outer(divisor, divisor)
                shares[product.reading] = sharing(moments)
            levels, scales = compensated(weights, shares[product.reading])
        else:
            levels, scales = nearest(weights)
        off = weights.astype(np.float64) - levels.astype(np.float64) * scales
        int8[product.node] = Rounded(levels, scales, mean @ off, divisor)
    return int8


def smoothable(model: ir.Model, products: Sequence[Product]) -> list[str]:
    """Values that SmoothQuant may divide: of norms whose output goes into quantised matrix products alone."""
    free = [node for node in model.graph if node.op_type == "LayerNormalization" and _is_free(node, products)]
    return [node.outputs[0].name or "" for node in free]


def ranges_of(
    model: ir.Model,
    products: Sequence[Product],
    flows: Mapping[str, Flow],
    weights: Mapping[str, Rounded],
    *,
    clip: bool,
) -> dict[str, tuple[float, float]]:
    """What the levels of each value go from and to, after the division of smoothing.

    Args:
        model: The float32 graph.
        products: Its products.
        flows: Of every value that they read.
        weights: From `rounded`.
        clip: See `QuantizationRecipe`.
    """
    ranges: dict[str, tuple[float, float]] = {}
    for product in products:
        if product.value in ranges:
            continue
        flow, divisor = flows[product.reading], weights[product.node].divisor
        if product.value == PATCHES:  # bytes less a byte: a level each, and nothing is rounded
            middle = float(constant(model, MIDDLE))
            ranges[product.value] = -middle, 255 - middle
            continue
        low, high, rows = flow.low, flow.high, flow.sample.rows
        if divisor is not None:
            # the range after the division is bounded by the channels' peaks
            peak, least = float((flow.peaks / divisor).max()), float(divisor.min())
            low, high, rows = max(-peak, low / least), min(peak, high / least), rows / divisor
        ranges[product.value] = clipped(rows, low, high) if clip else (low, high)
    return ranges


def quantise(
    model: ir.Model,
    products: Sequence[Product],
    ranges: Mapping[str, tuple[float, float]],
    weights: Mapping[str, Rounded],
) -> None:
    """Puts int8 into a graph, in place.

    Args:
        model: The float32 graph.
        products: Those that become int8; the others stay float32.
        ranges: From `ranges_of`.
        weights: From `rounded`.
    """
    nodes = {node.name: node for node in model.graph}
    by_value: dict[str, list[Product]] = {}
    for product in products:
        by_value.setdefault(product.value, []).append(product)
    for value, group in by_value.items():
        divisor = weights[group[0].node].divisor
        source = nodes[group[0].node].inputs[0]
        if source is None:
            continue
        if divisor is not None:
            _divide_norm(model, source, divisor, keep=[nodes[s.node] for s in group])
        low, high = ranges[value]
        levels = _through_eight_bits(model, source, low, high, nodes[group[0].node])
        for product in group:
            _take(model, nodes[product.node], product, levels, weights[product.node])


def _through_eight_bits(model: ir.Model, source: ir.Value, low: float, high: float, before: ir.Node) -> ir.Value:
    """The value rounded to uint8 levels from low to high."""
    scale, zero = step(low, high)
    name = source.name
    size = initializer(model.graph, f"{name}_scale", np.array(scale, dtype=np.float32))
    point = initializer(model.graph, f"{name}_zero_point", np.array(zero, dtype=np.uint8))
    levels = patches_as_bytes(model) if name == PATCHES else None
    if levels is None:
        q = make_node(
            "QuantizeLinear", [source, size, point], f"{name}_uint8", source.shape, ir.DataType.UINT8,
            name=f"{name}_quantize",
        )  # fmt: skip
        model.graph.insert_before(before, [q])
        levels = q.outputs[0]
    dq = make_node(
        "DequantizeLinear", [levels, size, point], f"{name}_rounded", source.shape, name=f"{name}_dequantize"
    )
    model.graph.insert_before(before, [dq])
    return dq.outputs[0]


def _take(model: ir.Model, node: ir.Node, product: Product, value: ir.Value, weights: Rounded) -> None:
    """Lets a product read the rounded value and int8 weights."""
    old, levels, axis = node.inputs[1], weights.levels, 1
    if product.window is not None:
        axis, levels = 0, np.ascontiguousarray(levels.T).reshape(constant(model, product.weights).shape)
    held = initializer(model.graph, f"{product.node}_int8", levels)
    scales = initializer(model.graph, f"{product.node}_scales", weights.scales)
    zeros = initializer(model.graph, f"{product.node}_zeros", np.zeros(len(weights.scales), np.int8))
    dq = make_node(
        "DequantizeLinear", [held, scales, zeros], f"{product.node}_weights_rounded", levels.shape,
        name=f"{product.node}_weights", axis=axis,
    )  # fmt: skip
    model.graph.insert_before(node, [dq])
    node.replace_input_with(0, value)
    node.replace_input_with(1, dq.outputs[0])
    if old is not None and not list(old.uses()):
        model.graph.initializers.pop(product.weights)
    if product.window is None:
        _correct(model, node, product, weights.correction)
    else:
        _correct_conv(model, node, product, weights.correction)


def _correct_conv(model: ir.Model, node: ir.Node, product: Product, correction: NDArray[np.float64]) -> None:
    """The mean's shift into a convolution's own bias. Windows over the border see fewer numbers, and shift less."""
    held = 0.0 if product.bias is None else constant(model, product.bias)
    moved = initializer(model.graph, f"{product.node}_bias", (held + correction).astype(np.float32))
    old = node.inputs[2] if len(node.inputs) > 2 else None
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, moved)
    if old is not None and product.bias is not None and not list(old.uses()):
        model.graph.initializers.pop(product.bias)


def _correct(model: ir.Model, node: ir.Node, product: Product, correction: NDArray[np.float64]) -> None:
    """The mean's shift into the bias, or into a new one."""
    if product.bias is not None:
        held = model.graph.initializers[product.bias]
        moved = constant(model, product.bias) + correction
        held.const_value = ir.tensor(moved.astype(np.float32), name=product.bias)
        return
    output = node.outputs[0]
    bias = initializer(model.graph, f"{product.node}_correction", correction.astype(np.float32))
    users = list(output.uses())
    add = make_node("Add", [output, bias], f"{output.name}_corrected", output.shape, name=f"{product.node}_corrected")
    model.graph.insert_after(node, [add])
    for use in users:
        use.node.replace_input_with(use.idx, add.outputs[0])


def _divide_norm(model: ir.Model, value: ir.Value, divisor: NDArray[np.float32], keep: Sequence[ir.Node]) -> None:
    """The division of a LayerNormalization's output, folded into its own scale and bias; every user is in `keep`."""
    norm = value.producer()
    if norm is None or not all(use.node in keep for use in value.uses()):
        raise ContractError(
            f"{value.name} serves others than the products that are quantised; quantise without smoothing"
        )
    for place in (1, 2):
        numbers = numbers_of(norm.inputs[place], np.float32) if place < len(norm.inputs) else None
        if numbers is not None:
            smooth = initializer(model.graph, f"{value.name}_smooth_{place}", numbers / divisor)
            norm.replace_input_with(place, smooth)


def _is_free(norm: ir.Node, products: Sequence[Product]) -> bool:
    """Whether a norm's output goes into quantised products alone, so that its scale may change for them."""
    nodes = {product.node for product in products}
    output = norm.outputs[0]
    users = list(output.uses())
    if any(product.value == output.name and product.window is not None for product in products):
        return False
    constant_scale = norm.inputs[1] is not None and norm.inputs[1].const_value is not None
    return (
        constant_scale and bool(users) and not output.is_graph_output() and all(use.node.name in nodes for use in users)
    )


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


def _numbers(value: ir.Value | None, node: ir.Node) -> NDArray[np.float64]:
    numbers = numbers_of(value)
    if numbers is None or numbers.size != 1:
        raise ContractError(f"{node.name}: its scale and zero point are not one constant each")
    return numbers


def _wider(scale: float, zero: int) -> float:
    """The scale that covers the same range with levels from -127 to 127."""
    return scale * max(zero, _BYTES - zero) / _LEVELS


def _to_int8(model: ir.Model, quantize: ir.Node, dequantize: ir.Node) -> None:
    zero = _zero(dequantize)
    scale = initializer(
        model.graph, f"{dequantize.name}_symmetric", np.array(_wider(_scale(dequantize), zero or 0), np.float32)
    )
    point = initializer(model.graph, f"{dequantize.name}_no_offset", np.array(0, np.int8))
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
    cast = _named("Cast", [start], f"{dequantize.name}_cast", start.shape, to=int(ir.DataType.FLOAT))
    model.graph.insert_before(first, [cast])
    first.replace_input_with(0, cast.outputs[0])
    for mover in way:
        mover.outputs[0].dtype = ir.DataType.FLOAT
    shape = dequantize.outputs[0].shape
    moved = dequantize.inputs[0]
    offset = initializer(model.graph, f"{dequantize.name}_offset", np.array(zero, np.float32))
    width = initializer(model.graph, f"{dequantize.name}_width", np.array(scale, np.float32))
    wide = initializer(model.graph, f"{dequantize.name}_symmetric", np.array(_wider(scale, zero or 0), np.float32))
    point = initializer(model.graph, f"{dequantize.name}_no_offset", np.array(0, np.int8))
    steps = [_named("Sub", [moved, offset], f"{dequantize.name}_centred", shape)]
    if scale != 1:
        steps.append(_named("Mul", [steps[-1].outputs[0], width], f"{dequantize.name}_scaled", shape))
    quantize = _named(
        "QuantizeLinear", [steps[-1].outputs[0], wide, point], f"{dequantize.name}_int8", shape, ir.DataType.INT8
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
