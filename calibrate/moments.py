"""The sufficient statistics of a calibration: two D×D matrices and their counts, in float64.

They are sums, so they stream, merge, and weigh: what is fitted from a million pairs needs no more memory than what is
fitted from ten, and two runs over halves of the data add up to one run over all of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from invariclip.errors import InputError
from invariclip.files import write_atomically

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

MOMENTS_SCHEMA = 1
_CHUNK = 8192
"""Rows whose differences are formed at a time, so that memory stays flat in the number of pairs."""


@dataclass(frozen=True)
class Moments:
    """Sums over points z and over pair differences Δ = z₁ - z₂ (CLIP-ICM, the estimator's Σ and Σ_Δ).

    Attributes:
        points: How many points were added.
        point_weight: Their total weight.
        point_sum: float64 [D], Σ w z.
        point_outer: float64 [D, D], Σ w z zᵀ.
        pairs: How many pairs were added.
        pair_weight: Their total weight.
        pair_outer: float64 [D, D], Σ w Δ Δᵀ.
    """

    points: int
    point_weight: float
    point_sum: NDArray[np.float64]
    point_outer: NDArray[np.float64]
    pairs: int
    pair_weight: float
    pair_outer: NDArray[np.float64]

    @property
    def width(self) -> int:
        """D."""
        return int(self.point_sum.shape[0])

    @property
    def sigma(self) -> NDArray[np.float64]:
        """Σ = E[z zᵀ], [D, D], not centred: the origin is where the cosine is measured from.

        Raises:
            InputError: No point was added.
        """
        if self.point_weight <= 0:
            raise InputError("the moments hold no picture; there is nothing to fit")
        return self.point_outer / self.point_weight

    @property
    def sigma_delta(self) -> NDArray[np.float64]:
        """Σ_Δ = E[Δ Δᵀ], [D, D].

        Raises:
            InputError: No pair was added.
        """
        if self.pair_weight <= 0:
            raise InputError(
                "the moments hold no pair; pictures of one concept in two environments are needed, or --interventions"
            )
        return self.pair_outer / self.pair_weight

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets together.

        Raises:
            InputError: They are of different widths.
        """
        if self.width != other.width:
            raise InputError(f"moments of width {self.width} and {other.width} cannot be added")
        return Moments(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def scaled(self, weight: float) -> Moments:
        """Every weight multiplied by `weight`; the counts say what was really seen and stay.

        Raises:
            InputError: The weight is negative or not finite.
        """
        if not (np.isfinite(weight) and weight >= 0):
            raise InputError(f"a weight must be zero or more, not {weight}")
        return Moments(
            points=self.points,
            point_weight=self.point_weight * weight,
            point_sum=self.point_sum * weight,
            point_outer=self.point_outer * weight,
            pairs=self.pairs,
            pair_weight=self.pair_weight * weight,
            pair_outer=self.pair_outer * weight,
        )


def empty(width: int) -> Moments:
    """The moments of nothing, for embeddings of width D."""
    square = np.zeros((width, width))
    return Moments(0, 0.0, np.zeros(width), square, 0, 0.0, square.copy())


def of_points(vectors: NDArray[np.floating[Any]], weights: NDArray[np.float64] | None = None) -> Moments:
    """Moments of points.

    Args:
        vectors: [N, D].
        weights: [N], zero or more; all one by default.

    Raises:
        InputError: A value is not finite, or a weight negative.
    """
    w = _weights(weights, len(vectors))
    total = empty(vectors.shape[1])
    linear, outer = total.point_sum, total.point_outer
    for start in range(0, len(vectors), _CHUNK):
        rows = _finite(vectors[start : start + _CHUNK])
        scaled = rows * w[start : start + _CHUNK, None]
        linear = linear + scaled.sum(axis=0)
        outer = outer + scaled.T @ rows
    return Moments(len(vectors), float(w.sum()), linear, outer, 0, 0.0, total.pair_outer)


def of_pairs(
    first: NDArray[np.floating[Any]], second: NDArray[np.floating[Any]], weights: NDArray[np.float64] | None = None
) -> Moments:
    """Moments of pairs: of their differences alone, since a point may be in many pairs (see `of_points`).

    Args:
        first: [P, D].
        second: [P, D].
        weights: [P], zero or more; all one by default.

    Raises:
        InputError: A value is not finite, a weight negative, or the shapes differ.
    """
    if first.shape != second.shape:
        raise InputError(f"the members of pairs have shapes {list(first.shape)} and {list(second.shape)}")
    w = _weights(weights, len(first))
    total = empty(first.shape[1])
    outer = total.pair_outer
    for start in range(0, len(first), _CHUNK):
        part = slice(start, start + _CHUNK)
        delta = _finite(first[part]) - _finite(second[part])
        outer = outer + (delta * w[part, None]).T @ delta
    return Moments(0, 0.0, total.point_sum, total.point_outer, len(first), float(w.sum()), outer)


def write_moments(path: str | os.PathLike[str], moments: Moments) -> None:
    """Writes moments atomically, as safetensors."""
    values = {f.name: getattr(moments, f.name) for f in fields(moments)}
    arrays = {name: np.ascontiguousarray(value) for name, value in values.items() if isinstance(value, np.ndarray)}
    facts = {name: value for name, value in values.items() if name not in arrays}
    content = save(arrays, {"invariclip.moments": json.dumps({"schema": MOMENTS_SCHEMA, **facts}, sort_keys=True)})
    write_atomically(Path(path), content)


def read_moments(path: str | os.PathLike[str]) -> Moments:
    """Reads what `write_moments` wrote.

    Raises:
        InputError: The file is missing, damaged, or not moments of this schema.
    """
    where = Path(path)
    if not where.is_file():
        raise InputError(f"{where}: no such moments file")
    try:
        with safe_open(where, framework="numpy") as tensors:
            facts = json.loads((tensors.metadata() or {})["invariclip.moments"])
            arrays = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 -- not a mapping
        if facts.pop("schema") != MOMENTS_SCHEMA:
            raise InputError(f"{where}: its schema is not known; this version reads {MOMENTS_SCHEMA}")
        moments = Moments(**facts, **arrays)
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise InputError(f"{where}: not moments written by invariclip ({error})") from error
    square = (moments.width, moments.width)
    if moments.point_outer.shape != square or moments.pair_outer.shape != square:
        raise InputError(f"{where}: damaged, its matrices are not {square[0]}×{square[1]}")
    return moments


def _weights(weights: NDArray[np.float64] | None, count: int) -> NDArray[np.float64]:
    if weights is None:
        return np.ones(count)
    if weights.shape != (count,) or not np.isfinite(weights).all() or (weights < 0).any():
        raise InputError(f"weights must be {count} finite numbers of zero or more")
    return weights.astype(np.float64)


def _finite(rows: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    if not np.isfinite(rows).all():
        raise InputError("an embedding has values that are not finite; leave that picture out")
    return rows.astype(np.float64)
