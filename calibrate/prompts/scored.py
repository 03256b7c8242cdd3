"""The images that answers are scored on, and how the hand-written template and the fused opinions do on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.calibrate.prompts.evaluate import Reliability, auroc, reliability, risk_coverage, uncertainties
from invariclip.calibrate.prompts.opinions import fused_answers

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from invariclip.calibrate.prompts.scales import Scales
    from invariclip.calibrate.prompts.splits import Split
    from invariclip.calibrate.prompts.views import LabelledEmbeddings
    from invariclip.preprocessing.pixels import PixelSpec

HAND_WRITTEN, CDC = "hand-written", "cdc"


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
    seen: LabelledEmbeddings,
    split: Split,
    bank: NDArray[np.float64],
    logit_scale: float,
    scales: Scales,
    pixels: PixelSpec,
) -> ScoredImages:
    """The held-back images, or the validation images where none are held back.

    Args:
        seen: All images.
        split: Which of them are which.
        bank: float64 [M + 1, K, d].
        logit_scale: τ.
        scales: Of the evidence.
        pixels: How the encoder wants its images.
    """
    held = bool(len(split.held))
    chosen = seen.part(split.held if held else split.validation)
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
