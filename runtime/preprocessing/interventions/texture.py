"""Clouds: a fractal map by midpoint displacement on a square that joins up with itself.

Diamond-square (Fournier, Fussell and Carpenter, Computer Rendering of Stochastic Models, CACM 1982), as ImageNet-C
draws its fog with it (Hendrycks and Dietterich, arXiv 1903.12261, appendix).
"""

from __future__ import annotations

import numpy as np
from PIL import Image

LARGEST = 512
"""Sides beyond it are drawn at this size and stretched: a cloud has nothing finer to show, and memory stays bounded."""


def plasma(width: int, height: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """A cloud over an image, float64 [height, width] from 0 to 1.

    Args:
        width: Of the image, at least 1.
        height: Likewise.
        decay: By what the displacement is divided when the step is halved: 1 is grain, 3 is nearly smooth.
        rng: Draws the displacements.
    """
    side = 2
    while side < min(max(width, height), LARGEST):
        side *= 2
    cloud = np.zeros((side, side))
    step, reach = side, 1.0
    while step > 1:
        half = step // 2
        corners = cloud[::step, ::step]
        beside, below = np.roll(corners, -1, 1), np.roll(corners, -1, 0)
        middles = _moved((corners + beside + below + np.roll(below, -1, 1)) / 4, reach, rng)
        cloud[half::step, half::step] = middles
        # an edge's middle lies between two corners and the middles of the two squares that share the edge
        cloud[::step, half::step] = _moved((corners + beside + middles + np.roll(middles, 1, 0)) / 4, reach, rng)
        cloud[half::step, ::step] = _moved((corners + below + middles + np.roll(middles, 1, 1)) / 4, reach, rng)
        step, reach = half, reach / decay
    cloud -= cloud.min()
    cloud /= cloud.max() or 1.0
    if max(width, height) <= side:
        return cloud[:height, :width]
    stretched = Image.fromarray(cloud.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(stretched, dtype=np.float64)


def _moved(means: np.ndarray, reach: float, rng: np.random.Generator) -> np.ndarray:
    return means + rng.uniform(-reach, reach, means.shape)
