"""float16 in a graph: as arithmetic with float32 islands, or as storage of weights alone.

`to_float16` writes the arithmetic into the graph itself, as strongly typed engines want it. Where a node may compute in
float16 is read from its operator's schema. What loses most by it stays float32: norms, softmax, the embedding's length
and everything after it, an exchangeable projection, pixels' resize, and constants that float16 does not have. Further
islands are added until the contract is kept, see `LADDER`. `halve` halves the file and leaves the arithmetic float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from invariclip.artifact.manifest import EMBEDDING, PROJECTION_INPUT
from invariclip.errors import ContractError
from invariclip.export.graphs.nodes import FRONT, downstream, initializer, make_node, numbers_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

NORMS = frozenset(
    {
        "BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization",
        "LpNormalization", "RMSNormalization", "LogSoftmax", "Softmax", "Pow", "Sqrt", "Reciprocal",
        "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum",
        "ReduceSumSquare", "CumSum",
    }
)  # fmt: skip
"""They add up, or divide by what was added up: half the digits there are not made good later."""
SUMS = frozenset({"Add", "Sub", "Sum", "Concat", "Expand"})
"""The residual stream: large numbers, and small ones added to them."""
ACTIVATIONS = frozenset({"Gelu", "Erf", "Sigmoid", "Tanh", "Mul", "Div", "Relu", "HardSigmoid", "HardSwish", "Exp"})
LADDER: tuple[tuple[str, frozenset[str]], ...] = (
    ("norms, softmax and head", NORMS),
    ("and sums", NORMS | SUMS),
    ("and activations", NORMS | SUMS | ACTIVATIONS),
)
"""Operators that stay float32, from the fewest to so many that products alone are left in float16."""
_SCALED = ("QuantizeLinear", "DequantizeLinear")
MIN_WEIGHTS = 1 << 10
"""Smaller tensors stay float32: they are nothing of the size, and biases and norms cost the most for it."""
_LARGEST, _SMALLEST_NORMAL = float(np.finfo(np.float16).max), float(np.finfo(np.float16).tiny)


@dataclass(frozen=True)
class Islands:
    """What became of a graph.

    Attributes:
        halved: Nodes that compute in float16, by operator.
        kept: Nodes that could and stay float32, by operator.
        casts: Casts that were put between them.
    """

    halved: dict[str, int]
    kept: dict[str, int]
    casts: int


def to_float16(model: ir.Model, keep: Iterable[str] = NORMS) -> Islands:
    """Lets a float32 graph compute in float16 outside its islands, in place; inputs and outputs keep their types.

    Args:
        model: A float32 graph, or one with Q/DQ.
        keep: Operators that stay float32 wherever they stand.

    Raises:
        ContractError: Nothing in it can compute in float16.
    """
    _require_types(model)
    graph = model.graph
    opset = model.opset_imports.get("", 0)
    kept_operators = set(keep)
    finished = _after_projection(graph) | _fine_scales(graph)
    writer = Writer(graph)
    halved: dict[str, int] = {}
    kept: dict[str, int] = {}
    for node in list(graph):
        places = _float16_places(node, opset)
        if places is None:
            continue
        inputs, outputs = places
        if node.op_type in kept_operators or node in finished or not _fits(node, inputs):
            kept[node.op_type] = kept.get(node.op_type, 0) + 1
            continue
        halved[node.op_type] = halved.get(node.op_type, 0) + 1
        for place in inputs:
            value = node.inputs[place]
            if value is not None:
                node.replace_input_with(place, writer.half(value, node))
        for place in outputs:
            writer.turn(node.outputs[place])
    if not halved:
        raise ContractError(f"{graph.name}: no node of it can compute in float16; is it a float32 graph?")
    writer.restore()
    _drop_unused(graph)
    return Islands(dict(sorted(halved.items())), dict(sorted(kept.items())), writer.casts)


def _require_types(model: ir.Model) -> None:
    """Gives every value its type: one that is not known could stand between two types unnoticed.

    Raises:
        ContractError: onnx cannot tell one.
    """
    if not _untyped(model):
        return
    ShapeInferencePass()(model)
    unknown = _untyped(model)
    if unknown:
        raise ContractError(f"{model.graph.name}: it is not known what type these have: {', '.join(unknown[:5])}")


def _untyped(model: ir.Model) -> list[str]:
    return [value.name or "" for node in model.graph for value in node.outputs if value.dtype is None]


def _float16_places(node: ir.Node, opset: int) -> tuple[list[int], list[int]] | None:
    """Which float32 inputs and outputs of a node its operator's schema has in float16; None where there are none.

    Inputs and outputs of one type variable go together, so a variable with a float32 member of no float16 rules the
    node out.
    """
    if node.domain not in ("", "ai.onnx") or node.op_type in ("Cast", "Shape", "Size"):
        return None
    schema = onnx.defs.get_schema(node.op_type, opset)
    allowed = {constraint.type_param_str: set(constraint.allowed_type_strs) for constraint in schema.type_constraints}
    inputs = _places(node.inputs, schema.inputs, allowed)
    outputs = _places(node.outputs, schema.outputs, allowed)
    if inputs is None or outputs is None or not inputs:
        return None
    return inputs, outputs


def _places(
    values: Sequence[ir.Value | None],
    formal: Sequence[onnx.defs.OpSchema.FormalParameter],
    allowed: dict[str, set[str]],
) -> list[int] | None:
    """Places of float32 values that may be float16; None where one may not."""
    places = []
    for place, value in enumerate(values):
        if value is None or value.dtype != ir.DataType.FLOAT:
            continue
        parameter = formal[min(place, len(formal) - 1)]  # the last one may be variadic
        if "tensor(float16)" not in allowed.get(parameter.type_str, {parameter.type_str}):
            return None
        places.append(place)
    return places


def _fits(node: ir.Node, inputs: Iterable[int]) -> bool:
    """Whether float16 has its constants, none above the largest."""
    for place in inputs:
        value = node.inputs[place]
        if value is None:
            continue
        if value.is_graph_input() and value.name == PROJECTION_INPUT:
            return False
        numbers = constant_of(value)
        if numbers is None or not numbers.size:
            continue
        finite = np.abs(numbers[np.isfinite(numbers)])
        if finite.size and float(finite.max()) > _LARGEST:
            return False
    return not (node.name or "").startswith(FRONT)


def _after_projection(graph: ir.Graph) -> set[ir.Node]:
    """The embedding's length and everything after it: the nodes from the last reduction before `embedding` on."""
    embedding = next((output for output in graph.outputs if output.name == EMBEDDING), None)
    divide = None if embedding is None else embedding.producer()
    if divide is None or not divide.inputs or divide.inputs[0] is None:
        return set()
    return downstream(divide.inputs[0])


