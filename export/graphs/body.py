"""A digest of everything in a graph that its embedding depends on: equal digests, equal embeddings."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import onnx

from invariclip.artifact.manifest import EMBEDDING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


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
