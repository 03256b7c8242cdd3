"""The candidates of a selection: the grid of estimators, ranks and λ, their scores on a fold, and screening.

- Scores: the share of right answers, and the margin between right and wrong ones. A left-out environment can be so easy
  that several candidates answer everything in it; `separation`, how clearly they answer, then tells them apart.
- Screening: eigenproblems grow with D³, and every λ of `icm` is one of its own. For wide encoders all candidates are
  scored on a few folds first, one for each thing that is left out, and only the best on the other folds: one round of
  successive halving (Jamieson and Talwalkar, Non-stochastic best arm identification and hyperparameter optimization,
  AISTATS 2016). The scores of those that go on are the same as without screening.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from invariclip.calibrate.projection.classifiers import fit_probe, prototype_bank, prototypes, unit, zero_shot
from invariclip.calibrate.projection.estimators import EstimatorBasis, decompose, decompose_all
from invariclip.calibrate.projection.folds import CHANGED
from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from invariclip.calibrate.data.moments import Moments
    from invariclip.calibrate.data.pairs import EmbeddingTable
    from invariclip.calibrate.projection.folds import Fold

Objective: TypeAlias = Literal["zero-shot", "prototypes", "both", "probe"]
TEXT_OBJECTIVES: tuple[Objective, ...] = ("zero-shot", "both")
"""Those that compare images with class names."""
_CHUNK = 4096
_LEAST = 1e-6
"""The least spread, as a share of the mean: margins may all be one."""
AFFORDABLE = 1e11
"""D³ over all decompositions and folds: some ten seconds of two processors. Up to it everything is scored: with three
environments and the whole grid up to D = 640."""
KEPT = 2
"""Decompositions that go on: every λ of `shrinkage` shares one, and so does every rank of `generalised` or of one λ."""
_STRIDE = 5
"""So that environments are screened with different concepts and kinds of intervention left out."""
STRENGTHS = {"shrinkage": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0), "icm": (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)}
RANK_SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8)


def bases(moments: Moments, candidates: Sequence[ProjectionCandidate]) -> dict[ProjectionCandidate, EstimatorBasis]:
    """Every candidate's basis; one eigendecomposition serves all ranks, and for shrinkage all λ too."""
    by_setting: dict[ProjectionCandidate, EstimatorBasis] = {}
    for estimator in dict.fromkeys(candidate.estimator for candidate in candidates):
        strengths = [c.strength for c in candidates if c.estimator == estimator and c.strength is not None]
        if not strengths:
            by_setting[ProjectionCandidate(estimator)] = decompose(moments, estimator)
            continue
        unique = list(dict.fromkeys(strengths))
        for basis in decompose_all(moments, estimator, unique):
            by_setting[ProjectionCandidate(estimator, None, basis.strength)] = basis
    return {candidate: by_setting[replace(candidate, rank=None, captions=False)] for candidate in candidates}


