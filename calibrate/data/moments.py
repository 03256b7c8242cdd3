"""The sufficient statistics of a calibration: two D×D matrices and their counts, in float64.

They are sums, so they stream, merge, weigh and subtract: a million pairs need no more memory than ten, two runs over
halves of the data add up to one run over all of it, and all of it less one environment is what the others gave.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_CHUNK = 2048
"""Rows that are weighed and multiplied at a time, so that memory stays flat in the number of rows."""
_ROUNDING = 1e-9
"""What subtraction may leave below zero, relative to what was subtracted from, before it counts as a mistake."""


@dataclass(frozen=True)
class Moments:
    """Sums over points z and over pair differences Δ = z₁ - z₂ (CLIP-ICM, the estimator's Σ and Σ_Δ).

    The squared weights and the fourth powers give the error of Σ and Σ_Δ, see `estimators.shares`.

    Attributes:
        points: How many points were added.
        point_weight: Their total weight Σ w.
        point_weight_squares: Σ w².
        point_fourth: Σ w² ‖z‖⁴.
        point_sum: float64 [D], Σ w z.
        point_outer: float64 [D, D], Σ w z zᵀ.
        pairs: How many pairs were added.
        pair_weight: Their total weight Σ w.
        pair_weight_squares: Σ w².
        pair_fourth: Σ w² ‖Δ‖⁴.
        pair_independent: How many of the pairs are independent at most, see `of_pairs`.
        pair_outer: float64 [D, D], Σ w Δ Δᵀ.
    """

    points: int
    point_weight: float
    point_weight_squares: float
    point_fourth: float
    point_sum: NDArray[np.float64]
    point_outer: NDArray[np.float64]
    pairs: int
    pair_weight: float
    pair_weight_squares: float
    pair_fourth: float
    pair_independent: int
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
            raise InputError("the moments hold no image; there is nothing to fit")
        return self.point_outer / self.point_weight

    @property
    def sigma_delta(self) -> NDArray[np.float64]:
        """Σ_Δ = E[Δ Δᵀ], [D, D].

        Raises:
            InputError: No pair was added.
        """
        if self.pair_weight <= 0:
            raise InputError(
                "the moments hold no pair; images of one concept in two environments are needed, or --interventions"
            )
        return self.pair_outer / self.pair_weight

    @property
    def effective_points(self) -> float:
        """How many equally weighted points would be as many: (Σ w)² / Σ w² (Kish, Survey Sampling, 1965)."""
        return self.point_weight**2 / self.point_weight_squares if self.point_weight_squares > 0 else 0.0

    @property
    def effective_pairs(self) -> float:
        """How many independent pairs of equal weight would be as many: (Σ w)² / Σ w², `pair_independent` at most."""
        if self.pair_weight_squares <= 0:
            return 0.0
        return min(self.pair_weight**2 / self.pair_weight_squares, float(self.pair_independent))

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets together.

        Raises:
            InputError: They are of different widths.
        """
        if self.width != other.width:
            raise InputError(f"moments of width {self.width} and {other.width} cannot be added")
        # Where one side has none of a kind, its zeros need not be added: of wide embeddings that is most of the time.
        sides = {kind: [one for one in (self, other) if getattr(one, f"{kind}_weight") or getattr(one, f"{kind}s")]
                 for kind in ("point", "pair")}  # fmt: skip
        return Moments(**{
            f.name: _sum([getattr(one, f.name) for one in sides[f.name.split("_")[0].rstrip("s")] or [self]])
            for f in fields(self)
        })  # fmt: skip

    def __sub__(self, other: Moments) -> Moments:
        """The moments without a part that was added to them before, such as those of one environment.

        Raises:
            InputError: They are of different widths, or `other` cannot be a part of these: a count, a weight or a
                second moment would be negative.
        """
        if self.width != other.width:
            raise InputError(f"moments of width {self.width} and {other.width} cannot be subtracted")
        left = {f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)}
        for name, rest in left.items():
            # The sum of the points may have any sign; of the matrices the diagonal may not.
            whole, least = getattr(self, name), rest
            if isinstance(rest, np.ndarray):
                if name == "point_sum":
                    continue
                whole, least = np.trace(whole), np.diag(rest).min()
            if least < -_ROUNDING * whole:
                raise InputError(
                    f"the moments to subtract are not a part of these: {name.replace('_', ' ')} would be negative; "
                    "subtract only what was added, with the same weights"
                )
            if isinstance(rest, float):
                left[name] = max(rest, 0.0)
        rest = Moments(**left)
        # Nothing is left of a kind: what rounding leaves of its sums must not pass for data.
        nothing = empty(self.width)
        points = rest if rest.points else nothing
        pairs = rest if rest.pairs else nothing
        return replace(points, **{f.name: getattr(pairs, f.name) for f in fields(rest) if f.name.startswith("pair")})

    def scaled(self, weight: float) -> Moments:
        """Every weight multiplied by `weight`; the counts say what was really seen and stay.

        Raises:
            InputError: The weight is negative or not finite.
        """
        return self._rescaled(weight, weight)

    @property
    def crowding(self) -> float:
        """How many times fewer the pairs count as they share members: 1 where all of them are independent.

        Such pairs come from one source: what is independent in one says nothing of another's, whose weights differ.
        """
        squares = self.pair_weight_squares * self.pair_independent
        return max(1.0, self.pair_weight**2 / squares) if squares > 0 else 1.0

    def crowded(self, times: float) -> Moments:
        """As if so many times fewer pairs of equal weight had been seen: the error of the sums grows in proportion.

        A source whose pairs share members has to be `crowded` by its `crowding` before it is scaled beside others;
        then it is so in the sum as well.
        """
        return replace(self, pair_weight_squares=self.pair_weight_squares * times, pair_fourth=self.pair_fourth * times)

    def _rescaled(self, points: float, pairs: float) -> Moments:
        """The weights of all points and those of all pairs, each multiplied by a number."""
        for weight in (points, pairs):
            if not (np.isfinite(weight) and weight >= 0):
                raise InputError(f"a weight must be zero or more, not {weight}")
        return Moments(
            points=self.points,
            point_weight=self.point_weight * points,
            point_weight_squares=self.point_weight_squares * points**2,
            point_fourth=self.point_fourth * points**2,
            point_sum=self.point_sum * points,
            point_outer=self.point_outer if points == 1 else self.point_outer * points,
            pairs=self.pairs,
            pair_weight=self.pair_weight * pairs,
            pair_weight_squares=self.pair_weight_squares * pairs**2,
            pair_fourth=self.pair_fourth * pairs**2,
            pair_independent=self.pair_independent,
            pair_outer=self.pair_outer if pairs == 1 else self.pair_outer * pairs,
        )


