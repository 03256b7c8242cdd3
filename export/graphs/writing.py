"""A graph to a file: written as ONNX, checked, with the artifact's facts inside."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir

from invariclip.artifact.graph_file import without_facts
from invariclip.artifact.manifest import METADATA_KEY
from invariclip.errors import ContractError
from invariclip.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

EXTERNAL_DATA_BYTES = 1_000_000_000
"""Weights above this go into a file beside the graph. Protobuf ends at 2 GiB, and needs twice the weights to write."""


def write_graph(model: ir.Model, path: Path) -> None:
    """Writes a graph as ONNX and checks it.

    Args:
        model: The graph.
        path: File to write; weights above `EXTERNAL_DATA_BYTES` go to `path.data`.

    Raises:
        ContractError: The graph is not valid ONNX.
    """
    data = path.with_name(f"{path.name}.data")
    external = weight_bytes(model) > EXTERNAL_DATA_BYTES
    save_graph(model, path, external_data=data.name if external else None)
    require_valid(path, "the exported graph")


def save_graph(model: ir.Model, path: Path, *, external_data: str | None = None) -> None:
    """Writes a graph as ONNX without a check; see `write_graph`.

    Initializers say their own type and shape. `value_info` of them as well makes ONNX Runtime's quantizers fail, so
    it is not written.

    Args:
        model: The graph.
        path: File to write.
        external_data: The name of the file beside it that takes the weights; None leaves them where they are.
    """
    inputs = set(model.graph.inputs)
    said = [(value, value.shape, value.type) for value in model.graph.initializers.values() if value not in inputs]
    for value, _, _ in said:
        value.shape = value.type = None
        value.metadata_props.clear()
    try:
        ir.save(model, path, external_data=external_data)
    finally:
        for value, shape, kind in said:
            value.shape, value.type = shape, kind


def require_valid(path: Path, what: str) -> None:
    """Checks a graph's file.

    Args:
        path: The ONNX file.
        what: What to call the graph in an error.

    Raises:
        ContractError: It is not valid ONNX.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ContractError(f"{path.name}: {what} is not valid ONNX ({error})") from error


def write_facts(path: Path, facts: Mapping[str, Any]) -> None:
    """Puts facts into an ONNX file's `metadata_props`, so that a C++ program needs that file alone.

    Those that it had are taken out, and the new ones appended: protobuf reads two messages one after the other as one.
    Nothing is parsed, and every other byte stays.
    """
    entry = onnx.StringStringEntryProto(key=METADATA_KEY, value=facts_text(facts))
    extra = onnx.ModelProto(metadata_props=[entry])
    write_atomically(path, without_facts(path) + extra.SerializeToString())


def facts_text(facts: Mapping[str, Any]) -> str:
    """Facts of a graph as its `metadata_props` have them: JSON."""
    return json.dumps(facts, ensure_ascii=False, sort_keys=True)


def weight_bytes(model: ir.Model) -> int:
    """Bytes of a graph's initializers."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
