"""What there is to know of a fit beside its matrix: spectra, conditions, counts, and what was kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.calibrate.projection.little_data import ENOUGH, regularised, shares

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from invariclip.artifact.projection import Projection
    from invariclip.calibrate.data.moments import Moments

_ROUNDING = 1e-14
"""Eigenvalues below this share of the largest are rounding, and the condition is then told as none."""
_QUANTILES = (1.0, 0.75, 0.5, 0.25, 0.0)


def diagnose(projection: Projection, moments: Moments) -> dict[str, Any]:
    """JSON-ready facts of a fitted projection.

    - `kept_variation`, `kept_movement`: see `energies`.
    - `spectrum`: of the estimator's eigenvalues the highest, the quartiles downwards, and the lowest (all of them are
      in the projection's file); None for the identity.
    - `sigma`, `sigma_delta`: `effective`, the effective count of observations; `condition`, the largest eigenvalue over
      the smallest, or None where the matrix is singular; `rank`, how many eigenvalues are above rounding; `identity`,
      the share of the identity that Ledoit and Wolf's mix would have, above zero only for little data.
    - `mixed`: the share that the estimator did mix in, see `little_data.regularised`.

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
    kept = {}
    for name, moment in (("kept_variation", moments.sigma), ("kept_movement", moments.sigma_delta)):
        whole = float(np.trace(moment))
        kept[name] = round(float(np.vdot(A, moment @ A)) / whole, 4) if whole > 0 else 0.0
    return kept


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
