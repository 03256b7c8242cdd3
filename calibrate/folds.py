"""What is left out in turn: an environment, or a kind of intervention where there is one environment, and concepts.

An environment that calibration will meet later is unlike those it was fitted on. Leaving one of these out, fitting on
the others and scoring on it is the nearest thing to that which can be had without the later one (DomainBed's
leave-one-domain-out, Gulrajani and Lopez-Paz, arXiv 2007.01434). Concepts are left out as well: a projection fitted on
the very concepts that it is scored on looks better than it is.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from invariclip.calibrate.pairs import Table

CONCEPT_FOLDS = 4
CONCEPTS_TO_FOLD = 8
"""Below this many concepts none are left out: what remained would say too little."""


@dataclass(frozen=True)
class Fold:
    """One split of the rows of a table.

    Attributes:
        left_out: The environment or kind of intervention that is scored.
        fit: bool [N], rows whose pairs are fitted on.
        support: bool [N], rows that class prototypes are made of.
        queries: bool [N], rows that are scored.
    """

    left_out: str
    fit: NDArray[np.bool_]
    support: NDArray[np.bool_]
    queries: NDArray[np.bool_]


def make_folds(table: Table, *, seed: int = 0, concept_folds: int = CONCEPT_FOLDS) -> tuple[str, list[Fold]]:
    """The folds that a table allows, and one line that says what is left out.

    - Three environments or more (two, where there are interventions as well): each environment in turn.
    - Two environments without interventions: leaving one out would leave no pair, so only concepts are left out, and
      each environment is scored from prototypes of the other.
    - One environment: each kind of intervention in turn, scored from the unchanged pictures.

    Args:
        table: All rows.
        seed: Distributes the concepts over the folds.
        concept_folds: Into how many folds concepts are split; 1 leaves none out.

    Raises:
        InputError: There are too few environments and kinds of intervention to leave one out.
    """
    present = np.unique(table.environments[table.unchanged])
    kinds = np.unique(table.kinds[~table.unchanged])
    parts = _concept_parts(table, concept_folds, seed)
    concepts = "no concepts" if len(parts) == 1 else f"a {_ordinal(len(parts))} of the concepts"
    if len(present) >= 3 or (len(present) == 2 and len(kinds)):
        return (
            f"each of {len(present)} environments in turn, and {concepts}",
            [_environment_fold(table, int(code), part, keep_pairs=False) for code in present for part in parts],
        )
    if len(present) == 2 and len(parts) > 1:
        return (
            f"{concepts}; with two environments none can be left out",
            [_environment_fold(table, int(code), part, keep_pairs=True) for code in present for part in parts],
        )
    if len(kinds) >= 2:
        return (
            f"each of {len(kinds)} kinds of intervention in turn, and {concepts}",
            [_kind_fold(table, int(code), part) for code in kinds for part in parts],
        )
    raise InputError(
        f"nothing can be left out to select by: {len(present)} environment(s), {len(kinds)} kind(s) of intervention, "
        f"{len(np.unique(table.concepts))} concept(s); add environments or interventions, or give --estimator, --rank "
        "and --strength"
    )


def _environment_fold(table: Table, code: int, part: NDArray[np.bool_], *, keep_pairs: bool) -> Fold:
    left = table.environments == code
    fit = np.ones_like(left) if keep_pairs else ~left
    everything = bool(part.all())
    return Fold(
        left_out=table.environment_names[code],
        fit=fit if everything else fit & ~part,
        support=table.unchanged & ~left,
        queries=table.unchanged & left & part,
    )


def _kind_fold(table: Table, code: int, part: NDArray[np.bool_]) -> Fold:
    left = table.kinds == code
    everything = bool(part.all())
    return Fold(
        left_out=table.kind_names[code],
        fit=~left if everything else ~left & ~part,
        support=table.unchanged,
        queries=left & part,
    )


def _concept_parts(table: Table, count: int, seed: int) -> list[NDArray[np.bool_]]:
    """Masks over rows, one for each fold of concepts; a concept's fold depends on its name and the seed alone."""
    if count <= 1 or len(np.unique(table.concepts)) < CONCEPTS_TO_FOLD:
        return [np.ones(len(table.concepts), dtype=np.bool_)]
    ranked = sorted(range(len(table.concept_names)), key=lambda code: _hash(table.concept_names[code], seed))
    fold = np.empty(len(ranked), dtype=np.int64)
    # By rank in hash order, so that the folds are equally large however few concepts there are.
    fold[ranked] = np.arange(len(ranked)) % count
    return [fold[table.concepts] == index for index in range(count)]


def _hash(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\n{name}".encode()).digest()


def _ordinal(count: int) -> str:
    names: Sequence[str] = ("whole", "half", "third", "quarter", "fifth")
    return names[count - 1] if count <= len(names) else f"1/{count}"
