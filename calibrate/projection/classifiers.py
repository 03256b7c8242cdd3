"""Ways to name an image's class from its embedding: zero-shot, class prototypes, and a linear probe.

The probe's protocol is CLIP's (Radford et al., arXiv 2103.00020, appendix A.3), with the C = 0.316 that CLIP found on
ImageNet and that CLIP-ICM takes over (Song et al., arXiv 2405.15289). What a fixed C means depends on how far apart
embeddings lie: where a projection removes what all of them share, the same C is a weaker penalty. A gain at the
published C may be due to that alone; one that remains where every projection has its own best C is not. So both are
worth reporting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

PUBLISHED_C = 0.316
C_GRID = (0.1, 0.316, 1.0, 3.16, 10.0, 31.6)
"""Half decades around the published one."""
MAX_ITERATIONS = 5000
_CHUNK = 4096
"""Queries compared with the classes at a time: K classes cost K·8·4096 bytes."""


@dataclass(frozen=True)
class Probe:
    """A fitted linear probe.

    Attributes:
        classes: int64 [K], the labels it tells apart, ascending.
        weights: float64 [K, d].
        bias: float64 [K].
        C: Inverse strength of its penalty.
    """

    classes: NDArray[np.int64]
    weights: NDArray[np.float64]
    bias: NDArray[np.float64]
    C: float

    def predict(self, vectors: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
        """The most probable label of every row of [N, d], int64 [N]."""
        return np.asarray(self.classes[np.argmax(vectors @ self.weights.T + self.bias, axis=1)])

    def correct(self, vectors: NDArray[np.floating[Any]], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which rows get their own label, bool [N]; a label that it was not fitted on counts as wrong."""
        return np.asarray(self.predict(vectors) == labels)


def fit_probe(vectors: NDArray[np.floating[Any]], labels: NDArray[np.int64], C: float = PUBLISHED_C) -> Probe:
    """Multinomial logistic regression: minimises C · Σ cross-entropy + ½ ‖weights‖², the bias without penalty.

    Deterministic: L-BFGS from zero. In float32: a fit is little but reading the vectors over and over, and what it
    differs by from float64 is below the solver's tolerance.

    Args:
        vectors: [N, d], unit length after projection.
        labels: int64 [N].
        C: Inverse strength of the penalty, above zero.

    Raises:
        InputError: There are fewer than two classes, a value is not finite, or C is not above zero.
        MissingExtraError: scikit-learn is not installed.
    """
    classes = np.unique(labels)
    if len(classes) < 2:
        raise InputError(f"a linear probe needs two classes or more, and there are {len(classes)}")
    if not (np.isfinite(C) and C > 0):
        raise InputError(f"C must be a finite number above zero, not {C}")
    if not np.isfinite(vectors).all():
        raise InputError("an embedding has values that are not finite; leave that image out")
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise MissingExtraError('a linear probe needs scikit-learn: pip install "invariclip[calibrate]"') from None
    fitted = LogisticRegression(C=C, max_iter=MAX_ITERATIONS).fit(vectors.astype(np.float32), labels)
    weights, bias = fitted.coef_, fitted.intercept_
    if len(classes) == 2:
        # The library keeps the difference of two classes alone; half of it each is the same probe.
        weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    return Probe(classes.astype(np.int64), np.asarray(weights, np.float64), np.asarray(bias, np.float64), float(C))


def choose_penalty(
    vectors: NDArray[np.floating[Any]],
    labels: NDArray[np.int64],
    environments: NDArray[np.int64],
    Cs: Sequence[float] = C_GRID,
) -> float:
    """C by leaving one training environment out in turn: the best mean accuracy, of equal ones the smallest.

    Images of one environment left out at random would be easier than any environment that is met later, and would
    call for a weaker penalty than it bears.

    Args:
        vectors: [N, d], unit length after projection; of training environments alone.
        labels: int64 [N].
        environments: int64 [N].
        Cs: What to choose from.

    Raises:
        InputError: There are fewer than two environments, or one holds all images of all classes but one.
        MissingExtraError: scikit-learn is not installed.
    """
    codes = np.unique(environments)
    if len(codes) < 2:
        raise InputError("C is chosen by leaving environments out, and there is only one; give C")
    accuracy = np.zeros(len(Cs))
    for code in codes:
        left = environments == code
        for index, C in enumerate(Cs):
            probe = fit_probe(vectors[~left], labels[~left], C)
            accuracy[index] += probe.correct(vectors[left], labels[left]).mean()
    return float(min(zip(-accuracy, Cs, strict=True))[1])


def zero_shot(
    images: NDArray[np.floating[Any]], labels: NDArray[np.int64], bank: NDArray[np.floating[Any]]
) -> NDArray[np.bool_]:
    """Which images' nearest class embedding, by cosine, is their own (CLIP-ICM, the predictor).

    Args:
        images: [N, d], unit length, projected if there is a projection.
        labels: int64 [N], rows of the bank.
        bank: [K, d], unit length, in the same space.

    Returns:
        bool [N].
    """
    correct = np.empty(len(images), dtype=np.bool_)
    for start in range(0, len(images), _CHUNK):
        part = slice(start, start + _CHUNK)
        correct[part] = np.argmax(images[part] @ bank.T, axis=1) == labels[part]
    return correct


def prototypes(
    support: NDArray[np.floating[Any]],
    support_labels: NDArray[np.int64],
    queries: NDArray[np.floating[Any]],
    labels: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Which queries are nearest, by cosine, to the mean of their own class's support images.

    Args:
        support: [M, d], unit length.
        support_labels: int64 [M].
        queries: [N, d], unit length.
        labels: int64 [N]; a query whose class has no support counts as wrong.

    Returns:
        bool [N].

    Raises:
        InputError: There is no support.
    """
    classes, bank = prototype_bank(support, support_labels)
    place = np.searchsorted(classes, labels)
    known = np.isin(labels, classes)
    return zero_shot(queries, np.where(known, place, -1), bank)


def prototype_bank(
    support: NDArray[np.floating[Any]], support_labels: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The means of classes, at unit length.

    Args:
        support: [M, d], unit length.
        support_labels: int64 [M].

    Returns:
        int64 [K], the classes in ascending order, and float64 [K, d].

    Raises:
        InputError: There is no support.
    """
    if not len(support):
        raise InputError("class prototypes need support images, and there are none")
    order = np.argsort(support_labels, kind="stable")
    classes, starts = np.unique(support_labels[order], return_index=True)
    sums = np.add.reduceat(support[order].astype(np.float64), starts, axis=0)
    # Opposite images may cancel to a zero mean; such a class then never wins.
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    return classes, np.divide(sums, lengths, out=np.zeros_like(sums), where=lengths > 0)


def unit(vectors: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Rows scaled to length 1."""
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), dtype=np.float64)
