"""What a camera, a cable or a disk adds: compression, noise.

Pillow's libjpeg decides the very bits of a compressed image; another build of it may differ in the last level.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from invariclip.preprocessing.interventions.base import Intervention, Range, parameter


@dataclass(frozen=True)
class Jpeg(Intervention):
    """Written as JPEG and read again, with half of the colour resolution (4:2:0), as most cameras write it.

    Attributes:
        quality: libjpeg's scale; Hendrycks and Dietterich (arXiv 1903.12261) go from 25 to 7.
    """

    name: ClassVar[str] = "jpeg"
    quality: Range = parameter((7, 40), 1, 95)

    def change(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Draws whole qualities, the ends among them."""
        low, high = map(int, self.quality)
        memory = io.BytesIO()
        image.save(memory, "JPEG", quality=int(rng.integers(low, high, endpoint=True)), subsampling="4:2:0")
        with Image.open(memory, formats=["JPEG"]) as stored:
            return stored.convert("RGB")


@dataclass(frozen=True)
class GaussianNoise(Intervention):
    """Independent normal noise on every channel: a sensor's own.

    Attributes:
        deviation: In levels of 255; Hendrycks and Dietterich (arXiv 1903.12261) go from 20 to 97.
    """

    name: ClassVar[str] = "gaussian-noise"
    deviation: Range = parameter((8, 50), 0, 255)

    def change(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Levels beyond black and white are cut."""
        levels = np.asarray(image, dtype=np.float64)
        return to_image(levels + rng.normal(0, rng.uniform(*self.deviation), levels.shape))


@dataclass(frozen=True)
class ShotNoise(Intervention):
    """Light is counted: a level's variance grows with the level (Poisson).

    Attributes:
        photons: How many make white; Hendrycks and Dietterich (arXiv 1903.12261) go from 60 down to 3.
    """

    name: ClassVar[str] = "shot-noise"
    photons: Range = parameter((8, 60), 1, 10_000)

    def change(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Few photons are drawn as often as many, on a logarithmic scale."""
        photons = np.exp(rng.uniform(np.log(self.photons[0]), np.log(self.photons[1])))
        counts = rng.poisson(np.asarray(image, dtype=np.float64) / 255 * photons)
        return to_image(counts * (255 / photons))


def to_image(levels: np.ndarray) -> Image.Image:
    """Levels float [H, W, 3], rounded and cut to 0 … 255, as an RGB image."""
    return Image.fromarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8))
