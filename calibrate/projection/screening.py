"""Which candidates are worth scoring on every fold, where an encoder is so wide that scoring all of them takes minutes.

Eigenproblems grow with D³, and every λ of `icm` is one of its own. So all candidates are scored on a few folds first,
one for each thing that is left out, and the rest of the folds is spent on the best: one round of successive halving
(Jamieson and Talwalkar, Non-stochastic best arm identification and hyperparameter optimization, AISTATS 2016). What is
kept is scored exactly as without screening; what is dropped stands in the selection with how far behind it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from invariclip.calibrate.projection.folds import CHANGED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from invariclip.calibrate.projection.candidates import ProjectionCandidate
    from invariclip.calibrate.projection.folds import Fold

AFFORDABLE = 1e11
"""D³ over all decompositions and folds: some ten seconds of two processors. Up to it everything is scored: with three
environments and the whole grid up to D = 640."""
KEPT = 2
"""Decompositions that go on: every λ of `shrinkage` shares one, and so does every rank of `generalised` or of one λ."""
_STRIDE = 5
"""So that environments are screened with different concepts and kinds of intervention left out."""


def decomposition(candidate: ProjectionCandidate) -> tuple[str, float | None, bool]:
    """What candidates share that come from one eigenproblem."""
    strength = candidate.strength if candidate.estimator == "icm" else None
    return candidate.estimator, strength, candidate.captions


def needs_screening(candidates: Sequence[ProjectionCandidate], folds: int, width: int) -> bool:
    """Whether scoring every candidate on every fold would take too long.

    Args:
        candidates: All of them.
        folds: How many folds there are.
        width: D.
    """
    problems = {decomposition(candidate) for candidate in candidates if candidate.estimator != "identity"}
    return len(problems) > KEPT and len(problems) * folds * float(width) ** 3 > AFFORDABLE


def screening_folds(folds: Sequence[Fold]) -> list[int]:
    """The places of the folds to screen on: one for each environment or kind of intervention that is left out."""
    places: dict[str, list[int]] = {}
    for place, fold in enumerate(folds):
        places.setdefault(fold.groups[0].removesuffix(CHANGED), []).append(place)
    return sorted(own[_STRIDE * number % len(own)] for number, own in enumerate(places.values()))


def kept(behind: dict[ProjectionCandidate, float], count: int = KEPT) -> list[ProjectionCandidate]:
    """The candidates that go on, in their order: no projection, and all of the `count` best decompositions.

    Args:
        behind: For every candidate its score on the screening folds, relative to the best: zero or less.
        count: How many decompositions.
    """
    best: dict[tuple[str, float | None, bool], float] = {}
    for candidate, value in behind.items():
        if candidate.estimator != "identity":
            key = decomposition(candidate)
            best[key] = max(best.get(key, value), value)
    going_on = set(sorted(best, key=lambda key: -best[key])[:count])
    return [each for each in behind if each.estimator == "identity" or decomposition(each) in going_on]
