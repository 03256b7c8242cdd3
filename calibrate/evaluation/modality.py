"""Baselines that treat images and texts apart and look at no environment: GR-CLIP's centring and IsoCLIP's projectors.

Both were proposed for another purpose than styles: for the gap between the two modalities, and for what contrastive
training leaves unaligned within one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.calibrate.evaluation.baselines import Baseline
from invariclip.calibrate.evaluation.maps import PerModality
from invariclip.errors import CheckpointError, InputError, ProjectionError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from invariclip.export.checkpoints.checkpoint import Checkpoint

TOP, BOTTOM = 150 / 512, 50 / 512
"""Shares of singular directions that IsoCLIP's published code drops by default, of ViT-B/32's 512."""
_ZERO = 1e-9
"""Singular values below this share of the largest are zero."""


def gr_clip(images: NDArray[np.floating[Any]], texts: NDArray[np.floating[Any]]) -> PerModality:
    """Every modality less its own mean, at unit length again (Li et al., arXiv 2507.19054, GR-CLIP).

    Args:
        images: [N, D], unit length: the images that their mean is taken of, of training environments alone.
        texts: [M, D], unit length: the texts that theirs is taken of; prompts of the training classes, say. The paper
            takes captions of a data set beside the one that is scored.

    Raises:
        InputError: There is no image or no text.
        ProjectionError: The two have different widths.
    """
    if not len(images) or not len(texts):
        raise InputError("a modality's mean needs one embedding at least")
    if images.shape[1] != texts.shape[1]:
        raise ProjectionError(f"images are {images.shape[1]} wide and texts {texts.shape[1]}")
    plain = np.eye(images.shape[1])
    means = (np.asarray(part, dtype=np.float64).mean(axis=0) for part in (images, texts))
    return PerModality(*(Baseline("gr-clip", mean, plain) for mean in means))


@dataclass(frozen=True)
class Projectors:
    """The linear layers that a checkpoint's two towers end in, y = W h.

    Attributes:
        image: W_i, float64 [D, image tower's width]; a bias is one more column, h then ends in a 1.
        text: W_t, float64 [D, text tower's width], likewise.
    """

    image: NDArray[np.float64]
    text: NDArray[np.float64]


def projectors(checkpoint: Checkpoint) -> Projectors:
    """Reads both last linear layers; of a head of several layers it is the last.

    Args:
        checkpoint: An open_clip model.

    Raises:
        CheckpointError: A tower does not end in a linear layer, as where its output is pooled or normalised last.
    """
    # torch is imported by whoever has a checkpoint
    import torch

    from invariclip.export.graphs.fold import last_linear, probe_images

    ids = torch.from_numpy(checkpoint.tokenizer(["a photo of a dog.", "two cats"]))
    images = probe_images(*checkpoint.pixels.image_size)
    try:
        return Projectors(last_linear(checkpoint.module, "image", images), last_linear(checkpoint.module, "text", ids))
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.name}: {error}; IsoCLIP needs the last linear layer of both") from error


def spectrum(layers: Projectors) -> NDArray[np.float64]:
    """Singular values above zero of the inter-modal operator W_iᵀ W_t, descending, float64 [r].

    Raises:
        ProjectionError: The two layers end in spaces of different width.
    """
    return _decomposed(layers)[1]


def rank_or_default(layers: Projectors, rank: int) -> int | None:
    """The rank of a projection for `isoclip` to stand beside it, or None for its own where Ψ has no larger one."""
    return rank if rank < len(spectrum(layers)) else None


def isoclip(layers: Projectors, rank: int | None = None) -> PerModality:
    """Drops the top and bottom singular directions of the inter-modal operator (Magistri et al., arXiv 2603.19862).

    With Ψ = W_iᵀ W_t = U S Vᵀ and the columns k in the middle of the spectrum, the paper replaces the towers' last
    layers by W_i U_k U_kᵀ and W_t V_k V_kᵀ; no data is looked at. U_kᵀ = S_k⁻¹ V_kᵀ W_tᵀ W_i, so that is a linear map
    of the embeddings themselves: y ↦ A S_k⁻¹ Bᵀ y for images and y ↦ B S_k⁻¹ Aᵀ y for texts, with A = W_i U_k and
    B = W_t V_k: two oblique projections, one the transpose of the other, which give exactly what the layers would.

    It is for comparisons within one modality, as prototypes make them; the published code refuses it across them, as
    zero-shot is. Biases enter as that code has SigLIP's: as one more column.

    Args:
        layers: Both last layers, see `projectors`.
        rank: k, directions that are kept; three of four dropped ones are at the top, as in the published code's
            defaults. None drops the shares of those defaults, `TOP` and `BOTTOM`.

    Raises:
        ProjectionError: The two layers end in spaces of different width, or the rank is not from 1 to that of Ψ.
    """
    left, values, right = _decomposed(layers)
    count = len(values)
    if rank is not None and not 1 <= rank <= count:
        raise ProjectionError(f"rank {rank} is not from 1 to {count}, the rank of the inter-modal operator")
    if rank is None:
        top, bottom = round(TOP * count), round(BOTTOM * count)
    else:
        top = round((count - rank) * TOP / (TOP + BOTTOM))
        bottom = count - rank - top
    middle = slice(top, count - bottom)
    of_images, of_texts = layers.image @ left[:, middle], layers.text @ right[:, middle]
    matrix = of_texts / values[middle] @ of_images.T
    nothing = np.zeros(len(matrix))
    return PerModality(Baseline("isoclip", nothing, matrix), Baseline("isoclip", nothing, matrix.T))


def _decomposed(
    layers: Projectors,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    if len(layers.image) != len(layers.text):
        raise ProjectionError(f"images end in {len(layers.image)} dimensions, but texts in {len(layers.text)}")
    left, values, right = np.linalg.svd(layers.image.T @ layers.text, full_matrices=False)
    kept = values > _ZERO * values[0]
    return left[:, kept], values[kept], right[kept].T
