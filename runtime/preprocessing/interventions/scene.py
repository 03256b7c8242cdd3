"""What lies around the thing: fog before it, another background behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image, ImageFilter

from invariclip.errors import NotApplicableError
from invariclip.preprocessing.interventions.base import DonorIntervention, Intervention, Range, parameter
from invariclip.preprocessing.interventions.degrade import to_image
from invariclip.preprocessing.interventions.geometric import Crop
from invariclip.preprocessing.interventions.texture import plasma

TOLERANCE = 24
SHARES = (0.05, 0.95)
"""How much of the image a background may be: less is a frame, more leaves no thing."""
BORDER_SHARE = 0.5
"""A background runs along at least so much of the border."""


@dataclass(frozen=True)
class Fog(Intervention):
    """White haze in clouds: x → (x + density · cloud) / (1 + density), levels from 0 to 1.

    It is ImageNet-C's (Hendrycks and Dietterich, arXiv 1903.12261) with the image's brightest level taken as white;
    that goes through densities from 1.5 to 3.

    Attributes:
        density: The haze's weight beside the image's.
        decay: How smooth the clouds are; see `texture.plasma`.
    """

    name: ClassVar[str] = "fog"
    density: Range = parameter((0.8, 2.0), 0, 10)
    decay: Range = parameter((1.5, 2.0), 1, 4)

    def change(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The same haze over all three channels."""
        density = rng.uniform(*self.density)
        cloud = plasma(*image.size, rng.uniform(*self.decay), rng)[..., None]
        return to_image((np.asarray(image) + density * 255 * cloud) / (1 + density))


@dataclass(frozen=True)
class BackgroundTexture(Intervention):
    """A plain background gives way to clouds between two drawn colours.

    Attributes:
        tolerance: See `background`.
        contrast: How far the two colours lie apart: 0 is one plain colour, 1 are any two.
        decay: How smooth the clouds are; see `texture.plasma`.
    """

    name: ClassVar[str] = "background-texture"
    tolerance: int = parameter(TOLERANCE, 0, 128)
    contrast: Range = parameter((0.0, 1.0), 0, 1)
    decay: Range = parameter((1.3, 2.5), 1, 4)

    def change(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Both colours are drawn evenly from all there are."""
        mask = background(image, self.tolerance)
        first, second = rng.uniform(0, 255, (2, 3))
        second = first + (second - first) * rng.uniform(*self.contrast)
        cloud = plasma(*image.size, rng.uniform(*self.decay), rng)[..., None]
        return _behind(image, to_image(first + (second - first) * cloud), mask)


@dataclass(frozen=True)
class BackgroundSwap(DonorIntervention):
    """A plain background gives way to a part of another image, enlarged and out of focus.

    A whole image would bring the thing that it shows, and the class would no longer be one.

    Attributes:
        tolerance: See `background`.
        area: The part's share of the other image.
        blur: Standard deviation, in pixels.
    """

    name: ClassVar[str] = "background-swap"
    tolerance: int = parameter(TOLERANCE, 0, 128)
    area: Range = parameter((0.1, 0.4), 0.01, 1)
    blur: Range = parameter((2.0, 8.0), 0, 100)

    def change_with(self, image: Image.Image, donor: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The part has the image's aspect."""
        mask = background(image, self.tolerance)
        part = Crop(area=self.area, aspect=(1, 1)).change(donor, rng)
        return _behind(image, part.filter(ImageFilter.GaussianBlur(rng.uniform(*self.blur))), mask)


def background(image: Image.Image, tolerance: int) -> np.ndarray:
    """The plain area that the border belongs to, bool [H, W].

    Its colour is the border's median; what is within the tolerance of it in every channel and connected to the border
    through such pixels (four neighbours) is background.

    Args:
        image: RGB.
        tolerance: Levels.

    Raises:
        NotApplicableError: The border has no such colour, or what is left is no thing.
    """
    levels = np.asarray(image, dtype=np.int16)
    edge = np.ones(levels.shape[:2], dtype=np.bool_)
    edge[1:-1, 1:-1] = False
    near = (np.abs(levels - np.median(levels[edge], axis=0)) <= tolerance).all(axis=2)
    reached = near & edge
    if reached.sum() < BORDER_SHARE * edge.sum():
        raise NotApplicableError("the border has no single colour, so there is no background to separate")
    found = 0
    while found != (found := int(reached.sum())):
        # along rows, then along columns
        reached = _along_rows(_along_rows(reached, near).T, near.T).T
    if not SHARES[0] <= found / near.size <= SHARES[1]:
        raise NotApplicableError("the border's colour is nearly none or nearly all of the image")
    return np.asarray(reached)


def _along_rows(reached: np.ndarray, free: np.ndarray) -> np.ndarray:
    """What can be reached within rows over free pixels, bool [H, W]: a run of them is reached if one of it is."""
    height = len(free)
    # a closed column keeps the end of one row apart from the start of the next
    closed = np.concatenate([~free, np.ones((height, 1), dtype=np.bool_)], axis=1)
    runs = np.cumsum(closed).reshape(closed.shape)[:, :-1]
    hit = np.zeros(closed.sum() + 1, dtype=np.bool_)
    hit[runs[reached]] = True
    return np.asarray(free & hit[runs])


def _behind(image: Image.Image, new: Image.Image, mask: np.ndarray) -> Image.Image:
    """The new image where the mask is; the seam is a pixel or two wide, as an antialiased edge is."""
    alpha = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(3))
    return Image.composite(new, image, alpha.filter(ImageFilter.BoxBlur(1)))
