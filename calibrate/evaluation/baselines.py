"""What a projection is compared with: affine maps z ↦ normalise((z - offset) matrix + shift), each fitted, by its name.

They are for tables of evaluation, not for export: an artifact's projection is linear, and most of these have an offset.
`none` needs a width alone; `centring`, `whitening` and `pca` the points of moments; `published` points and pairs;
`within-class` and `lda` need vectors and their class labels. `erasure` has those that need environment labels,
`text_baselines` those that need a text tower.

Class embeddings go through the same map as images, unless it is a `PerModality`. Where a checkpoint keeps images and
texts apart, the images' mean is not the texts', and a map with an offset says more by prototypes or a linear probe than
by zero-shot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from invariclip.calibrate.projection import estimators
from invariclip.errors import InputError, ProjectionError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from invariclip.calibrate.data.moments import Moments

BASELINES = (
    "none", "centring", "whitening", "within-class", "lda", "pca", "published",
    "leace", "splince", "text-styles", "prism-mini", "gr-clip", "isoclip",
)  # fmt: skip
RIDGE = 1e-3
"""Regularises `whitening`, `within-class` and `lda`, as a share of the mean eigenvalue of what they invert."""


class Map(Protocol):
    """A projection or a baseline: from the encoder's embeddings to the vectors whose cosines count."""

    def apply(self, embeddings: NDArray[np.floating[Any]], /) -> NDArray[np.float64]:
        """[N, D] to unit-length [N, d]."""


@dataclass(frozen=True)
class PerModality:
    """Two maps into one space: `apply` is that of images, so it stands wherever a `Map` of images does.

    Attributes:
        images: For image embeddings, and so for prototypes and probes.
        texts: For class embeddings that a text tower gave.
    """

    images: Map
    texts: Map

    def apply(self, embeddings: NDArray[np.floating[Any]], /) -> NDArray[np.float64]:
        """Image embeddings, [N, D] to unit-length [N, d]."""
        return self.images.apply(embeddings)


def for_texts(what: Map) -> Map:
    """The map for text embeddings: the map itself, unless it treats the modalities differently."""
    return what.texts if isinstance(what, PerModality) else what


