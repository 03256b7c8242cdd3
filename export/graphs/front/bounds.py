"""How far a front's pixels may be from the host's."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FrontBounds:
    """What a front keeps on an image of any size and content; the reference is `preprocessing.pixels`.

    Attributes:
        max_levels: Largest difference of any channel of any pixel, in levels of 255.
        share_off: Share of one image's channel values that differ at all.
    """

    max_levels: int
    share_off: float


BOUNDS = {
    ("matmul", "bicubic"): FrontBounds(1, 0.01),
    ("matmul", "bilinear"): FrontBounds(1, 0.01),
    ("resize", "bicubic"): FrontBounds(2, 0.15),
    ("resize", "bilinear"): FrontBounds(2, 0.50),
}
"""By form and `PixelSpec.interpolation`, with room over the worst that was found.

Of a thousand random images each, `matmul` was equal to the host on 99.6 % (bicubic) and on all (bilinear), and else a
few values in a million were one level off. `resize` was equal on 53 % and 63 %; the worst had 0.7 % and 22 % of their
values off. A search among small ratios of whole numbers, which put many sums halfway between two levels, found 7 % of a
image of waves (28 × 32 to 32) and 35 % of one in black and white (16 × 20 to 40). They hold for images up to
`TALLEST` times as tall as wide.
"""
TALLEST = 100
"""Above this, Pillow shortens a tall image by columns first, which no front does: up to 28 levels off."""
