"""The table's rows: what is learnt for each, and how it answers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.bench.studies.cdc.world import TEMPLATES
from invariclip.calibrate.prompts.options import DEFAULT_AUGMENTATIONS, PromptOptions
from invariclip.calibrate.prompts.scores import fused_answers, uncertainties
from invariclip.preprocessing.interventions import resolve

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from invariclip.artifact.learned_prompts import LearnedPrompts

SHOTS = 1
"""Training images of a class: each concept has two or three in the styles adapted to."""
MAIN, ZERO_SHOT, SINGLE, MEAN = "CDC", "zero-shot", "single template, softmax", "mean of softmax"
ZERO_SHOT_FITTED, SINGLE_FITTED = "zero-shot, temperature fitted", "single template, temperature fitted"
FITTED = (ZERO_SHOT_FITTED, SINGLE_FITTED)
"""Rows whose softmax has a temperature of its own, fitted on the images that CDC fits its evidence on."""
_FOUR = tuple(resolve(name) for name in DEFAULT_AUGMENTATIONS[:4])
OPTIONS = PromptOptions(templates=TEMPLATES, shots=SHOTS, augmentations=_FOUR)


def _of(learned: int) -> PromptOptions:
    """So many templates; the four augmentations go round."""
    return replace(OPTIONS, learned=learned, augmentations=tuple(_FOUR[m % len(_FOUR)] for m in range(learned)))


_SOFTMAX = replace(OPTIONS, learned=1, losses=("softmax",), augmentations=(None,))
"""As CoOp learns (Zhou et al., IJCV 2022): one template, the cross-entropy of its softmax."""

ROWS: dict[str, PromptOptions | None] = {
    ZERO_SHOT: None,
    ZERO_SHOT_FITTED: None,
    SINGLE: _SOFTMAX,
    SINGLE_FITTED: _SOFTMAX,
    MAIN: OPTIONS,
    MEAN: OPTIONS,
    "M = 1": _of(1),
    "M = 2": _of(2),
    "M = 8": _of(8),
    "softmax for evidential": replace(OPTIONS, losses=("softmax", "misleading", "diversity", "consistency")),
    "without misleading": OPTIONS.without(["misleading"]),
    "without diversity": OPTIONS.without(["diversity"]),
    "without consistency": OPTIONS.without(["consistency"]),
    "without augmentation": replace(OPTIONS, augmentations=(None,) * 4),
}
"""What is learnt for each row. `MEAN` answers by `MAIN`'s templates."""
COMPARED = (ZERO_SHOT, ZERO_SHOT_FITTED, SINGLE, SINGLE_FITTED, MEAN, MAIN)
"""The table; the other rows show what each part gives."""


@dataclass(frozen=True, eq=False)
class RowAnswers:
    """What a row says about images.

    Attributes:
        classes: int64 [N], the classes answered.
        confidence: float64 [N], their probability.
        doubts: float64 [N] by name: what may serve as the uncertainty. The first is the row's own.
    """

    classes: NDArray[np.int64]
    confidence: NDArray[np.floating[Any]]
    doubts: dict[str, NDArray[np.floating[Any]]]


def answer(
    row: str,
    vectors: NDArray[np.float64],
    bank: NDArray[np.float64],
    logit_scale: float,
    semantics: LearnedPrompts | None,
) -> RowAnswers:
    """Answers of a row.

    Args:
        row: One of `ROWS`.
        vectors: float64 [N, d].
        bank: float64 [M + 1, K, d]; rows of one template are answered by the last of it.
        logit_scale: τ.
        semantics: What was learnt for it, if anything.
    """
    if row in (ZERO_SHOT, SINGLE, *FITTED):
        logits = logit_scale * vectors @ bank[-1].T
        doubts = uncertainties(logits)
        return RowAnswers(logits.argmax(axis=1), 1 - doubts["max-softmax"], {**doubts})
    if semantics is None:
        raise ValueError(f"{row} needs learned templates")
    if row == MEAN:
        probability = np.mean([_softmax(logit_scale * vectors @ own.T) for own in bank], axis=0)
        highest = probability.max(axis=1)
        spread = -(probability * np.log(np.maximum(probability, 1e-300))).sum(axis=1)
        return RowAnswers(probability.argmax(axis=1), highest, {"max-softmax": 1 - highest, "entropy": spread})
    numbers = semantics.evidence_scale, semantics.evidence_bias, semantics.background
    fused = fused_answers(vectors, bank, logit_scale, *numbers)
    highest = fused.probabilities.max(axis=1)
    own: dict[str, NDArray[np.floating[Any]]] = {"u": fused.uncertainty, "1 - max p": 1 - highest}
    return RowAnswers(fused.probabilities.argmax(axis=1), highest, own)


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))
