"""What a class head must answer, in float64: the logits' softmax or sigmoid, or Dempster's rule, two at a time.

The rule is written down as trusted classification states it (Han et al., ICLR 2021), and shares no step with the closed
form in `invariclip.uncertainty` or with the graph's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

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


def earned(
    logits: NDArray[np.float64], bias: NDArray[np.float64], background: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The log of each template's evidence by its definition, template by template.

    Args:
        logits: a · τ · cos, float64 [M, K].
        bias: c, [M].
        background: a · τ · r, [M].

    Returns:
        log(K · e^c · p_k · odds), [M, K]: p the softmax, odds those of the best class against the others and the
        background.
    """
    evidence = np.empty_like(logits)
    for row, (own, height, behind) in enumerate(zip(logits, bias, background, strict=True)):
        best = int(own.argmax())
        odds = own[best] - np.logaddexp.reduce(np.append(np.delete(own, best), behind))
        evidence[row] = own - np.logaddexp.reduce(own) + np.clip(odds + height, -1e4, 1e4) + np.log(len(own))
    return evidence


def opinion(log_evidence: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One template's belief [..., K] and uncertainty [...]: e / S and K / S, S = Σ e + K; any height of evidence."""
    classes = log_evidence.shape[-1]
    most = np.maximum(log_evidence.max(axis=-1, keepdims=True), np.log(classes))
    evidence, nothing = np.exp(log_evidence - most), classes * np.exp(-most)
    total = evidence.sum(axis=-1, keepdims=True) + nothing
    return np.asarray(evidence / total), np.asarray((nothing / total)[..., 0])


def combine(
    one: tuple[NDArray[np.float64], NDArray[np.float64]], other: tuple[NDArray[np.float64], NDArray[np.float64]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two opinions as one: b_k = (b_k b'_k + b_k u' + b'_k u) / (1 - C), u = u u' / (1 - C), C the conflict."""
    (belief, unsure), (others, doubt) = one, other
    agreed = belief * others + belief * doubt[..., None] + others * unsure[..., None]
    left = unsure * doubt
    # 1 - C, as what is left of all pairs when conflicting ones are taken out; 1 less C itself would cancel
    kept = agreed.sum(axis=-1) + left
    return np.asarray(agreed / kept[..., None]), np.asarray(left / kept)


def pairwise(log_evidence: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """All templates' opinions, combined one after the other.

    Args:
        log_evidence: float64 [..., M, K].

    Returns:
        Belief [..., K] and uncertainty [...].
    """
    templates = np.moveaxis(log_evidence, -2, 0)
    fused = opinion(templates[0])
    for further in templates[1:]:
        fused = combine(fused, opinion(further))
    return fused
