"""What a chosen candidate gains on concepts that were fitted, beside its gain on concepts that were not.

A projection knows the very things that it was fitted on: their gain can be large where others lose. Selection scores
concepts that each fit left out; here the same fits are scored on the concepts that they saw, in the environments and
under the interventions that they did not. Only the chosen candidate and no projection are, so this costs one more
decomposition for every fold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from invariclip.calibrate.data.pairs import ALL_SOURCES, EmbeddingTable, Sources
from invariclip.calibrate.projection.candidates import ProjectionCandidate
from invariclip.calibrate.projection.evaluate import Bootstrap
from invariclip.calibrate.projection.folds import CONCEPT_PARTS, concept_masks, make_folds
from invariclip.calibrate.projection.parallel import side_by_side
from invariclip.calibrate.projection.scorer import Scorer
from invariclip.calibrate.projection.selection import ConceptGains, Selection, fitted_bases, units

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from invariclip.calibrate.projection.folds import Fold


def concept_gains(
    table: EmbeddingTable,
    selection: Selection,
    *,
    bank: NDArray[np.float64] | None = None,
    sources: Sources = ALL_SOURCES,
    concept_parts: int = CONCEPT_PARTS,
    seed: int = 0,
) -> ConceptGains | None:
    """The chosen candidate's gains; the arguments are those that `select.select` had.

    Args:
        table: The rows.
        selection: What was chosen, and how it was scored.
        bank: See `select.select`, as are the others.
        sources: Which pairs are fitted on.
        concept_parts: See `folds.make_folds`.
        seed: Of the folds, the pairs and the bootstrap.

    Returns:
        None where no projection was chosen. Where no concept could be left out, the told gain is of fitted ones.
    """
    chosen, none = selection.result(), ProjectionCandidate("identity")
    if chosen.candidate == none:
        return None
    if len(concept_masks(table, concept_parts, seed)) == 1:
        return ConceptGains(chosen.gain, None)
    _, folds = make_folds(table, seed=seed, concept_parts=concept_parts, fitted=True)
    folds = [fold for fold in folds if fold.queries.any()]
    pair = [none, chosen.candidate]

    def work(fold: Fold) -> dict[ProjectionCandidate, NDArray[np.float64]]:
        score = Scorer(table, fold, selection.objective, bank)
        fitted = fitted_bases(table, fold, pair, bank, sources, seed)
        return {candidate: score(basis, candidate.rank) for candidate, basis in fitted}

    scores = list(side_by_side(work, folds, table.vectors.shape[1]))
    named = [name for fold in folds for name in fold.groups]
    groups = np.unique(named, return_inverse=True)[1]
    bootstrap = Bootstrap(np.concatenate([units(table)[fold.queries] for fold in folds]), groups, seed=seed)
    with_it, without = (np.concatenate([one[candidate] for one in scores]) for candidate in reversed(pair))
    return ConceptGains(bootstrap.intervals(with_it, without)[-1], chosen.gain)
