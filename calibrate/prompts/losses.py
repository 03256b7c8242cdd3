"""CDC's loss: trusted cross-entropy, misleading evidence, diversity, consistency (docs/cdc.md).

Evidence comes as its logarithm, and may be as large as e^100 or as small as e^-100: everything is written so that
neither end overflows, nor loses its gradient where there is one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

_FAR = 20.0
"""log x beyond which ψ(x) = log x - 1/(2x) - ... is log x in float32, and to 1e-9 in float64."""
_KL_HIGHEST = 16.0
"""log e beyond which more misleading evidence costs no more: Γ's terms cancel there and would leave noise."""
_LEAST = 1e-30
BELOW = 2.0
"""How far the background lies below the usual rivals, as a logarithm: a seventh of them. Among the classes that were
learned it changes little; of two classes it is most of what an image of neither is held against. Chosen on images of
training styles that interventions had changed (docs/cdc.md)."""


def digamma_exp(log_x: torch.Tensor) -> torch.Tensor:
    """ψ(x) of log x, for any x that is not tiny."""
    near = torch.digamma(torch.exp(log_x.clamp(max=_FAR)))
    return torch.where(log_x < _FAR, near, log_x)


def log_evidence(logits: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """One template's log e, see `invariclip.uncertainty`; its background is the usual one of these images.

    Args:
        logits: τ · cos, [N, K] of two classes or more.
        scale: a.
        bias: c.

    Returns:
        [N, K].
    """
    scaled = scale * logits
    top, against = _rivalry(scaled)
    odds = top - torch.logaddexp(against, _background(against))
    return scaled.log_softmax(dim=1) + odds + bias + math.log(logits.shape[1])


def usual_background(logits: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The background's cosine times τ: e^-`BELOW` of what the best class of a usual image has against it.

    Args:
        logits: As in `log_evidence`.
        scale: a.
    """
    return _background(_rivalry(scale * logits)[1]) / scale


def _rivalry(scaled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best class's logit, and the log of what all the others have together, [N, 1] each."""
    top, best = scaled.max(dim=1, keepdim=True)
    return top, scaled.scatter(1, best, -torch.inf).logsumexp(dim=1, keepdim=True)


def _background(against: torch.Tensor) -> torch.Tensor:
    return against.mean() - BELOW


def evidential_loss(log_evidence: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Σ_k y_k (ψ(S) - ψ(α_k)) with α = e + 1: the mean cross-entropy under the Dirichlet (Sensoy et al., NeurIPS 2018).

    Args:
        log_evidence: log e, [N, K].
        labels: int64 [N].

    Returns:
        [N].
    """
    zero = torch.zeros((), dtype=log_evidence.dtype)
    own = log_evidence.gather(1, labels[:, None])[:, 0]
    total = torch.logaddexp(log_evidence.logsumexp(dim=1), zero + math.log(log_evidence.shape[1]))
    return digamma_exp(total) - digamma_exp(torch.logaddexp(own, zero))


def misleading_loss(log_evidence: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """KL(Dir(α̃) ‖ Dir(1)) with α̃ = y + (1 - y)·α: what evidence for wrong classes is away from knowing nothing.

    KL = log Γ(S̃) - log Γ(K) - Σ log Γ(α̃_k) + Σ (α̃_k - 1)(ψ(α̃_k) - ψ(S̃)), in float64.

    Args:
        log_evidence: log e, [N, K]; what is beyond e^16 counts as e^16.
        labels: int64 [N].

    Returns:
        [N], in the dtype of `log_evidence`.
    """
    evidence = log_evidence.double().clamp(max=_KL_HIGHEST).exp().scatter(1, labels[:, None], 0.0)
    alpha = evidence + 1
    total = alpha.sum(dim=1)
    divergence = (
        torch.lgamma(total)
        - math.lgamma(alpha.shape[1])
        - torch.lgamma(alpha).sum(dim=1)
        + (evidence * (torch.digamma(alpha) - torch.digamma(total)[:, None])).sum(dim=1)
    )
    return divergence.to(log_evidence.dtype)


def diversity_loss(classes: torch.Tensor) -> torch.Tensor:
    """How alike the learned templates' embeddings of a class are: the mean cosine over classes and pairs of templates.

    Args:
        classes: [M, K, d], unit length.

    Returns:
        One number; 0 for a single template.
    """
    count = len(classes)
    if count < 2:
        return torch.zeros((), dtype=classes.dtype)
    cosines = torch.einsum("mkd,nkd->mn", classes, classes) / classes.shape[1]
    return (cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1))


def consistency_loss(logits: torch.Tensor, hand_written: torch.Tensor) -> torch.Tensor:
    """KL(p₀ ‖ p_m) of a learned template's softmax p_m from the hand-written template's p₀.

    Args:
        logits: A learned template's, [N, K].
        hand_written: Template 0's on the same images, [N, K]; it is what is tied to, and gets no gradient.

    Returns:
        [N].
    """
    target = hand_written.detach().log_softmax(dim=1)
    return (target.exp() * (target - logits.log_softmax(dim=1))).sum(dim=1)


def fused_log_evidence(opinions: Sequence[torch.Tensor]) -> torch.Tensor:
    """Log e of the opinions fused: K·expm1(r) with r = Σ_m log(1 + e_m / K), see `invariclip.uncertainty`.

    Args:
        opinions: log e of each template, [N, K] each.

    Returns:
        [N, K].
    """
    log_classes = math.log(opinions[0].shape[1])
    strength = torch.stack([torch.logaddexp(one - log_classes, torch.zeros_like(one)) for one in opinions])
    height = strength.sum(dim=0).clamp(min=_LEAST)
    # log expm1(r) = r + log(1 - exp(-r)) where r is large; the mild slope keeps the branch not taken finite
    return (
        torch.where(
            height > 1,
            height + torch.log(-torch.expm1(-height.clamp(min=0.5))),
            torch.log(torch.expm1(height.clamp(max=2.0))),
        )
        + log_classes
    )
