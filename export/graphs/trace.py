"""A torch tower traced to an ONNX graph: opset 20, dynamic batch.

What is traced: `ImageTower`, uint8 images → unit embedding, and `TracedTextTower`, ids → unit embedding.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from invariclip.errors import ContractError
from invariclip.export.libraries import quiet

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir

    from invariclip.preprocessing.pixels import PixelSpec

OPSET = 20
"""`Gelu` and `LayerNormalization` stay whole, and TensorRT still builds all of it."""
NORM_FLOOR = 1e-12
"""Smallest length that a raw embedding is divided by, as in torch's `normalize`."""


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


class ImageTower(nn.Module):
    """uint8 [N, H, W, 3] → float32 unit embedding [N, d]."""

    mean: torch.Tensor
    std: torch.Tensor
    matrix: torch.Tensor | None

    def __init__(self, encoder: nn.Module, pixels: PixelSpec, matrix: torch.Tensor | None = None) -> None:
        """Wraps an encoder.

        Args:
            encoder: The image part of a model (see `part_of`), with or without the projection folded in.
            pixels: Its mean and standard deviation enter the graph.
            matrix: float32 [D, d], the projection where it is not folded in.
        """
        super().__init__()
        self.encoder = encoder
        self.register_buffer("mean", torch.tensor(pixels.image_mean, dtype=torch.float32)[:, None, None])
        self.register_buffer("std", torch.tensor(pixels.image_std, dtype=torch.float32)[:, None, None])
        self.register_buffer("matrix", matrix)
        self.eval()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """The same operations, in the same order, as the runtime's `normalise` and then the encoder."""
        # Cast comes first because TensorRT parses a uint8 input only then
        scaled = pixels.to(torch.float32).permute(0, 3, 1, 2) / 255.0
        raw = self.encoder.encode_image((scaled - self.mean) / self.std, normalize=False)  # type: ignore[operator]
        return _unit(raw, self.matrix)


class TracedTextTower(nn.Module):
    """int64 ids [N, L] → float32 embedding [N, d] of unit length."""

    matrix: torch.Tensor | None

    def __init__(self, encoder: nn.Module, matrix: torch.Tensor | None = None) -> None:
        """Wraps the text part of a model (see `part_of`); `matrix` as in `ImageTower`."""
        super().__init__()
        self.encoder = encoder
        self.register_buffer("matrix", matrix)
        self.eval()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Encoder, projection where it is not folded, unit length."""
        return _unit(self.encoder.encode_text(input_ids, normalize=False), self.matrix)  # type: ignore[operator]


def part_of(module: nn.Module, tower: str) -> nn.Module:
    """A shallow copy of an open_clip model that holds one tower alone: what is not there cannot get into the graph.

    Args:
        module: The model.
        tower: `image` or `text`.
    """
    twin = copy.copy(module)
    if tower == "image":
        twin._modules = {"visual": module._modules["visual"]}
        twin._parameters, twin._buffers = {}, {}
    else:
        twin._modules = {name: part for name, part in module._modules.items() if name not in ("visual", "text_decoder")}
        twin._parameters = {name: value for name, value in module._parameters.items() if not name.startswith("logit_")}
    return twin


def _unit(raw: torch.Tensor, matrix: torch.Tensor | None) -> torch.Tensor:
    rows = raw if matrix is None else raw @ matrix
    # torch's `normalize`, without its expansion of the lengths to the rows' shape
    lengths: torch.Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / lengths.clamp_min(NORM_FLOOR)
