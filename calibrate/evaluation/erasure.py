"""Concepts erased from embeddings by labels alone, in closed form: LEACE, and SPLINCE, which spares what classes need.

Both remove what a linear reader can tell of the environment from: the covariance of embeddings with environment labels
becomes zero, and with it every linear classifier is at chance on the data that it was fitted on (LEACE, section 3).
They need every embedding's environment label, and SPLINCE its class label too; a projection needs pairs instead.
Both invert the covariance of embeddings, so they want several times as many embeddings as dimensions; of fewer they fit
the noise (`shrink` makes that milder), and a reader that is tested on rows that they were fitted on can then be *below*
chance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.calibrate.evaluation.baselines import Baseline
from invariclip.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

TOLERANCE = 1e-10
"""Directions whose variance is below this share of the largest are treated as constant: the pseudo-inverse's cut."""
MEETING = 1e-6
"""Sine of the angle below which two subspaces are said to share a direction."""


def leace(vectors: NDArray[np.floating[Any]], environments: NDArray[np.int64], *, shrink: bool = False) -> Baseline:
    """Least-squares concept erasure: r(x) = x - W⁺ P W (x - μ) (Belrose et al. 2023, arXiv 2306.03819, section 4).

    W = (Σ_XX^(1/2))⁺ whitens, and P is the orthogonal projection onto the column space of W Σ_XZ, Σ_XZ being the
    covariance with one-hot environment labels Z. Of all affine maps that leave no covariance with Z, r changes x least
    in the mean square. The mean μ is kept.

    Args:
        vectors: [N, D], of the training environments.
        environments: int64 [N].
        shrink: Take for Σ_XX the optimal linear shrinkage α S + (1 - α) (tr S / D) I of the measured covariance S, as
            the authors' published code does by default: α = 1 - (tr S)² / (N (‖S‖² - (tr S)² / D)), here kept within 0
            and 1 (Bodnar et al., arXiv 1308.2608). No covariance with Z is left then either.

    Raises:
        InputError: There are not as many labels as vectors, fewer than two environments, or vectors that are all equal.
    """
    rows, mean = _centred(vectors)
    whiten, colour = _whitening(rows, shrink=shrink)
    kernel = _basis(whiten @ _covariance(rows, environments, "environment"))
    removed = colour @ kernel @ (kernel.T @ whiten)
    return Baseline("leace", mean, (np.eye(len(mean)) - removed).T, mean)


def splince(
    vectors: NDArray[np.floating[Any]],
    environments: NDArray[np.int64],
    labels: NDArray[np.int64],
    *,
    directions: int | None = None,
) -> Baseline:
    """Erases the environment and leaves the covariance with class labels as it is (Holstege et al., arXiv 2506.10703).

    r(x) = μ + W⁺ P W (x - μ) with the whitening W of `leace`. P is the oblique projection whose kernel is the column
    space of W Σ_XZ (Z: environments) and whose range holds that of W Σ_XY (Y: classes) and everything that is
    orthogonal to both. With orthonormal bases V of the first and U of the second it is I - V (NᵀV)⁻¹ Nᵀ,
    N = (I - UUᵀ) V; where U is orthogonal to V it is that of LEACE. The paper writes the same projection by bases of
    its range and of the kernel's complement, and proves that it is the one of least distortion that does both.

    Both can be had only where the two subspaces share no direction: K classes and E environments need
    K + E - 2 ≤ D, at least. With more classes, give `directions`: only the leading left singular vectors of W Σ_XY
    then make up U, so only that part of the covariance is kept. That is an addition of this project's.

    Args:
        vectors: [N, D], of the training environments.
        environments: int64 [N].
        labels: int64 [N], classes.
        directions: How many directions of W Σ_XY are kept at most; None keeps all.

    Raises:
        InputError: As for `leace`, of classes too; `directions` is below 1; or the classes' subspace and the
            environments' share a direction.
    """
    if directions is not None and directions < 1:
        raise InputError(f"directions must be 1 or more, not {directions}")
    rows, mean = _centred(vectors)
    whiten, colour = _whitening(rows)
    kernel = _basis(whiten @ _covariance(rows, environments, "environment"))
    class_basis = _basis(whiten @ _covariance(rows, labels, "class"))[:, :directions]
    normal = kernel - class_basis @ (class_basis.T @ kernel)
    if kernel.shape[1] and np.linalg.svd(normal, compute_uv=False)[-1] < MEETING:
        raise InputError(
            f"the {class_basis.shape[1]} directions that tell classes apart and the {kernel.shape[1]} that tell "
            f"environments apart meet in {len(mean)} dimensions, so the covariance with one cannot go while that with "
            "the other stays; keep fewer directions (`directions`), or use `leace`"
        )
    removed = colour @ kernel @ np.linalg.solve(normal.T @ kernel, normal.T @ whiten)
    return Baseline("splince", mean, (np.eye(len(mean)) - removed).T, mean)