def empty(width: int) -> Moments:
    """The moments of nothing, for embeddings of width D."""
    # Two arrays of zeros, not a copy of one: memory that is never written is never touched.
    outer = np.zeros((width, width)), np.zeros((width, width))
    return Moments(0, 0.0, 0.0, 0.0, np.zeros(width), outer[0], 0, 0.0, 0.0, 0.0, 0, outer[1])


def of_points(vectors: NDArray[np.floating[Any]], weights: NDArray[np.float64] | None = None) -> Moments:
    """Moments of points.

    Args:
        vectors: [N, D].
        weights: [N], zero or more; all one by default.

    Raises:
        InputError: A value is not finite, or a weight negative.
    """
    w = _weights(weights, len(vectors))
    linear, outer, fourth = np.zeros(vectors.shape[1]), np.zeros((vectors.shape[1],) * 2), 0.0
    for part in _chunks(len(vectors)):
        rows, roots, powers = _weighed(vectors[part].astype(np.float64), w, part)
        linear += rows.sum(axis=0) if roots is None else roots @ rows
        outer += rows.T @ rows
        fourth += powers
    total, squares = (float(len(vectors)),) * 2 if w is None else (float(w.sum()), float(w @ w))
    return replace(
        empty(len(linear)),
        points=len(vectors),
        point_weight=total,
        point_weight_squares=squares,
        point_fourth=fourth,
        point_sum=linear,
        point_outer=outer,
    )


