"""How good a fit is: spectra, conditions, effective counts, what it keeps, and how much refits on resampled pairs vary.

For refits, pairs are spread over groups whose moments add up to those of all; a resample weighs the groups anew. So
neither a table nor a stream has to be read again, and what belongs together (all pairs of one concept) is drawn
together.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.calibrate.data.moments import Moments, empty
from invariclip.calibrate.projection.estimators import ENOUGH, EstimatorBasis, decompose, regularised, shares
from invariclip.calibrate.projection.parallel import side_by_side
from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from invariclip.artifact.projection import Projection

RESAMPLES = 100
_WORK = 2.7e9
"""D³ over all resamples: some four seconds of one slow core for D = 512, which get 20 resamples."""
_FEWEST = 12
"""With so few resamples the 95 % quantile is close to their largest value."""
LEVEL = 0.95
_ROUNDING = 1e-14
"""Eigenvalues below this share of the largest are rounding, and the condition is then None."""
_QUANTILES = (1.0, 0.75, 0.5, 0.25, 0.0)


@dataclass(frozen=True)
class Spread:
    """Median and 95 % quantile over the resamples."""

    median: float
    high: float

    def to_json(self) -> dict[str, float]:
        """Rounded to a ten-thousandth."""
        return {"median": round(self.median, 4), "high": round(self.high, 4)}


@dataclass(frozen=True)
class Confidence:
    """How far refits are from the fit.

    Attributes:
        rank: Dimensions of the subspace that is compared: the kept one, or for `shrinkage`, which keeps all, the one
            that it shortens most.
        largest: Largest principal angle between it and a refit's, in degrees, 0 to 90.
        mean: Mean of all `rank` principal angles, in degrees.
        deviation: ‖P - P_b‖_F / ‖P‖_F of the metrics P = A_inv A_invᵀ that cosines are taken in, of trace one each:
            what a refit does to similarities, soft or hard.
        resamples: How many refits there were.
        groups: How many groups they drew from.
    """

    rank: int
    largest: Spread
    mean: Spread
    deviation: Spread
    resamples: int
    groups: int

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, for the facts and the provenance; angles in degrees."""
        return {
            "rank": self.rank,
            "largest_angle": self.largest.to_json(),
            "mean_angle": self.mean.to_json(),
            "deviation": self.deviation.to_json(),
            "resamples": self.resamples,
            "groups": self.groups,
        }


def default_resamples(width: int) -> int:
    """As many resamples as a few seconds allow, from 12 to 100: each costs an eigendecomposition.

    Args:
        width: D.
    """
    return int(np.clip(_WORK / width**3, _FEWEST, RESAMPLES))


def confidence(
    parts: Sequence[Moments],
    estimator: str,
    rank: int | None = None,
    strength: float | None = None,
    *,
    resamples: int | None = None,
    seed: int = 0,
) -> Confidence | None:
    """Refits on bootstrap resamples of groups (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 6).

    Every resample draws as many groups as there are, with replacement, and adds their moments up: in time O(B·D³) and
    memory O(D²) beside the parts. Principal angles are those of Björck and Golub (Numerical methods for computing
    angles between linear subspaces, 1973), by the singular values of Q₁ᵀ Q₂.

    Args:
        parts: Moments of the groups. Those whose pairs do not differ, or that have none, stay in every resample. The
            fit that refits are compared with is that of their sum.
        estimator: See `estimators.decompose`.
        rank: d; all D by default.
        strength: λ.
        resamples: How many; `default_resamples` by default.
        seed: Of the draws.

    Returns:
        None where there is nothing to be unsure of or nothing to draw from: for the identity, for an uncut `icm` or
        `generalised` (a rotation), or with fewer than two groups whose pairs differ.

    Raises:
        InputError: There is no part, their widths differ, or they hold no image or no pair.
        ProjectionError: The estimator does not go with the strength.
    """
    if not parts:
        raise InputError("confidence needs the moments of groups, and there are none")
    # A group without movement has nothing to say on it; were nothing else drawn, there would be no fit.
    drawn = [part for part in parts if np.trace(part.pair_outer) > 0]
    fixed = empty(parts[0].width)
    for part in parts:
        if np.trace(part.pair_outer) <= 0:
            fixed = fixed + part
    whole = _drawn(fixed, drawn, np.ones(len(drawn), dtype=np.int64))
    fit = decompose(whole, estimator, strength)
    compared = _compared(fit, rank)
    if compared == 0 or len(drawn) < 2:
        return None
    count = default_resamples(whole.width) if resamples is None else resamples
    draws = np.random.default_rng(seed).multinomial(len(drawn), np.full(len(drawn), 1 / len(drawn)), size=count)
    subspace, metric = _subspace(fit, compared), _metric(fit, rank)

    def refit(times: NDArray[np.int64]) -> tuple[float, float, float]:
        resample = _drawn(fixed, drawn, times)
        if resample.point_weight <= 0:  # all images are in groups that were not drawn
            resample = replace(resample, point_weight=whole.point_weight, point_outer=whole.point_outer)
        other = decompose(resample, estimator, strength)
        cosines = np.linalg.svd(subspace.T @ _subspace(other, compared), compute_uv=False)
        angles = np.degrees(np.arccos(np.minimum(cosines, 1)))
        moved = np.linalg.norm(_metric(other, rank) - metric) / np.linalg.norm(metric)
        return float(angles.max()), float(angles.mean()), float(moved)

    largest, mean, deviation = np.array(list(side_by_side(refit, list(draws), whole.width))).T
    return Confidence(compared, _spread(largest), _spread(mean), _spread(deviation), count, len(drawn))


