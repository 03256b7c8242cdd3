"""What comes last in a graph: the class head after `embedding`, and the projection as something a caller may replace.

Both are edits of the graph alone. Nothing before `embedding` is touched, so classes can be exchanged in an artifact
whose checkpoint is far away, and whose weights need not even be read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from invariclip.errors import ArtifactError, ContractError, InputError
from invariclip.manifest import EMBEDDING, LOGITS, PROBABILITIES, PROJECTION_INPUT

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

CLASS_BANK, LOGIT_SCALE, LOGIT_BIAS = "class_bank", "logit_scale", "logit_bias"
MATRIX = "matrix"
"""What `ImageTower` and `TextTower` call the explicit MatMul's matrix."""
_COSINES, _SCALED = "class_cosines", "scaled_cosines"
MAX_BANK_BYTES = 1 << 30
"""Bound on the float32 bank that goes into a graph: with the head's own file facts protobuf's 2 GiB stay far off."""


def attach_head(
    model: ir.Model, bank: NDArray[np.float64] | None, logit_scale: float, logit_bias: float | None
) -> None:
    """Puts the classes after `embedding`, in place of any that stand there; without a bank it takes them away.

    The graph then answers logits [batch, K] = τ · embedding @ bankᵀ (+ bias) and probabilities [batch, K]: the softmax
    of the logits, or their sigmoid where there is a bias (SigLIP). Initializers: `class_bank` float32 [d, K],
    `logit_scale` and `logit_bias` float32 scalars.

    Args:
        model: A graph with the output `embedding`, float32 [batch, d]. Changed in place.
        bank: Unit class embeddings, float64 [K, d], or None.
        logit_scale: Temperature τ, already exponentiated.
        logit_bias: Added to the logits, or None.

    Raises:
        ArtifactError: The graph has no float32 output `embedding`, or answers more than a class head does.
        InputError: The bank is not of the embedding's width, empty, too large, or not finite.
    """
    graph = model.graph
    embedding = _embedding(graph)
    if bank is not None:
        _check_bank(bank, embedding)
    _remove_head(graph, embedding)
    if bank is None:
        return
    _free_names(graph, (CLASS_BANK, LOGIT_SCALE, LOGIT_BIAS, _COSINES, _SCALED, LOGITS, PROBABILITIES))
    shape = ir.Shape([embedding.shape[0] if embedding.shape is not None else "batch", len(bank)])
    weights = _constant(graph, CLASS_BANK, np.ascontiguousarray(bank.T, dtype=np.float32))
    scale = _constant(graph, LOGIT_SCALE, np.array(logit_scale, dtype=np.float32))
    cosines = _append(graph, "MatMul", [embedding, weights], _COSINES, shape)
    if logit_bias is None:
        logits = _append(graph, "Mul", [cosines, scale], LOGITS, shape)
        probabilities = _append(graph, "Softmax", [logits], PROBABILITIES, shape, {"axis": -1})
    else:
        bias = _constant(graph, LOGIT_BIAS, np.array(logit_bias, dtype=np.float32))
        scaled = _append(graph, "Mul", [cosines, scale], _SCALED, shape)
        logits = _append(graph, "Add", [scaled, bias], LOGITS, shape)
        probabilities = _append(graph, "Sigmoid", [logits], PROBABILITIES, shape)
    graph.outputs.extend([logits, probabilities])


