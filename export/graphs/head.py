"""What comes last in a graph: the class head after `embedding`, and the projection as something a caller may replace.

Both are edits of the graph alone. Nothing before `embedding` is touched, so classes can be exchanged in an artifact
whose checkpoint is far away, and whose weights need not even be read; `body_digest` shows that nothing was.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir

from invariclip.artifact.manifest import EMBEDDING, LOGITS, PROBABILITIES, PROJECTION_INPUT, UNCERTAINTY
from invariclip.errors import ArtifactError, ContractError, InputError
from invariclip.export.graphs import learned_head
from invariclip.export.graphs.nodes import append, downstream, free_names, initializer, make_node

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.artifact.manifest import LearnedPromptsFacts

CLASS_BANK, LOGIT_SCALE, LOGIT_BIAS = "class_bank", "logit_scale", "logit_bias"
MATRIX = "matrix"
"""What `ImageTower` and `TextTower` call the explicit MatMul's matrix."""
SITE_SHIFT = "site_shift"
_UNMOVED, _MOVED = "embedding_unmoved", "embedding_moved"
_COSINES, _SCALED = "class_cosines", "scaled_cosines"
_SIGMOID = ("logit_size", "logit_below", "logit_small", "logit_whole", "logit_weak", "logit_part")
_LIMITS = (("sigmoid_one", 1.0), ("sigmoid_zero", 0.0))
MAX_BANK_BYTES = 1 << 30
"""Bound on the float32 bank that goes into a graph: with the head's own file facts protobuf's 2 GiB stay far off."""


def attach_head(
    model: ir.Model,
    bank: NDArray[np.float64] | None,
    logit_scale: float,
    logit_bias: float | None,
    learned: LearnedPromptsFacts | None = None,
) -> None:
    """Puts the classes after `embedding`, in place of any that stand there; without a bank it takes them away.

    The graph then answers logits [batch, K] = τ · embedding @ bankᵀ (+ bias) and probabilities [batch, K]: the softmax
    of the logits, or their sigmoid where there is a bias (SigLIP). Initializers: `class_bank` float32 [d, K],
    `logit_scale` and `logit_bias` float32 scalars.

    With learned templates the logits are the hand-written template's, the probabilities all templates' together, and
    there is a third answer, uncertainty [batch]; see `learned_head`.

    Args:
        model: A graph with the output `embedding`, float32 [batch, d]. Changed in place.
        bank: Unit class embeddings, float64 [K, d], or None; with learned templates [M + 1, K, d].
        logit_scale: Temperature τ, already exponentiated.
        logit_bias: Added to the logits, or None.
        learned: Facts of the learned templates, or None.

    Raises:
        ArtifactError: The graph has no float32 output `embedding`, or answers more than a class head does.
        InputError: The bank is not of the embedding's width, empty, too large, or not finite.
    """
    graph = model.graph
    embedding = _embedding(graph)
    if bank is not None:
        _check_bank(bank, embedding, learned)
    _remove_head(graph, embedding)
    if bank is None:
        return
    if learned is not None:
        learned_head.attach(graph, embedding, bank, learned, logit_scale, logit_bias)
        return
    free_names(
        graph,
        (
            CLASS_BANK,
            LOGIT_SCALE,
            LOGIT_BIAS,
            _COSINES,
            _SCALED,
            LOGITS,
            PROBABILITIES,
            *_SIGMOID,
            *(name for name, _ in _LIMITS),
        ),
    )
    shape = ir.Shape([embedding.shape[0] if embedding.shape is not None else "batch", len(bank)])
    weights = initializer(graph, CLASS_BANK, np.ascontiguousarray(bank.T, dtype=np.float32))
    scale = initializer(graph, LOGIT_SCALE, np.array(logit_scale, dtype=np.float32))
    cosines = append(graph, "MatMul", [embedding, weights], _COSINES, shape)
    if logit_bias is None:
        logits = append(graph, "Mul", [cosines, scale], LOGITS, shape)
        probabilities = append(graph, "Softmax", [logits], PROBABILITIES, shape, axis=-1)
    else:
        bias = initializer(graph, LOGIT_BIAS, np.array(logit_bias, dtype=np.float32))
        scaled = append(graph, "Mul", [cosines, scale], _SCALED, shape)
        logits = append(graph, "Add", [scaled, bias], LOGITS, shape)
        probabilities = _sigmoid(graph, logits, shape)
    graph.outputs.extend([logits, probabilities])


def _sigmoid(graph: ir.Graph, logits: ir.Value, shape: ir.Shape) -> ir.Value:
    """1 / (1 + e^-x) as (e^-|x| where x < 0, else 1) / (1 + e^-|x|), so that weak classes keep their order.

    ONNX Runtime's Sigmoid clips its input near ±18: below, all classes have one probability, and the first one wins.
    """
    one, zero = (initializer(graph, name, np.array(value, dtype=np.float32)) for name, value in _LIMITS)
    size = append(graph, "Abs", [logits], _SIGMOID[0], shape)
    below = append(graph, "Neg", [size], _SIGMOID[1], shape)
    small = append(graph, "Exp", [below], _SIGMOID[2], shape)
    whole = append(graph, "Add", [small, one], _SIGMOID[3], shape)
    weak = append(graph, "Less", [logits, zero], _SIGMOID[4], shape, ir.DataType.BOOL)
    part = append(graph, "Where", [weak, small, one], _SIGMOID[5], shape)
    return append(graph, "Div", [part, whole], PROBABILITIES, shape)


