"""Domain leakage: how well a reader names the environment from an embedding, the class taken away first or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from invariclip.calibrate.projection.probe import fit_probe
from invariclip.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

PARTS = 5
RIDGE = 1e-2
"""Of the linear reader, as a share of the mean variance of a dimension."""

Reader: TypeAlias = Literal["centroid", "linear", "probe"]
"""Who reads the environment:

- `centroid`, the nearest centroid, sees what a cosine sees;
- `linear`, regularised least squares on indicators (Hastie et al., The Elements of Statistical Learning, section 4.2),
  also finds what a soft projection has only shortened, in one solve;
- `probe`, logistic regression, is what tables quote.
"""


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
    parts: int = PARTS,
    seed: int = 0,
) -> Leakage:
    """Cross-validated accuracy of a linear probe that names the environment, the class taken away first.

    Environments hold classes in different shares, so a probe could name the environment from the class. Hence every
    class's centre (the mean of its environments' means) is subtracted. Then everything is scaled to mean square length
    1, so that the probe's penalty means the same before and after a projection. Classes in one environment only are
    left out: there class and environment are one thing.

    The centre is that of all images, tested ones too, which tells nothing where a class has tens of them in every
    environment. Where it has one or two, the tested one is what the others lack: see `told`, which leaves it out.

    Args:
        vectors: [N, d], unit length.
        labels: int64 [N].
        environments: int64 [N].
        parts: Into how many parts the images of every class and environment are split; each is left out in turn.
        seed: Of the split.

    Raises:
        InputError: Fewer than two environments share a class, or have too few images to split.
        MissingExtraError: scikit-learn is not installed.
    """
    rows, residuals = _without_class(vectors, labels, environments)
    codes, environment = np.unique(environments[rows], return_inverse=True)
    if len(codes) < 2:
        raise InputError("leakage needs a class with images in two environments, and there is none")
    fold = fold_numbers(np.stack([labels[rows], environment]), parts, seed)
    right = np.zeros(len(rows))
    for part in range(parts):
        right += told(residuals, environment, fold == part, "probe")
    recall = [right[environment == code].mean() for code in range(len(codes))]
    return Leakage(100 * float(np.mean(recall)), 100 / len(codes))


def told(
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
        test: bool [N]; there must be rows of both kinds for anything to be told.
        reader: Who reads.
        labels: int64 [N], to take the mean of the class away first; None reads embeddings as they are.
    """
    right = np.zeros(len(vectors), dtype=np.bool_)
    if not test.any() or test.all():
        return right
    seen = vectors if labels is None else vectors - _class_means(vectors, labels, test)
    if reader == "probe":
        right[test] = fit_probe(seen[~test], environments[~test]).correct(seen[test], environments[test])
    else:
        read = _by_centroid if reader == "centroid" else _by_line
        right[test] = read(seen[~test], environments[~test], seen[test]) == environments[test]
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
    kept, residuals = [], []
    shared = classes_in_several(labels, environments)
    for label in np.unique(labels[shared]):
        rows = np.flatnonzero(labels == label)
        codes = np.unique(environments[rows])
        means = [vectors[rows[environments[rows] == code]].mean(axis=0) for code in codes]
        kept.append(rows)
        residuals.append(vectors[rows] - np.mean(means, axis=0))
    if not kept:
        raise InputError("leakage needs a class with images in two environments, and there is none")
    found = np.concatenate(residuals).astype(np.float64)
    scale = np.sqrt(np.mean(np.sum(found**2, axis=1)))
    return np.concatenate(kept), found / scale if scale > 0 else found


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
    seen: NDArray[np.floating[Any]], environments: NDArray[np.int64], asked: NDArray[np.floating[Any]]
) -> NDArray[np.int64]:
    codes = np.unique(environments)
    centroids = np.stack([seen[environments == code].mean(axis=0) for code in codes])
    return np.asarray(codes[np.argmax(asked @ centroids.T - (centroids**2).sum(axis=1) / 2, axis=1)])


def _by_line(
    seen: NDArray[np.floating[Any]], environments: NDArray[np.int64], asked: NDArray[np.floating[Any]]
) -> NDArray[np.int64]:
    codes, places, counts = np.unique(environments, return_inverse=True, return_counts=True)
    # Every environment weighs the same, however many images it has.
    weights = (1 / counts[places] / len(codes))[:, None]
    centre = (weights * seen).sum(axis=0)
    inputs = seen - centre
    targets = np.eye(len(codes))[places] - 1 / len(codes)
    gram = inputs.T @ (weights * inputs)
    ridge = max(RIDGE * float(np.trace(gram)) / len(gram), np.finfo(np.float64).tiny)
    solved = np.linalg.solve(gram + ridge * np.eye(len(gram)), inputs.T @ (weights * targets))
    return np.asarray(codes[np.argmax((asked - centre) @ solved, axis=1)])
