"""How a template's cosines become evidence: two numbers a template, fitted on all classes and on unseen images.

Training sees few classes a step and images that it learns by heart, so its own scales would be too sure. What is
fitted here are both things that users read: the probabilities, by the log loss of the right class, and u, as what it
then is: the probability that the answer is wrong, by the log loss of that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from invariclip.calibrate.prompts import losses

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_LOGITS = 1 << 21
"""Of all templates and images together: beyond that, images are drawn."""
_PRIOR = 1e-3
"""Weight of what tells templates' scales apart: those that say the same could otherwise share it any way, and some be
left without a say."""
_ROUNDS = 60


@dataclass(frozen=True, eq=False)
class Scales:
    """What makes evidence of each template's cosines, see `invariclip.uncertainty`.

    Attributes:
        scale: float64 [M + 1], a.
        bias: float64 [M + 1], c.
        background: float64 [M + 1], r.
        loss: Of the fit.
    """

    scale: NDArray[np.float64]
    bias: NDArray[np.float64]
    background: NDArray[np.float64]
    loss: float

    @property
    def numbers(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """a, c and r, as `scores.fused_answers` takes them."""
        return self.scale, self.bias, self.background


def fit_scales(
    vectors: NDArray[np.float64],
    labels: NDArray[np.int64],
    bank: NDArray[np.float64],
    logit_scale: float,
    *,
    seed: int = 0,
) -> Scales:
    """Fits a > 0 and c of every template by L-BFGS, in float64.

    Args:
        vectors: float64 [N, d], unit length; of images that the templates were not learned from, and of which some
            should be hard: with none answered wrong, u would be fitted as always zero.
        labels: int64 [N].
        bank: float64 [M + 1, K, d], every template's class embeddings.
        logit_scale: τ.
        seed: Of the draw where there are too many images.
    """
    templates, classes = bank.shape[:2]
    most = max(MOST_LOGITS // (templates * classes), 1)
    if len(vectors) > most:
        rows = np.sort(np.random.default_rng([seed, 41]).choice(len(vectors), most, replace=False))
        vectors, labels = vectors[rows], labels[rows]
    logits = [torch.from_numpy(logit_scale * vectors @ one.T) for one in bank]
    targets = torch.from_numpy(labels)
    log_scale = torch.zeros(templates, dtype=torch.float64, requires_grad=True)
    # All of them together then have as much evidence as doubt where a usual template's odds are even
    start = math.log(math.expm1(math.log(2) / templates))
    bias = torch.full((templates,), start, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([log_scale, bias], max_iter=_ROUNDS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        scale = log_scale.exp()
        opinions = [losses.log_evidence(one, scale[m], bias[m]) for m, one in enumerate(logits)]
        apart = log_scale.var(correction=0) + bias.var(correction=0)
        base_rate = (scale[0] * logits[0]).log_softmax(dim=1)
        served = served_loss(losses.fused_log_evidence(opinions), base_rate, targets)
        return served + _PRIOR * (apart + (log_scale**2).mean())

    def closure() -> float:
        optimiser.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return float(value.detach())

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        final = float(loss())
        levels = [losses.usual_background(one, a) for one, a in zip(logits, log_scale.exp(), strict=True)]
    background = torch.stack(levels).numpy() / logit_scale
    return Scales(log_scale.detach().exp().numpy(), bias.detach().numpy(), background, final)


def fit_temperature(cosines: NDArray[np.float64], labels: NDArray[np.int64], logit_scale: float) -> float:
    """τ of a softmax, by the log loss of the right class (Guo et al., ICML 2017); L-BFGS on its logarithm, float64.

    Args:
        cosines: [N, K].
        labels: int64 [N].
        logit_scale: Where to start.
    """
    inputs, targets = torch.from_numpy(cosines), torch.from_numpy(labels)
    log_tau = torch.tensor(math.log(logit_scale), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([log_tau], max_iter=_ROUNDS, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimiser.zero_grad()
        value = torch.nn.functional.cross_entropy(log_tau.exp() * inputs, targets)
        value.backward()  # type: ignore[no-untyped-call]
        return float(value.detach())

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return math.exp(float(log_tau.detach()))


def served_loss(log_evidence: torch.Tensor, base_rate: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log p_y - log P(right or wrong, as it was | u), the mean over images.

    Args:
        log_evidence: log e of the fused opinion, [N, K]: p_k = b_k + u · base rate, b = e / S, u = K / S, S = Σ e + K.
        base_rate: Its logarithm, [N, K]: the hand-written template's softmax.
        labels: int64 [N].
    """
    log_classes = math.log(log_evidence.shape[1])
    evidence = log_evidence.logsumexp(dim=1)
    total = torch.logaddexp(evidence, torch.zeros_like(evidence) + log_classes)
    own, fallback = (rows.gather(1, labels[:, None])[:, 0] for rows in (log_evidence, base_rate))
    of_class = total - torch.logaddexp(own, fallback + log_classes)
    # The answer is the likeliest class, log(b_k + u · base rate) but for the total
    right = torch.logaddexp(log_evidence, base_rate + log_classes).detach().argmax(dim=1) == labels
    # -log(1 - u) = -log(Σ e / S), -log u = -log(K / S)
    of_doubt = total - torch.where(right, evidence, torch.full_like(evidence, log_classes))
    return (of_class + of_doubt).mean()