def _drawn(fixed: Moments, parts: Sequence[Moments], times: NDArray[np.int64]) -> Moments:
    """The moments of `fixed` and of every part as often as it was drawn: twice is as if all of it were there twice."""
    names = [f.name for f in fields(fixed)]
    sums = {name: np.array(getattr(fixed, name)) for name in names}
    buffer = np.empty_like(fixed.point_outer)
    for part, often in zip(parts, times.tolist(), strict=True):
        for name in names if often else ():
            added = getattr(part, name)
            # In place: new matrices for every term would take longer than the arithmetic.
            if often > 1:
                added = np.multiply(added, often, out=buffer) if np.ndim(added) == 2 else np.multiply(added, often)
            sums[name] += added
    values: dict[str, Any] = {name: value if value.ndim else value.item() for name, value in sums.items()}
    return Moments(**values)


def _compared(basis: EstimatorBasis, rank: int | None) -> int:
    """Dimensions of the subspace to compare, 0 if there is none."""
    width = len(basis.axes)
    if basis.cuts:
        return rank if rank is not None and rank < width else 0
    # The fewest axes along which half of all movement lies: factors are (1 + movement)^(-1/2).
    movement = np.cumsum(1 / basis.factors[::-1] ** 2 - 1)
    return int(np.searchsorted(movement, movement[-1] / 2)) + 1 if movement[-1] > 0 else 0


def _subspace(basis: EstimatorBasis, count: int) -> NDArray[np.float64]:
    """Orthonormal [D, count]: the most invariant axes if the estimator cuts, the least invariant ones if not."""
    return basis.axes[:, :count] if basis.cuts else basis.axes[:, -count:]


def _metric(basis: EstimatorBasis, rank: int | None) -> NDArray[np.float64]:
    """P = A_inv A_invᵀ of trace one, [D, D]."""
    columns = (basis.axes * basis.factors)[:, :rank]
    return np.asarray(columns @ columns.T / (basis.factors[:rank] ** 2).sum())


def _spread(values: NDArray[np.float64]) -> Spread:
    return Spread(float(np.median(values)), float(np.quantile(values, LEVEL)))


def diagnose(projection: Projection, moments: Moments) -> dict[str, Any]:
    """JSON-ready facts of a fitted projection.

    - `kept_variation`, `kept_movement`: see `energies`.
    - `spectrum`: of the estimator's eigenvalues the highest, the quartiles downwards, and the lowest (all of them are
      in the projection's file); None for the identity.
    - `sigma`, `sigma_delta`: `effective`, the effective count of observations; `condition`, the largest eigenvalue over
      the smallest, or None where the matrix is singular; `rank`, how many eigenvalues are above rounding; `identity`,
      the share of the identity that Ledoit and Wolf's mix would have, above zero only for little data.
    - `mixed`: the share that the estimator did mix in, see `estimators.regularised`.

    Args:
        projection: Fitted from the moments.
        moments: Σ and Σ_Δ.

    Raises:
        InputError: The moments hold no image or no pair.
    """
    points, pairs = shares(moments)
    return {
        **energies(projection, moments),
        "spectrum": _quantiles(projection.eigenvalues),
        "sigma": _matrix(moments.sigma, moments.effective_points, points),
        "sigma_delta": _matrix(moments.sigma_delta, moments.effective_pairs, pairs),
        "mixed": round(regularised(moments)[2], 4) if projection.estimator == "generalised" else 0.0,
    }


def energies(projection: Projection, moments: Moments) -> dict[str, float]:
    """What is kept of the variation between images and of what the environment moves, as shares of 1.

    tr(Aᵀ Σ A) / tr(Σ) and tr(Aᵀ Σ_Δ A) / tr(Σ_Δ), with A scaled so that the direction it keeps best keeps its length.
    Where no pair differs there is no movement to keep a share of, and it counts as 0.
    """
    A = projection.A_inv / np.linalg.norm(projection.A_inv, 2)
    shares = {}
    for name, moment in (("kept_variation", moments.sigma), ("kept_movement", moments.sigma_delta)):
        whole = float(np.trace(moment))
        shares[name] = round(float(np.vdot(A, moment @ A)) / whole, 4) if whole > 0 else 0.0
    return shares


def few(facts: dict[str, Any], width: int) -> bool:
    """Whether either count of `diagnose` is below what is enough for D = `width`."""
    return any(facts[name]["effective"] < ENOUGH * width for name in ("sigma", "sigma_delta"))


def _matrix(second: NDArray[np.float64], effective: float, share: float) -> dict[str, Any]:
    values = np.linalg.eigvalsh(second)
    rank = int((values > _ROUNDING * values[-1]).sum()) if values[-1] > 0 else 0
    return {
        "effective": round(effective, 1),
        "condition": float(f"{values[-1] / values[0]:.4g}") if rank == len(values) else None,
        "rank": rank,
        "identity": round(share, 4),
    }


def _quantiles(values: NDArray[np.float64]) -> list[float] | None:
    return [float(f"{np.quantile(values, share):.6g}") for share in _QUANTILES] if len(values) else None
