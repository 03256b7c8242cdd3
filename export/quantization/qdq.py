"""int8 in a graph: QuantizeLinear and DequantizeLinear around the products that are chosen.

The form is ONNX's own (Q/DQ), which ONNX Runtime, OpenVINO and TensorRT all read: a value is uint8 with one scale and a
zero point, from the range that it had on the calibration images; weights are int8 with a scale for each output. What
rounding the weights does to the mean of the output is known, and goes into the bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from invariclip.console import silent
from invariclip.errors import ContractError
from invariclip.export.graphs.rewrites.patches import MIDDLE, PATCHES, patches_as_bytes
from invariclip.export.quantization.clipping import clipped, step
from invariclip.export.quantization.rounding import compensated, nearest, sharing
from invariclip.export.quantization.sites import constant, matrix
from invariclip.export.quantization.smooth import factors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from invariclip.console import Progress
    from invariclip.export.quantization.ranges import Flow
    from invariclip.export.quantization.sites import Product


@dataclass(frozen=True)
class QuantizationRecipe:
    """How a graph is quantised.

    Attributes:
        smoothing: α of SmoothQuant for values that come from a LayerNormalization; None leaves them as they are.
        compensate: Round weights by GPTQ rather than to the nearest.
        clip: Cut off a value's outermost numbers where that errs less, see `clipping`.
    """

    smoothing: float | None = None
    compensate: bool = True
    clip: bool = False


@dataclass(frozen=True)
class Rounded:
    """One site's weights in int8.

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
    sites: Sequence[Product],
    flows: Mapping[str, Flow],
    recipe: QuantizationRecipe,
    *,
    progress: Progress = silent,
) -> dict[str, Rounded]:
    """Every site's weights in int8, by the site's node.

    Args:
        model: The float32 graph.
        sites: Its products.
        flows: Of every value that they read.
        recipe: How.
        progress: `console.bar` or `console.silent`.
    """
    divisors: dict[str, NDArray[np.float32]] = {}
    if recipe.smoothing is not None:
        for value in smoothable(model, sites):
            matrices = [matrix(model, site) for site in sites if site.value == value]
            divisors[value] = factors(flows[value].peaks, matrices, recipe.smoothing)
    found = {}
    shares: dict[str, NDArray[np.float32]] = {}
    for site in progress(list(sites), total=len(sites), desc="weights to int8"):
        divisor, flow = divisors.get(site.value), flows[site.reading]
        weights, mean = matrix(model, site), flow.mean
        if divisor is not None:
            weights, mean = weights * divisor[:, None], mean / divisor
        if recipe.compensate:
            if site.reading not in shares:
                moments = flow.moments if divisor is None else flow.moments / np.outer(divisor, divisor)
                shares[site.reading] = sharing(moments)
            levels, scales = compensated(weights, shares[site.reading])
        else:
            levels, scales = nearest(weights)
        off = weights.astype(np.float64) - levels.astype(np.float64) * scales
        found[site.node] = Rounded(levels, scales, mean @ off, divisor)
    return found


def smoothable(model: ir.Model, sites: Sequence[Product]) -> list[str]:
    """Values that SmoothQuant may divide: of norms whose output goes into quantised matrix products alone."""
    free = [node for node in model.graph if node.op_type == "LayerNormalization" and _is_free(node, sites)]
    return [node.outputs[0].name or "" for node in free]


def ranges_of(
    model: ir.Model, sites: Sequence[Product], flows: Mapping[str, Flow], weights: Mapping[str, Rounded], *, clip: bool
) -> dict[str, tuple[float, float]]:
    """What the levels of each value go from and to, after the division of smoothing.

    Args:
        model: The float32 graph.
        sites: Its products.
        flows: Of every value that they read.
        weights: From `rounded`.
        clip: See `QuantizationRecipe`.
    """
    found: dict[str, tuple[float, float]] = {}
    for site in sites:
        if site.value in found:
            continue
        flow, divisor = flows[site.reading], weights[site.node].divisor
        if site.value == PATCHES:  # bytes less a byte: a level each, and nothing is rounded
            middle = float(constant(model, MIDDLE))
            found[site.value] = -middle, 255 - middle
            continue
        low, high, rows = flow.low, flow.high, flow.sample.rows
        if divisor is not None:
            # the range after the division is bounded by the channels' peaks
            peak, least = float((flow.peaks / divisor).max()), float(divisor.min())
            low, high, rows = max(-peak, low / least), min(peak, high / least), rows / divisor
        found[site.value] = clipped(rows, low, high) if clip else (low, high)
    return found


def quantise(
    model: ir.Model,
    sites: Sequence[Product],
    ranges: Mapping[str, tuple[float, float]],
    weights: Mapping[str, Rounded],
) -> None:
    """Puts int8 into a graph, in place.

    Args:
        model: The float32 graph.
        sites: The products that become int8; the others stay float32.
        ranges: From `ranges_of`.
        weights: From `rounded`.
    """
    nodes = {node.name: node for node in model.graph}
    by_value: dict[str, list[Product]] = {}
    for site in sites:
        by_value.setdefault(site.value, []).append(site)
    for value, group in by_value.items():
        divisor = weights[group[0].node].divisor
        source = nodes[group[0].node].inputs[0]
        if source is None:
            continue
        if divisor is not None:
            _divide_norm(model, source, divisor, keep=[nodes[s.node] for s in group])
        low, high = ranges[value]
        given = _through_eight_bits(model, source, low, high, nodes[group[0].node])
        for site in group:
            _take(model, nodes[site.node], site, given, weights[site.node])


