"""Bytes to pixels, bit-defined: the same calls, in the same order, as open_clip's evaluation transform.

open_clip resizes the image in the mode it was stored in (a palette image therefore by nearest neighbour, a
transparent one with its alpha premultiplied), crops at a *rounded* offset, and only then converts to RGB. EXIF
orientation is not applied, because training pipelines do not apply it. Calibration, export and serving all come
through here, so that what was measured is what answers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from invariclip.errors import ArtifactError, ImageSizeError, InputError
from invariclip.preprocessing.decode import (
    MAX_IMAGE_PIXELS,
    MAX_RESIZED_PIXELS,
    Box,
    ImageInput,
    Size,
    image_name,
    open_image,
    open_reduced,
)

__all__ = [
    "FAST_MARGIN",
    "MAX_IMAGE_PIXELS",
    "MAX_RESIZED_PIXELS",
    "PIXEL_MODES",
    "ImageInput",
    "PixelMode",
    "PixelSpec",
    "normalise",
    "open_image",
    "pixels",
    "require_pixel_mode",
    "resized_pixels",
    "stack",
]  # fmt: skip

PixelMode = Literal["exact", "fast"]
PIXEL_MODES: tuple[PixelMode, ...] = ("exact", "fast")
FAST_MARGIN = 3
"""How many times larger than needed a JPEG stays that `fast` decodes smaller.

Of embeddings of the bundled checkpoint, on photographs that are just as many times larger, the smallest cosine was
0.992 at 1, 0.997 at 2 (top-1 agreement 88 %: that fails a contract) and 0.9997 at 3 (100 % of 48).
"""
_MAX_WEIGHTS = 1 << 24  # of the filter in one direction, 8 bytes each


@dataclass(frozen=True)
class PixelSpec:
    """How a checkpoint wants its images; the field names are open_clip's.

    Attributes:
        image_size: Height and width that the image tower takes, in pixels.
        image_mean: Per-channel mean, in units where a channel spans 0 to 1.
        image_std: Per-channel standard deviation, in the same units.
        interpolation: Resampling filter of the resize.
        resize_mode: `shortest` edge to size then centre crop, `longest` edge to size then pad, or `squash`.
        fill_color: Grey level of the padding of `longest`.
    """

    image_size: tuple[int, int]
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill_color: int = 0

    def __post_init__(self) -> None:
        """Refuses what `pixels` could not honour, also when it comes from a manifest.

        Raises:
            ArtifactError: A field is outside its range.
        """
        if len(self.image_size) != 2 or not all(type(side) is int and 1 <= side <= 4096 for side in self.image_size):
            raise ArtifactError(f"image_size {self.image_size} is not a height and a width from 1 to 4096")
        if self.interpolation not in ("bicubic", "bilinear"):
            raise ArtifactError(f"interpolation {self.interpolation!r} is not known; available: bicubic, bilinear")
        if self.resize_mode not in ("shortest", "longest", "squash"):
            raise ArtifactError(f"resize_mode {self.resize_mode!r} is not known; available: shortest, longest, squash")
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise ArtifactError("image_mean and image_std need three numbers each, the latter above zero")

    def to_json(self) -> dict[str, Any]:
        """The spec as the manifest stores it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def pixels(
    image: ImageInput, spec: PixelSpec, mode: PixelMode = "exact", *, exif_transpose: bool = False
) -> NDArray[np.uint8]:
    """One image as the tower sees it, before normalisation.

    `fast` is another way for JPEGs that come as a path or as bytes, and the same as `exact` for all else. The decoder
    leaves out what the resize would average away, but never so much that less than `FAST_MARGIN` times the needed size
    is left; and the resize computes only what the crop keeps. Measured at 224 pixels: up to six times larger images
    are 1 level of 255 off, because nothing can be left out; larger photographs up to 6, 0.4 in the mean, and drawings
    with hard edges up to 17. Whether a tower minds is for the contract to say (`export.contract.fast_pixels`).

    Args:
        image: See `ImageInput`.
        spec: How the tower wants it.
        mode: `exact`, or `fast`.
        exif_transpose: See `decode.open_image`.

    Returns:
        uint8 [H, W, 3], RGB; in mode `exact` equal to open_clip's evaluation transform before its tensor conversion.

    Raises:
        InputError: The image cannot be read, or no mode is called `mode`.
        ImageSizeError: It is too large, before or after the resize; see `resized_pixels`.
    """
    require_pixel_mode(mode)
    if mode == "fast" and isinstance(image, (str, os.PathLike, bytes)):
        opened, whole, box = open_reduced(image, lambda size: _spacious(size, spec), exif_transpose=exif_transpose)
    else:
        opened, box = open_image(image, exif_transpose=exif_transpose), None
        whole = opened.size
    try:
        fitted = _fit(opened, spec) if box is None else _fit_part(opened, whole, box, spec)
        return np.asarray(fitted.convert("RGB"))
    except InputError as error:
        raise type(error)(f"{image_name(image)}: {error}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{image_name(image)}: cannot be converted to RGB ({error})") from error


