"""How a template's cosines become evidence: two numbers a template, fitted on all classes and on unseen pictures.

Training sees few classes a step and pictures that it learns by heart, so its own scales would be too sure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from invariclip.calibrate.cdc import losses

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_LOGITS = 1 << 24
"""Of all templates and pictures together: beyond that, pictures are drawn."""
_PRIOR = 1e-3
"""Weight of (log a)²: templates that say the same could otherwise take any share of the scale."""
_ROUNDS = 60


@dataclass(frozen=True, eq=False)
class Scales:
    """Evidence of each template, log e = a · τ · cos + c.

    Attributes:
        scale: float64 [M + 1], a.
        bias: float64 [M + 1], c.
        loss: Of the fit.
    """

    scale: NDArray[np.float64]
    bias: NDArray[np.float64]
    loss: float


def fit_scales(
    vectors: NDArray[np.float64],
    labels: NDArray[np.int64],
    bank: NDArray[np.float64],
    logit_scale: float,
    *,
    misleading: float,
    seed: int = 0,
) -> Scales:
    """Fits a > 0 and c of every template, by L-BFGS on the trusted cross-entropy of the fused opinion.

    The divergence of the misleading evidence is part of it: it is the evidence that a picture has whose class is not
    among those asked for, and what keeps that near nothing.

    Args:
        vectors: float64 [N, d], unit length; pictures that the vectors were not learnt from.
        labels: int64 [N].
        bank: float64 [M + 1, K, d], every template's class embeddings.
        logit_scale: τ.
        misleading: Weight of that divergence.
        seed: Of the draw where there are too many pictures.
    """
    templates, classes = bank.shape[:2]
    most = max(MOST_LOGITS // (templates * classes), 1)
    if len(vectors) > most:
        rows = np.sort(np.random.default_rng([seed, 41]).choice(len(vectors), most, replace=False))
        vectors, labels = vectors[rows], labels[rows]
    logits = [torch.from_numpy(logit_scale * vectors @ one.T) for one in bank]
    wanted = torch.from_numpy(labels)
    own = [float(one.gather(1, wanted[:, None]).mean()) for one in logits]
    log_scale = torch.zeros(templates, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([np.log(classes) - mean for mean in own], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([log_scale, bias], max_iter=_ROUNDS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        opinions = [log_scale[m].exp() * one + bias[m] for m, one in enumerate(logits)]
        fused = losses.fused_log_evidence(opinions)
        loss = losses.evidential_loss(fused, wanted).mean() + _PRIOR * (log_scale**2).mean()
        if misleading:
            loss = loss + misleading * losses.misleading_loss(fused, wanted).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    final = float(closure())
    return Scales(log_scale.detach().exp().numpy(), bias.detach().numpy(), final)
