"""What is left of the environment in embeddings: leakage to a linear probe, and the gap that interventions open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.calibrate.probe import fit_probe
from invariclip.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEAKAGE_PARTS = 5


@dataclass(frozen=True)
class Leakage:
    """How well a linear probe names the environment.

    Attributes:
        accuracy: Percent right, averaged over environments, on pictures that it was not fitted on.
        chance: Percent right by chance.
    """

    accuracy: float
    chance: float


def domain_leakage(
    vectors: NDArray[np.floating[Any]],
    labels: NDArray[np.int64],
    environments: NDArray[np.int64],
    *,
    parts: int = LEAKAGE_PARTS,
    seed: int = 0,
) -> Leakage:
    """Cross-validated accuracy of a linear probe that names the environment, the class taken away first.

    Environments hold classes in different shares, so a probe could name the environment from the class. Hence every
    class's centre (the mean of its environments' means) is subtracted. Then everything is scaled to mean square length
    1, so that the probe's penalty means the same before and after a projection. Classes in one environment only are
    left out: there class and environment are one thing.

    Args:
        vectors: [N, d], unit length.
        labels: int64 [N].
        environments: int64 [N].
        parts: Into how many parts the pictures of every class and environment are split; each is left out in turn.
        seed: Of the split.

    Raises:
        InputError: Fewer than two environments share a class, or have too few pictures to split.
        MissingExtraError: scikit-learn is not installed.
    """
    rows, residuals = _without_class(vectors, labels, environments)
    codes, environment = np.unique(environments[rows], return_inverse=True)
    if len(codes) < 2:
        raise InputError("leakage needs a class with pictures in two environments, and there is none")
    fold = _fold_numbers(np.stack([labels[rows], environment]), parts, seed)
    right = np.zeros(len(rows))
    for part in range(parts):
        test = fold == part
        if test.any():
            probe = fit_probe(residuals[~test], environment[~test])
            right[test] = probe.correct(residuals[test], environment[test])
    recall = [right[environment == code].mean() for code in range(len(codes))]
    return Leakage(100 * float(np.mean(recall)), 100 / len(codes))


def invariance_gap(first: NDArray[np.floating[Any]], second: NDArray[np.floating[Any]]) -> float:
    """How far interventions move embeddings, as a share of how far apart two pictures are anyway.

    Mean (1 - cos) of pairs, divided by the mean (1 - cos) of the first members with one another: 0 is invariance, 1 is
    that a changed picture is as far away as another picture. Without the division a projection that pushes all
    embeddings together would look invariant.

    Args:
        first: [P, d], unit length.
        second: [P, d], unit length.

    Raises:
        InputError: There are fewer than two pairs, or all first members are one.
    """
    count = len(first)
    if count < 2:
        raise InputError(f"the invariance gap needs two pairs or more, and there are {count}")
    moved = 1 - float(np.mean(np.sum(first * second, axis=1)))
    total = np.sum(first, axis=0)
    # Of all ordered pairs the count pairs of a picture with itself are taken out.
    apart = 1 - float((total @ total - count) / (count * (count - 1)))
    if apart <= 0:
        raise InputError("all pictures have one embedding: there is no distance to measure the gap by")
    return moved / apart


def _without_class(
    vectors: NDArray[np.floating[Any]], labels: NDArray[np.int64], environments: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Rows of classes that two environments share, and their vectors less the class's centre."""
    kept, residuals = [], []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        codes = np.unique(environments[rows])
        if len(codes) > 1:
            means = [vectors[rows[environments[rows] == code]].mean(axis=0) for code in codes]
            kept.append(rows)
            residuals.append(vectors[rows] - np.mean(means, axis=0))
    if not kept:
        raise InputError("leakage needs a class with pictures in two environments, and there is none")
    found = np.concatenate(residuals).astype(np.float64)
    scale = np.sqrt(np.mean(np.sum(found**2, axis=1)))
    return np.concatenate(kept), found / scale if scale > 0 else found


def _fold_numbers(strata: NDArray[np.int64], parts: int, seed: int) -> NDArray[np.int64]:
    """A part for every column, dealt out in random order within each stratum."""
    numbers = np.empty(strata.shape[1], dtype=np.int64)
    rng = np.random.default_rng(seed)
    dealt = 0
    for stratum in np.unique(strata, axis=1).T:
        rows = rng.permutation(np.flatnonzero((strata == stratum[:, None]).all(axis=0)))
        # Dealing goes on where the last stratum stopped, so that parts stay equally large.
        numbers[rows] = (np.arange(len(rows)) + dealt) % parts
        dealt += len(rows)
    return numbers
