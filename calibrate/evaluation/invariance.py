"""How invariant embeddings are: invariance gap, domain leakage, and side effects on other attributes.

The gap compares how far interventions move embeddings with how far apart they are anyway. Leakage is how well a reader
names the environment from an embedding. Side effects are the accuracies of attributes that the pairs did not target,
before and after a map: a projection away from one concept can make a model lean more on others (Gerych et al., "WRING
Out The Bias", ICLR 2026). They are measured in that manner, not by that paper's measure of bias. Whether an attribute
was meant to get worse, as the environment is, the caller knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from invariclip.calibrate.projection.bootstrap import RESAMPLES, AccuracyInterval, Bootstrap
from invariclip.calibrate.projection.classifiers import fit_probe
from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

_CHUNK = 8192
PARTS = 5
"""Into how many parts rows are split for cross-validation; each is left out in turn."""
RIDGE = 1e-2
"""Of the linear reader, as a share of the mean variance of a dimension."""
Reader: TypeAlias = Literal["centroid", "linear", "probe"]
"""Who reads the environment:

- `centroid`, the nearest centroid, sees what a cosine sees;
- `linear`, regularised least squares on indicators (Hastie et al., The Elements of Statistical Learning, section 4.2),
  also finds what a soft projection has only shortened, in one solve;
- `probe`, logistic regression, is what tables quote.
"""


def invariance_gap(first: NDArray[np.floating[Any]], second: NDArray[np.floating[Any]]) -> float:
    """How far interventions move embeddings, as a share of how far apart two images are anyway.

    Mean (1 - cos) of pairs, divided by the mean (1 - cos) of the first members with one another: 0 is invariance, 1 is
    that a changed image is as far away as another image. Without the division a projection that pushes all
    embeddings together would look invariant.

    Args:
        first: [P, d], unit length.
        second: [P, d], unit length.

    Raises:
        InputError: There are fewer than two pairs, or all first members are one.
    """
    if len(first) < 2:
        raise InputError(f"the invariance gap needs two pairs or more, and there are {len(first)}")
    total, count = group_distances(first, np.arange(len(first)))
    if total <= 0:
        raise InputError("all images have one embedding: there is no distance to measure the gap by")
    return float(np.mean(pair_distances(first, second))) / (total / count)


def pair_distances(first: NDArray[np.floating[Any]], second: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """1 - cos of the two members of every pair, float64 [P].

    Args:
        first: [P, d], unit length.
        second: [P, d], unit length.
    """
    distances = np.empty(len(first))
    for start in range(0, len(first), _CHUNK):
        part = slice(start, start + _CHUNK)
        distances[part] = 1 - np.einsum("nd,nd->n", first[part], second[part])
    return distances


def group_distances(vectors: NDArray[np.floating[Any]], groups: NDArray[np.int64]) -> tuple[float, float]:
    """1 - cos over all ordered pairs of rows of different groups: their sum, and how many they are, by sums alone.

    Args:
        vectors: [N, d], unit length.
        groups: int64 [N]; every row one of its own for all pairs of different rows, classes for pairs of two classes.
    """
    names, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    sums = np.zeros((len(names), vectors.shape[1]))
    np.add.at(sums, codes, vectors)
    count = float(len(vectors) ** 2 - (sizes**2).sum())
    return count - float((sums.sum(axis=0) ** 2).sum() - (sums**2).sum()), count


@dataclass(frozen=True)
class SideEffect:
    """One attribute before and after; accuracies are averaged over the attribute's values.

    Attributes:
        attribute: Its name.
        before: Accuracy in percent, with its interval.
        after: The same after the map.
        difference: After less before, in points; paired.
        chance: Percent right by chance.
        worse: The whole interval of the difference lies below minus the tolerance.
    """

    attribute: str
    before: AccuracyInterval
    after: AccuracyInterval
    difference: AccuracyInterval
    chance: float
    worse: bool

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, under the attributes' names."""
        return {
            "attribute": self.attribute,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "difference": self.difference.to_json(),
            "chance": round(self.chance, 3),
            "worse": self.worse,
        }