def of_pairs(
    first: NDArray[np.floating[Any]],
    second: NDArray[np.floating[Any]],
    weights: NDArray[np.float64] | None = None,
    *,
    independent: int | None = None,
) -> Moments:
    """Moments of pairs: of their differences alone, since a point may be in many pairs (see `of_points`).

    Args:
        first: [P, D].
        second: [P, D].
        weights: [P], zero or more; all one by default.
        independent: How many of the pairs are independent at most, where they share members: k images make
            k(k-1)/2 pairs, whose differences have only k - 1 degrees of freedom. All by default.

    Raises:
        InputError: A value is not finite, a weight negative, or the shapes differ.
    """
    if first.shape != second.shape:
        raise InputError(f"the members of pairs have shapes {list(first.shape)} and {list(second.shape)}")
    w = _weights(weights, len(first))
    outer, fourth = np.zeros((first.shape[1],) * 2), 0.0
    for part in _chunks(len(first)):
        with np.errstate(invalid="ignore"):  # ∞ - ∞, which is refused below
            delta = np.subtract(first[part], second[part], dtype=np.float64)
        rows, _, powers = _weighed(delta, w, part)
        outer += rows.T @ rows
        fourth += powers
    total, squares = (float(len(first)),) * 2 if w is None else (float(w.sum()), float(w @ w))
    return replace(
        empty(len(outer)),
        pairs=len(first),
        pair_weight=total,
        pair_weight_squares=squares,
        pair_fourth=fourth,
        pair_independent=len(first) if independent is None else independent,
        pair_outer=outer,
    )


def combined(parts: Sequence[Moments], weights: Sequence[float]) -> Moments:
    """Several sources of pairs together, each counting by its own weight, however many pairs it has.

    Args:
        parts: The pairs of every one are scaled to a total weight of its entry in `weights`; points are added as they
            are. One without pairs adds its points.
        weights: Zero or more, one for every part.

    Raises:
        InputError: There is no part, the weights are not as many as the parts, one is negative or not finite, or the
            widths differ.
    """
    if not parts or len(parts) != len(weights):
        raise InputError(f"{len(parts)} moments and {len(weights)} weights cannot be combined; give one weight to each")
    total = empty(parts[0].width)
    for part, weight in zip(parts, weights, strict=True):
        part = part.crowded(part.crowding)
        total = total + part._rescaled(1.0, weight / part.pair_weight if part.pair_weight > 0 else weight)
    return total


def _sum(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values[0] + values[1]


def _weights(weights: NDArray[np.float64] | None, count: int) -> NDArray[np.float64] | None:
    if weights is None:
        return None
    if weights.shape != (count,) or not np.isfinite(weights).all() or (weights < 0).any():
        raise InputError(f"weights must be {count} finite numbers of zero or more")
    return weights.astype(np.float64)


def _chunks(count: int) -> list[slice]:
    return [slice(start, start + _CHUNK) for start in range(0, count, _CHUNK)]


def _weighed(
    rows: NDArray[np.float64], weights: NDArray[np.float64] | None, part: slice
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None, float]:
    """The rows times the roots of their weights, those roots, and Σ w² ‖z‖⁴.

    One array times itself is then the weighted sum, of which BLAS computes half (SYRK); two different factors would
    cost twice as much.
    """
    roots = None if weights is None else np.sqrt(weights[part])
    if roots is not None:
        with np.errstate(invalid="ignore"):  # 0 · ∞, which is refused below
            rows *= roots[:, None]
    # Squared lengths tell of every value that is not finite, and save a pass over the rows.
    squares = np.einsum("nd,nd->n", rows, rows)
    if not np.isfinite(squares).all():
        raise InputError("an embedding has values that are not finite; leave that image out")
    return rows, roots, float(squares @ squares)