def resized_pixels(size: Size, spec: PixelSpec) -> int:
    """How many pixels the resize of an image makes, before the crop or padding.

    Args:
        size: The image's width and height, 1 or more each.
        spec: How the tower wants it.

    Raises:
        ImageSizeError: There would be more than `MAX_RESIZED_PIXELS`, at the end or between the two passes of the
            resize, or the filter's weights would take too much memory.
    """
    (width, height), _ = _resized(size, spec)
    return width * height


def require_pixel_mode(mode: str) -> None:
    """Makes sure that `pixels` knows a mode.

    Raises:
        InputError: It does not.
    """
    if mode not in PIXEL_MODES:
        raise InputError(f"no pixel mode is called {mode!r}; available: {', '.join(PIXEL_MODES)}")


def stack(
    images: Sequence[ImageInput],
    spec: PixelSpec,
    mode: PixelMode = "exact",
    *,
    exif_transpose: bool = False,
    workers: int = 1,
) -> NDArray[np.uint8]:
    """Several images as one batch, uint8 [N, H, W, 3], in order; the arguments are those of `pixels`.

    Raises:
        InputError: One of them cannot be read; the message names it. Or no mode is called `mode`.
    """
    batch = np.empty((len(images), *spec.image_size, 3), dtype=np.uint8)

    def fill(index: int) -> None:
        batch[index] = pixels(images[index], spec, mode, exif_transpose=exif_transpose)

    if workers > 1 and len(images) > 1:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(fill, range(len(images))))
    else:
        for index in range(len(images)):
            fill(index)
    return batch


def normalise(batch: NDArray[np.uint8], spec: PixelSpec) -> NDArray[np.float32]:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W], bit-equal to torchvision's ToTensor and Normalize."""
    scaled = batch.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    mean = np.asarray(spec.image_mean, dtype=np.float32)[:, None, None]
    std = np.asarray(spec.image_std, dtype=np.float32)[:, None, None]
    return np.ascontiguousarray((scaled - mean) / std)


def _fit(image: Image.Image, spec: PixelSpec) -> Image.Image:
    """Resize and crop or pad to `spec.image_size`, as torchvision's and open_clip's transforms do."""
    size, filter_ = _resized(image.size, spec)
    return _crop_or_pad(image.resize(size, filter_), spec)


def _fit_part(image: Image.Image, whole: Size, box: Box, spec: PixelSpec) -> Image.Image:
    """As `_fit`, of the image of size `whole` that fills `box` of an image; resizes no more than the crop keeps."""
    (width, height), filter_ = _resized(whole, spec)
    wanted_h, wanted_w = spec.image_size
    if width < wanted_w or height < wanted_h:
        return _crop_or_pad(image.resize((width, height), filter_, box), spec)
    left, top = _crop_offset((width, height), spec)
    x, y = (box[2] - box[0]) / width, (box[3] - box[1]) / height
    kept = (
        box[0] + left * x,
        box[1] + top * y,
        min(box[0] + (left + wanted_w) * x, box[2]),
        min(box[1] + (top + wanted_h) * y, box[3]),
    )
    return image.resize((wanted_w, wanted_h), filter_, kept)


