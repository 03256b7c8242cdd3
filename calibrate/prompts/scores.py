"""How good learned prompts' answers and uncertainty are: calibration, risk against coverage, AUROC.

The answers are computed in float64 on the host, as the artifact's head computes them, and scored on images that
training did not see, beside those of the hand-written template.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.errors import InputError
from invariclip.uncertainty import Fused, fuse, opinions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from invariclip.calibrate.prompts.scales import Scales
    from invariclip.calibrate.prompts.views import LabelledEmbeddings, Split
    from invariclip.preprocessing.pixels import PixelSpec

_CHUNK = 1 << 22
"""Cosines at a time."""
HAND_WRITTEN, CDC = "hand-written", "cdc"
BINS = 15
"""Of the expected calibration error, as Guo et al. (ICML 2017) have them."""


def fused_answers(
    vectors: NDArray[np.float64],
    bank: NDArray[np.float64],
    logit_scale: float,
    scale: NDArray[np.float64],
    bias: NDArray[np.float64],
    background: NDArray[np.float64],
) -> Fused:
    """All templates' opinions, fused.

    Args:
        vectors: float64 [N, d], unit length.
        bank: float64 [M + 1, K, d].
        logit_scale: τ.
        scale: a, [M + 1].
        bias: c, [M + 1].
        background: r, [M + 1].

    Returns:
        Belief and base rate [N, K], uncertainty [N].
    """
    step = max(_CHUNK // (bank.shape[0] * bank.shape[1]), 1)
    parts = []
    for start in range(0, len(vectors), step):
        cosines = np.einsum("nd,mkd->nmk", vectors[start : start + step], bank, optimize=True)
        parts.append(fuse(*opinions(cosines, logit_scale, scale, bias, background)))
    if not parts:
        return Fused(np.empty((0, bank.shape[1])), np.empty(0), np.empty((0, bank.shape[1])))
    return Fused(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("belief", "uncertainty", "base_rate"))
    )


@dataclass(frozen=True, eq=False)
class ScoredImages:
    """What answers are scored on, and all that they are made of.

    Attributes:
        held: The images were held back; else none were, and these are the validation images, which the evidence was
            fitted on.
        images: N of them, as they are.
        bank: float64 [M + 1, K, d], every template's class embeddings, the hand-written one's first.
        logit_scale: τ.
        scales: What makes evidence of each template's cosines.
        pixels: How the encoder wants its images.
    """

    held: bool
    images: LabelledEmbeddings
    bank: NDArray[np.float64]
    logit_scale: float
    scales: Scales
    pixels: PixelSpec


@dataclass(frozen=True, eq=False)
class Side:
    """One way to answer N images, and how sure it is of each answer.

    Attributes:
        name: `HAND_WRITTEN` or `CDC`.
        answers: int64 [N], places in the classes.
        right: bool [N].
        confidence: float64 [N], the probability of the answer.
        uncertainty: float64 [N], by which it would abstain: 1 - max-softmax, or u.
    """

    name: str
    answers: NDArray[np.int64]
    right: NDArray[np.bool_]
    confidence: NDArray[np.float64]
    uncertainty: NDArray[np.float64]

    @property
    def accuracy(self) -> float:
        """Percent right."""
        return 100 * float(self.right.mean())

    @property
    def reliability(self) -> Reliability:
        """Confidence against accuracy, in bins; its `error` is the expected calibration error."""
        return reliability(self.confidence, self.right)

    @property
    def auroc_wrong(self) -> float | None:
        """Chance that a wrong answer is more uncertain than a right one; None unless there are both."""
        apart = auroc(self.uncertainty, ~self.right)
        return None if np.isnan(apart) else apart

    @property
    def risk(self) -> NDArray[np.float64]:
        """Share of wrong answers when the n most certain images are answered, float64 [N] for n from 1 to N."""
        return risk_coverage(self.uncertainty, self.right)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready: accuracy, calibration error, AUROC of wrong answers, area under risk against coverage."""
        apart = self.auroc_wrong
        return {
            "accuracy": round(self.accuracy, 3),
            "ece": round(self.reliability.error, 5),
            "auroc_wrong": None if apart is None else round(apart, 5),
            "aurc": round(float(self.risk.mean()), 5),
        }


def scored_of(
    embedded: LabelledEmbeddings,
    split: Split,
    bank: NDArray[np.float64],
    logit_scale: float,
    scales: Scales,
    pixels: PixelSpec,
) -> ScoredImages:
    """The held-back images, or the validation images where none are held back.

    Args:
        embedded: All images.
        split: Which of them are which.
        bank: float64 [M + 1, K, d].
        logit_scale: τ.
        scales: Of the evidence.
        pixels: How the encoder wants its images.
    """
    held = bool(len(split.held))
    chosen = embedded.part(split.held if held else split.validation)
    return ScoredImages(held, chosen, bank, logit_scale, scales, pixels)


def sides(scored: ScoredImages) -> tuple[Side, Side]:
    """The hand-written template's softmax, and the fused opinions."""
    vectors, labels = scored.images.vectors, scored.images.labels
    logits = scored.logit_scale * vectors @ scored.bank[0].T
    doubt = uncertainties(logits)["max-softmax"]
    fused = fused_answers(vectors, scored.bank, scored.logit_scale, *scored.scales.numbers)
    plain, answers = logits.argmax(axis=1), fused.probabilities.argmax(axis=1)
    sure = np.asarray(fused.probabilities.max(axis=1), dtype=np.float64)
    return (
        Side(HAND_WRITTEN, plain, plain == labels, 1 - doubt, doubt),
        Side(CDC, answers, answers == labels, sure, np.asarray(fused.uncertainty, dtype=np.float64)),
    )


def scores_json(scored: ScoredImages) -> dict[str, Any]:
    """Both sides' scores, JSON-ready, and on which images and how many."""
    on = "held" if scored.held else "validation"
    return {"on": on, "images": len(scored.images.labels), **{side.name: side.to_json() for side in sides(scored)}}


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
