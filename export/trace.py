"""A torch tower as an ONNX file: opset 20, dynamic batch, checked, with the artifact's facts inside."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from typing import TYPE_CHECKING, Any

import onnx
import torch

from invariclip.errors import ContractError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

OPSET = 20
"""`Gelu` and `LayerNormalization` stay whole, and TensorRT still builds all of it."""
METADATA_KEY = "invariclip"
EXTERNAL_DATA_BYTES = 1_800_000_000
"""Weights above this go into a file beside the graph: protobuf ends at 2 GiB."""


def trace(
    tower: torch.nn.Module,
    example: torch.Tensor,
    path: Path,
    *,
    input_name: str,
    output_names: tuple[str, ...],
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Writes a tower as ONNX.

    Args:
        tower: An `ImageTower` or `TextTower`.
        example: Input of two or more rows; the first dimension becomes the dynamic `batch`.
        path: File to write; weights above `EXTERNAL_DATA_BYTES` go to `path.data`.
        input_name: The graph's input.
        output_names: The graph's outputs.
        facts: JSON-ready, stored in the file's `metadata_props`: a C++ program needs this file alone.

    Raises:
        ContractError: The tower cannot be exported, or the graph is not valid ONNX.
    """
    with _quiet():
        try:
            program = torch.onnx.export(
                tower,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[input_name],
                output_names=list(output_names),
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                verbose=False,
            )
        except Exception as error:  # the exporter's errors share no public base class
            reason = str(error).split("\n", 1)[0]
            raise ContractError(f"{path.name}: torch cannot export this tower ({reason})") from error
        if program is None:
            raise ContractError(f"{path.name}: torch gave no graph")
        program.model.metadata_props[METADATA_KEY] = json.dumps(facts or {}, ensure_ascii=False, sort_keys=True)
        _tidy(program.model.graph)
        program.save(path, external_data=weight_bytes(tower) > EXTERNAL_DATA_BYTES)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ContractError(f"{path.name}: the exported graph is not valid ONNX ({error})") from error


def weight_bytes(tower: torch.nn.Module) -> int:
    """Bytes of a tower's parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*tower.parameters(), *tower.buffers()))


def node_count(path: Path) -> int:
    """Nodes of the graph, those of subgraphs and functions included."""
    model = onnx.load(str(path), load_external_data=False)
    return _nodes(model.graph) + sum(len(function.node) for function in model.functions)


def read_facts(path: Path) -> dict[str, Any]:
    """The facts that `trace` stored in a file."""
    model = onnx.load(str(path), load_external_data=False)
    stored = {item.key: item.value for item in model.metadata_props}
    return dict(json.loads(stored[METADATA_KEY]))


def _tidy(graph: Any) -> None:
    """Renames inner values that took an output's name (token *embedding*), drops positions in this machine's files."""
    outer = {id(value): value.name for value in (*graph.inputs, *graph.outputs)}
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            if id(value) not in outer and value.name in outer.values():
                value.name = f"{value.name}_inner"


def _nodes(graph: onnx.GraphProto) -> int:
    inner = [attribute for node in graph.node for attribute in node.attribute]
    return len(graph.node) + sum(_nodes(item.g) for item in inner if item.HasField("g"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's remarks are about its own passes; what matters is checked afterwards."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
