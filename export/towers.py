"""The two modules that get traced: uint8 pictures → unit embedding (and logits), ids → unit embedding."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from invariclip.export.fold import Folded
    from invariclip.pixels import PixelSpec

IMAGE_INPUT, TEXT_INPUT = "pixels", "input_ids"
EMBEDDING, LOGITS, PROBABILITIES = "embedding", "logits", "probabilities"


class ImageTower(nn.Module):
    """uint8 [N, H, W, 3] → float32 unit embedding [N, d], and with a class bank logits and probabilities [N, K]."""

    mean: torch.Tensor
    std: torch.Tensor
    bank: torch.Tensor | None
    matrix: torch.Tensor | None

    def __init__(
        self,
        folded: Folded,
        pixels: PixelSpec,
        *,
        bank: NDArray[np.float64] | None = None,
        logit_scale: float = 1.0,
        logit_bias: float | None = None,
    ) -> None:
        """Wraps an encoder.

        Args:
            folded: The encoder with the projection in it (see `fold`).
            pixels: Its mean and standard deviation enter the graph.
            bank: Unit class embeddings [K, d] to bake in, or None.
            logit_scale: Temperature, already exponentiated.
            logit_bias: Added to logits; where there is one, classes are independent (SigLIP) and probabilities sigmoid.
        """
        super().__init__()
        self.encoder = part_of(folded.module, "image")
        self.logit_scale = logit_scale
        self.logit_bias = logit_bias
        self.register_buffer("mean", torch.tensor(pixels.image_mean, dtype=torch.float32)[:, None, None])
        self.register_buffer("std", torch.tensor(pixels.image_std, dtype=torch.float32)[:, None, None])
        self.register_buffer("matrix", folded.matrix)
        self.register_buffer("bank", None if bank is None else torch.from_numpy(bank.T.copy()).float())
        self.eval()

    @property
    def output_names(self) -> tuple[str, ...]:
        """The graph's outputs, in the order of `forward`."""
        return (EMBEDDING,) if self.bank is None else (EMBEDDING, LOGITS, PROBABILITIES)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The same operations, in the same order, as the runtime's `normalise` and then the encoder."""
        # Cast comes first because TensorRT parses a uint8 input only then
        scaled = pixels.to(torch.float32).permute(0, 3, 1, 2) / 255.0
        raw = self.encoder.encode_image((scaled - self.mean) / self.std, normalize=False)  # type: ignore[operator]
        embedding = _unit(raw, self.matrix)
        if self.bank is None:
            return (embedding,)
        logits = embedding @ self.bank * self.logit_scale
        if self.logit_bias is None:
            return embedding, logits, logits.softmax(dim=-1)
        logits = logits + self.logit_bias
        return embedding, logits, logits.sigmoid()


class TextTower(nn.Module):
    """int64 ids [N, L] → float32 embedding [N, d] of unit length."""

    matrix: torch.Tensor | None

    def __init__(self, folded: Folded) -> None:
        """Wraps an encoder with the projection in it (see `fold`)."""
        super().__init__()
        self.encoder = part_of(folded.module, "text")
        self.register_buffer("matrix", folded.matrix)
        self.eval()

    @property
    def output_names(self) -> tuple[str, ...]:
        """The graph's outputs."""
        return (EMBEDDING,)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Encoder, projection where it is not folded, unit length."""
        return (_unit(self.encoder.encode_text(input_ids, normalize=False), self.matrix),)  # type: ignore[operator]


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
    return nn.functional.normalize(raw if matrix is None else raw @ matrix, dim=-1)