def _fine_scales(graph: ir.Graph) -> set[ir.Node]:
    """Q/DQ whose scales would lose digits in float16, with the products that they feed and all that feeds those.

    Both operands of an int8 product need scales of one type, or TensorRT cannot build it.
    """
    fine = {node for node in graph if node.op_type in _SCALED and _is_fine(node.inputs[1])}
    waiting = list(fine)
    while waiting:
        node = waiting.pop()
        neighbours = [value.producer() for value in node.inputs if value is not None]
        if node.op_type in _SCALED:
            neighbours += [use.node for output in node.outputs for use in output.uses()]
        for other in neighbours:
            near = other is not None and (other.op_type in _SCALED or (node.op_type in _SCALED and _multiplies(other)))
            if other is not None and near and other not in fine:
                fine.add(other)
                waiting.append(other)
    return fine


def _multiplies(node: ir.Node) -> bool:
    return node.op_type in ("MatMul", "Gemm", "Conv")


def _is_fine(scale: ir.Value | None) -> bool:
    numbers = None if scale is None else constant_of(scale)
    return numbers is not None and bool(numbers.size) and float(np.abs(numbers).min()) < _SMALLEST_NORMAL


def _drop_unused(graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_input() and not value.is_graph_output():
            del graph.initializers[name]


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
        half = initializer(graph, f"{name}_float16", numbers.astype(np.float16))
        cast = make_node(
            "Cast", [half], f"{name}_float32", numbers.shape, name=f"{name}_cast", to=int(ir.DataType.FLOAT)
        )
        graph.insert_before(graph[0], [cast])
        for use in users:
            use.node.replace_input_with(use.idx, cast.outputs[0])
        count += 1
    return count


class Writer:
    """Puts casts where float32 and float16 meet, one for each value however many read it."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._halves: dict[ir.Value, ir.Value] = {}
        self._turned: set[ir.Value] = set()
        self.casts = 0

    def half(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        """The value in float16: itself where its node computes so already, a constant again, or a cast."""
        if value in self._turned:
            return value
        if value not in self._halves:
            numbers = constant_of(value)
            if numbers is None:
                self._halves[value] = self._cast_down(value, reader)
            else:
                self._halves[value] = initializer(self._graph, f"{value.name}_float16", numbers.astype(np.float16))
        return self._halves[value]

    def turn(self, value: ir.Value) -> None:
        """A node's output is float16; its type is written in the end, so that its readers are asked as float32 ones."""
        self._turned.add(value)

    def restore(self) -> None:
        """Casts back for every reader that stayed float32, and for the graph's outputs."""
        for value in sorted(self._turned, key=lambda value: value.name or ""):
            value.dtype = ir.DataType.FLOAT16
            readers = [use for use in value.uses() if not self._reads_half(use.node)]
            output = value.is_graph_output()
            if not readers and not output:
                continue
            node = value.producer()
            if node is None:
                continue
            cast = self._cast(value, ir.DataType.FLOAT, f"{value.name}_float32")
            self._graph.insert_after(node, [cast])
            for use in readers:
                use.node.replace_input_with(use.idx, cast.outputs[0])
            if output:
                self._take_over(value, cast.outputs[0])

    def _reads_half(self, node: ir.Node) -> bool:
        """Whether a reader computes in float16 itself, or does not care."""
        if node.op_type in ("Cast", "Shape", "Size"):
            return True
        if node.op_type == "QuantizeLinear":
            scale = node.inputs[1]
            return scale is not None and scale.dtype == ir.DataType.FLOAT16
        return any(output in self._turned for output in node.outputs)

    def _take_over(self, value: ir.Value, whole: ir.Value) -> None:
        """The float32 copy becomes the graph's output, under its name."""
        name = value.name
        value.name, whole.name = f"{name}_float16", name
        for place, output in enumerate(self._graph.outputs):
            if output is value:
                self._graph.outputs[place] = whole

    def _cast_down(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        cast = self._cast(value, ir.DataType.FLOAT16, f"{value.name}_float16")
        producer = value.producer()
        if producer is None or producer.graph is not self._graph:
            self._graph.insert_before(self._graph[0] if value.is_graph_input() else reader, [cast])
        else:
            self._graph.insert_after(producer, [cast])
        return cast.outputs[0]

    def _cast(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
        self.casts += 1
        return make_node("Cast", [value], name, value.shape, dtype, name=f"{name}_cast", to=int(dtype))


def constant_of(value: ir.Value) -> NDArray[np.float32] | None:
    """An initializer's numbers; None for anything that is computed or may be fed."""
    return numbers_of(value, np.float32) if value.is_initializer() and not value.is_graph_input() else None
