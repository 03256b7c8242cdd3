"""The fast pixel mode held against the exact one: in levels, and in what a tower makes of the difference.

The mode is about large JPEGs, which few images of a check are (the bundled ones are 256x256 WebP). So every image
becomes JPEGs of chosen sizes: repeated in mirror image at its own resolution, and not enlarged, because an enlarged
image has no fine detail and hides what the decoder leaves out.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from invariclip.console import silent
from invariclip.errors import InputError
from invariclip.export.checkpoints.check_texts import spread
from invariclip.export.verification.answers import project
from invariclip.export.verification.comparison import agreement
from invariclip.preprocessing.pixels import open_image, pixels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.console import Progress
    from invariclip.export.verification.candidate import ExportJob
    from invariclip.export.verification.evidence import ImageBatches
    from invariclip.export.verification.figures import Thresholds
    from invariclip.preprocessing.pixels import PixelSpec

SIZES = ((640, 480), (1800, 1350), (4000, 3000))
"""Width and height. At the first a decoder can leave out nothing for 224 pixels; at the second it leaves the least that
it may, just `FAST_MARGIN` times what is needed; the third is what a telephone takes."""
SHOWN = 24
"""Images that are shown in each size."""
QUALITY = 90
_MAX_SIDE = 8192
_BATCH = 16


@dataclass(frozen=True)
class FastFigures:
    """How far the fast mode is from the exact one.

    Attributes:
        items: JPEGs looked at.
        max_levels: Largest difference of a byte, in levels of 255.
        mean_levels: Mean difference of a byte.
        cosine_min: Smallest cosine between the embeddings of both.
        cosine_mean: Mean cosine.
        top1_agreement: Share of JPEGs whose best match in the bank is the same; None without a bank.
    """

    items: int
    max_levels: float
    mean_levels: float
    cosine_min: float
    cosine_mean: float
    top1_agreement: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The figures as a parity record stores them."""
        return asdict(self)


def as_jpeg(image: Image.Image, size: tuple[int, int], quality: int = QUALITY) -> bytes:
    """An image as a JPEG of another size: cut where it is larger, repeated in mirror image where it is smaller.

    Args:
        image: Any mode.
        size: Width and height, at most 8192 each.
        quality: Pillow's, from 1 to 95; colour is stored at half resolution, as cameras do.

    Raises:
        InputError: `size` is out of range.
    """
    if not all(1 <= side <= _MAX_SIDE for side in size):
        raise InputError(f"a JPEG of {size[0]}x{size[1]} is not made; sides go from 1 to {_MAX_SIDE}")
    rgb = np.asarray(image.convert("RGB"))[: size[1], : size[0]]
    room = ((0, size[1] - rgb.shape[0]), (0, size[0] - rgb.shape[1]), (0, 0))
    stream = io.BytesIO()
    Image.fromarray(np.pad(rgb, room, mode="symmetric")).save(stream, "JPEG", quality=quality, subsampling="4:2:0")
    return stream.getvalue()


def prove(job: ExportJob, images: ImageBatches, bounds: Thresholds, *, progress: Progress = silent) -> dict[str, Any]:
    """Holds the fast mode against the exact one at a level's bounds, as the checkpoint itself sees both.

    Which engine answers does not matter: what the mode changes is the pixels, and every variant was held against the
    checkpoint already.

    Args:
        job: The checkpoint, its projection, and the classes, whose place prompts take where there are none.
        images: What to make JPEGs of.
        bounds: `min_cosine` and `min_top1` are asked.
        progress: `console.bar` or `console.silent`.

    Returns:
        The record that `Manifest.fast_pixels` keeps: figures, bounds, what they `broken`, and `passed`.

    Raises:
        InputError: No image can be read.
    """
    chosen = spread(images.readable, SHOWN)
    pairs = fast_pairs(progress(chosen, total=len(chosen), desc="fast pixels"), job.checkpoint.pixels)

    def encode(batch: NDArray[np.uint8]) -> NDArray[np.float64]:
        parts = [job.checkpoint.encode_images(batch[start : start + _BATCH]) for start in range(0, len(batch), _BATCH)]
        return project(np.concatenate(parts), job.projection, job.site)

    figures = fast_figures(pairs, encode, job.bank_or_prompts())
    broken = []
    if not figures.cosine_min >= bounds.min_cosine:
        broken.append(f"cosine to the exact mode {figures.cosine_min:.6f}, below {bounds.min_cosine:g}")
    if figures.top1_agreement is not None and not figures.top1_agreement >= bounds.min_top1:
        broken.append(f"the same best match on {figures.top1_agreement:.2%}, below {bounds.min_top1:.2%}")
    return {
        **figures.to_json(),
        "sizes": [list(size) for size in SIZES],
        "min_cosine": bounds.min_cosine,
        "min_top1": bounds.min_top1,
        "broken": broken,
        "passed": not broken,
    }


def fast_pairs(
    paths: Iterable[Path], spec: PixelSpec, sizes: Sequence[tuple[int, int]] = SIZES
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Some of the images as JPEGs of each size, through the exact mode and through the fast one.

    Args:
        paths: Readable images.
        spec: How the tower wants them.
        sizes: Width and height of the JPEGs.

    Returns:
        Pairs of uint8 [H, W, 3].

    Raises:
        InputError: An image cannot be read.
    """
    for path in paths:
        image = open_image(path)
        for size in sizes:
            data = as_jpeg(image, size)
            yield pixels(data, spec), pixels(data, spec, "fast")


def fast_levels(pairs: Iterable[tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> tuple[float, float]:
    """Largest and mean difference of what `fast_pairs` gives, in levels of 255; 0 where there are none."""
    worst, total, count = 0, 0, 0
    for exact, fast in pairs:
        off = np.abs(exact.astype(np.int16) - fast)
        worst, total, count = max(worst, int(off.max())), total + int(off.sum()), count + off.size
    return float(worst), total / max(count, 1)


def fast_figures(
    pairs: Iterable[tuple[NDArray[np.uint8], NDArray[np.uint8]]],
    encode: Callable[[NDArray[np.uint8]], NDArray[Any]],
    bank: NDArray[Any] | None = None,
) -> FastFigures:
    """What a tower makes of the fast mode.

    Args:
        pairs: What `fast_pairs` gives; they are held in memory, 300 KB each at 224x224.
        encode: uint8 [n, H, W, 3] to embeddings [n, d] of any length above 0: the checkpoint's, or a graph's.
        bank: [K, d], of unit length: where an image's best match is sought.

    Raises:
        InputError: There is no pair.
    """
    given = list(pairs)
    if not given:
        raise InputError("the fast pixel mode was shown no image; give at least one")
    sides = [np.asarray(encode(np.stack(side)), dtype=np.float64) for side in zip(*given, strict=True)]
    exact, fast = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides)
    cosines = (exact * fast).sum(axis=1)
    same = None if bank is None else agreement(exact @ bank.T, fast @ bank.T, 1)[0]
    return FastFigures(len(given), *fast_levels(given), float(cosines.min()), float(cosines.mean()), same)
