"""What a class head must answer, in float64: the logits' softmax or sigmoid, or Dempster's rule, two at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from invariclip.export.verification.dempster import earned, pairwise
from invariclip.export.verification.figures import probabilities

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from invariclip.artifact.manifest import LearnedPromptsFacts


@dataclass(frozen=True, eq=False)
class ClassHead:
    """Classes and how they are answered, independent of how a graph or the runtime does it.

    Attributes:
        bank: Unit class embeddings, float64 [K, d]; with learned templates [M + 1, K, d].
        logit_scale: Temperature τ.
        logit_bias: Added to the logits (SigLIP), or None; evidence does not have it.
        learned: Facts of the learned templates, or None.
    """

    bank: NDArray[np.float64]
    logit_scale: float
    logit_bias: float | None
    learned: LearnedPromptsFacts | None = None

    def answers(self, embeddings: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Probabilities [N, K] of unit embeddings [N, d], and uncertainty [N] where there are learned templates."""
        if self.learned is None:
            return probabilities(embeddings @ self.bank.T, self.logit_scale, self.logit_bias), None
        slopes = np.array(self.learned.evidence_scale) * self.logit_scale
        heights, background = np.array(self.learned.evidence_bias), np.array(self.learned.background)
        said, unsure = [], []
        # A row at a time: pairs of a thousand classes and sixteen templates are not held for all images at once
        for embedding in embeddings:
            logits = (self.bank @ embedding) * slopes[:, None]
            belief, doubt = pairwise(earned(logits, heights, slopes * background))
            said.append(belief + doubt * probabilities(logits[:1], 1.0, None)[0])
            unsure.append(doubt)
        return np.array(said), np.array(unsure)