class Scorer:
    """Scores one fold; embeddings are turned into an estimator's axes once, of which candidates take their parts.

    Cosines do not change when the axes are turned, so the symmetric A_inv of shrinkage needs no turning back.
    """

    def __init__(
        self, table: EmbeddingTable, fold: Fold, objective: Objective, bank: NDArray[np.float64] | None
    ) -> None:
        self.labels, self.support_labels = table.labels[fold.queries], table.labels[fold.support]
        self._inputs = {"queries": table.vectors[fold.queries]}
        if objective != "zero-shot":
            self._inputs["support"] = table.vectors[fold.support]
        if objective in TEXT_OBJECTIVES and bank is not None:
            self._inputs["bank"] = bank
        self._probe = objective == "probe"
        self._axes: NDArray[np.float64] | None = None
        self._turned: dict[str, NDArray[np.float64]] = {}

    def __call__(self, basis: EstimatorBasis, rank: int | None) -> NDArray[np.float64]:
        """Share of right answers, 0 to 1, for every query."""
        vectors = self._mapped(basis, rank)
        answers: list[NDArray[np.bool_]] = []
        if self._probe:
            answers.append(fit_probe(vectors["support"], self.support_labels).correct(vectors["queries"], self.labels))
        elif "support" in vectors:
            answers.append(prototypes(vectors["support"], self.support_labels, vectors["queries"], self.labels))
        if "bank" in vectors:
            answers.append(zero_shot(vectors["queries"], self.labels, vectors["bank"]))
        return np.asarray(np.mean(answers, axis=0))

    def margins(self, basis: EstimatorBasis, rank: int | None) -> list[NDArray[np.float64]]:
        """For every way of answering the margins of the queries whose class is known, in the same order of ways."""
        vectors = self._mapped(basis, rank)
        by_way: list[NDArray[np.float64]] = []
        if self._probe:
            probe = fit_probe(vectors["support"], self.support_labels)
            by_way.append(self._margins(vectors["queries"], probe.classes, probe.weights, probe.bias))
        elif "support" in vectors:
            by_way.append(self._margins(vectors["queries"], *prototype_bank(vectors["support"], self.support_labels)))
        if "bank" in vectors:
            by_way.append(self._margins(vectors["queries"], np.arange(len(vectors["bank"])), vectors["bank"]))
        return by_way

    def _mapped(self, basis: EstimatorBasis, rank: int | None) -> dict[str, NDArray[np.float64]]:
        """The inputs as a candidate maps them, unit length."""
        if self._axes is not basis.axes:
            self._axes = basis.axes
            # The identity's axes are those that are there; multiplying by them would only take time.
            same = basis.estimator == "identity"
            self._turned = self._inputs if same else {name: each @ basis.axes for name, each in self._inputs.items()}
        return {name: unit(vectors[:, :rank] * basis.factors[:rank]) for name, vectors in self._turned.items()}

    def _margins(
        self,
        queries: NDArray[np.float64],
        classes: NDArray[np.int64],
        bank: NDArray[np.float64],
        bias: NDArray[np.float64] | float = 0.0,
    ) -> NDArray[np.float64]:
        known = np.isin(self.labels, classes) & (len(classes) > 1)
        rows, places = queries[known], np.searchsorted(classes, self.labels[known])
        parts = [slice(start, start + _CHUNK) for start in range(0, len(rows), _CHUNK)]
        return np.concatenate([np.empty(0), *(margins(rows[part] @ bank.T + bias, places[part]) for part in parts)])


def margins(scores: NDArray[np.floating[Any]], places: NDArray[np.int64]) -> NDArray[np.float64]:
    """By how much the right class's score exceeds the best of all others, float64 [N].

    Args:
        scores: [N, K], K at least 2.
        places: int64 [N], the column of the right class.
    """
    rows = np.arange(len(scores))
    others = np.array(scores, dtype=np.float64)
    own = others[rows, places].copy()
    others[rows, places] = -np.inf
    return np.asarray(own - others.max(axis=1))


def separation(margins: NDArray[np.float64]) -> float:
    """How many standard deviations the mean margin lies above zero: of normal margins, Φ(-that) would be wrong.

    It is a ratio, so it does not grow as a projection spreads all embeddings.

    Args:
        margins: float64 [N]; 0 for none.
    """
    if not len(margins):
        return 0.0
    mean, spread = float(np.mean(margins)), float(np.std(margins))
    return mean / max(spread, _LEAST * abs(mean)) if mean else 0.0


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


def screening_winners(behind: dict[ProjectionCandidate, float]) -> list[ProjectionCandidate]:
    """The candidates that go on, in their order: no projection, and all of the `KEPT` best decompositions.

    Args:
        behind: For every candidate its score on the screening folds, relative to the best: zero or less.
    """
    best: dict[tuple[str, float | None, bool], float] = {}
    for candidate, value in behind.items():
        if candidate.estimator != "identity":
            key = decomposition(candidate)
            best[key] = max(best.get(key, value), value)
    going_on = set(sorted(best, key=lambda key: -best[key])[:KEPT])
    return [each for each in behind if each.estimator == "identity" or decomposition(each) in going_on]


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
    candidates: list[ProjectionCandidate] = []
    if estimator in ("auto", "shrinkage") and rank is None:
        lambdas = STRENGTHS["shrinkage"] if strength is None else (strength,)
        candidates += [ProjectionCandidate("shrinkage", None, value) for value in lambdas]
    if estimator in ("auto", "generalised") and strength is None:
        candidates += [ProjectionCandidate("generalised", value) for value in ranks]
    if estimator in ("auto", "icm"):
        lambdas = STRENGTHS["icm"] if strength is None else (strength,)
        candidates += [ProjectionCandidate("icm", value, each) for each in lambdas for value in ranks]
    if not candidates and estimator != "identity":
        raise InputError(f"--estimator {estimator} cannot take this --rank or --strength; only icm takes both")
    return [
        ProjectionCandidate("identity"),
        *(replace(each, captions=flag) for flag in captions for each in candidates),
    ]
