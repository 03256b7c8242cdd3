"""A_inv folded into the last linear layer before the L2 norm, so that the projection costs nothing.

A tower ends in y = W h + b, W being [D, width]. The projected embedding is A_invᵀ y = (A_invᵀ W) h + A_invᵀ b: the same
layer with d rows instead of D. Products are taken in float64 and rounded to float32 once. A tower that does not end in
such a layer gets one explicit MatMul instead, and the result says so. The given model stays as it is: only the modules
on the way to the changed layer are copied, and those shallowly, so folding needs no second copy of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from invariclip.errors import CheckpointError
from invariclip.export.checkpoints.surgery import find, with_replaced

if TYPE_CHECKING:
    from numpy.typing import NDArray

Fold = Literal["folded", "matmul", "input"]

IMAGE_SITES = (
    "visual.proj",
    "visual.attnpool.c_proj",
    "visual.head.proj",
    "visual.head.mlp.fc2",
    "visual.trunk.head",
    "visual.trunk.head.fc",
    "visual.trunk.fc",
)
"""Where an image tower may end: ViT, ModifiedResNet, timm with a linear head, timm with an MLP head; and timm whose own
classifier is the projection, as EVA02 and PE-Core, MobileCLIP, and ResNets call it."""
TEXT_SITES = ("text_projection", "text.text_projection", "text.proj")
"""Where a text tower may end: CLIP, a tower of its own, a Hugging Face model."""

CHECK_TOLERANCE = 1e-4
"""Bound on the difference of unit embeddings on probe input. It asks whether the layer was the last one at all: a wrong
one is off by tenths. How exact the result is, the contract says later."""
_PROBES = 3


@dataclass(frozen=True)
class Folded:
    """A tower with the projection in it.

    Attributes:
        module: The model whose encoder gives projected embeddings, or the original one if `how` is not `folded`.
        how: `folded`; or `matmul`: the caller multiplies by `matrix` after the encoder; or `input`: so too, and the
            graph lets whoever runs it feed another matrix.
        matrix: float32 [D, d] for `matmul` and `input`, else None.
        site: Name of the layer that took it, or the empty string.
    """

    module: nn.Module
    how: Fold
    matrix: torch.Tensor | None
    site: str


def fold_images(module: nn.Module, A_inv: NDArray[np.float64], probe: torch.Tensor) -> Folded:
    """Folds into the image tower.

    Args:
        module: An open_clip model in float32.
        A_inv: float64 [D, d].
        probe: float32 [N, 3, H, W], any input; the folded tower is checked on it.
    """
    return _fold(module, A_inv, IMAGE_SITES, "encode_image", probe)


def fold_texts(module: nn.Module, A_inv: NDArray[np.float64], probe: torch.Tensor) -> Folded:
    """Folds into the text tower; `probe` is int64 [N, L]."""
    return _fold(module, A_inv, TEXT_SITES, "encode_text", probe)


def last_linear(module: nn.Module, tower: Literal["image", "text"], probe: torch.Tensor) -> NDArray[np.float64]:
    """The linear layer that a tower ends in, as one matrix: float64 [D, width], its bias as one more column.

    Args:
        module: An open_clip model in float32.
        tower: Which tower.
        probe: Its input, as for `fold_images` and `fold_texts`: that the layer is the last one is checked on it.

    Raises:
        CheckpointError: The tower ends in something else.
    """
    sites, encoder = (IMAGE_SITES, "encode_image") if tower == "image" else (TEXT_SITES, "encode_text")
    with torch.inference_mode():
        D = int(getattr(module, encoder)(probe, normalize=False).shape[-1])
    # Any matrix but the identity tells whether a layer is the last one.
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))[0]
    folded = _fold(module, turn, sites, encoder, probe)
    if folded.how != "folded":
        raise CheckpointError(f"the {tower} tower does not end in a linear layer, so it has no projection to decompose")
    layer = find(module, folded.site)
    while isinstance(layer, nn.Sequential):
        layer = layer[-1]
    if isinstance(layer, nn.Parameter):
        return np.asarray(layer.detach().double().numpy().T)
    columns = [layer.weight] if layer.bias is None else [layer.weight, layer.bias[:, None]]
    return np.asarray(torch.cat(columns, dim=1).detach().double().numpy())


def left_open(module: nn.Module, A_inv: NDArray[np.float64]) -> Folded:
    """Folds nothing: the projection stays one MatMul whose matrix can be exchanged (see `head.expose_projection`).

    Args:
        module: An open_clip model in float32.
        A_inv: float64 [D, d], the matrix that is used where none is fed.
    """
    return Folded(module, "input", torch.from_numpy(A_inv.astype(np.float32)), "")


def probe_images(height: int, width: int) -> torch.Tensor:
    """Noise that stands in for images where a tower is checked or traced: float32 [3, 3, H, W]."""
    return torch.randn((_PROBES, 3, height, width), generator=torch.Generator().manual_seed(0))


def fold_linear(
    weight: torch.Tensor, bias: torch.Tensor | None, A_inv: NDArray[np.float64]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(A_invᵀ W, A_invᵀ b) of a layer y = W h + b, products in float64, float32 results.

    Args:
        weight: W, [D, width] as `nn.Linear` keeps it.
        bias: b, [D], or None.
        A_inv: float64 [D, d].

    Returns:
        float32 [d, width] and float32 [d] or None.
    """
    A_t = torch.from_numpy(np.ascontiguousarray(A_inv.T, dtype=np.float64))
    folded = (A_t @ weight.detach().double()).float().contiguous()
    return folded, None if bias is None else (A_t @ bias.detach().double()).float().contiguous()


