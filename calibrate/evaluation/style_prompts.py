"""Projections away from what prompts say of styles: no image is looked at, only a text tower asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.calibrate.data.embed import embed_texts
from invariclip.calibrate.evaluation.baselines import Baseline
from invariclip.calibrate.evaluation.maps import PerModality
from invariclip.errors import InputError, ProjectionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from invariclip.calibrate.data.encoder import TextEncoder
    from invariclip.calibrate.evaluation.maps import Map

TEMPLATE = "{style} of a {name}."
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
    found = embed_texts(encoder, [*styles, *texts])
    return StylePrompts(found[: len(styles)], found[len(styles) :].reshape(len(styles), len(classes), -1))


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
    if not len(values) or values[0] <= _ZERO:
        raise InputError(f"{nothing}; there is no direction to remove")
    return int((values > _ZERO * values[0]).sum())
