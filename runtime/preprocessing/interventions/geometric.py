"""The camera moves, the thing stays: crop, rotation, perspective, mirror.

None of them shows a border that was not in the image: an encoder would learn the border, not the movement.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image, ImageOps

from invariclip.preprocessing.interventions.base import Intervention, Range, parameter


@dataclass(frozen=True)
class Crop(Intervention):
    """A part of the image at the size of the whole (torchvision's RandomResizedCrop, with a milder scale).

    Attributes:
        area: The part's share of the image.
        aspect: The part's width by height, relative to the image's; drawn evenly on a logarithmic scale.
    """

    name: ClassVar[str] = "crop"
    area: Range = parameter((0.5, 0.9), 0.01, 1)
    aspect: Range = parameter((0.75, 4 / 3), 0.25, 4)

    def change(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """A part whose aspect does not fit is cut to what there is."""
        share = rng.uniform(*self.area)
        stretch = np.exp(rng.uniform(np.log(self.aspect[0]), np.log(self.aspect[1])))
        width = min(1.0, np.sqrt(share * stretch)) * image.width
        height = min(1.0, np.sqrt(share / stretch)) * image.height
        left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
        box = (left, top, left + width, top + height)
        return image.resize(image.size, Image.Resampling.BICUBIC, box=box)


@dataclass(frozen=True)
class Rotation(Intervention):
    """A turn about the middle; the corners are filled with the image's mirror image.

    Attributes:
        degrees: How far, either way.
    """

    name: ClassVar[str] = "rotation"
    degrees: Range = parameter((5, 30), 0, 180)

    def change(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Turns an image that is continued on all sides."""
        angle = rng.uniform(*self.degrees) * rng.choice((-1, 1))
        width, height = image.size
        # a corner comes from no further out than half of the diagonal; two more for the cubic's reach
        reach = np.hypot(width, height) / 2
        beside, above = int(reach - width / 2) + 2, int(reach - height / 2) + 2
        wide = np.pad(np.asarray(image), ((above, above), (beside, beside), (0, 0)), mode="symmetric")
        turned = Image.fromarray(wide).rotate(angle, Image.Resampling.BICUBIC)
        return turned.crop((beside, above, beside + width, above + height))


@dataclass(frozen=True)
class Perspective(Intervention):
    """The image seen from aside: a four-cornered part of it becomes the whole.

    Attributes:
        distortion: Up to which share of half the side each corner is drawn inwards (torchvision's RandomPerspective
            draws the same corners and maps the other way round, which leaves black wedges).
    """

    name: ClassVar[str] = "perspective"
    distortion: Range = parameter((0.1, 0.4), 0, 0.9)

    def change(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Draws the four corners evenly up to the distortion."""
        reach = rng.uniform(*self.distortion) / 2
        width, height = image.size
        corners = np.asarray([(0, 0), (width, 0), (width, height), (0, height)], dtype=np.float64)
        inwards = np.asarray([(1, 1), (-1, 1), (-1, -1), (1, -1)]) * rng.uniform(0, reach, (4, 2)) * (width, height)
        coefficients = _homography(corners, corners + inwards)
        return image.transform(image.size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Flip(Intervention):
    """Left and right exchanged; not for classes that differ in just that, such as letters or arrows."""

    name: ClassVar[str] = "flip"

    def change(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Has nothing to draw."""
        del rng
        return ImageOps.mirror(image)


def _homography(start: np.ndarray, end: np.ndarray) -> list[float]:
    """The eight coefficients a … h of (x, y) → (ax + by + c, dx + ey + f) / (gx + hy + 1).

    Args:
        start: float64 [4, 2], corners in the result.
        end: float64 [4, 2], where each comes from.
    """
    rows = []
    for (x, y), (u, v) in zip(start, end, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
    return [float(value) for value in np.linalg.solve(np.asarray(rows), end.ravel())]
