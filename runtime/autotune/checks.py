"""Whether a candidate answers on this machine like the safe default: what was proved elsewhere may not hold here.

The same graph runs through other kernels on another processor; some saturate, some are wrong. So a few images and
texts, made here from a seed, go through both. They only look for kernels that are wrong: the contract itself was
checked on real images at export.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from invariclip.artifact.fidelity import Fidelity

IMAGES = 8
TEXTS = (
    "a photo of a cat.",
    "two red boats on a lake at night",
    "x",
    "a word painted on a wall, seen from below",
)
MIN_COSINE: dict[Fidelity, float] = {"exact": 0.999999, "near": 0.9999, "fast": 0.985}
"""Of the contract's levels, as `export.verification.figures` bounds them."""
SLACK = 2.0
"""How many times the angle of that cosine is allowed. The default is off by an angle too, and these images are none
that the level was proved on: bfloat16 of a ViT-B/32 with random weights reaches 0.78 of the angle of `near` on them."""


def check_images(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Noise, gradients, checks and waves: images that embed apart from each other.

    Args:
        height: Of each.
        width: Of each.
        seed: Of the generator.

    Returns:
        uint8 [IMAGES, height, width, 3].
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    images = []
    for place in range(IMAGES):
        low, high = rng.uniform(0, 255, (2, 3))
        angle, count = rng.uniform(0, 2 * np.pi), int(rng.integers(3, 12))
        across = np.cos(angle) * x + np.sin(angle) * y
        kinds = {
            "noise": rng.uniform(0, 1, (height, width)),
            "gradient": 0.5 + 0.5 * across,
            "checks": ((x * count).astype(int) + (y * count).astype(int)) % 2,
            "waves": 0.5 + 0.5 * np.sin(6 * count * across),
        }
        weight = list(kinds.values())[place % len(kinds)][..., None]
        images.append(low + (high - low) * weight + rng.normal(0, 6, (height, width, 3)))
    return np.asarray(np.clip(np.stack(images), 0, 255), dtype=np.uint8)


def disagreement(got: NDArray[np.float32], wanted: NDArray[np.float32], level: Fidelity) -> str:
    """What is wrong with a candidate's embeddings, in words; empty if they keep its level.

    Args:
        got: The candidate's, [N, d].
        wanted: The safe default's, [N, d], unit length.
        level: The one that the candidate claims.
    """
    if got.shape != wanted.shape:
        return f"answers {list(got.shape)} where the default answers {list(wanted.shape)}"
    if not np.isfinite(got).all():
        return f"{int((~np.isfinite(got)).any(axis=1).sum())} of {len(got)} answers are NaN or infinite"
    got, wanted = got.astype(np.float64), wanted.astype(np.float64)
    lengths = np.linalg.norm(got, axis=1) * np.linalg.norm(wanted, axis=1)
    cosine = float(((got * wanted).sum(axis=1) / np.maximum(lengths, 1e-30)).min())
    least = float(np.cos(SLACK * np.arccos(MIN_COSINE[level])))
    if cosine < least:
        return f"cosine {cosine:.7f} to the default's answers, below {least:.7f} of {level}"
    return ""