def expose_projection(model: ir.Model) -> None:
    """Makes the matrix of a tower that was exported unfolded an overridable initializer of the name `projection`.

    It keeps its value as the default and is listed among the graph's inputs too, so a caller may feed another matrix
    of the same shape [D, d] at any run. A graph that has been through this already stays as it is.

    Args:
        model: A graph traced from a tower whose `matrix` is set. Changed in place.

    Raises:
        ContractError: No MatMul takes such a matrix, or it serves several nodes: the tower was traced folded, or a
            rewrite has merged the matrix with another layer.
    """
    graph = model.graph
    if any(value.name == PROJECTION_INPUT for value in graph.inputs):
        return
    value = graph.initializers.get(MATRIX) or graph.initializers.get(PROJECTION_INPUT)
    users = [] if value is None else list(value.uses())
    if value is None or len(users) != 1 or users[0].node.op_type != "MatMul" or users[0].idx != 1:
        raise ContractError(
            f"{graph.name}: no MatMul takes the projection alone, so it cannot become an input; "
            "trace the tower with the projection unfolded, and expose it before any other rewrite"
        )
    if value.name != PROJECTION_INPUT:
        _free_names(graph, (PROJECTION_INPUT,))
        value.name = PROJECTION_INPUT
    graph.inputs.append(value)


def _embedding(graph: ir.Graph) -> ir.Value:
    value = next((output for output in graph.outputs if output.name == EMBEDDING), None)
    if value is None or value.dtype != ir.DataType.FLOAT:
        answers = ", ".join(f"{output.name} {output.dtype}" for output in graph.outputs)
        raise ArtifactError(f"a class head needs a float32 output {EMBEDDING!r}; the graph answers: {answers}")
    return value


def _check_bank(bank: NDArray[np.float64], embedding: ir.Value) -> None:
    width = embedding.shape[1] if embedding.shape is not None and len(embedding.shape) == 2 else None
    if bank.ndim != 2 or not len(bank) or (isinstance(width, int) and bank.shape[1] != width):
        raise InputError(f"a class bank of shape {list(bank.shape)} does not fit; the embedding needs [K, {width}]")
    if bank.size * 4 > MAX_BANK_BYTES:
        raise InputError(f"a class bank of {bank.size * 4:,} bytes is above {MAX_BANK_BYTES:,}; bake in fewer classes")
    if not np.isfinite(bank).all():
        raise InputError("the class bank holds values that are not finite; embed the classes again")


def _downstream(value: ir.Value) -> set[ir.Node]:
    """Every node that a value reaches."""
    reached: set[ir.Node] = set()
    waiting = list(value.consumers())
    while waiting:
        node = waiting.pop()
        if node not in reached:
            reached.add(node)
            waiting += [user for output in node.outputs for user in output.consumers()]
    return reached


def _remove_head(graph: ir.Graph, embedding: ir.Value) -> None:
    nodes = _downstream(embedding)
    names = {output.name for node in nodes for output in node.outputs if output.is_graph_output()}
    if names - {LOGITS, PROBABILITIES}:
        raise ArtifactError(
            f"the graph answers {', '.join(sorted(map(str, names)))} from the embedding, not only "
            f"{LOGITS} and {PROBABILITIES}; this head cannot be exchanged"
        )
    given = [value for node in nodes for value in node.inputs if value is not None and value.is_initializer()]
    for output in [output for output in graph.outputs if output.name in names]:
        graph.outputs.remove(output)
    graph.remove(nodes, safe=True)
    for value in given:
        if value.name is not None and not value.uses() and value.name in graph.initializers:
            del graph.initializers[value.name]


def _free_names(graph: ir.Graph, names: Iterable[str]) -> None:
    """Renames inner values and weights that bear a name that is about to be given."""
    wanted = set(names)
    inner = [output for node in graph.all_nodes() for output in node.outputs]
    for value in (*inner, *list(graph.initializers.values())):
        if value.name in wanted:
            value.name = f"{value.name}_inner"


def _constant(graph: ir.Graph, name: str, array: NDArray[np.float32]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def _append(
    graph: ir.Graph,
    operator: str,
    inputs: list[ir.Value],
    name: str,
    shape: ir.Shape,
    attributes: dict[str, int] | None = None,
) -> ir.Value:
    node = ir.node(operator, inputs, attributes or {}, name=f"head_{name}")
    (output,) = node.outputs
    output.name, output.shape, output.type = name, ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
    graph.append(node)
    return output
