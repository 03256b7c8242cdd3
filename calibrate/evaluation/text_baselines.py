"""Baselines that need a text tower: `text-styles` and PRISM-mini, GR-CLIP's centring, IsoCLIP's projectors.

The first two project away from what prompts say of styles and look at no image. The last two treat images and texts
apart and look at no environment: they were proposed for the gap between the modalities, and for what contrastive
training leaves unaligned within one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.calibrate.data.encode import embed_texts
from invariclip.calibrate.evaluation.baselines import Baseline, PerModality
from invariclip.errors import CheckpointError, InputError, ProjectionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from invariclip.calibrate.data.encoders import TextEncoder
    from invariclip.calibrate.evaluation.baselines import Map
    from invariclip.export.checkpoints.checkpoint import Checkpoint

TEMPLATE = "{style} of a {name}."
_NO_DIRECTION = 1e-9
"""Singular values below this share of the largest are zero."""
TOP, BOTTOM = 150 / 512, 50 / 512
"""Shares of singular directions that IsoCLIP's published code drops by default, of ViT-B/32's 512."""
_ZERO = 1e-9
"""Singular values below this share of the largest are zero."""


@dataclass(frozen=True)
class StylePrompts:
    """What a text tower makes of styles, alone and of every class.

    Attributes:
        words: float64 [S, D], unit length: the styles' names.
        prompts: float64 [S, K, D], unit length: "<style> of a <class>".
    """

    words: NDArray[np.float64]
    prompts: NDArray[np.float64]


def embed_style_prompts(encoder: TextEncoder, styles: Sequence[str], classes: Sequence[str]) -> StylePrompts:
    """Embeds the styles' names and every class in every style.

    Args:
        encoder: Has a text tower.
        styles: With their article, "a 3D render" say: of the training environments alone.
        classes: Names.

    Raises:
        InputError: There are fewer than two styles, or no class.
    """
    if len(styles) < 2 or not classes:
        raise InputError(f"style prompts need two styles and a class at least, not {len(styles)} and {len(classes)}")
    texts = [TEMPLATE.format(style=style, name=name) for style in styles for name in classes]
    vectors = embed_texts(encoder, [*styles, *texts])
    return StylePrompts(vectors[: len(styles)], vectors[len(styles) :].reshape(len(styles), len(classes), -1))


def text_styles(prompts: NDArray[np.floating[Any]], removed: int | None = None) -> Baseline:
    """Orthogonal projection away from how prompts differ with the style.

    Of every class's prompts the mean over styles is subtracted; the leading right singular vectors of all these
    differences are removed, z ↦ (I - V Vᵀ) z. This is the bias subspace of Bolukbasi et al. (arXiv 1607.06520, section
    6, "hard de-biasing"), a class being a defining set, on embeddings of prompts as Chuang et al. (arXiv 2302.00070)
    have them; those project their texts alone, here images and texts both are, as for every projection.

    Args:
        prompts: [S, K, D], unit length, see `StylePrompts`.
        removed: How many directions are removed, or all that the differences span if they are fewer; by default one
            less than there are styles.

    Raises:
        InputError: There are fewer than two styles, or prompts do not differ.
        ProjectionError: `removed` is not from 1 to D - 1, or nothing would be left.
    """
    styles, _, width = prompts.shape
    if styles < 2:
        raise InputError(f"styles are told from their differences; two at least are needed, not {styles}")
    differences = (prompts - prompts.mean(axis=0)).astype(np.float64).reshape(-1, width)
    _, values, axes = np.linalg.svd(differences, full_matrices=False)
    span = _rank(values, "prompts of a class are equal in every style")
    count = styles - 1 if removed is None else removed
    if not 1 <= count < width:
        raise ProjectionError(f"{count} directions cannot be removed of {width}; choose from 1 to {width - 1}")
    count = min(count, span)
    return Baseline("text-styles", np.zeros(width), np.eye(width) - axes[:count].T @ axes[:count])


def prism_mini(words: NDArray[np.floating[Any]]) -> PerModality:
    """PRISM-mini: images are projected away from the span of spurious words' embeddings, x ↦ (I - V (VᵀV)⁻¹ Vᵀ) x.

    Molahasani et al. (ICCV 2025, arXiv 2507.08979), as the authors' published code computes it (`utils.py` of
    github.com/MahdiyarMM/PRISM, `--mitigation orth`): V has the unit embeddings of the spurious attributes as columns,
    images are projected, texts stay as they are. There an LLM names the attributes; here the styles' own names do. The
    inverse is taken as a pseudo-inverse, for words whose embeddings are not independent.

    Args:
        words: [S, D], unit length, see `StylePrompts`.

    Raises:
        InputError: There is no word, or they span the whole space.
    """
    count, width = words.shape
    if not count:
        raise InputError("PRISM-mini needs one spurious word at least")
    _, values, axes = np.linalg.svd(words.astype(np.float64), full_matrices=False)
    span = axes[: _rank(values, "all words have zero embeddings")]
    if len(span) == width:
        raise InputError(f"{count} words span all {width} dimensions, so nothing would be left; give fewer")
    plain = np.eye(width)
    nothing = np.zeros(width)
    return PerModality(Baseline("prism-mini", nothing, plain - span.T @ span), Baseline("prism-mini", nothing, plain))


def by_name(styles: StylePrompts, rank: int) -> dict[str, Map]:
    """The rows of a table: `text-styles` twice, by default and of a projection's rank, and `prism-mini`.

    Args:
        styles: Of the training environments.
        rank: d of the projection that stands beside them.
    """
    width = styles.words.shape[1]
    return {
        "text-styles": text_styles(styles.prompts),
        "text-styles, equal rank": text_styles(styles.prompts, max(1, width - rank)),
        "prism-mini": prism_mini(styles.words),
    }


def _rank(values: NDArray[np.float64], nothing: str) -> int:
    if not len(values) or values[0] <= _NO_DIRECTION:
        raise InputError(f"{nothing}; there is no direction to remove")
    return int((values > _NO_DIRECTION * values[0]).sum())


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
    nonzero = values > _ZERO * values[0]
    return left[:, nonzero], values[nonzero], right[nonzero].T
