"""What a model says of a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Prediction:
    """What a picture was taken for.

    Attributes:
        label: The most probable class.
        probability: Its probability, from 0 to 1 (softmax over all classes; per class for sigmoid models).
        ranking: The `top_k` classes with their probabilities, best first.
    """

    label: str
    probability: float
    ranking: tuple[tuple[str, float], ...]


@dataclass(frozen=True, eq=False)
class Answer:
    """One picture's answer from a stream.

    Attributes:
        place: Where the picture stands in the stream, from 0; unreadable ones are counted.
        picture: It itself, as it was given.
        embedding: float32 [d], of unit length.
        probabilities: float32 [K], in the order of `classes`; None where there are no classes.
        classes: The K class names.
    """

    place: int
    picture: Any
    embedding: NDArray[np.float32]
    probabilities: NDArray[np.float32] | None
    classes: tuple[str, ...]

    def prediction(self, top_k: int = 5) -> Prediction:
        """The best classes.

        Raises:
            InputError: There are no classes, or `top_k` is below 1.
        """
        if self.probabilities is None:
            raise InputError("the artifact has no classes; give some with with_classes([...])")
        return ranked(self.probabilities, self.classes, top_k)


def ranked(probabilities: NDArray[np.float32], classes: Sequence[str], top_k: int) -> Prediction:
    """The best classes of one picture; of equal ones, the first comes first.

    Args:
        probabilities: float32 [K].
        classes: K names.
        top_k: How many.

    Raises:
        InputError: `top_k` is below 1.
    """
    if top_k < 1:
        raise InputError(f"top_k must be at least 1, not {top_k}")
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    ranking = tuple((classes[place], float(probabilities[place])) for place in order)
    return Prediction(*ranking[0], ranking)


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
