"""What a projection takes out of the embeddings of concepts that it was not fitted on: the gap, and the environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from invariclip.calibrate.evaluate import Bootstrap, Interval
from invariclip.calibrate.folds import concept_masks
from invariclip.calibrate.pairs import natural_pairs
from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from invariclip.calibrate.pairs import Table
    from invariclip.projection import Projection

PARTS = 4
MAX_ROWS = 20_000
"""Pictures that the environment is read from: a classifier gains nothing from more."""
RIDGE = 1e-2
"""Of the linear classifier, as a share of the mean variance of a dimension."""
NATURAL = "natural pairs"
_CHUNK = 8192


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
    before: Interval
    after: Interval | None


@dataclass(frozen=True)
class Gaps:
    """How far apart the members of a pair are, by kind, in percent of how far pictures of two classes are.

    Attributes:
        kinds: Mean 1 - cos over the pairs of a kind, over `apart`.
        apart: Mean 1 - cos of two pictures of different classes, before and after.
    """

    kinds: tuple[Change, ...]
    apart: tuple[float, float | None]


def held_out_spaces(table: Table, fit_on: Callable[[Table], Projection | None], seed: int) -> list[Space]:
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


def gaps(table: Table, spaces: list[Space], seed: int) -> Gaps | None:
    """The gap of every kind of intervention and of natural pairs; None where no two classes could be compared.

    The gap alone falls whenever a projection draws all embeddings together; over the distance of different classes
    it falls only if the members of a pair come closer than other pictures do.
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
    old = bootstrap.intervals(_distances(table.vectors, first, second) / before)
    new: list[Interval | None] = [None] * len(old)
    if after:
        # Both members of a pair are of one concept, hence of one space.
        seen = np.empty((len(table.vectors), spaces[0].see(table.vectors[:1]).shape[1]))
        for space in spaces:
            seen[space.held] = space.see(table.vectors[space.held])
        new = list(bootstrap.intervals(_distances(seen, first, second) / after))
    names = (*table.kind_names, NATURAL)
    return Gaps(
        tuple(
            Change(names[code], int((kinds == code).sum()), old[place], new[place])
            for place, code in enumerate(bootstrap.codes)
        ),
        (before, after),
    )


def leakage(table: Table, spaces: list[Space], ranks: NDArray[np.int64], seed: int) -> list[Change]:
    """How often an environment can be told from an embedding: percent right, mean over environments.

    Two readers: the nearest centroid, which sees what a cosine sees, and a linear classifier (regularised least
    squares on indicators, Hastie et al., The Elements of Statistical Learning, section 4.2), which also finds what a
    soft projection has only shortened. Each reads embeddings as they are, and less the mean of their class: what is
    left of the environment within a class. Readers are tried on pictures that they did not learn from, of
    concepts that neither they nor the projection have seen.

    Returns:
        Four measures, or none where there are fewer than two environments.
    """
    rows = np.flatnonzero(table.unchanged)
    rows = np.sort(rows[np.argsort(ranks[rows])][:MAX_ROWS])
    if len(np.unique(table.environments[rows])) < 2:
        return []
    found: list[Change] = []
    shared = _classes_in_several(table, rows)
    for within, where in ((False, rows), (True, rows[shared])):
        if len(np.unique(table.environments[where])) < 2:
            continue
        bootstrap = Bootstrap(table.concepts[where], table.environments[where], seed=seed)
        plain = _read(table, [Space(space.held, None) for space in spaces], where, ranks, within)
        seen = _read(table, spaces, where, ranks, within) if spaces[0].projection is not None else None
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


def _apart(table: Table, spaces: list[Space]) -> float | None:
    """Mean 1 - cos over all pairs of unchanged pictures of different classes, by sums alone; None without such."""
    total, pairs = 0.0, 0.0
    for space in spaces:
        rows = np.flatnonzero(space.held & table.unchanged)
        classes, codes = np.unique(table.labels[rows], return_inverse=True)
        seen = space.see(table.vectors[rows])
        sums = np.zeros((len(classes), seen.shape[1]))
        np.add.at(sums, codes, seen)
        sizes = np.bincount(codes, minlength=len(classes))
        count = float(len(rows) ** 2 - (sizes**2).sum())
        total += count - float((sums.sum(axis=0) ** 2).sum() - (sums**2).sum())
        pairs += count
    return total / pairs if pairs and total > 0 else None