def side_effects(
    before: NDArray[np.floating[Any]],
    after: NDArray[np.floating[Any]],
    attributes: Mapping[str, NDArray[np.int64]],
    *,
    groups: NDArray[np.int64] | None = None,
    reader: Reader = "centroid",
    tolerance: float = 0.0,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[SideEffect]:
    """Cross-validated accuracy of every attribute before and after a map, with paired bootstrap intervals.

    Intervals are each attribute's own at 95 %: of forty attributes that a map does not harm, one is flagged by chance.

    Args:
        before: [N, D], unit length.
        after: [N, d], the same rows through the map, unit length.
        attributes: Name → int64 [N]; -1 where a row's value is not known: it is left out for that attribute.
        groups: int64 [N], rows that must not be told from each other, as images of one concept: a group is fitted on
            or tested as a whole, and is what the bootstrap draws. None makes every row its own.
        reader: `centroid` (nearest prototype, what a cosine sees), `linear` or `probe`, see `Reader`.
        tolerance: Points that an attribute may lose before it is flagged.
        seed: Of the split and the bootstrap.
        resamples: Of the bootstrap.

    Returns:
        One for each attribute, in the given order.

    Raises:
        InputError: Numbers of rows differ, an embedding is not finite, the tolerance is below zero, there is no
            attribute, or one has fewer than two values that two groups have each.
        MissingExtraError: The reader is `probe` and scikit-learn is not installed.
    """
    count = len(before)
    own = np.arange(count) if groups is None else groups
    if not attributes:
        raise InputError("there is no attribute to look at")
    if tolerance < 0:
        raise InputError(f"tolerance is in points and not below zero; {tolerance} is")
    for name, rows in (("`after`", after), ("`groups`", own), *attributes.items()):
        if len(rows) != count:
            raise InputError(f"{count} embeddings before the map, and {len(rows)} rows of {name}")
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise InputError("an embedding has values that are not finite; leave that row out")
    effects = []
    for name, values in attributes.items():
        known = _usable(name, values, own)
        labels, members = values[known], own[known]
        fold = _folds(labels, members, seed)
        right = []
        for vectors in (before[known], after[known]):
            answers = np.zeros(len(labels), dtype=np.bool_)
            for part in range(PARTS):
                answers |= reader_hits(vectors, labels, fold == part, reader)
            right.append(answers)
        bootstrap = Bootstrap(members, labels, resamples=resamples, seed=seed)
        # The last interval is that of the mean over values: each counts the same, however many rows it has.
        first, second = (bootstrap.intervals(answers)[-1] for answers in right)
        change = bootstrap.intervals(right[1], right[0])[-1]
        effects.append(SideEffect(name, first, second, change, 100 / len(bootstrap.codes), change.high < -tolerance))
    return effects


def _usable(name: str, values: NDArray[np.int64], groups: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Rows whose value is known and that two groups have, so that one can be fitted on while the other is tested."""
    pairs = np.unique(np.stack([values, groups]), axis=1)
    codes, counts = np.unique(pairs[0], return_counts=True)
    usable = codes[(codes >= 0) & (counts > 1)]
    if len(usable) < 2:
        raise InputError(f"attribute {name!r} needs two values that two groups have each, and has {len(usable)}")
    return np.isin(values, usable)


def _folds(labels: NDArray[np.int64], groups: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """A part for every row, int64 [N]: whole groups, dealt out within the value of each group's first row."""
    _, first, place = np.unique(groups, return_index=True, return_inverse=True)
    return np.asarray(fold_numbers(labels[first][None], PARTS, seed)[place])


@dataclass(frozen=True)
class Leakage:
    """How well a linear probe names the environment.

    Attributes:
        accuracy: Percent right, averaged over environments, on images that it was not fitted on.
        chance: Percent right by chance.
    """

    accuracy: float
    chance: float


def domain_leakage(
    vectors: NDArray[np.floating[Any]],
    labels: NDArray[np.int64],
    environments: NDArray[np.int64],
    *,
    seed: int = 0,
) -> Leakage:
    """Cross-validated accuracy of a linear probe that names the environment, the class taken away first.

    Environments hold classes in different shares, so a probe could name the environment from the class. Hence every
    class's centre (the mean of its environments' means) is subtracted. Then everything is scaled to mean square length
    1, so that the probe's penalty means the same before and after a projection. Classes in one environment only are
    left out: there class and environment are one thing.

    The centre is that of all images, tested ones too, which tells nothing where a class has tens of them in every
    environment. Where it has one or two, the tested one is what the others lack; `reader_hits` leaves it out.

    Args:
        vectors: [N, d], unit length.
        labels: int64 [N].
        environments: int64 [N].
        seed: Of the split.

    Raises:
        InputError: Fewer than two environments share a class, or have too few images to split.
        MissingExtraError: scikit-learn is not installed.
    """
    rows, residuals = _without_class(vectors, labels, environments)
    codes, environment = np.unique(environments[rows], return_inverse=True)
    if len(codes) < 2:
        raise InputError("leakage needs a class with images in two environments, and there is none")
    fold = fold_numbers(np.stack([labels[rows], environment]), PARTS, seed)
    right = np.zeros(len(rows))
    for part in range(PARTS):
        right += reader_hits(residuals, environment, fold == part, "probe")
    recall = [right[environment == code].mean() for code in range(len(codes))]
    return Leakage(100 * float(np.mean(recall)), 100 / len(codes))


def reader_hits(
    vectors: NDArray[np.floating[Any]],
    environments: NDArray[np.int64],
    test: NDArray[np.bool_],
    reader: Reader,
    *,
    labels: NDArray[np.int64] | None = None,
) -> NDArray[np.bool_]:
    """Which tested rows' environment a reader names that was fitted on the others, bool [N]; False for rows not tested.

    Args:
        vectors: [N, d].
        environments: int64 [N].
        test: bool [N]; there must be rows of both kinds.
        reader: Who reads.
        labels: int64 [N], to take the mean of the class away first; None reads embeddings as they are.
    """
    right = np.zeros(len(vectors), dtype=np.bool_)
    if not test.any() or test.all():
        return right
    rows = vectors if labels is None else vectors - _class_means(vectors, labels, test)
    if reader == "probe":
        right[test] = fit_probe(rows[~test], environments[~test]).correct(rows[test], environments[test])
    else:
        read = _by_centroid if reader == "centroid" else _by_line
        right[test] = read(rows[~test], environments[~test], rows[test]) == environments[test]
    return right


def classes_in_several(labels: NDArray[np.int64], environments: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which rows are of a class that stands in two environments or more, bool [N]."""
    cells = np.unique(np.stack([labels, environments]), axis=1)
    codes, counts = np.unique(cells[0], return_counts=True)
    return np.isin(labels, codes[counts > 1])


def _without_class(
    vectors: NDArray[np.floating[Any]], labels: NDArray[np.int64], environments: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Rows of classes that two environments share, and their vectors less the class's centre."""
    row_parts, residuals = [], []
    shared = classes_in_several(labels, environments)
    for label in np.unique(labels[shared]):
        rows = np.flatnonzero(labels == label)
        codes = np.unique(environments[rows])
        means = [vectors[rows[environments[rows] == code]].mean(axis=0) for code in codes]
        row_parts.append(rows)
        residuals.append(vectors[rows] - np.mean(means, axis=0))
    if not row_parts:
        raise InputError("leakage needs a class with images in two environments, and there is none")
    vectors_left = np.concatenate(residuals).astype(np.float64)
    scale = np.sqrt(np.mean(np.sum(vectors_left**2, axis=1)))
    return np.concatenate(row_parts), vectors_left / scale if scale > 0 else vectors_left


def fold_numbers(strata: NDArray[np.int64], parts: int, seed: int) -> NDArray[np.int64]:
    """A part for every column, dealt out in random order within each stratum.

    Args:
        strata: int64 [S, N]; equal columns are one stratum.
        parts: How many parts; they differ in size by one at most.
        seed: Of the order.

    Returns:
        int64 [N], from 0 to `parts` - 1.
    """
    numbers = np.empty(strata.shape[1], dtype=np.int64)
    rng = np.random.default_rng(seed)
    dealt = 0
    for stratum in np.unique(strata, axis=1).T:
        rows = rng.permutation(np.flatnonzero((strata == stratum[:, None]).all(axis=0)))
        # Dealing goes on where the last stratum stopped, so that parts stay equally large.
        numbers[rows] = (np.arange(len(rows)) + dealt) % parts
        dealt += len(rows)
    return numbers


def _class_means(
    vectors: NDArray[np.floating[Any]], labels: NDArray[np.int64], test: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """For every row the mean of its class, [N, d]: of the rows not tested, or, of a class only tested, of those.

    A mean over both would tell: where a class has an image in each environment, the tested one would be what
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
    train: NDArray[np.floating[Any]], environments: NDArray[np.int64], queries: NDArray[np.floating[Any]]
) -> NDArray[np.int64]:
    codes = np.unique(environments)
    centroids = np.stack([train[environments == code].mean(axis=0) for code in codes])
    return np.asarray(codes[np.argmax(queries @ centroids.T - (centroids**2).sum(axis=1) / 2, axis=1)])


def _by_line(
    train: NDArray[np.floating[Any]], environments: NDArray[np.int64], queries: NDArray[np.floating[Any]]
) -> NDArray[np.int64]:
    codes, places, counts = np.unique(environments, return_inverse=True, return_counts=True)
    # Every environment weighs the same, however many images it has.
    weights = (1 / counts[places] / len(codes))[:, None]
    centre = (weights * train).sum(axis=0)
    inputs = train - centre
    targets = np.eye(len(codes))[places] - 1 / len(codes)
    gram = inputs.T @ (weights * inputs)
    ridge = max(RIDGE * float(np.trace(gram)) / len(gram), np.finfo(np.float64).tiny)
    solved = np.linalg.solve(gram + ridge * np.eye(len(gram)), inputs.T @ (weights * targets))
    return np.asarray(codes[np.argmax((queries - centre) @ solved, axis=1)])
