"""What is left out in turn: an environment, and with it kinds of intervention and concepts.

An environment that will be met later is unlike those that were fitted on. Leaving one out, fitting on the others and
scoring on it is the nearest thing to it that can be had without it (DomainBed's leave-one-domain-out, Gulrajani and
Lopez-Paz, arXiv 2007.01434). But an encoder has often learned the left-out environment too, and then an image of it
asks little. The same image under an intervention that was left out of the fit is unlike anything the encoder or the
projection has seen; so half of the score comes from unchanged images and half from changed ones. Concepts are left
out as well: a projection looks better than it is on the very concepts that it was fitted on.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from invariclip.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from invariclip.calibrate.data.pairs import EmbeddingTable

CONCEPT_PARTS = 4
KIND_PARTS = 2
CONCEPTS_TO_PART = 8
"""Below this many concepts none are left out: what remained would say too little."""
CHANGED = " changed"
"""Added to an environment's name for the scores of its changed images."""


@dataclass(frozen=True)
class Fold:
    """One split of the rows of a table.

    Attributes:
        fit: bool [N], rows that are fitted on.
        support: bool [N], rows that class prototypes are made of.
        queries: bool [N], rows that are scored.
        groups: For every scored row, in order, the name under which its score counts: the environment that was left
            out, with `CHANGED` where the row is a changed image, or the kind of intervention.
    """

    fit: NDArray[np.bool_]
    support: NDArray[np.bool_]
    queries: NDArray[np.bool_]
    groups: tuple[str, ...]


def make_folds(
    table: EmbeddingTable, *, seed: int = 0, concept_parts: int = CONCEPT_PARTS, fitted: bool = False
) -> tuple[str, list[Fold]]:
    """The folds that a table allows, and one line that says what is left out.

    - Three environments or more (two, where there are interventions as well): each environment in turn, each with one
      of two halves of the kinds of intervention.
    - Two environments without interventions: leaving one out would leave no pair, so only concepts are left out, and
      each environment is scored from prototypes of the other.
    - One environment: each kind of intervention in turn, scored from the unchanged images.

    Args:
        table: All rows.
        seed: Distributes the concepts over the parts.
        concept_parts: Into how many parts concepts are split; 1 leaves none out.
        fitted: Score, in the same folds, the concepts that are fitted on in place of those that are left out. Where
            only concepts can be left out, these are then the very images of the fit.

    Raises:
        InputError: There are too few environments and kinds of intervention to leave one out.
    """
    environments = [int(code) for code in np.unique(table.environments[table.unchanged])]
    kinds = [int(code) for code in np.unique(table.kinds[~table.unchanged])]
    parts = concept_masks(table, concept_parts, seed)
    concepts = "no concepts" if len(parts) == 1 else f"a {_share(len(parts))} of the concepts"
    if len(environments) >= 3 or (len(environments) == 2 and kinds):
        # A single kind cannot be left out where it is all there is to fit on: then it is fitted on and not scored.
        kind_parts = [kinds[start::KIND_PARTS] for start in range(KIND_PARTS)] if len(kinds) >= KIND_PARTS else [[]]
        halves = ", half of the kinds of intervention" if len(kind_parts) > 1 else ""
        return (
            f"each of {len(environments)} environments in turn{halves} and {concepts}",
            [
                _environment_fold(table, code, some, part, fitted)
                for code in environments
                for some in kind_parts
                for part in parts
            ],
        )
    if len(environments) == 2 and len(parts) > 1:
        return (
            f"{concepts}; with two environments and no interventions neither can be left out",
            [_concept_fold(table, code, part, fitted) for code in environments for part in parts],
        )
    if len(kinds) >= 2:
        return (
            f"each of {len(kinds)} kinds of intervention in turn and {concepts}",
            [_kind_fold(table, code, part, fitted) for code in kinds for part in parts],
        )
    raise InputError(
        f"nothing can be left out to select by: {len(environments)} environment(s), {len(kinds)} kind(s) of "
        f"intervention, {len(np.unique(table.concepts))} concept(s); add some, or fix estimator, rank and strength"
    )


def _environment_fold(
    table: EmbeddingTable, code: int, kinds: list[int], part: NDArray[np.bool_], fitted: bool
) -> Fold:
    """Left out: the environment, all of `kinds` everywhere, and the concepts of `part`."""
    left, some = table.environments == code, np.isin(table.kinds, kinds)
    queries = left & _scored_concepts(part, fitted) & (table.unchanged | some)
    name = table.environment_names[code]
    return Fold(
        fit=~left & ~some & _others(part),
        support=table.unchanged & ~left,
        queries=queries,
        groups=tuple(name if plain else name + CHANGED for plain in table.unchanged[queries]),
    )


def _concept_fold(table: EmbeddingTable, code: int, part: NDArray[np.bool_], fitted: bool) -> Fold:
    """Left out: the concepts of `part`, in both environments."""
    left = table.environments == code
    queries = table.unchanged & left & _scored_concepts(part, fitted)
    return Fold(
        fit=_others(part),
        support=table.unchanged & ~left,
        queries=queries,
        groups=(table.environment_names[code],) * int(queries.sum()),
    )


def _kind_fold(table: EmbeddingTable, code: int, part: NDArray[np.bool_], fitted: bool) -> Fold:
    """Left out: the kind of intervention, and the concepts of `part`."""
    queries = (table.kinds == code) & _scored_concepts(part, fitted)
    return Fold(
        fit=(table.kinds != code) & _others(part),
        support=table.unchanged,
        queries=queries,
        groups=(table.kind_names[code],) * int(queries.sum()),
    )


def _scored_concepts(part: NDArray[np.bool_], fitted: bool) -> NDArray[np.bool_]:
    """Rows of the concepts that are scored."""
    return _others(part) if fitted else part


def _others(part: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Rows outside of a part; all rows if the part is everything, for then no concept is left out."""
    return np.ones_like(part) if part.all() else ~part


def concept_masks(table: EmbeddingTable, count: int, seed: int) -> list[NDArray[np.bool_]]:
    """Masks over rows, bool [N] each, one for each part of the concepts, by the concepts' names and the seed alone.

    One mask of all rows where there are fewer than `CONCEPTS_TO_PART` concepts.
    """
    if count <= 1 or len(np.unique(table.concepts)) < CONCEPTS_TO_PART:
        return [np.ones(len(table.concepts), dtype=np.bool_)]
    ranked = sorted(range(len(table.concept_names)), key=lambda code: _hash(table.concept_names[code], seed))
    part = np.empty(len(ranked), dtype=np.int64)
    # By rank in the order of hashes, so that the parts are equally large however few concepts there are.
    part[ranked] = np.arange(len(ranked)) % count
    return [part[table.concepts] == index for index in range(count)]


def _hash(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\n{name}".encode()).digest()


def _share(count: int) -> str:
    names = ("whole", "half", "third", "quarter", "fifth")
    return names[count - 1] if count <= len(names) else f"1/{count}"
