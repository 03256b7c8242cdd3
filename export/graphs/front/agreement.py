"""How far a front's pixels are from the host's, on real pictures, and how far they may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from invariclip.errors import ContractError, InputError
from invariclip.pixels import open_picture, pixels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from invariclip.pixels import Picture, PixelSpec

    RunFront: TypeAlias = Callable[[NDArray[np.uint8]], NDArray[np.uint8] | NDArray[np.float32]]


@dataclass(frozen=True)
class FrontAgreement:
    """What was measured of a front; the reference is `invariclip.pixels.pixels`.

    Attributes:
        max_levels: Largest difference of any channel of any pixel, in levels of 255.
        share_off: Share of the channel values that differ at all, over all pictures.
        pictures: How many pictures it was measured on.
    """

    max_levels: int
    share_off: float
    pictures: int


@dataclass(frozen=True)
class FrontBounds:
    """What a front keeps on a picture of any size and content.

    Attributes:
        max_levels: See `FrontAgreement`.
        share_off: See `FrontAgreement`; of one picture.
    """

    max_levels: int
    share_off: float


BOUNDS = {
    ("matmul", "bicubic"): FrontBounds(1, 0.01),
    ("matmul", "bilinear"): FrontBounds(1, 0.01),
    ("resize", "bicubic"): FrontBounds(2, 0.02),
    ("resize", "bilinear"): FrontBounds(2, 0.35),
}
"""By form and `PixelSpec.interpolation`, with room over the worst of a thousand random pictures each.

`matmul` was equal to the host on 99.6 % of them (bicubic) and on all (bilinear), and else a few values in a million
were one level off. `resize` was equal on 53 % and 63 %; the worst had 0.7 % and 22 % of their values off, where small
ratios of whole numbers put many sums halfway between two levels. They hold for pictures up to `TALLEST` times as tall
as wide.
"""
TALLEST = 100
"""Above this, Pillow shortens a tall picture by columns first, which no front does: up to 28 levels off."""


def front_agreement(run: RunFront, pictures: Iterable[Picture], spec: PixelSpec) -> FrontAgreement:
    """Compares a front with the host, picture by picture.

    Each picture is converted to RGB first, because that is what a front takes. (A palette or a transparent picture the
    host resizes in the mode it is stored in; that difference is the caller's conversion and no fault of the front.)

    Args:
        run: Runs the front, such as `front_alone` gives it: uint8 [1, height, width, 3] → [1, S, S, 3], uint8 or whole
            numbers in float32.
        pictures: What to measure on.
        spec: How the tower wants its pictures.

    Raises:
        InputError: There is no picture, or one cannot be read.
        ContractError: The front answers another shape, or values that no byte has.
    """
    count, values, off, worst = 0, 0, 0, 0
    for picture in pictures:
        image = open_picture(picture).convert("RGB")
        wanted = pixels(image, spec).astype(np.int16)
        got = np.asarray(run(np.asarray(image)[None]), dtype=np.float32)
        if got.shape != (1, *wanted.shape):
            raise ContractError(f"the front answers {list(got.shape)} for one picture, not {[1, *wanted.shape]}")
        # NaN compares false with everything, so it is caught here too
        if not bool(((got >= 0) & (got <= 255) & (got == np.floor(got))).all()):
            raise ContractError("the front answers values that are not whole numbers from 0 to 255")
        apart = np.abs(got[0].astype(np.int16) - wanted)
        count, values = count + 1, values + apart.size
        off, worst = off + int(np.count_nonzero(apart)), max(worst, int(apart.max()))
    if not count:
        raise InputError("no picture to measure the front on; give one or more")
    return FrontAgreement(worst, off / values, count)


def front_failures(found: FrontAgreement, bounds: FrontBounds) -> tuple[str, ...]:
    """The bounds that a front breaks, a line each that says the figure, its bound and by how much it is off."""
    lines = []
    if found.max_levels > bounds.max_levels:
        off = found.max_levels - bounds.max_levels
        lines.append(f"pixels in the graph: {found.max_levels} levels off, above {bounds.max_levels}, by {off}")
    if found.share_off > bounds.share_off:
        off_share = found.share_off - bounds.share_off
        lines.append(
            f"pixels in the graph: {found.share_off:.3%} of the values differ, above {bounds.share_off:.3%}, "
            f"by {off_share:.3%}"
        )
    return tuple(lines)
