"""What a model says of a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from invariclip.abstaining import WITHOUT_UNCERTAINTY, require_threshold
from invariclip.errors import InputError
from invariclip.evidence import fuse, opinions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from invariclip.manifest import SemanticsFacts


@dataclass(frozen=True)
class Prediction:
    """What a picture was taken for.

    Attributes:
        label: The most probable class; None where the model abstains.
        probability: The most probable class's probability, from 0 to 1 (softmax over all classes; per class for sigmoid
            models; belief, and doubt shared as the hand-written template has it, for learned templates).
        ranking: The `top_k` classes with their probabilities, best first.
        uncertainty: From 0, sure, to 1, no evidence for any class; None of an artifact without learned templates.
        abstained: Whether the uncertainty was above what the caller allowed.
    """

    label: str | None
    probability: float
    ranking: tuple[tuple[str, float], ...]
    uncertainty: float | None = None
    abstained: bool = False

    def to_json(self) -> dict[str, Any]:
        """What `predict --json` and the server say of a picture."""
        return {
            "label": self.label, "probability": self.probability, "ranking": [list(pair) for pair in self.ranking],
            "uncertainty": self.uncertainty, "abstained": self.abstained,
        }  # fmt: skip


class Answers(NamedTuple):
    """What `Model.answer` gives: a row a picture.

    Attributes:
        embeddings: float32 [N, d], of unit length.
        probabilities: float32 [N, K].
        uncertainty: float32 [N]; None of an artifact without learned templates.
    """

    embeddings: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    uncertainty: NDArray[np.float32] | None


@dataclass(frozen=True, eq=False)
class Answer:
    """One picture's answer from a stream.

    Attributes:
        place: Where the picture stands in the stream, from 0; unreadable ones are counted.
        picture: It itself, as it was given.
        embedding: float32 [d], of unit length.
        probabilities: float32 [K], in the order of `classes`; None where there are no classes.
        classes: The K class names.
        uncertainty: From 0 to 1, of an artifact with learned templates; else None.
    """

    place: int
    picture: Any
    embedding: NDArray[np.float32]
    probabilities: NDArray[np.float32] | None
    classes: tuple[str, ...]
    uncertainty: float | None = None

    def prediction(self, top_k: int = 5, *, abstain_above: float | None = None) -> Prediction:
        """The best classes.

        Args:
            top_k: How many.
            abstain_above: The uncertainty above which no label is given, see `abstaining.threshold`.

        Raises:
            InputError: There are no classes, a number is out of range, or there is no uncertainty to abstain by.
        """
        if self.probabilities is None:
            raise InputError("the artifact has no classes; give some with with_classes([...])")
        return ranked(
            self.probabilities, self.classes, top_k, uncertainty=self.uncertainty, abstain_above=abstain_above
        )


def ranked(
    probabilities: NDArray[np.float32],
    classes: Sequence[str],
    top_k: int,
    *,
    uncertainty: float | None = None,
    abstain_above: float | None = None,
) -> Prediction:
    """The best classes of one picture; of equal ones, the first comes first.

    Args:
        probabilities: float32 [K].
        classes: K names.
        top_k: How many.
        uncertainty: Of an artifact with learned templates; else None.
        abstain_above: The uncertainty above which no label is given; None always gives one.

    Raises:
        InputError: A number is out of range, or there is no uncertainty to abstain by.
    """
    if top_k < 1:
        raise InputError(f"top_k must be at least 1, not {top_k}")
    if abstain_above is not None:
        require_threshold(abstain_above)
        if uncertainty is None:
            raise InputError(WITHOUT_UNCERTAINTY)
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    ranking = tuple((classes[place], float(probabilities[place])) for place in order)
    # `not u <= bound`: an uncertainty that is NaN is no reason to be sure
    abstained = abstain_above is not None and not uncertainty <= abstain_above  # type: ignore[operator]
    return Prediction(None if abstained else ranking[0][0], ranking[0][1], ranking, uncertainty, abstained)


def fused_probabilities(
    embeddings: NDArray[np.float32], banks: NDArray[np.float64], logit_scale: float, facts: SemanticsFacts
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Probabilities [N, K] and uncertainty [N] of all templates together, see `evidence`; computed in float64.

    Args:
        embeddings: float32 [N, d], of unit length.
        banks: float64 [M + 1, K, d], the classes' by template, of unit length.
        logit_scale: τ.
        facts: How a template's logits become evidence.
    """
    templates, classes, width = banks.shape
    cosines = embeddings.astype(np.float64) @ banks.reshape(-1, width).T
    numbers = map(np.array, (facts.evidence_scale, facts.evidence_bias, facts.background))
    fused = fuse(*opinions(cosines.reshape(-1, templates, classes), logit_scale, *numbers))
    return fused.probabilities.astype(np.float32), fused.uncertainty.astype(np.float32)


def class_probabilities(
    embeddings: NDArray[np.float32], bank: NDArray[np.float32], logit_scale: float, logit_bias: float | None
) -> NDArray[np.float32]:
    """p(c|x) = softmax_c(τ · cos), CLIP-ICM's predictor; with a bias SigLIP's, sigmoid(τ · cos + b).

    Args:
        embeddings: float32 [N, d], of unit length.
        bank: float32 [K, d], the classes', of unit length.
        logit_scale: τ.
        logit_bias: b, or None.

    Returns:
        float32 [N, K].
    """
    logits = np.float32(logit_scale) * (embeddings @ bank.T)
    if logit_bias is not None:
        # The sigmoid, in the form that cannot overflow
        return np.asarray(0.5 + 0.5 * np.tanh(0.5 * (logits + np.float32(logit_bias))), dtype=np.float32)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float32)
