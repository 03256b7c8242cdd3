"""The candidates of a selection: every estimator with the ranks and λ that are worth a try, and no projection."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

STRENGTHS = {"shrinkage": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0), "icm": (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)}
RANK_SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8)


@dataclass(frozen=True)
class ProjectionCandidate:
    """One way to fit: the arguments of `estimators.fit`, and whether images are paired with captions as well."""

    estimator: str
    rank: int | None = None
    strength: float | None = None
    captions: bool = False

    def __str__(self) -> str:
        parts = [self.estimator]
        parts += [f"d={self.rank}"] if self.rank is not None else []
        parts += [f"λ={self.strength:g}"] if self.strength is not None else []
        parts += ["with captions"] if self.captions else []
        return " ".join(parts)


def grid(
    width: int,
    *,
    estimator: str = "auto",
    rank: int | None = None,
    strength: float | None = None,
    captions: Sequence[bool] = (False,),
) -> list[ProjectionCandidate]:
    """The candidates: always no projection, and of every estimator asked for all ranks and λ that are not given.

    Args:
        width: D.
        estimator: `auto` for all of them, or a name.
        rank: Only this rank; then only estimators that cut.
        strength: Only this λ; then only estimators that have one.
        captions: Without captions as pairs, with them, or both.

    Raises:
        InputError: No estimator takes what was given.
    """
    ranks = [rank] if rank is not None else sorted({max(1, round(width * share)) for share in RANK_SHARES} - {width})
    found: list[ProjectionCandidate] = []
    if estimator in ("auto", "shrinkage") and rank is None:
        lambdas = STRENGTHS["shrinkage"] if strength is None else (strength,)
        found += [ProjectionCandidate("shrinkage", None, value) for value in lambdas]
    if estimator in ("auto", "generalised") and strength is None:
        found += [ProjectionCandidate("generalised", value) for value in ranks]
    if estimator in ("auto", "icm"):
        lambdas = STRENGTHS["icm"] if strength is None else (strength,)
        found += [ProjectionCandidate("icm", value, each) for each in lambdas for value in ranks]
    if not found and estimator != "identity":
        raise InputError(f"--estimator {estimator} cannot take this --rank or --strength; only icm takes both")
    return [ProjectionCandidate("identity"), *(replace(each, captions=flag) for flag in captions for each in found)]
