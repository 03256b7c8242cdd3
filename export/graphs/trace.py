"""A torch tower as an ONNX file: opset 20, dynamic batch, checked, with the artifact's facts inside."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir
import torch

from invariclip.artifact.manifest import METADATA_KEY
from invariclip.errors import ContractError
from invariclip.export.checkpoints.quiet import quiet

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

OPSET = 20
"""`Gelu` and `LayerNormalization` stay whole, and TensorRT still builds all of it."""
EXTERNAL_DATA_BYTES = 1_000_000_000
"""Weights above this go into a file beside the graph. Protobuf ends at 2 GiB, and needs twice the weights to write."""


def traced(
    tower: torch.nn.Module, example: torch.Tensor, *, input_name: str, output_name: str, longest: int | None = None
) -> ir.Model:
    """A tower as a graph of opset `OPSET` whose batch is dynamic.

    Args:
        tower: An `ImageTower` or `TextTower`.
        example: Input of two or more rows; the first dimension becomes the dynamic `batch`.
        input_name: The graph's input.
        output_name: Its output.
        longest: Makes the second dimension dynamic too: `length`, from 1 to this.

    Raises:
        ContractError: torch cannot export the tower.
    """
    shape = {0: torch.export.Dim("batch", min=1)}
    if longest is not None:
        shape[1] = torch.export.Dim("length", min=1, max=longest)
    with quiet():
        try:
            program = torch.onnx.export(
                tower,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[input_name],
                output_names=[output_name],
                dynamic_shapes=(shape,),
                verbose=False,
            )
        except Exception as error:  # the exporter's errors share no public base class
            reason = str(error).split("\n", 1)[0]
            raise ContractError(f"{type(tower).__name__}: torch cannot export it ({reason})") from error
    if program is None:
        raise ContractError(f"{type(tower).__name__}: torch gave no graph")
    _tidy(program.model.graph)
    _require_dynamic(program.model.graph.inputs[0], shape)
    return program.model


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
    ir.save(model, path, external_data=data.name if external else None)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ContractError(f"{path.name}: the exported graph is not valid ONNX ({error})") from error


def write_facts(path: Path, facts: Mapping[str, Any]) -> None:
    """Adds facts to an ONNX file's `metadata_props`, so that a C++ program needs that file alone.

    They are appended: protobuf reads two messages one after the other as one, so nothing has to be loaded.
    """
    text = json.dumps(facts, ensure_ascii=False, sort_keys=True)
    extra = onnx.ModelProto(metadata_props=[onnx.StringStringEntryProto(key=METADATA_KEY, value=text)])
    with path.open("ab") as file:
        file.write(extra.SerializeToString())


def weight_bytes(model: ir.Model) -> int:
    """Bytes of a graph's initializers."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def _require_dynamic(value: ir.Value, wanted: Mapping[int, object]) -> None:
    """A batch that a tower turned into a Python number is frozen in the graph, and torch says nothing.

    Raises:
        ContractError: A dimension that should be dynamic is not.
    """
    frozen = [] if value.shape is None else [place for place in wanted if isinstance(value.shape[place], int)]
    if frozen:
        raise ContractError(f"{value.name}: torch froze dimension {frozen[0]} of {value.shape} while tracing")


def _tidy(graph: Any) -> None:
    """Renames inner values that took an output's name (token *embedding*), drops positions in this machine's files."""
    outer = {id(value): value.name for value in (*graph.inputs, *graph.outputs)}
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            if id(value) not in outer and value.name in outer.values():
                value.name = f"{value.name}_inner"
