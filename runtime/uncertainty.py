"""Several templates' evidence for the classes, fused into one answer that says how unsure it is.

CDC's trusted classification (arXiv 2410.12816). Template m takes an image's logits for evidence e_k ≥ 0 of K classes:

    e_k^m = K · exp(c_m) · p_k^m · w_k*^m / (Σ_{j ≠ k*} w_j^m + w_0^m),    w_k^m = exp(a_m · τ · cos_k^m),

with p^m the softmax w^m / Σ w^m, k* its best class, and w_0^m = exp(a_m · τ · r_m) a background rival at cosine r_m. So
a template has as much evidence as its best class has odds against all its rivals, and shares it among the classes as
its softmax does. Without a background, with c = 0 and one template, u below is 1 - max p: the chance that the answer is
wrong, if the softmax is calibrated. The background is what an image of none of the classes is held against, however
few classes are asked about. Evidence that counts how near classes are (e = exp(a · τ · cos + c), the plain reading) is
large for two classes alike as well, and tells wrong answers worse than a softmax does (docs/cdc.md).

That is an opinion: belief b_k = e_k / S and uncertainty u = K / S with S = Σ e + K, so Σ b_k + u = 1. Opinions are put
together by Dempster's reduced rule. Over M of them it needs no loop: with q_k = Π_m (b_k^m + u^m) and U = Π_m u^m,

    b_k = (q_k - U) / n,    u = U / n,    n = Σ_k (q_k - U) + U.

S cancels in q_k / U = Π_m (1 + e_k^m / K), so all that is needed is

    r_k = Σ_m log(1 + e_k^m / K) = Σ_m softplus(log e_k^m - log K),
    b_k = expm1(r_k) / n',    u = 1 / n',    n' = 1 + Σ_k expm1(r_k).

Every r_k is zero or more, so nothing cancels; the largest is taken out before anything is exponentiated.

Probabilities are b_k + u · p_k^0: what no template is sure of falls back to the hand-written one's softmax. It is
subjective logic's projected probability with that softmax for the base rate (Jøsang, Subjective Logic, 2016, 3.5). A
base rate of 1/K, the paper's, would spread the doubt over classes that nothing speaks for. With one template and c = 0
the probabilities are p itself.

How near the classes asked about an image is, all of them together: an uncertainty that needs no learned template.

The energy of a classifier's logits is E = -log Σ_k exp(z_k), z = τ · cos (Liu et al., Energy-based Out-of-distribution
Detection, NeurIPS 2020, arXiv 2010.03759): low where an image is near some class. A softmax takes the height of the
logits away; the energy is that height, so it tells images of none of the classes where a softmax is sure of the
nearest. It tells wrong answers among the classes worse than the softmax does (docs/cdc.md has both).

Answers carry it as a number from 0 to 1, without a parameter that would need data:

- Softmax models: u = (1 - (log mean_k exp z_k) / τ) / 2. log mean exp lies between the mean and the largest logit, so
  from -τ to τ: u is one half of one less a soft maximum of the cosines. At given classes it is the energy but for where
  it starts and its unit, so it orders images as the energy does, and nowhere does it saturate. **It is no
  probability.** An encoder's cosines fill a narrow band, and so does u (0.3 to 0.4 is usual for a CLIP); it can be
  compared among images of one artifact with one list of classes, and the number to abstain above has to be read off
  one's own images.
- Sigmoid models (SigLIP) have a bias that holds every class against nothing: u = Π_k (1 - p_k), which is
  exp(-Σ_k softplus z_k): the chance, as the model has it, that none of the classes is there, were they independent. Its
  logarithm is the joint energy of Wang et al. (Can multi-label classification networks know what they don't know?,
  NeurIPS 2021, arXiv 2111.14818).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from numpy.typing import NDArray


def energy(logits: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """-log Σ exp over the last axis, float64; the largest logit is taken out before anything is exponentiated."""
    plain = logits.astype(np.float64)
    highest = plain.max(axis=-1)
    return np.asarray(-highest - np.log(np.exp(plain - highest[..., None]).sum(axis=-1)))


def energy_uncertainty(
    logits: NDArray[np.floating[Any]], logit_scale: float, *, sigmoid: bool = False
) -> NDArray[np.float32]:
    """The energy from 0, near some class, to 1, far from all; see above for what it is and what it is not.

    Args:
        logits: [..., K], τ · cos; for sigmoid models with their bias.
        logit_scale: τ.
        sigmoid: Whether classes are answered by a sigmoid each.

    Returns:
        float32 [...], computed in float64; NaN where a logit is.
    """
    if sigmoid:
        return np.asarray(np.exp(-np.logaddexp(0, logits.astype(np.float64)).sum(axis=-1)), dtype=np.float32)
    near = (-energy(logits) - np.log(logits.shape[-1])) / logit_scale
    # Beyond the ends by no more than float32 cosines are beyond 1
    return np.asarray(np.clip((1 - near) / 2, 0, 1), dtype=np.float32)


MOST = 1e4
"""Of log evidence, either way; it is more than any image has, and float16 still adds up seventeen templates of it."""


@dataclass(frozen=True, eq=False)
class Fused:
    """What all templates say together.

    Attributes:
        belief: [..., K], from 0 to 1; with `uncertainty` they sum to 1.
        uncertainty: [...], u from 0 (sure) to 1 (no evidence for anything).
        base_rate: [..., K], what is thought of classes without evidence; its parts sum to 1.
    """

    belief: NDArray[np.floating[Any]]
    uncertainty: NDArray[np.floating[Any]]
    base_rate: NDArray[np.floating[Any]]

    @property
    def probabilities(self) -> NDArray[np.floating[Any]]:
        """Of the classes, b + u · base_rate, [..., K]."""
        return np.asarray(self.belief + self.uncertainty[..., None] * self.base_rate)


def fuse(log_evidence: NDArray[np.floating[Any]], base_rate: NDArray[np.floating[Any]]) -> Fused:
    """Fuses M opinions on K classes by Dempster's reduced rule, in its closed form and in log space.

    Args:
        log_evidence: log e, [..., M, K], finite. -inf, no evidence at all, is allowed.
        base_rate: [..., K].

    Returns:
        Belief and uncertainty, in the same dtype.
    """
    classes = log_evidence.shape[-1]
    strength = np.logaddexp(0, log_evidence - np.log(classes).astype(log_evidence.dtype))
    together = strength.sum(axis=-2)
    best = together.max(axis=-1, keepdims=True)
    share = np.exp(together - best) * -np.expm1(-together)  # expm1(r_k), over exp of the largest r
    nothing = np.exp(-best)
    total = share.sum(axis=-1, keepdims=True) + nothing
    return Fused(share / total, (nothing / total)[..., 0], base_rate)


def opinions(
    cosines: NDArray[np.floating[Any]],
    logit_scale: float,
    evidence_scale: NDArray[np.floating[Any]],
    evidence_bias: NDArray[np.floating[Any]],
    background: NDArray[np.floating[Any]],
) -> tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]:
    """The log of each template's evidence, and the hand-written one's softmax; see above.

    Args:
        cosines: [..., M, K], of images and class embeddings by template.
        logit_scale: τ.
        evidence_scale: a, [M].
        evidence_bias: c, [M].
        background: r, [M].

    Returns:
        log e, [..., M, K], and p of the first template, [..., K].
    """
    dtype = cosines.dtype
    slope = (evidence_scale * logit_scale)[:, None]
    logits, behind = cosines * slope.astype(dtype), (slope * background[:, None]).astype(dtype)
    best = logits.argmax(axis=-1)[..., None]
    top = np.take_along_axis(logits, best, axis=-1)
    rivals = logits.copy()
    np.put_along_axis(rivals, best, -np.inf, axis=-1)
    crowd = _log_sum_exp(rivals)
    # The log of the best p, -log(1 + exp(crowd - top)): nothing cancels where p is nearly 1
    chance = -np.logaddexp(0, crowd - top)
    height = top - np.logaddexp(crowd, behind) + chance + evidence_bias.astype(dtype)[:, None]
    evidence = logits - top + np.clip(height, -MOST, MOST) + np.log(cosines.shape[-1]).astype(dtype)
    return np.asarray(evidence), np.exp((logits - top + chance)[..., 0, :])


def _log_sum_exp(values: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Over the last axis, kept; -inf where all of it is."""
    most = np.maximum(values.max(axis=-1, keepdims=True), np.finfo(values.dtype).min)
    with np.errstate(divide="ignore"):
        return np.asarray(most + np.log(np.exp(values - most).sum(axis=-1, keepdims=True)))
