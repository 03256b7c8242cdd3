"""One fold's candidates, scored: what each answers right, and how clearly."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from invariclip.calibrate.projection.probe import fit_probe
from invariclip.calibrate.projection.candidates import ProjectionCandidate
from invariclip.calibrate.projection.estimators import EstimatorBasis, decompose, decompose_all
from invariclip.calibrate.projection.evaluate import prototype_bank, prototypes, unit, zero_shot
from invariclip.calibrate.projection.separation import margins

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from invariclip.calibrate.data.pairs import EmbeddingTable
    from invariclip.calibrate.projection.folds import Fold
    from invariclip.calibrate.data.moments import Moments

Objective: TypeAlias = Literal["zero-shot", "prototypes", "both", "probe"]
TEXT_OBJECTIVES: tuple[Objective, ...] = ("zero-shot", "both")
"""Those that compare images with class names."""
_CHUNK = 4096


def bases(moments: Moments, candidates: Sequence[ProjectionCandidate]) -> dict[ProjectionCandidate, EstimatorBasis]:
    """Every candidate's basis; one eigendecomposition serves all ranks, and for shrinkage all λ too."""
    found: dict[ProjectionCandidate, EstimatorBasis] = {}
    for estimator in dict.fromkeys(candidate.estimator for candidate in candidates):
        strengths = [c.strength for c in candidates if c.estimator == estimator and c.strength is not None]
        if not strengths:
            found[ProjectionCandidate(estimator)] = decompose(moments, estimator)
            continue
        unique = list(dict.fromkeys(strengths))
        for basis in decompose_all(moments, estimator, unique):
            found[ProjectionCandidate(estimator, None, basis.strength)] = basis
    return {candidate: found[replace(candidate, rank=None, captions=False)] for candidate in candidates}


class Scorer:
    """Scores one fold; embeddings are turned into an estimator's axes once, of which candidates take their parts.

    Cosines do not change when the axes are turned, so the symmetric A_inv of shrinkage needs no turning back.
    """

    def __init__(
        self, table: EmbeddingTable, fold: Fold, objective: Objective, bank: NDArray[np.float64] | None
    ) -> None:
        self.labels, self.support_labels = table.labels[fold.queries], table.labels[fold.support]
        self._given = {"queries": table.vectors[fold.queries]}
        if objective != "zero-shot":
            self._given["support"] = table.vectors[fold.support]
        if objective in TEXT_OBJECTIVES and bank is not None:
            self._given["bank"] = bank
        self._probe = objective == "probe"
        self._axes: NDArray[np.float64] | None = None
        self._turned: dict[str, NDArray[np.float64]] = {}

    def __call__(self, basis: EstimatorBasis, rank: int | None) -> NDArray[np.float64]:
        """Share of right answers, 0 to 1, for every query."""
        seen = self._seen(basis, rank)
        answers: list[NDArray[np.bool_]] = []
        if self._probe:
            answers.append(fit_probe(seen["support"], self.support_labels).correct(seen["queries"], self.labels))
        elif "support" in seen:
            answers.append(prototypes(seen["support"], self.support_labels, seen["queries"], self.labels))
        if "bank" in seen:
            answers.append(zero_shot(seen["queries"], self.labels, seen["bank"]))
        return np.asarray(np.mean(answers, axis=0))

    def margins(self, basis: EstimatorBasis, rank: int | None) -> list[NDArray[np.float64]]:
        """For every way of answering the margins of the queries whose class is known, in the same order of ways."""
        seen = self._seen(basis, rank)
        found: list[NDArray[np.float64]] = []
        if self._probe:
            probe = fit_probe(seen["support"], self.support_labels)
            found.append(self._margins(seen["queries"], probe.classes, probe.weights, probe.bias))
        elif "support" in seen:
            found.append(self._margins(seen["queries"], *prototype_bank(seen["support"], self.support_labels)))
        if "bank" in seen:
            found.append(self._margins(seen["queries"], np.arange(len(seen["bank"])), seen["bank"]))
        return found

    def _seen(self, basis: EstimatorBasis, rank: int | None) -> dict[str, NDArray[np.float64]]:
        """Everything as a candidate shows it, unit length."""
        if self._axes is not basis.axes:
            self._axes = basis.axes
            # The identity's axes are those that are there; multiplying by them would only take time.
            same = basis.estimator == "identity"
            self._turned = self._given if same else {name: each @ basis.axes for name, each in self._given.items()}
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