def _spacious(whole: Size, spec: PixelSpec) -> Size:
    """What a JPEG's decoder must leave of an image's width and height."""
    (width, height), _ = _resized(whole, spec)
    return FAST_MARGIN * width, FAST_MARGIN * height


def _resized(size: Size, spec: PixelSpec) -> tuple[Size, Image.Resampling]:
    """An image's width and height after the resize and before crop or padding, and the filter.

    Raises:
        ImageSizeError: See `resized_pixels`.
    """
    width, height = size
    wanted_h, wanted_w = spec.image_size
    filter_ = Image.Resampling.BICUBIC if spec.interpolation == "bicubic" else Image.Resampling.BILINEAR
    if spec.resize_mode == "squash":
        resized = (wanted_w, wanted_h)
    elif spec.resize_mode == "longest":
        resized = _by_ratio(size, max(height / wanted_h, width / wanted_w))
    elif wanted_h == wanted_w:
        short, long = sorted(size)
        scaled = int(wanted_h * long / short)
        resized = (wanted_h, scaled) if width <= height else (scaled, wanted_h)
    else:
        # For a tower that is not square open_clip 3.3 drops the configured filter here and always takes bicubic.
        resized, filter_ = _by_ratio(size, min(height / wanted_h, width / wanted_w)), Image.Resampling.BICUBIC
    _require_bearable(size, resized, filter_)
    return resized, filter_


def _by_ratio(size: Size, ratio: float) -> Size:
    """open_clip's ResizeKeepRatio: both sides divided by one ratio and rounded half to even."""
    return max(1, round(size[0] / ratio)), max(1, round(size[1] / ratio))


def _require_bearable(size: Size, resized: Size, filter_: Image.Resampling) -> None:
    """A strip of few pixels can grow beyond all memory before it is cropped; the C++ runtime has the same bounds.

    Raises:
        ImageSizeError: It would.
    """
    width, height = resized
    # Pillow resizes rows first, but a very high image that becomes lower by its columns first
    columns_first = size[1] > 100 * size[0] and height < size[1]
    between = size[0] * height if columns_first else width * size[1] if width != size[0] else 0
    grown = max(width * height, between)
    if grown > MAX_RESIZED_PIXELS:
        raise ImageSizeError(
            f"an image of {size[0]}x{size[1]} becomes {grown:,} pixels when it is resized to {width}x{height}, above "
            f"the limit of {MAX_RESIZED_PIXELS:,}; crop it to a shape that is less long"
        )
    support = 2.0 if filter_ == Image.Resampling.BICUBIC else 1.0
    for old, new in zip(size, resized, strict=True):
        taps = 2 * math.ceil(support * max(old / new, 1.0)) + 1
        if old != new and taps * new > _MAX_WEIGHTS:
            raise ImageSizeError(
                f"an image of {size[0]}x{size[1]} is too long to resize to {width}x{height}; "
                "crop it to a shape that is less long"
            )


def _crop_or_pad(image: Image.Image, spec: PixelSpec) -> Image.Image:
    """Centre crop whose offset is rounded half to even; padding, where a side is short, as open_clip pads."""
    height, width = spec.image_size
    short_w, short_h = max(0, width - image.width), max(0, height - image.height)
    if short_w or short_h:
        border = (short_w // 2, short_h // 2, (short_w + 1) // 2, (short_h + 1) // 2)
        image = ImageOps.expand(image, border, fill=_fill(image, spec.fill_color))
    left, top = _crop_offset(image.size, spec)
    return image.crop((left, top, left + width, top + height))


def _crop_offset(size: Size, spec: PixelSpec) -> Size:
    """Where the centre crop begins, left and top, rounded half to even."""
    height, width = spec.image_size
    return round((size[0] - width) / 2.0), round((size[1] - height) / 2.0)


def _fill(image: Image.Image, grey: int) -> int | tuple[int, ...]:
    """Padding level as torchvision sets it: every band, alpha included, gets the same."""
    bands = len(image.getbands())
    return grey if bands == 1 else (grey,) * bands
