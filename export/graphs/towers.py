"""The two modules that get traced: uint8 images → unit embedding, ids → unit embedding."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from invariclip.preprocessing.pixels import PixelSpec

NORM_FLOOR = 1e-12
"""Smallest length that a raw embedding is divided by, as in torch's `normalize`."""


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