def _distances(
    vectors: NDArray[np.float64], first: NDArray[np.int64], second: NDArray[np.int64]
) -> NDArray[np.float64]:
    """1 - cos of pairs of rows, a chunk at a time."""
    parts = [
        1 - np.einsum("nd,nd->n", vectors[first[start : start + _CHUNK]], vectors[second[start : start + _CHUNK]])
        for start in range(0, len(first), _CHUNK)
    ]
    return np.concatenate(parts)


def _classes_in_several(table: Table, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which rows are of a class that stands in two environments or more, bool [len(rows)]."""
    codes = np.unique(np.stack([table.labels[rows], table.environments[rows]]), axis=1)
    seen = np.bincount(codes[0], minlength=len(table.label_names))
    return np.asarray(seen[table.labels[rows]] > 1)


def _read(
    table: Table, spaces: list[Space], rows: NDArray[np.int64], ranks: NDArray[np.int64], within: bool
) -> dict[str, NDArray[np.bool_]]:
    """Which rows' environment each reader names, bool [len(rows)]."""
    environments = table.environments[rows]
    correct = {name: np.zeros(len(rows), dtype=np.bool_) for name in ("centroid", "linear")}
    for space in spaces:
        seen = space.see(table.vectors[rows])
        tests = [space.held[rows]]
        if tests[0].all():
            # Concepts are too few to be left out: pictures are, in the order in which they would be drawn.
            turn = np.argsort(np.argsort(ranks[rows])) % PARTS
            tests = [turn == part for part in range(PARTS)]
        for test in tests:
            if not test.any() or test.all():
                continue
            inputs = seen - _class_means(seen, table.labels[rows], test) if within else seen
            named = {
                "centroid": _by_centroid(inputs[~test], environments[~test], inputs[test]),
                "linear": _by_line(inputs[~test], environments[~test], inputs[test]),
            }
            for name, answers in named.items():
                correct[name][test] = answers == environments[test]
    return correct


def _class_means(
    vectors: NDArray[np.float64], labels: NDArray[np.int64], test: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """For every row the mean of its class, [N, d]: of the rows not tested, or, of a class only tested, of those.

    A mean over both would tell: where a class has a picture in each environment, the tested one would be what
    the others lack.
    """
    own = np.zeros(len(labels), dtype=np.bool_)
    own[test] = ~np.isin(labels[test], labels[~test])
    _, codes = np.unique(labels, return_inverse=True)
    sums, counts = np.zeros((codes.max() + 1, vectors.shape[1])), np.zeros(codes.max() + 1)
    counted = ~test | own
    np.add.at(sums, codes[counted], vectors[counted])
    np.add.at(counts, codes[counted], 1)
    return np.asarray((sums / counts[:, None])[codes])


def _by_centroid(
    seen: NDArray[np.float64], environments: NDArray[np.int64], asked: NDArray[np.float64]
) -> NDArray[np.int64]:
    codes = np.unique(environments)
    centroids = np.stack([seen[environments == code].mean(axis=0) for code in codes])
    return np.asarray(codes[np.argmax(asked @ centroids.T - (centroids**2).sum(axis=1) / 2, axis=1)])


def _by_line(
    seen: NDArray[np.float64], environments: NDArray[np.int64], asked: NDArray[np.float64]
) -> NDArray[np.int64]:
    codes, places, counts = np.unique(environments, return_inverse=True, return_counts=True)
    # Every environment weighs the same, however many pictures it has.
    weights = (1 / counts[places] / len(codes))[:, None]
    centre = (weights * seen).sum(axis=0)
    inputs = seen - centre
    targets = np.eye(len(codes))[places] - 1 / len(codes)
    gram = inputs.T @ (weights * inputs)
    ridge = max(RIDGE * float(np.trace(gram)) / len(gram), np.finfo(np.float64).tiny)
    solved = np.linalg.solve(gram + ridge * np.eye(len(gram)), inputs.T @ (weights * targets))
    return np.asarray(codes[np.argmax((asked - centre) @ solved, axis=1)])