@dataclass(frozen=True)
class Baseline:
    """A fitted affine map on embeddings.

    Attributes:
        name: One of `BASELINES`.
        offset: float64 [D].
        matrix: float64 [D, d].
        shift: float64 [d], or None for zero: what is added after the product.
    """

    name: str
    offset: NDArray[np.float64]
    matrix: NDArray[np.float64]
    shift: NDArray[np.float64] | None = None

    def apply(self, vectors: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """normalise((z - offset) matrix + shift), float64 [N, d], unit length; a row that becomes zero stays zero.

        Args:
            vectors: [N, D], images or class embeddings alike.

        Raises:
            ProjectionError: They have another width.
        """
        if vectors.shape[-1] != len(self.offset):
            raise ProjectionError(f"{self.name} is for embeddings of width {len(self.offset)}, not {vectors.shape[-1]}")
        mapped = (vectors.astype(np.float64) - self.offset) @ self.matrix
        if self.shift is not None:
            mapped += self.shift
        lengths = np.linalg.norm(mapped, axis=-1, keepdims=True)
        return np.asarray(np.divide(mapped, lengths, out=np.zeros_like(mapped), where=lengths > 0))


def none(width: int) -> Baseline:
    """Embeddings as they are.

    Args:
        width: D.
    """
    return Baseline("none", np.zeros(width), np.eye(width))


def centring(moments: Moments) -> Baseline:
    """The mean of all images taken away, pooled over environments.

    Raises:
        InputError: The moments hold no image.
    """
    return Baseline("centring", _mean(moments), np.eye(moments.width))


def whitening(moments: Moments, ridge: float = RIDGE) -> Baseline:
    """ZCA: centred, then (C + r I)^(-1/2) of the covariance C, the whitening nearest to no change (Kessy et al. 2018).

    Args:
        moments: Of the images; pairs are not looked at.
        ridge: r, as a share of the mean eigenvalue of C.

    Raises:
        InputError: The moments hold no image, or all of them are equal.
    """
    values, vectors = _spectrum(_covariance(moments), "all images have equal embeddings")
    return Baseline("whitening", _mean(moments), vectors * _roots(values, ridge) @ vectors.T)


def pca(moments: Moments, rank: int) -> Baseline:
    """Centred, then the `rank` directions of the largest variance: what a cut to equal rank does that knows no pairs.

    Args:
        moments: Of the images; pairs are not looked at.
        rank: d, that of the projection to compare with.

    Raises:
        InputError: The moments hold no image, or all of them are equal.
        ProjectionError: The rank is not from 1 to D.
    """
    _require_rank(rank, moments.width)
    _, vectors = _spectrum(_covariance(moments), "all images have equal embeddings")
    return Baseline("pca", _mean(moments), vectors[:, ::-1][:, :rank].copy())


def within_class(vectors: NDArray[np.floating[Any]], labels: NDArray[np.int64], ridge: float = RIDGE) -> Baseline:
    """Centred, then whitened within classes: (S_w + r I)^(-1/2) of the mean covariance S_w within classes.

    Classes are pooled over environments, so what environments do to a class counts as variation within it: the nearest
    that labels without pairs come to `shrinkage`.

    Args:
        vectors: [N, D].
        labels: int64 [N].
        ridge: r, as a share of the mean eigenvalue of S_w.

    Raises:
        InputError: There are not as many labels as vectors, fewer than two classes, or no class has two images that
            differ.
    """
    rows, means, codes = _classes(vectors, labels)
    return Baseline("within-class", rows.mean(axis=0), _whitened_within(rows, means[codes], ridge))


def lda(
    vectors: NDArray[np.floating[Any]], labels: NDArray[np.int64], rank: int | None = None, ridge: float = RIDGE
) -> Baseline:
    """Fisher's linear discriminant: whitened within classes, then the directions along which class means differ most.

    With W = (S_w + r I)^(-1/2) of `within_class` and S_b the covariance of class means, weighted by their counts,
    the matrix is W U with the leading eigenvectors U of W S_b W (Fukunaga, Introduction to Statistical Pattern
    Recognition, 1990, section 10.2).

    Args:
        vectors: [N, D].
        labels: int64 [N].
        rank: d; by default one less than there are classes, and D at most: no other direction tells them apart.
        ridge: r, as a share of the mean eigenvalue of S_w.

    Raises:
        InputError: As for `within_class`.
        ProjectionError: The rank is not from 1 to the default.
    """
    rows, means, codes = _classes(vectors, labels)
    most = min(len(means) - 1, rows.shape[1])
    count = most if rank is None else rank
    _require_rank(count, most)
    whiten, mean = _whitened_within(rows, means[codes], ridge), rows.mean(axis=0)
    spread = (means - mean) * np.sqrt(np.bincount(codes) / len(rows))[:, None] @ whiten
    _, directions = np.linalg.eigh(spread.T @ spread)
    return Baseline("lda", mean, whiten @ directions[:, ::-1][:, :count])


def published(moments: Moments, rank: int, strength: float) -> Baseline:
    """`estimators.published`: the paper's estimator with the wrong end of the spectrum.

    Args:
        moments: Σ and Σ_Δ.
        rank: d.
        strength: λ.

    Raises:
        InputError: The moments hold no image or no pair.
        ProjectionError: The rank is not from 1 to D.
    """
    _require_rank(rank, moments.width)
    return Baseline("published", np.zeros(moments.width), estimators.published(moments, rank, strength).A_inv)


def _classes(
    vectors: NDArray[np.floating[Any]], labels: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """The rows in float64, the means of the classes [K, D], and every row's class."""
    if len(labels) != len(vectors):
        raise InputError(f"{len(vectors)} vectors and {len(labels)} labels; every vector needs one label")
    rows = vectors.astype(np.float64)
    classes, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise InputError(f"this baseline tells classes apart and needs two at least, not {len(classes)}")
    sums = np.zeros((len(classes), rows.shape[1]))
    np.add.at(sums, codes, rows)
    return rows, sums / counts[:, None], codes


def _whitened_within(rows: NDArray[np.float64], means: NDArray[np.float64], ridge: float) -> NDArray[np.float64]:
    within = rows - means
    values, axes = _spectrum(within.T @ within / len(rows), "no class has two images that differ")
    return np.asarray(axes * _roots(values, ridge) @ axes.T)


def _mean(moments: Moments) -> NDArray[np.float64]:
    if moments.point_weight <= 0:
        raise InputError("the moments hold no image; there is nothing to fit")
    return moments.point_sum / moments.point_weight


def _covariance(moments: Moments) -> NDArray[np.float64]:
    mean = _mean(moments)
    return moments.sigma - np.outer(mean, mean)


def _spectrum(second: NDArray[np.float64], nothing: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    values, vectors = np.linalg.eigh(second)
    # Unit-length embeddings leave about 1e-16 where nothing varies.
    if values[-1] <= 1e-14:
        raise InputError(f"{nothing}; there is nothing to fit")
    return np.maximum(values, 0), vectors


def _roots(values: NDArray[np.float64], ridge: float) -> NDArray[np.float64]:
    return np.asarray(1 / np.sqrt(values + ridge * values.mean()))


def _require_rank(rank: int, most: int) -> None:
    if not 1 <= rank <= most:
        raise ProjectionError(f"rank {rank} is not from 1 to {most}")
