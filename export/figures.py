"""What is measured of a graph against its reference, and the bounds that it must keep."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

TIE = 1e-6
"""Cosines closer than this are a tie: float32 unit vectors of a thousand components do not tell them apart."""


@dataclass(frozen=True)
class Thresholds:
    """Bounds of one precision; the defaults are float32's.

    Attributes:
        max_abs_diff: Largest difference of any component of two unit embeddings.
        min_cosine: Smallest cosine between an embedding and its reference.
        min_top1: Share of inputs whose best match is the reference's.
        max_batch_diff: Largest difference of a row's embedding alone and in a batch.
        max_rerun_diff: Largest difference between two runs on the same input.
        max_probability_diff: Largest difference of a class probability.
    """

    max_abs_diff: float = 1e-5
    min_cosine: float = 0.999999
    min_top1: float = 1.0
    max_batch_diff: float = 1e-5
    max_rerun_diff: float = 0.0
    max_probability_diff: float = 1e-4


FLOAT32 = Thresholds()


@dataclass(frozen=True)
class Figures:
    """What was measured of one tower.

    Attributes:
        items: Pictures or texts.
        max_abs_diff: See `Thresholds`.
        cosine_min: Smallest cosine to the reference.
        cosine_mean: Mean cosine to the reference.
        top1_agreement: Share of inputs whose best match in the bank is the same, ties counted as the same.
        top1_ties: Inputs whose best match differs, but lies within `TIE` of the reference's best.
        top1_of: Rows of the bank that the best match was sought in.
        non_finite: Values of the embedding that are NaN or infinite.
        batch_diff: See `Thresholds`.
        rerun_diff: See `Thresholds`.
        probability_diff: See `Thresholds`; None where no classes are baked in.
    """

    items: int
    max_abs_diff: float
    cosine_min: float
    cosine_mean: float
    top1_agreement: float
    top1_ties: int
    top1_of: int
    non_finite: int
    batch_diff: float
    rerun_diff: float
    probability_diff: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The figures as the manifest stores them; NaN, which JSON lacks, becomes None."""
        nan = [name for name, value in asdict(self).items() if isinstance(value, float) and not np.isfinite(value)]
        return {**asdict(self), **dict.fromkeys(nan)}


@dataclass
class Comparison:
    """Reference and candidate answers of one tower, collected batch by batch.

    Attributes:
        reference: float64 [n, d] unit embeddings of each batch.
        candidate: float32 [n, d] of the graph.
        probabilities: float32 [n, K] of the graph, where it has classes.
        batch_diff: Largest difference seen between a row alone and in a batch.
        rerun_diff: Largest difference seen between two runs.
    """

    reference: list[NDArray[np.float64]] = field(default_factory=list)
    candidate: list[NDArray[np.float32]] = field(default_factory=list)
    probabilities: list[NDArray[np.float32]] = field(default_factory=list)
    batch_diff: float = 0.0
    rerun_diff: float = 0.0


def measure(
    seen: Comparison, bank: NDArray[np.float64], *, logit_scale: float = 1.0, logit_bias: float | None = None
) -> Figures:
    """The figures of one tower.

    Args:
        seen: Answers of both sides on at least one input.
        bank: float64 [K, d] unit vectors of the reference in which both sides' best match is sought; where classes are
            baked in, theirs.
        logit_scale: Temperature of the classes.
        logit_bias: Bias of the classes (SigLIP), or None.
    """
    wanted, got = np.concatenate(seen.reference), np.concatenate(seen.candidate).astype(np.float64)
    rows = np.arange(len(wanted))
    cosines = (wanted * got).sum(axis=1) / np.maximum(np.linalg.norm(got, axis=1), 1e-30)
    scores = wanted @ bank.T
    best, chosen = scores.argmax(axis=1), (got @ bank.T).argmax(axis=1)
    tied = (best != chosen) & (scores[rows, best] - scores[rows, chosen] <= TIE)
    difference = None
    if seen.probabilities:
        difference = max_diff(np.concatenate(seen.probabilities), probabilities(scores, logit_scale, logit_bias))
    return Figures(
        items=len(wanted),
        max_abs_diff=max_diff(got, wanted),
        cosine_min=float(cosines.min()),
        cosine_mean=float(cosines.mean()),
        top1_agreement=float(((best == chosen) | tied).mean()),
        top1_ties=int(tied.sum()),
        top1_of=len(bank),
        non_finite=int((~np.isfinite(got)).sum()),
        batch_diff=seen.batch_diff,
        rerun_diff=seen.rerun_diff,
        probability_diff=difference,
    )


def failures(tower: str, figures: Figures, bounds: Thresholds) -> list[str]:
    """Every bound that a tower's figures break, in words; empty if it passed. A figure that is NaN breaks its bound."""
    found = [f"{tower} answers {figures.non_finite} values that are NaN or infinite"] if figures.non_finite else []
    upper = {
        "max |Δ|": (figures.max_abs_diff, bounds.max_abs_diff),
        "batch consistency, max |Δ|": (figures.batch_diff, bounds.max_batch_diff),
        "run-to-run, max |Δ|": (figures.rerun_diff, bounds.max_rerun_diff),
        "probability, max |Δ|": (figures.probability_diff, bounds.max_probability_diff),
    }
    lower = {
        "cosine, min": (figures.cosine_min, bounds.min_cosine),
        "top-1 agreement": (figures.top1_agreement, bounds.min_top1),
    }
    # `not value <= bound` and not `value > bound`: a NaN must fail
    over = [
        f"{tower} {name} {value:.3g} is above {bound:.3g}"
        for name, (value, bound) in upper.items()
        if not _within(value, bound)
    ]
    under = [
        f"{tower} {name} {share:.7g} is below {bound:.7g}"
        for name, (share, bound) in lower.items()
        if not share >= bound
    ]
    return found + over + under


def probabilities(cosines: NDArray[np.float64], logit_scale: float, logit_bias: float | None) -> NDArray[np.float64]:
    """Cosines [N, K] to class probabilities [N, K] in float64: softmax, or a sigmoid per class where there is a bias.

    p(c|x) = softmax_c(τ · cos) is CLIP-ICM's predictor; SigLIP's is sigmoid(τ · cos + b).
    """
    scores = cosines * logit_scale
    if logit_bias is not None:
        return np.asarray(1 / (1 + np.exp(-(scores + logit_bias))))
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def max_diff(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Largest |difference|; NaN if either side has one."""
    return float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max())


def _within(value: float | None, bound: float) -> bool:
    return value is None or value <= bound