def room(
    environments: NDArray[np.int64], labels: NDArray[np.int64], vectors: NDArray[np.floating[Any]], rank: int
) -> int | None:
    """How many class directions `splince` is given in a table: all where there is room, otherwise a projection's rank.

    Args:
        environments: int64 [N].
        labels: int64 [N], classes.
        vectors: [N, D].
        rank: d of the projection that stands beside it.

    Returns:
        None for all, or a number that leaves one dimension to the environments and one more.
    """
    most = min(int(vectors.shape[1]), len(vectors) - 1)
    apart = np.unique(environments).size - 1
    if np.unique(labels).size - 1 + apart < most:
        return None
    return max(1, min(rank, most - apart - 1))


def _centred(vectors: NDArray[np.floating[Any]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if not len(vectors):
        raise InputError("there is no embedding to fit on")
    rows = vectors.astype(np.float64)
    mean = rows.mean(axis=0)
    return rows - mean, mean


def _whitening(rows: NDArray[np.float64], *, shrink: bool = False) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """W = (Σ^(1/2))⁺ and W⁺ = Σ^(1/2) of centred rows, without the directions in which they are constant; [D, D]."""
    values, axes = np.linalg.eigh(rows.T @ rows / len(rows))
    if values[-1] <= 0:
        raise InputError("all embeddings are equal; there is nothing to fit")
    if shrink:
        # Shrinking towards the identity leaves the axes: it is the eigenvalues that are drawn to their mean.
        spread = ((values - values.mean()) ** 2).sum()
        share = np.clip(1 - values.sum() ** 2 / (len(rows) * spread), 0, 1) if spread > 0 else 0.0
        values = share * values + (1 - share) * values.mean()
    varying = values > TOLERANCE * values[-1]
    roots, axes = np.sqrt(values[varying]), axes[:, varying]
    return axes / roots @ axes.T, axes * roots @ axes.T


def _covariance(rows: NDArray[np.float64], labels: NDArray[np.int64], what: str) -> NDArray[np.float64]:
    """Covariance of centred rows with one-hot labels, [D, K]: every label's share times its mean."""
    if len(labels) != len(rows):
        raise InputError(f"{len(rows)} vectors and {len(labels)} {what} labels; every vector needs one")
    names, codes = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        raise InputError(f"erasure needs two values of the {what} label at least, not {len(names)}")
    sums = np.zeros((len(names), rows.shape[1]))
    np.add.at(sums, codes, rows)
    return sums.T / len(rows)


def _basis(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Orthonormal basis of the column space, the leading directions first; [D, rank], rank 0 of a matrix of zeros."""
    left, values, _ = np.linalg.svd(matrix, full_matrices=False)
    # Whitened covariances with indicators are at most 1, so a bound on their scale is a bound on rounding.
    return left[:, values > TOLERANCE * max(1.0, float(values[0]))]
