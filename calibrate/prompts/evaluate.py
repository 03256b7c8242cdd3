"""How good an uncertainty is: calibration, risk against coverage, telling wrong and unknown apart; base and new."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

BINS = 15
"""Of the expected calibration error, as Guo et al. (ICML 2017) have them."""


@dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy, in bins of equal width.

    Attributes:
        error: The expected calibration error: Σ_b n_b/N · |accuracy_b - confidence_b|.
        counts: int64 [B].
        confidence: Mean confidence of each bin, NaN where it is empty.
        accuracy: Share of right answers of each bin, NaN where it is empty.
    """

    error: float
    counts: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]


def reliability(confidence: NDArray[np.floating[Any]], right: NDArray[np.bool_], bins: int = BINS) -> Reliability:
    """Compares how sure answers are with how often they are right.

    Args:
        confidence: Probability of the answer given, [N].
        right: bool [N].
        bins: How many.

    Raises:
        InputError: There is nothing to compare.
    """
    _require(len(confidence))
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        sure = np.bincount(place, confidence, minlength=bins) / counts
        correct = np.bincount(place, right, minlength=bins) / counts
    error = float(np.nansum(counts * np.abs(correct - sure)) / len(confidence))
    return Reliability(error, counts, sure, correct)


def risk_coverage(uncertainty: NDArray[np.floating[Any]], right: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Risk of what is answered when the n least uncertain images are, for n from 1 to N (El-Yaniv, Wiener, 2010).

    Equally uncertain images are answered in a random order; what stands here is the mean over all of them.

    Args:
        uncertainty: [N]; the smallest is answered first.
        right: bool [N].

    Returns:
        float64 [N]; the coverage is (1, ..., N) / N. Its mean is the area under the curve.

    Raises:
        InputError: There is no image.
    """
    _require(len(uncertainty))
    order = np.argsort(uncertainty, kind="stable")
    _, first, count = np.unique(uncertainty[order], return_index=True, return_counts=True)
    wrong = (~right[order]).astype(np.float64)
    level = np.add.reduceat(wrong, first) / count
    return np.asarray(np.cumsum(np.repeat(level, count)) / np.arange(1, len(order) + 1))


def auroc(score: NDArray[np.floating[Any]], positive: NDArray[np.bool_]) -> float:
    """Chance that a positive scores above a negative, ties counting half (Mann and Whitney).

    Args:
        score: [N].
        positive: bool [N].

    Returns:
        From 0 to 1; NaN where there are positives alone, or none.
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        return float("nan")
    _, place, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def uncertainties(logits: NDArray[np.floating[Any]]) -> dict[str, NDArray[np.float64]]:
    """What a plain classifier has to offer for an uncertainty, from its logits τ·cos.

    Args:
        logits: [N, K].

    Returns:
        [N] by name: `max-softmax` (1 - the largest probability; Hendrycks, Gimpel, ICLR 2017), `entropy` of the
        softmax, `energy` (-log Σ exp; Liu et al., NeurIPS 2020).
    """
    plain = logits.astype(np.float64)
    highest = plain.max(axis=1)
    energy = highest + np.log(np.exp(plain - highest[:, None]).sum(axis=1))
    log_probability = plain - energy[:, None]
    probability = np.exp(log_probability)
    return {
        "max-softmax": 1 - probability.max(axis=1),
        "entropy": -(probability * log_probability).sum(axis=1),
        "energy": -energy,
    }


def harmonic_mean(base: float, new: float) -> float:
    """Of the accuracies on base and new classes; 0 where either is."""
    return 2 * base * new / (base + new) if base + new else 0.0


def _require(count: int) -> None:
    if not count:
        raise InputError("there is no image to score")
