"""From moments to the invariant projection A_inv: three estimators, the identity, and one interface.

Σ = E[z zᵀ] says where embeddings vary, Σ_Δ = E[Δ Δᵀ] where an intervention moves them (CLIP-ICM, arXiv 2405.15289,
the estimation of A_inv). Both are quadratic in the embeddings, so with unit-length embeddings λ has no unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from invariclip.artifact.projection import Projection
from invariclip.calibrate.projection.little_data import regularised
from invariclip.errors import ProjectionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from invariclip.calibrate.data.moments import Moments

ESTIMATORS = ("icm", "generalised", "shrinkage", "identity")
RIDGE = 1e-4
"""Regularises `generalised`, as a share of the mean eigenvalue of Σ."""


@dataclass(frozen=True)
class EstimatorBasis:
    """An estimator's whole answer, from which every rank is cut.

    Attributes:
        estimator: Its name.
        strength: λ, or None where it has none.
        axes: float64 [D, D], orthonormal columns, the most invariant first.
        factors: float64 [D], what the length along each axis is multiplied by.
        eigenvalues: float64 [D], descending in invariance: larger values are retained first. For `icm` the
            eigenvalues of Σ - λΣ_Δ; for `generalised` 1 - μ; for `shrinkage` the factors.
        cuts: Whether a rank below D means something for it; otherwise A_inv is the symmetric matrix.
    """

    estimator: str
    strength: float | None
    axes: NDArray[np.float64]
    factors: NDArray[np.float64]
    eigenvalues: NDArray[np.float64]
    cuts: bool

    def projection(self, rank: int | None = None) -> Projection:
        """The projection of rank d; None keeps all D dimensions.

        Raises:
            ProjectionError: The rank is not from 1 to D, or below D for an estimator that does not cut.
        """
        width = len(self.axes)
        kept = width if rank is None else rank
        if not 1 <= kept <= width:
            raise ProjectionError(f"rank {kept} is not from 1 to the encoder's width {width}")
        if kept < width and not self.cuts:
            raise ProjectionError(f"{self.estimator} keeps the full rank {width}; a rank goes with icm or generalised")
        A_inv = (self.axes * self.factors)[:, :kept]
        if not self.cuts:
            # Turning the axes back changes no cosine, and leaves an A_inv that is near the identity where little moves.
            A_inv = A_inv @ self.axes.T
        return Projection(np.ascontiguousarray(A_inv), self.estimator, self.strength, self.eigenvalues)


def fit(moments: Moments, estimator: str, rank: int | None = None, strength: float | None = None) -> Projection:
    """The projection that an estimator makes of moments.

    Args:
        moments: Σ and Σ_Δ.
        estimator: One of `ESTIMATORS`.
        rank: d; all D by default.
        strength: λ, for `icm` and `shrinkage`.

    Raises:
        ProjectionError: The estimator is not known, or the rank or the strength does not go with it.
        InputError: The moments hold no image or no pair.
    """
    return decompose(moments, estimator, strength).projection(rank)


def decompose(moments: Moments, estimator: str, strength: float | None = None) -> EstimatorBasis:
    """The whole basis of an estimator, of which `EstimatorBasis.projection` takes the first columns.

    - `icm`: eigenvectors of the *largest* eigenvalues of Σ - λΣ_Δ. The columns are orthonormal.
    - `generalised`: Σ_Δ v = μ Σ v with the smallest μ, free of λ: the directions in which an intervention moves
      embeddings least, compared with how far they vary at all. What it identifies is a subspace. The raw solutions
      are orthonormal in Σ, not in the space where cosines are taken: used as they are they would whiten what is
      kept, magnifying just the directions with least signal. The columns here are an orthonormal basis of the same
      subspaces (Gram-Schmidt in the order of μ), so cosines keep the encoder's own metric, and the full rank changes
      nothing.
      Where fewer images than dimensions leave Σ singular, 0/0 decides; a ridge of `RIDGE` · mean-eig(Σ) on *both*
      sides gives a direction that no image excites μ = 1, so that it stands behind all that carry signal. A ridge
      on Σ alone would call it perfectly invariant. With few pairs the ridge is larger: see `little_data`.
    - `shrinkage`: the symmetric (I + λ Σ_Δ / mean-eig(Σ_Δ))^(-1/2); keeps every direction, shortens those that move.
    - `identity`: no change.

    Raises:
        ProjectionError: The estimator is not known, or the strength does not go with it.
        InputError: The moments hold no image or no pair.
    """
    if estimator not in ESTIMATORS:
        raise ProjectionError(f"no estimator is called {estimator!r}; available: {', '.join(ESTIMATORS)}")
    needs = estimator in ("icm", "shrinkage")
    if needs and (strength is None or not np.isfinite(strength) or strength <= 0):
        raise ProjectionError(f"{estimator} needs a strength λ above zero, not {strength}")
    if not needs and strength is not None:
        raise ProjectionError(f"{estimator} has no strength; λ goes with icm and shrinkage")
    if estimator == "identity":
        return EstimatorBasis(estimator, None, np.eye(moments.width), np.ones(moments.width), np.empty(0), cuts=False)
    if estimator == "generalised":
        return _generalised(moments)
    return decompose_all(moments, estimator, [strength or 0.0])[0]


def decompose_all(moments: Moments, estimator: str, strengths: Sequence[float]) -> list[EstimatorBasis]:
    """`icm` or `shrinkage` for several λ, sharing what can be shared; the λ are taken as they are.

    Raises:
        ProjectionError: No pair differs.
        InputError: The moments hold no image or no pair.
    """
    if estimator == "shrinkage":
        return _shrinkage(moments, strengths)
    return [_icm(moments, strength) for strength in strengths]


def published(moments: Moments, rank: int, strength: float) -> Projection:
    """What the published code keeps: the *first* columns of `eigh`, which are those of the smallest eigenvalues.

    A baseline for tests and tables only: it keeps the directions that the interventions move most.
    """
    values, vectors = np.linalg.eigh(moments.sigma - strength * moments.sigma_delta)
    return Projection(vectors[:, :rank].copy(), "published", strength, values)


def removed(factors: NDArray[np.float64], width: int) -> float:
    """How much of the space a projection takes away, from 0 (a rotation) towards 1.

    1 - (tr P)² / (D tr P²) with P = A Aᵀ: a cut to rank d removes 1 - d/D, and a shrinkage what an equally uneven
    cut would, so that all estimators stand on one scale (the participation ratio of P's spectrum).

    Args:
        factors: [d], the factors of the axes that are kept.
        width: D.
    """
    squares = factors**2
    return float(1 - squares.sum() ** 2 / (width * (squares**2).sum()))


def _icm(moments: Moments, strength: float) -> EstimatorBasis:
    values, vectors = np.linalg.eigh(moments.sigma - strength * moments.sigma_delta)
    # eigh answers in ascending order, and the largest are the ones to keep.
    return EstimatorBasis("icm", strength, vectors[:, ::-1], np.ones(len(values)), values[::-1].copy(), cuts=True)


def _generalised(moments: Moments) -> EstimatorBasis:
    sigma, moved, _ = regularised(moments)
    ridge = RIDGE * float(np.trace(moments.sigma)) / moments.width * np.eye(moments.width)
    # Through the Cholesky factor, as LAPACK's sygv does; with the ridge Σ is positive definite.
    inverse = np.linalg.inv(np.linalg.cholesky(sigma + ridge))
    values, vectors = np.linalg.eigh(inverse @ (moved + ridge) @ inverse.T)
    columns, triangle = np.linalg.qr(inverse.T @ vectors)
    # QR leaves the signs open; fixed ones make the projection's digest reproducible.
    axes = columns * np.sign(np.diag(triangle))
    return EstimatorBasis("generalised", None, axes, np.ones(len(values)), 1 - values, cuts=True)


def _shrinkage(moments: Moments, strengths: Sequence[float]) -> list[EstimatorBasis]:
    """One eigendecomposition serves every λ."""
    values, vectors = np.linalg.eigh(moments.sigma_delta)
    mean = float(values.mean())
    if mean <= 0:
        raise ProjectionError("no pair differs at all: all of its members have equal embeddings; check the pairs")
    # eigh's ascending order of Σ_Δ is the descending one of what is kept.
    moved = np.maximum(values, 0) / mean
    kept = [1 / np.sqrt(1 + strength * moved) for strength in strengths]
    return [
        EstimatorBasis("shrinkage", strength, vectors, factors, factors, cuts=False)
        for strength, factors in zip(strengths, kept, strict=True)
    ]
