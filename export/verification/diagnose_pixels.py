"""Why pixels are not what they should be: each known fault is made on purpose, and named only if it gives the same."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from invariclip.export.verification.figures import max_diff
from invariclip.export.verification.images_check import levels, shown, transform
from invariclip.preprocessing.pixels import normalise, pixels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.export.verification.images_check import RunFront
    from invariclip.preprocessing.pixels import PixelSpec

_CLOSE = 1.0
"""Levels within which two images are the same; honest float rounding stays below it."""


def pixel_causes(paths: Sequence[Path], spec: PixelSpec) -> list[str]:
    """Faults that explain why the runtime's pixels differ from open_clip's transform.

    Args:
        paths: Readable images.
        spec: How the tower wants them.
    """
    theirs = transform(spec)
    triples = (
        (np.asarray(image), levels(normalise(pixels(image, spec)[None], spec), spec)[0], levels(theirs(image), spec))
        for image in shown(paths, spec)
        if image.mode == "RGB"  # faults are made for images that need no conversion
    )
    return [f"pixels: {words}" for words in _explained(triples, spec)]


def front_causes(run: RunFront, images: Iterable[NDArray[np.uint8]], spec: PixelSpec) -> list[str]:
    """Faults that explain why a graph's own resize differs from the runtime's pixels.

    Args:
        run: See `images_check.open_front`.
        images: uint8 [h, w, 3] each, of any size.
        spec: How the tower wants images.
    """
    triples = ((image, run(image), pixels(image, spec)) for image in images)
    return [f"resize in the graph: {words}" for words in _explained(triples, spec)]


def _explained(triples: Iterable[tuple[NDArray[np.uint8], NDArray[Any], NDArray[Any]]], spec: PixelSpec) -> list[str]:
    """The faults that give what was got of every image, where at least one differs from what was wanted.

    One image after the other, because large ones do not fit into memory together.
    """
    differs, left = False, _FAULTS
    for image, got, wanted in triples:
        differs = differs or not max_diff(got, wanted) <= _CLOSE  # so that a NaN differs
        left = {words: fault for words, fault in left.items() if _same(got, fault(image, wanted, spec))}
        if not left:
            break
    return list(left) if differs else []


def _same(got: NDArray[Any], made: NDArray[Any] | None) -> bool:
    return made is not None and got.shape == made.shape and max_diff(np.clip(np.round(got), 0, 255), made) <= _CLOSE


def _swapped(image: NDArray[np.uint8], wanted: NDArray[Any], spec: PixelSpec) -> NDArray[Any]:
    del image, spec
    return wanted[..., ::-1]


def _floored(image: NDArray[np.uint8], wanted: NDArray[Any], spec: PixelSpec) -> NDArray[Any] | None:
    del wanted
    return _fit(image, spec, offset=math.floor)


def _floats_first(image: NDArray[np.uint8], wanted: NDArray[Any], spec: PixelSpec) -> NDArray[Any] | None:
    del wanted
    return _fit(image, spec, in_floats=True)


def _floats_and_floored(image: NDArray[np.uint8], wanted: NDArray[Any], spec: PixelSpec) -> NDArray[Any] | None:
    del wanted
    return _fit(image, spec, in_floats=True, offset=math.floor)


def _nearest(image: NDArray[np.uint8], wanted: NDArray[Any], spec: PixelSpec) -> NDArray[Any] | None:
    del wanted
    return _fit(image, spec, filter_=Image.Resampling.NEAREST)


def _other_filter(image: NDArray[np.uint8], wanted: NDArray[Any], spec: PixelSpec) -> NDArray[Any] | None:
    del wanted
    other = Image.Resampling.BILINEAR if spec.interpolation == "bicubic" else Image.Resampling.BICUBIC
    return _fit(image, spec, filter_=other)


_FAULTS: dict[str, Callable[[NDArray[np.uint8], NDArray[Any], PixelSpec], NDArray[Any] | None]] = {
    "red and blue are swapped": _swapped,
    "the crop's offset is cut off, not rounded": _floored,
    "it is resized in floats, not in bytes": _floats_first,
    "it is resized in floats, not in bytes, and the crop's offset is cut off, not rounded": _floats_and_floored,
    "it is resized by the other of bicubic and bilinear": _other_filter,
    "it is resized by nearest neighbour": _nearest,
}


def _fit(
    image: NDArray[np.uint8],
    spec: PixelSpec,
    *,
    in_floats: bool = False,
    offset: Callable[[float], int] = round,
    filter_: Image.Resampling | None = None,
) -> NDArray[Any] | None:
    """Resize and centre crop of an RGB image to a square tower, written apart from the runtime's, with faults.

    Args:
        image: uint8 [h, w, 3].
        spec: How the tower wants it.
        in_floats: Neither round nor clip between the two passes, only at the end.
        offset: Makes a whole number of the crop's offset.
        filter_: Another filter than the spec's.

    Returns:
        [H, W, 3] in levels; None for a spec that this cannot do.
    """
    height, width = spec.image_size
    if spec.resize_mode == "longest" or (spec.resize_mode == "shortest" and height != width):
        return None
    size = (width, height)
    if spec.resize_mode == "shortest":
        tall, wide = image.shape[:2]
        scaled = int(height * max(tall, wide) / min(tall, wide))
        size = (height, scaled) if wide <= tall else (scaled, height)
    taken = Image.Resampling.BICUBIC if spec.interpolation == "bicubic" else Image.Resampling.BILINEAR
    filter_ = taken if filter_ is None else filter_
    if in_floats:
        channels = [Image.fromarray(channel.astype(np.float32)) for channel in image.transpose(2, 0, 1)]
        whole = np.stack([np.asarray(channel.resize(size, filter_)) for channel in channels], axis=-1)
        whole = np.clip(np.round(whole), 0, 255)
    else:
        whole = np.asarray(Image.fromarray(image).resize(size, filter_))
    top, left = offset((whole.shape[0] - height) / 2), offset((whole.shape[1] - width) / 2)
    return whole[top : top + height, left : left + width]
