"""Nodes that compute nothing, compute something twice, or compute a shape that is known: gone."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from invariclip.export.graphs.nodes import initializer
from invariclip.export.graphs.rewrites import RewriteNotApplicableError
from invariclip.export.libraries import quiet

if TYPE_CHECKING:
    from invariclip.export.graphs.rewrites import Subject

SMALL_BYTES = 1 << 20
"""Constants above this are not compared with each other: layers do not share their weights."""


def tidy(model: ir.Model, subject: Subject) -> str:
    """Removes dead, duplicate and identity nodes, and writes known shapes as constants."""
    del subject
    before = len(model.graph)
    plain = write_shapes(model)
    common.RemoveUnusedNodesPass()(model)
    common.IdentityEliminationPass()(model)
    with quiet():  # it remarks on a projection that is also an input, which has to stay as it is
        common.DeduplicateInitializersPass(size_limit=SMALL_BYTES)(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    gone = before - len(model.graph)
    if not gone and not plain:
        raise RewriteNotApplicableError("there was nothing to remove")
    return f"{gone} nodes gone, {plain} shapes written as constants"


def write_shapes(model: ir.Model) -> int:
    """Gives each Reshape whose target is computed a constant instead, where the shapes say what it comes to.

    In a target, 0 copies the input's dimension and -1 takes what is left.
    """
    count = 0
    for node in model.graph:
        if node.op_type != "Reshape":
            continue
        data, target = node.inputs[0], node.inputs[1]
        if data is None or target is None or target.const_value is not None:
            continue
        written = _target(data.shape, node.outputs[0].shape)
        if written is None:
            continue
        shape = initializer(model.graph, f"{node.outputs[0].name}_shape", np.array(written, dtype=np.int64))
        node.replace_input_with(1, shape)
        node.attributes.pop("allowzero", None)  # torch sets it, and a zero would then mean an empty dimension
        count += 1
    return count


def _target(before: ir.Shape | None, after: ir.Shape | None) -> list[int] | None:
    if before is None or after is None:
        return None
    written: list[int] = []
    for place, size in enumerate(after):
        if isinstance(size, int):
            if size == 0:
                return None
            written.append(size)
        elif place < len(before) and size.value is not None and before[place] == size:
            written.append(0)
        else:
            written.append(-1)
    return written if written.count(-1) <= 1 else None


def duplicates(model: ir.Model) -> str | None:
    """Names of operators that compute the same from the same inputs more than once, or None."""
    seen: Counter[tuple[object, ...]] = Counter()
    for node in model.graph:
        if not node.outputs or any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
            continue
        settings = tuple(sorted((name, repr(item.value)) for name, item in node.attributes.items()))
        seen[(node.domain, node.op_type, tuple(map(id, node.inputs)), settings)] += 1
    twice = sorted({str(key[1]) for key, count in seen.items() if count > 1})
    dead = sorted(
        {node.op_type for node in model.graph if not any(o.uses() or o.is_graph_output() for o in node.outputs)}
    )
    if twice or dead:
        return f"computed twice: {', '.join(twice) or 'nothing'}; computed for nobody: {', '.join(dead) or 'nothing'}"
    return None
