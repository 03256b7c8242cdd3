"""How near the classes asked about a picture is, all of them together: an uncertainty that needs no learned template.

The energy of a classifier's logits is E = -log Σ_k exp(z_k), z = τ · cos (Liu et al., Energy-based Out-of-distribution
Detection, NeurIPS 2020, arXiv 2010.03759): low where a picture is near some class. A softmax takes the height of the
logits away; the energy is that height, so it tells pictures of none of the classes where a softmax is sure of the
nearest. It tells wrong answers among the classes worse than the softmax does (docs/cdc.md has both).

Answers carry it as a number from 0 to 1, without a parameter that would need data:

- Softmax models: u = (1 - (log mean_k exp z_k) / τ) / 2. log mean exp lies between the mean and the largest logit, so
  from -τ to τ: u is one half of one less a soft maximum of the cosines. At given classes it is the energy but for where
  it starts and its unit, so it orders pictures as the energy does, and nowhere does it saturate. **It is no
  probability.** An encoder's cosines fill a narrow band, and so does u (0.3 to 0.4 is usual for a CLIP); it can be
  compared among pictures of one artifact with one list of classes, and the number to abstain above has to be read off
  one's own pictures.
- Sigmoid models (SigLIP) have a bias that holds every class against nothing: u = Π_k (1 - p_k), which is
  exp(-Σ_k softplus z_k): the chance, as the model has it, that none of the classes is there, were they independent. Its
  logarithm is the joint energy of Wang et al. (Can multi-label classification networks know what they don't know?,
  NeurIPS 2021, arXiv 2111.14818).
"""

from __future__ import annotations

from typing import Any

import numpy as np
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
