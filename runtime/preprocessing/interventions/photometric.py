"""The paper's seven: colours and sharpness change, places do not.

The kinds are CLIP-ICM's (Song et al., ICML 2025, arXiv 2405.15289, interventional data). Its published code takes
their ranges from the command line and states no default; the defaults here are the ones that torchvision's own
examples of the same seven use, with contrast and saturation jittered as widely as brightness.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from invariclip.preprocessing.interventions.base import Intervention, Range, parameter


@dataclass(frozen=True)
class ColourJitter(Intervention):
    """Brightness, contrast and saturation by factors around 1, hue by a turn of the colour circle.

    Attributes:
        brightness: The factor is drawn from [1 - brightness, 1 + brightness].
        contrast: Likewise.
        saturation: Likewise.
        hue: The turn is drawn from [-hue, hue], in whole circles.
    """

    name: ClassVar[str] = "colour-jitter"
    brightness: float = parameter(0.5, 0, 3)
    contrast: float = parameter(0.5, 0, 3)
    saturation: float = parameter(0.5, 0, 3)
    hue: float = parameter(0.3, 0, 0.5)

    def change(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Applies the four in random order, since they do not commute."""
        steps = (
            (ImageEnhance.Brightness, self.brightness),
            (ImageEnhance.Contrast, self.contrast),
            (ImageEnhance.Color, self.saturation),
            (None, self.hue),
        )
        for index in rng.permutation(len(steps)):
            enhance, reach = steps[index]
            if enhance is None:
                image = _turn_hue(image, rng.uniform(-reach, reach))
            else:
                image = enhance(image).enhance(rng.uniform(max(0.0, 1 - reach), 1 + reach))
        return image


@dataclass(frozen=True)
class Greyscale(Intervention):
    """Luma alone (ITU-R 601), in all three channels."""

    name: ClassVar[str] = "greyscale"

    def change(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Has nothing to draw."""
        del rng
        return ImageOps.grayscale(image).convert("RGB")


@dataclass(frozen=True)
class GaussianBlur(Intervention):
    """A blur.

    Attributes:
        deviation: The Gaussian's standard deviation, in pixels.
    """

    name: ClassVar[str] = "gaussian-blur"
    deviation: Range = parameter((0.1, 5.0), 0, 100)

    def change(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Blurs by Pillow's extended box blur, which is within a few levels of a true Gaussian."""
        return image.filter(ImageFilter.GaussianBlur(rng.uniform(*self.deviation)))


@dataclass(frozen=True)
class Invert(Intervention):
    """The photographic negative."""

    name: ClassVar[str] = "invert"

    def change(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Has nothing to draw."""
        del rng
        return ImageOps.invert(image)


@dataclass(frozen=True)
class Posterize(Intervention):
    """Fewer levels.

    Attributes:
        bits: The highest so many of every channel are kept.
    """

    name: ClassVar[str] = "posterize"
    bits: int = parameter(2, 1, 8)

    def change(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Has nothing to draw."""
        del rng
        return ImageOps.posterize(image, self.bits)


@dataclass(frozen=True)
class Solarize(Intervention):
    """The negative of what is bright.

    Attributes:
        threshold: Levels at and above it are inverted.
    """

    name: ClassVar[str] = "solarize"
    threshold: int = parameter(192, 0, 256)

    def change(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Has nothing to draw."""
        del rng
        return ImageOps.solarize(image, self.threshold)


@dataclass(frozen=True)
class Equalize(Intervention):
    """Flattens the histogram of every channel."""

    name: ClassVar[str] = "equalize"

    def change(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Has nothing to draw."""
        del rng
        return ImageOps.equalize(image)


def _turn_hue(image: Image.Image, turn: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    # Hue is stored in 256 steps and wraps, as angles do.
    turned = Image.fromarray((np.asarray(hue).astype(np.int16) + round(turn * 256)).astype(np.uint8))
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")
