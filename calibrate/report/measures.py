"""The gap and the leakage of a table's concepts that a projection was not fitted on, before and after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from invariclip.calibrate.data.pairs import natural_pairs
from invariclip.calibrate.evaluation.invariance import apart, moved
from invariclip.calibrate.evaluation.leakage import Reader, classes_in_several, told
from invariclip.calibrate.projection.evaluate import AccuracyInterval, Bootstrap
from invariclip.calibrate.projection.folds import concept_masks
from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from invariclip.artifact.projection import Projection
    from invariclip.calibrate.data.pairs import EmbeddingTable

PARTS = 4
MAX_ROWS = 20_000
"""Images that the environment is read from: a classifier gains nothing from more."""
READERS: tuple[Reader, ...] = ("centroid", "linear")
NATURAL = "natural pairs"


@dataclass(frozen=True)
class Space:
    """A projection and the concepts that it was not fitted on.

    Attributes:
        held: bool [N], rows of those concepts; all rows where concepts are too few to leave some out.
        projection: None for no projection.
    """

    held: NDArray[np.bool_]
    projection: Projection | None

    def see(self, vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        """Embeddings [N, D] as this space shows them, unit length."""
        return vectors if self.projection is None else self.projection.apply(vectors)


@dataclass(frozen=True)
class Change:
    """One measure without and with the projection; `after` is None where there is none."""

    name: str
    count: int
    before: AccuracyInterval
    after: AccuracyInterval | None


@dataclass(frozen=True)
class Gaps:
    """How far apart the members of a pair are, by kind, in percent of how far images of two classes are.

    Attributes:
        kinds: Mean 1 - cos over the pairs of a kind, over `apart`.
        apart: Mean 1 - cos of two images of different classes, before and after.
    """

    kinds: tuple[Change, ...]
    apart: tuple[float, float | None]


def held_out_spaces(
    table: EmbeddingTable, fit_on: Callable[[EmbeddingTable], Projection | None], seed: int
) -> list[Space]:
    """Fits on three quarters of the concepts in turn; one space that has seen everything where there are too few.

    Args:
        table: All rows.
        fit_on: Rows → projection; None for no projection.
        seed: Distributes the concepts over the parts.
    """
    parts = concept_masks(table, PARTS, seed)
    if len(parts) > 1:
        try:
            return [Space(part, fit_on(table.where(~part))) for part in parts]
        except InputError:
            pass  # too few pairs without a part: what is fitted on all of them is shown, and that it saw all
    return [Space(np.ones(len(table.vectors), dtype=np.bool_), fit_on(table))]


def gaps(table: EmbeddingTable, spaces: list[Space], seed: int) -> Gaps | None:
    """The gap of every kind of intervention and of natural pairs; None where no two classes could be compared.

    The gap alone falls whenever a projection draws all embeddings together; over the distance of different classes
    it falls only if the members of a pair come closer than other images do.
    """
    before = _apart(table, [Space(space.held, None) for space in spaces])
    projected = spaces[0].projection is not None
    after = _apart(table, spaces) if projected else None
    if not before or (projected and not after):
        return None
    natural = natural_pairs(table, seed=seed)
    changed = np.flatnonzero(~table.unchanged)
    first = np.concatenate([table.origins[changed], natural.first])
    second = np.concatenate([changed, natural.second])
    kinds = np.concatenate([table.kinds[changed], np.full(len(natural), len(table.kind_names))])
    if not len(first):
        return None
    bootstrap = Bootstrap(table.concepts[first], kinds, seed=seed)
    old = bootstrap.intervals(moved(table.vectors[first], table.vectors[second]) / before)
    new: list[AccuracyInterval | None] = [None] * len(old)
    if after:
        # Both members of a pair are of one concept, hence of one space.
        seen = np.empty((len(table.vectors), spaces[0].see(table.vectors[:1]).shape[1]))
        for space in spaces:
            seen[space.held] = space.see(table.vectors[space.held])
        new = list(bootstrap.intervals(moved(seen[first], seen[second]) / after))
    names = (*table.kind_names, NATURAL)
    return Gaps(
        tuple(
            Change(names[code], int((kinds == code).sum()), old[place], new[place])
            for place, code in enumerate(bootstrap.codes)
        ),
        (before, after),
    )


def leakage(table: EmbeddingTable, spaces: list[Space], ranks: NDArray[np.int64], seed: int) -> list[Change]:
    """How often an environment can be told from an embedding: percent right, mean over environments.

    Two readers (see `leakage.Reader`), each of which reads embeddings as they are, and less the mean of their class:
    what is left of the environment within a class. Readers are tried on images that they did not learn from, of
    concepts that neither they nor the projection have seen.

    Returns:
        Four measures, or none where there are fewer than two environments.
    """
    rows = np.flatnonzero(table.unchanged)
    rows = np.sort(rows[np.argsort(ranks[rows])][:MAX_ROWS])
    if len(np.unique(table.environments[rows])) < 2:
        return []
    found: list[Change] = []
    shared = rows[classes_in_several(table.labels[rows], table.environments[rows])]
    for within, where in ((False, rows), (True, shared)):
        if len(np.unique(table.environments[where])) < 2:
            continue
        bootstrap = Bootstrap(table.concepts[where], table.environments[where], seed=seed)
        labels = table.labels[where] if within else None
        plain = _read(table, [Space(space.held, None) for space in spaces], where, ranks, labels)
        seen = _read(table, spaces, where, ranks, labels) if spaces[0].projection is not None else None
        found += [
            Change(
                f"{reader}, {'within class' if within else 'any class'}",
                len(where),
                bootstrap.intervals(plain[reader])[-1],
                bootstrap.intervals(seen[reader])[-1] if seen else None,
            )
            for reader in plain
        ]
    return found


def _apart(table: EmbeddingTable, spaces: list[Space]) -> float | None:
    """Mean 1 - cos over all pairs of unchanged images of different classes in one space; None without such."""
    total = count = 0.0
    for space in spaces:
        rows = np.flatnonzero(space.held & table.unchanged)
        distances, pairs = apart(space.see(table.vectors[rows]), table.labels[rows])
        total, count = total + distances, count + pairs
    return total / count if count and total > 0 else None


def _read(
    table: EmbeddingTable,
    spaces: list[Space],
    rows: NDArray[np.int64],
    ranks: NDArray[np.int64],
    labels: NDArray[np.int64] | None,
) -> dict[Reader, NDArray[np.bool_]]:
    """Which rows' environment each reader names, bool [len(rows)]."""
    environments = table.environments[rows]
    correct = {name: np.zeros(len(rows), dtype=np.bool_) for name in READERS}
    for space in spaces:
        seen = space.see(table.vectors[rows])
        tests = [space.held[rows]]
        if tests[0].all():
            # Concepts are too few to be left out: images are, in the order in which they would be drawn.
            turn = np.argsort(np.argsort(ranks[rows])) % PARTS
            tests = [turn == part for part in range(PARTS)]
        for test in tests:
            for name in READERS:
                correct[name] |= told(seen, environments, test, name, labels=labels)
    return correct
