"""From moments to the invariant projection A_inv: three estimators, the identity, and one interface.

Σ = E[z zᵀ] says where embeddings vary, Σ_Δ = E[Δ Δᵀ] where an intervention moves them (CLIP-ICM, arXiv 2405.15289,
the estimation of A_inv). Both are quadratic in the embeddings, so with unit-length embeddings λ has no unit.

With fewer pairs than a few times D, a sample's second moment has a wider spectrum than the true one: directions that
no pair happened to move look perfectly invariant. Ledoit and Wolf (A well-conditioned estimator for large-dimensional
covariance matrices, J. Multivariate Analysis 88, 2004) give the mix of the sample and a multiple of the identity that
has the least expected squared error, from the sample alone. What to do with it was measured on linear SCMs, with and
without noise in the pairs, and on the reference encoder's embeddings of unseen styles, with D/4 to 5D pairs:

- `generalised` has no strength of its own, and mixing helps it: see `regularised`.
- `icm` and `shrinkage` are left alone. Mixing Σ_Δ (and Σ) with an identity only gives them another λ:
  (1-a)Σ - λ(1-b)Σ_Δ has the eigenvectors of λ' = λ(1-b)/(1-a), and I + λ((1-b)Σ_Δ/m + bI) is proportional to
  I + λ'Σ_Δ/m with λ' = λ(1-b)/(1+λb). The λ that selection takes on left-out data proved right already. Mixing on top
  only caps it, at (1-b)/b for `shrinkage` however much movement is to be removed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from invariclip.artifact.projection import Projection
from invariclip.errors import ProjectionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from invariclip.calibrate.data.moments import Moments

ENOUGH = 5
"""Times D: from that many on, a second moment is taken as it is."""
_MOST = 0.999
"""The largest share of the identity: with nothing but it, every direction would be as good as any other."""
_ROUNDING = 1e-9
"""Effective counts come from sums of weights: 30 pairs of weight 0.2 are 29.999999999999996."""
_NOTHING = 1e-10
"""An eigenvalue below this share of the largest is zero but for rounding (float32 embeddings leave 1e-14)."""
ESTIMATORS = ("icm", "generalised", "shrinkage", "identity")
RIDGE = 1e-4
"""Regularises `generalised`, as a share of the mean eigenvalue of Σ."""


def shares(moments: Moments) -> tuple[float, float]:
    """The shares of the identity that Σ and Σ_Δ call for: 0 from `ENOUGH` · D effective observations on.

    Raises:
        InputError: The moments hold no image or no pair.
    """
    few = ENOUGH * moments.width * (1 - _ROUNDING)
    points = pairs = 0.0
    if moments.effective_points < few:
        points = intensity(moments.sigma, moments.effective_points, moments.point_fourth, moments.point_weight)
    if moments.effective_pairs < few:
        fourth = moments.pair_fourth * moments.crowding
        pairs = intensity(moments.sigma_delta, moments.effective_pairs, fourth, moments.pair_weight)
    return points, pairs


def regularised(moments: Moments) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Σ and Σ_Δ for `generalised`, each mixed with the *same* multiple of the identity, and the share it has.

    Σ_Δ is mixed as Ledoit and Wolf do, (1-s)Σ_Δ + s·m·I with m the mean eigenvalue of Σ_Δ: movement that so few pairs
    cannot have shown. The same s·m·I joins (1-s)Σ. On Σ_Δ alone it would call a direction moved the more, the less
    images differ along it, until PCA is left: that lost one to two points on real embeddings. With both, s leads
    from the pencil's own answer to that of Σ - Σ_Δ, which is `icm` with λ = 1, and needs no λ to be chosen.

    Where the pairs span fewer dimensions than there are pairs and dimensions, they are not too few: noise would have
    taken them everywhere. Then what they leave untouched is invariant, and nothing is mixed.

    Returns:
        float64 [D, D], float64 [D, D], and s from 0 to 1.

    Raises:
        InputError: The moments hold no image or no pair.
    """
    sigma, moved = moments.sigma, moments.sigma_delta
    share = min(shares(moments)[1], _MOST)
    if share > 0 and rank(moved) < min(moments.width, int(moments.effective_pairs * (1 + _ROUNDING))):
        share = 0.0
    identity = share * np.trace(moved) / moments.width * np.eye(moments.width)
    return (1 - share) * sigma + identity, (1 - share) * moved + identity, share


def rank(second: NDArray[np.float64]) -> int:
    """How many dimensions a second moment spans, up to rounding.

    Args:
        second: float64 [D, D].
    """
    values = np.linalg.eigvalsh(second)
    return int((values > _NOTHING * values[-1]).sum())


def intensity(second: NDArray[np.float64], effective: float, fourth: float, weight: float) -> float:
    """The share of the identity in the mix with the least expected squared error (Ledoit & Wolf 2004, section 3).

    Let S = Σ_k w_k x_k x_kᵀ / W with W = Σ_k w_k, a sample's second moment about zero (nothing is centred, so no degree
    of freedom is lost). Theirs is the case of equal weights, w_k / W = 1/N, in which with ⟨A, B⟩ = tr(A Bᵀ)/D:

        m  = ⟨S, I⟩                                         the scale of the identity to mix with (Lemma 3.2)
        d² = ‖S - m I‖²                                     how far the sample is from it (Lemma 3.3)
        b² = min(d², Σ_k ‖x_k x_kᵀ - S‖² / N²)              the sample's own squared error (Lemma 3.4)

    and b²/d² is the intensity (equation 14). The error of a weighted mean of independent x_k x_kᵀ is the sum of its
    terms' errors times (w_k / W)², hence

        D b² = Σ_k (w_k/W)² ‖x_k x_kᵀ - S‖²_F
             = Σ_k (w_k/W)² (‖x_k‖⁴ - 2 x_kᵀ S x_k + ‖S‖²_F)
             ≈ Σ_k w_k² ‖x_k‖⁴ / W² - ‖S‖²_F / n,    n = W² / Σ_k w_k².

    The last step takes Σ_k w_k² x_k x_kᵀ as S · Σ_k w_k²: exact for equal weights, else where weights do not go
    with directions. It spares a third D × D sum: what is left are the two streamed numbers Σ w² ‖x‖⁴ and Σ w².

    Args:
        second: S, float64 [D, D].
        effective: n.
        fourth: Σ w² ‖x‖⁴.
        weight: W.
    """
    width = len(second)
    squares = float(np.vdot(second, second))
    mean = float(np.trace(second)) / width
    distance = squares - width * mean**2
    error = fourth / weight**2 - squares / effective
    # A multiple of the identity already, as in one dimension: there is nothing to mix.
    return min(max(error, 0.0), distance) / distance if distance > 0 else 0.0


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
        count = width if rank is None else rank
        if not 1 <= count <= width:
            raise ProjectionError(f"rank {count} is not from 1 to the encoder's width {width}")
        if count < width and not self.cuts:
            raise ProjectionError(f"{self.estimator} keeps the full rank {width}; a rank goes with icm or generalised")
        A_inv = (self.axes * self.factors)[:, :count]
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
      on Σ alone would call it perfectly invariant. With few pairs the ridge is larger: see `estimators.shares`.
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
    all_factors = [1 / np.sqrt(1 + strength * moved) for strength in strengths]
    return [
        EstimatorBasis("shrinkage", strength, vectors, factors, factors, cuts=False)
        for strength, factors in zip(strengths, all_factors, strict=True)
    ]