def _fold(
    module: nn.Module, A_inv: NDArray[np.float64], sites: tuple[str, ...], encoder: str, probe: torch.Tensor
) -> Folded:
    for site in sites:
        layer = find(module, site)
        new = None if layer is None else _folded_layer(layer, A_inv)
        if new is None:
            continue
        candidate = with_replaced(module, site.split("."), new)
        if _agrees(module, candidate, A_inv, encoder, probe):
            return Folded(candidate, "folded", None, site)
    return Folded(module, "matmul", torch.from_numpy(A_inv.astype(np.float32)), "")


def _folded_layer(layer: Any, A_inv: NDArray[np.float64]) -> nn.Module | nn.Parameter | None:
    """The layer with A_inv in it, or None if it is not linear or of another width."""
    D = A_inv.shape[0]
    if isinstance(layer, nn.Parameter) and layer.ndim == 2 and layer.shape[1] == D:
        # open_clip keeps these as [width, D] and computes h @ W
        weight, _ = fold_linear(layer.T, None, A_inv)
        return nn.Parameter(weight.T.contiguous(), requires_grad=False)
    if isinstance(layer, nn.Linear) and layer.out_features == D:
        weight, bias = fold_linear(layer.weight, layer.bias, A_inv)
        new = nn.Linear(layer.in_features, A_inv.shape[1], bias=bias is not None)
        new.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            new.bias = nn.Parameter(bias, requires_grad=False)
        return new.eval()
    if isinstance(layer, nn.Sequential) and len(layer):
        last = _folded_layer(layer[-1], A_inv)
        return None if last is None else with_replaced(layer, [str(len(layer) - 1)], last)
    return None


def _agrees(
    module: nn.Module, candidate: nn.Module, A_inv: NDArray[np.float64], encoder: str, probe: torch.Tensor
) -> bool:
    """Whether the folded encoder equals the original one times A_inv, direction by direction."""
    with torch.inference_mode():
        wanted = getattr(module, encoder)(probe, normalize=False).double() @ torch.from_numpy(A_inv)
        try:
            got = getattr(candidate, encoder)(probe, normalize=False).double()
        except RuntimeError:  # something after the layer still expects its old width
            return False
    if got.shape != wanted.shape:
        return False
    unit = nn.functional.normalize
    return bool((unit(got, dim=-1) - unit(wanted, dim=-1)).abs().max() <= CHECK_TOLERANCE)
