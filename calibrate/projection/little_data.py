"""Where data are few: how far a sample's second moment is to be trusted, and what the estimators make of that.

With fewer pairs than a few times D, the spectrum of a sample's second moment is wider than the truth's: directions that
no pair happened to move look perfectly invariant. Ledoit and Wolf (A well-conditioned estimator for large-dimensional
covariance matrices, J. Multivariate Analysis 88, 2004) give the mix of the sample and a multiple of the identity that
has the least expected squared error, from the sample alone.

What an estimator may do with it was measured, on linear SCMs with and without noise in the pairs and on the reference
encoder's embeddings of unseen styles, with D/4 to 5D pairs:

- `generalised` has no strength of its own, and mixing helps it: see `regularised`.
- `icm` and `shrinkage` are left alone. Mixing Σ_Δ (and Σ) with an identity only gives them another λ:
  (1-a)Σ - λ(1-b)Σ_Δ has the eigenvectors of λ' = λ(1-b)/(1-a), and I + λ((1-b)Σ_Δ/m + bI) is proportional to
  I + λ'Σ_Δ/m with λ' = λ(1-b)/(1+λb). The λ that selection takes on data left out was seen to be right already. Mixing
  on top only caps it, at (1-b)/b for `shrinkage` however much movement is to be removed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
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