def attach_site(model: ir.Model, shift: NDArray[np.float32]) -> None:
    """Takes a site's shift away from `embedding` and scales it to unit length again, in two nodes; see `site`.

    All that follows, such as the classes, takes the adapted embedding. Initializer: `site_shift` float32 [d].

    Args:
        model: A graph with the output `embedding`, float32 [batch, d] of unit length. Changed in place.
        shift: δ, float32 [d].

    Raises:
        ArtifactError: The graph has no float32 output `embedding`, or a site already.
        InputError: The shift is of another width.
    """
    graph = model.graph
    if SITE_SHIFT in graph.initializers:
        raise ArtifactError(f"{graph.name}: is adapted to a site already")
    old = _embedding(graph)
    shape = old.shape if old.shape is not None else ir.Shape(["batch", len(shift)])
    if shift.ndim != 1 or (isinstance(shape[1], int) and shape[1] != len(shift)):
        raise InputError(f"a shift of shape {list(shift.shape)} does not fit an embedding of shape {list(shape)}")
    free_names(graph, (SITE_SHIFT, _UNMOVED, _MOVED))
    moved = make_node("Sub", [old, initializer(graph, SITE_SHIFT, shift)], _MOVED, shape, name=_MOVED)
    unit = make_node("LpNormalization", moved.outputs, EMBEDDING, shape, name=f"{EMBEDDING}_adapted", axis=-1, p=2)
    for user, place in list(old.uses()):
        if user is not moved:
            user.replace_input_with(place, unit.outputs[0])
    graph.outputs[graph.outputs.index(old)] = unit.outputs[0]
    old.name = _UNMOVED
    producer = old.producer()
    if producer is None:
        raise ArtifactError(f"{graph.name}: nothing computes its embedding")
    graph.insert_after(producer, [moved, unit])


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
        free_names(graph, (PROJECTION_INPUT,))
        value.name = PROJECTION_INPUT
    graph.inputs.append(value)


def _embedding(graph: ir.Graph) -> ir.Value:
    value = next((output for output in graph.outputs if output.name == EMBEDDING), None)
    if value is None or value.dtype != ir.DataType.FLOAT:
        answers = ", ".join(f"{output.name} {output.dtype}" for output in graph.outputs)
        raise ArtifactError(f"a class head needs a float32 output {EMBEDDING!r}; the graph answers: {answers}")
    return value


def _check_bank(bank: NDArray[np.float64], embedding: ir.Value, learned: LearnedPromptsFacts | None) -> None:
    width = embedding.shape[1] if embedding.shape is not None and len(embedding.shape) == 2 else None
    templates = [] if learned is None else [learned.learned + 1]
    wanted = ", ".join(map(str, [*templates, "K", width]))
    fits = bank.ndim == len(templates) + 2 and list(bank.shape[: len(templates)]) == templates
    if not fits or not bank.size or (isinstance(width, int) and bank.shape[-1] != width):
        raise InputError(f"a class bank of shape {list(bank.shape)} does not fit; the embedding needs [{wanted}]")
    if bank.size * 4 > MAX_BANK_BYTES:
        raise InputError(f"a class bank of {bank.size * 4:,} bytes is above {MAX_BANK_BYTES:,}; bake in fewer classes")
    if not np.isfinite(bank).all():
        raise InputError("the class bank holds values that are not finite; embed the classes again")


def _remove_head(graph: ir.Graph, embedding: ir.Value) -> None:
    nodes = downstream(embedding)
    names = {output.name for node in nodes for output in node.outputs if output.is_graph_output()}
    if names - {LOGITS, PROBABILITIES, UNCERTAINTY}:
        raise ArtifactError(
            f"the graph answers {', '.join(sorted(map(str, names)))} from the embedding, not only "
            f"{LOGITS}, {PROBABILITIES} and {UNCERTAINTY}; this head cannot be exchanged"
        )
    constants = [value for node in nodes for value in node.inputs if value is not None and value.is_initializer()]
    for output in [output for output in graph.outputs if output.name in names]:
        graph.outputs.remove(output)
    graph.remove(nodes, safe=True)
    for value in constants:
        if value.name is not None and not value.uses() and value.name in graph.initializers:
            del graph.initializers[value.name]


def body_digest(path: Path) -> str:
    """sha256 over everything that `embedding` depends on: inputs, nodes in order, weights, functions.

    Weights in a file beside the graph enter with their place in it; that file has a digest of its own.

    Args:
        path: An image graph.
    """
    model = onnx.load(str(path), load_external_data=False)
    needed, nodes = {EMBEDDING}, []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            nodes.append(node)
            needed.update(_inputs_of(node))
    weights = sorted((item for item in model.graph.initializer if item.name in needed), key=lambda item: item.name)
    parts: Iterable[Any] = (*model.opset_import, *model.functions, *model.graph.input, *reversed(nodes), *weights)
    digest = hashlib.sha256()
    for part in parts:
        content = part.SerializeToString(deterministic=True)
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _inputs_of(node: onnx.NodeProto) -> set[str]:
    """Names that a node reads, those of its subgraphs included."""
    names = set(node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            names.update(*(_inputs_of(inner) for inner in graph.node), (output.name for output in graph.output))
    return names
