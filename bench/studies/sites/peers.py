"""Other ways to adapt to a site's unlabelled images, for rows beside ours; all of them cost more at run time.

Each is measured on a sample and then frozen, so that every row of the table has seen the same images. All work on
unit embeddings in the projected space and leave the encoder as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.calibrate.projection.classifiers import unit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Vectors = NDArray[np.float64]
    Rows = NDArray[np.int64]

SCALE = 100.0
"""What cosines are multiplied by to be logits, as CLIP's are."""
SHRINKAGES = (100.0, 30.0, 10.0, 3.0)
"""γ of `recoloured`."""
FILTERS = (1, 5, 20, 50, 100, 0)
"""M of T3A, the grid of its paper (section 4.1); 0 keeps all."""
POSITIVE_SHOTS, POSITIVE_WEIGHT, POSITIVE_SHARPNESS = 3, 2.0, 5.0
NEGATIVE_SHOTS, NEGATIVE_WEIGHT, NEGATIVE_SHARPNESS = 2, 0.117, 1.0
NEGATIVE_ENTROPY, NEGATIVE_PROBABILITY = (0.2, 0.5), (0.03, 1.0)


@dataclass(frozen=True, eq=False)
class Classes:
    """A linear rule that names classes.

    Attributes:
        labels: int64 [K].
        weights: [K, d], of the classes, unit length but for a probe's.
        bias: [K].
        scale: What cosines are multiplied by.
    """

    labels: Rows
    weights: Vectors
    bias: Vectors
    scale: float = 1.0

    def logits(self, vectors: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """float32 [N, K]."""
        small = np.asarray(self.scale * self.weights, dtype=np.float32)
        return np.asarray(vectors.astype(np.float32) @ small.T + self.bias.astype(np.float32))

    def __call__(self, vectors: NDArray[np.floating[Any]]) -> Rows:
        """The label of every row of [N, d]."""
        return np.asarray(self.labels[np.argmax(self.logits(vectors), axis=1)])


def nearest(bank: Vectors, labels: Rows) -> Classes:
    """Classes told by the nearest of some unit vectors, by cosine."""
    return Classes(labels, bank, np.zeros(len(bank)), SCALE)


def entropies(logits: NDArray[np.floating[Any]]) -> tuple[Vectors, Vectors]:
    """Probabilities [N, K] of logits and their entropies [N], in nats."""
    exact = logits.astype(np.float64)
    weights = np.exp(exact - exact.max(axis=1, keepdims=True))
    shares = weights / weights.sum(axis=1, keepdims=True)
    return shares, -np.sum(shares * np.log(np.maximum(shares, 1e-300)), axis=1)


@dataclass(frozen=True, eq=False)
class Colours:
    """A covariance of trace d: its eigenvectors with a share of it, [r, d], and their eigenvalues, [r]."""

    axes: Vectors
    values: Vectors

    def power(self, vectors: Vectors, exponent: float, shrinkage: float) -> Vectors:
        """Rows [N, d] times ((C + γI) / (1 + γ))^exponent; directions without variance have γ / (1 + γ)."""
        rest = (shrinkage / (1 + shrinkage)) ** exponent
        along = ((self.values + shrinkage) / (1 + shrinkage)) ** exponent - rest
        return np.asarray(rest * vectors + (along * (vectors @ self.axes.T)) @ self.axes)


def colours(vectors: Vectors) -> Colours:
    """The covariance of rows about their mean, scaled to the trace d.

    Args:
        vectors: [N, d].
    """
    rows = vectors - vectors.mean(axis=0)
    few = len(rows) < rows.shape[1]
    values, axes = np.linalg.eigh(rows @ rows.T if few else rows.T @ rows)
    some = values > 1e-10 * max(1e-300, float(values.max()))
    values, axes = values[some], axes[:, some].T
    if few:
        axes = (axes @ rows) / np.sqrt(values)[:, None]
    return Colours(axes, values * rows.shape[1] / max(1e-300, float(values.sum())))


def recoloured(vectors: Vectors, shift: Vectors, mean: Vectors, site: Colours, training: Colours, shrinkage: float
               ) -> Vectors:  # fmt: skip
    """CORAL with the shift of a site: z ↦ (m - δ) + (z - m) C_site^(-1/2) C_training^(1/2), at unit length.

    Sun, Feng and Saenko, "Return of Frustratingly Easy Domain Adaptation" (AAAI 2016, arXiv 1511.05547, section 3.1,
    algorithm 1), turned about: the site's images take the training images' colours, so that classes stay. The paper
    adds I to both covariances; here γI is added to covariances of trace d.

    Args:
        vectors: [N, d], unit length.
        shift: δ, [d].
        mean: m, of the site's sample.
        site: Colours of the sample.
        training: Colours of the training images, each environment about its own mean.
        shrinkage: γ; the larger, the nearer to the shift alone.
    """
    turned = training.power(site.power(vectors - mean, -0.5, shrinkage), 0.5, shrinkage)
    return unit(turned + (mean - shift))


@dataclass(frozen=True, eq=False)
class Supports:
    """What T3A keeps of a sample.

    Attributes:
        classes: The classifier before.
        vectors: [K + n, d]: the classes' own weights, then the sample.
        taken: int64 [K + n], places of the classes that they were taken for.
        order: int64 [K + n], by class and then by entropy.
    """

    classes: Classes
    vectors: Vectors
    taken: Rows
    order: Rows

    def filtered(self, keep: int) -> Classes:
        """The classifier of the M supports of each class with the least entropy; 0 keeps all."""
        count = len(self.classes.labels)
        starts = np.searchsorted(self.taken[self.order], np.arange(count))
        rank = np.arange(len(self.order)) - starts[self.taken[self.order]]
        kept = self.order[rank < keep] if keep else self.order
        sums = np.zeros((count, self.vectors.shape[1]))
        np.add.at(sums, self.taken[kept], self.vectors[kept])
        return Classes(self.classes.labels, unit(sums), np.zeros(count), SCALE)


def t3a(classes: Classes, sample: Vectors) -> Supports:
    """The supports that T3A takes from a sample.

    Iwasawa and Matsuo, "Test-Time Classifier Adjustment Module for Model-Agnostic Domain Generalization" (NeurIPS 2021,
    section 3.2): each class has a set of supports, its own weights first; an image joins the set of the class that it
    is taken for; of a set the M with the least entropy are kept, and their mean is the class.

    Args:
        classes: The classifier before.
        sample: [n, d], unit length; the filter after the last image does not depend on their order.
    """
    own = unit(classes.weights)
    supports, count = np.concatenate([own, sample]), len(own)
    logits = classes.logits(supports)
    taken = np.concatenate([np.arange(count), np.argmax(logits[count:], axis=1)])
    return Supports(classes, supports, taken, np.lexsort((entropies(logits)[1], taken)))


@dataclass(frozen=True, eq=False)
class Caches:
    """What TDA keeps of a sample.

    Attributes:
        classes: The classifier, which stays.
        positive: [P, d], keys.
        taken: int64 [P], places of the classes that they were taken for.
        negative: [Q, d], keys.
        masks: bool [Q, K], classes that each of those has a say about.
    """

    classes: Classes
    positive: Vectors
    taken: Rows
    negative: Vectors
    masks: NDArray[np.bool_]

    @property
    def numbers(self) -> int:
        """What is kept: keys, a label for each positive one, a mask for each negative one."""
        return self.positive.size + self.negative.size + len(self.taken) + self.masks.size

    @property
    def products(self) -> int:
        """What an image costs more: cosines with all keys, and each key's weight for what it speaks about."""
        return self.positive.size + self.negative.size + len(self.taken) + int(self.masks.sum())

    def __call__(self, vectors: Vectors) -> Rows:
        """The label of every row of [N, d]."""
        logits = self.classes.logits(vectors).astype(np.float64)
        hot = np.eye(logits.shape[1])[self.taken]
        logits += POSITIVE_WEIGHT * np.exp(-POSITIVE_SHARPNESS * (1 - vectors @ self.positive.T)) @ hot
        logits -= NEGATIVE_WEIGHT * np.exp(-NEGATIVE_SHARPNESS * (1 - vectors @ self.negative.T)) @ self.masks
        return np.asarray(self.classes.labels[np.argmax(logits, axis=1)])


def tda(classes: Classes, sample: Vectors) -> Caches:
    """The caches that TDA fills from a sample.

    Karmanov et al., "Efficient Test-Time Adaptation of Vision-Language Models" (CVPR 2024, arXiv 2403.18293, section
    3.2), with the published settings for ImageNet: of each class the three images of least entropy, and the two of
    least entropy among those of medium entropy, which count against every class of more than 3 %. Entropies are shares
    of log2 K, as in the published code; a cache that is full takes an image for its worst.

    Args:
        classes: The classifier.
        sample: [n, d], unit length, in the order in which they came.
    """
    logits = classes.logits(sample)
    shares, entropy = entropies(logits)
    taken, scaled = np.argmax(logits, axis=1), entropy / math.log2(logits.shape[1])
    medium = (scaled > NEGATIVE_ENTROPY[0]) & (scaled < NEGATIVE_ENTROPY[1])
    positive = _least(taken, entropy, np.ones_like(medium), POSITIVE_SHOTS)
    negative = _least(taken, entropy, medium, NEGATIVE_SHOTS)
    low, high = NEGATIVE_PROBABILITY
    masks = (shares[negative] > low) & (shares[negative] < high)
    return Caches(classes, sample[positive], taken[positive].astype(np.int64), sample[negative], masks)


def _least(taken: NDArray[np.intp], entropy: Vectors, allowed: NDArray[np.bool_], shots: int) -> NDArray[np.intp]:
    """Of every class the allowed rows of least entropy; what streaming into full caches leaves as well."""
    places = np.flatnonzero(allowed)
    order = places[np.lexsort((entropy[places], taken[places]))]
    first = np.searchsorted(taken[order], taken[order])
    return order[np.arange(len(order)) - first < shots]