def _through_eight_bits(model: ir.Model, source: ir.Value, low: float, high: float, before: ir.Node) -> ir.Value:
    """The value rounded to uint8 levels from low to high."""
    scale, zero = step(low, high)
    name = source.name
    size = _initializer(model, f"{name}_scale", np.array(scale, dtype=np.float32))
    point = _initializer(model, f"{name}_zero_point", np.array(zero, dtype=np.uint8))
    levels = patches_as_bytes(model) if name == PATCHES else None
    if levels is None:
        q = ir.node("QuantizeLinear", [source, size, point], name=f"{name}_quantize")
        levels = q.outputs[0]
        levels.name, levels.shape, levels.dtype = f"{name}_uint8", source.shape, ir.DataType.UINT8
        model.graph.insert_before(before, [q])
    dq = ir.node("DequantizeLinear", [levels, size, point], name=f"{name}_dequantize")
    rounded_ = dq.outputs[0]
    rounded_.name, rounded_.shape, rounded_.dtype = f"{name}_rounded", source.shape, ir.DataType.FLOAT
    model.graph.insert_before(before, [dq])
    return rounded_


def _take(model: ir.Model, node: ir.Node, site: Product, given: ir.Value, weights: Rounded) -> None:
    """Lets a product read the rounded value and int8 weights."""
    old, levels, axis = node.inputs[1], weights.levels, 1
    if site.window is not None:
        axis, levels = 0, np.ascontiguousarray(levels.T).reshape(constant(model, site.weights).shape)
    held = _initializer(model, f"{site.node}_int8", levels)
    scales = _initializer(model, f"{site.node}_scales", weights.scales)
    zeros = _initializer(model, f"{site.node}_zeros", np.zeros(len(weights.scales), np.int8))
    dq = ir.node("DequantizeLinear", [held, scales, zeros], {"axis": axis}, name=f"{site.node}_weights")
    dq.outputs[0].name = f"{site.node}_weights_rounded"
    dq.outputs[0].dtype, dq.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(levels.shape)
    model.graph.insert_before(node, [dq])
    node.replace_input_with(0, given)
    node.replace_input_with(1, dq.outputs[0])
    if old is not None and not list(old.uses()):
        model.graph.initializers.pop(site.weights)
    if site.window is None:
        _correct(model, node, site, weights.correction)
    else:
        _correct_conv(model, node, site, weights.correction)


def _correct_conv(model: ir.Model, node: ir.Node, site: Product, correction: NDArray[np.float64]) -> None:
    """The mean's shift into a convolution's own bias. Windows over the border see fewer numbers, and shift less."""
    held = 0.0 if site.bias is None else constant(model, site.bias)
    moved = _initializer(model, f"{site.node}_bias", (held + correction).astype(np.float32))
    old = node.inputs[2] if len(node.inputs) > 2 else None
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, moved)
    if old is not None and site.bias is not None and not list(old.uses()):
        model.graph.initializers.pop(site.bias)


def _correct(model: ir.Model, node: ir.Node, site: Product, correction: NDArray[np.float64]) -> None:
    """The mean's shift into the bias, or into a new one."""
    if site.bias is not None:
        held = model.graph.initializers[site.bias]
        moved = constant(model, site.bias) + correction
        held.const_value = ir.tensor(moved.astype(np.float32), name=site.bias)
        return
    product = node.outputs[0]
    bias = _initializer(model, f"{site.node}_correction", correction.astype(np.float32))
    users = list(product.uses())
    add = ir.node("Add", [product, bias], name=f"{site.node}_corrected")
    corrected = add.outputs[0]
    corrected.name, corrected.dtype, corrected.shape = f"{product.name}_corrected", ir.DataType.FLOAT, product.shape
    model.graph.insert_after(node, [add])
    for use in users:
        use.node.replace_input_with(use.idx, corrected)


def _divide_norm(model: ir.Model, value: ir.Value, divisor: NDArray[np.float32], keep: Sequence[ir.Node]) -> None:
    """The division of a LayerNormalization's output, folded into its own scale and bias; every user is in `keep`."""
    norm = value.producer()
    if norm is None or not all(use.node in keep for use in value.uses()):
        raise ContractError(
            f"{value.name} serves others than the products that are quantised; quantise without smoothing"
        )
    for place in (1, 2):
        old = norm.inputs[place] if place < len(norm.inputs) else None
        if old is not None and old.const_value is not None:
            numbers = np.asarray(old.const_value.numpy(), dtype=np.float32) / divisor
            norm.replace_input_with(place, _initializer(model, f"{value.name}_smooth_{place}", numbers))


def _is_free(norm: ir.Node, sites: Sequence[Product]) -> bool:
    """Whether a norm's output goes into quantised products alone, so that its scale may change for them."""
    nodes = {site.node for site in sites}
    output = norm.outputs[0]
    users = list(output.uses())
    if any(site.value == output.name and site.window is not None for site in sites):
        return False
    constant_scale = norm.inputs[1] is not None and norm.inputs[1].const_value is not None
    return (
        constant_scale and bool(users) and not output.is_graph_output() and all(use.node.name in nodes for use in users)
    )


def _initializer(model: ir.Model, name: str, numbers: NDArray[np.generic]) -> ir.Value:
    tensor = ir.tensor(numbers, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(numbers.shape), const_value=tensor)
    model.graph.register_initializer(value)
    return value
