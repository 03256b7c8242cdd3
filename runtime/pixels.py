"""Bytes to pixels, bit-defined: the same calls, in the same order, as open_clip's evaluation transform.

open_clip resizes the picture in the mode it was stored in (a palette picture therefore by nearest neighbour, a
transparent one with its alpha premultiplied), crops at a *rounded* offset, and only then converts to RGB. EXIF
orientation is not applied, because training pipelines do not apply it. Calibration, export and serving all come
through here, so that what was measured is what answers.
"""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from invariclip.errors import ArtifactError, InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

Picture: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]"
"""A path, encoded bytes, a PIL image, or a uint8 array [H, W, 3] (RGB) or [H, W] (greyscale)."""

PICTURE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
MAX_PICTURE_PIXELS = 200_000_000
"""Pictures above this are refused before they are decoded (600 MB as RGB)."""


@dataclass(frozen=True)
class PixelSpec:
    """How a checkpoint wants its pictures; the field names are open_clip's.

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

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> PixelSpec:
        """Reads what `to_json` wrote.

        Raises:
            ArtifactError: A field is missing, unknown or out of range.
        """
        try:
            plain: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
            }
            return cls(**plain)
        except TypeError as error:
            raise ArtifactError(f"the manifest's pixels are not understood: {error}") from error


def open_picture(picture: Picture, *, exif_transpose: bool = False) -> Image.Image:
    """Decodes one picture fully, in the mode it is stored in.

    Args:
        picture: See `Picture`.
        exif_transpose: Turn the picture as its EXIF orientation says. Off by default: open_clip does not.

    Raises:
        InputError: It is missing, not a picture, truncated, too large, or an array of another dtype or shape.
    """
    name = _name(picture)
    try:
        image = _decode(picture, name)
        image.load()
        return ImageOps.exif_transpose(image) if exif_transpose else image
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"{name}: is a directory, not a picture") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name}: not a picture that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: {error}") from error
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error, ... on damaged files
        raise InputError(f"{name}: damaged picture ({error})") from error


def pixels(picture: Picture, spec: PixelSpec, *, exif_transpose: bool = False) -> NDArray[np.uint8]:
    """One picture as the tower sees it, before normalisation.

    Returns:
        uint8 [H, W, 3], RGB, equal to open_clip's evaluation transform before its tensor conversion.

    Raises:
        InputError: The picture cannot be read.
    """
    image = open_picture(picture, exif_transpose=exif_transpose)
    try:
        return np.asarray(_fit(image, spec).convert("RGB"))
    except InputError as error:
        raise InputError(f"{_name(picture)}: {error}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{_name(picture)}: cannot be converted to RGB ({error})") from error


def stack(
    pictures: Sequence[Picture], spec: PixelSpec, *, exif_transpose: bool = False, workers: int = 1
) -> NDArray[np.uint8]:
    """Several pictures as one batch, uint8 [N, H, W, 3], in order.

    Raises:
        InputError: One of them cannot be read; the message names it.
    """
    batch = np.empty((len(pictures), *spec.image_size, 3), dtype=np.uint8)

    def fill(index: int) -> None:
        batch[index] = pixels(pictures[index], spec, exif_transpose=exif_transpose)

    if workers > 1 and len(pictures) > 1:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(fill, range(len(pictures))))
    else:
        for index in range(len(pictures)):
            fill(index)
    return batch


def normalise(batch: NDArray[np.uint8], spec: PixelSpec) -> NDArray[np.float32]:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W], bit-equal to torchvision's ToTensor and Normalize."""
    scaled = batch.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    mean = np.asarray(spec.image_mean, dtype=np.float32)[:, None, None]
    std = np.asarray(spec.image_std, dtype=np.float32)[:, None, None]
    return np.ascontiguousarray((scaled - mean) / std)


def find_pictures(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Files as given, folders replaced by the pictures below them, sorted by path.

    Raises:
        InputError: A path does not exist, or a folder holds no picture.
    """
    found: list[Path] = []
    for given in map(Path, paths):
        if given.is_dir():
            inside = sorted(p for p in given.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file())
            if not inside:
                raise InputError(f"{given}: no picture in this folder; known endings: {' '.join(PICTURE_SUFFIXES)}")
            found.extend(inside)
        elif given.exists():
            found.append(given)
        else:
            raise InputError(f"{given}: no such file or folder")
    return found


def _name(picture: Picture) -> str:
    """What to call a picture in an error message."""
    if isinstance(picture, (str, os.PathLike)):
        return os.fspath(picture)
    return f"<{len(picture)} bytes>" if isinstance(picture, bytes) else f"<{type(picture).__name__}>"


def _decode(picture: Picture, name: str) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or not (picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] == 3)):
            raise InputError(
                f"{name}: an array of {picture.dtype} {list(picture.shape)}; pass uint8 [H, W, 3] (RGB) or [H, W]"
            )
        image = Image.fromarray(picture)
    elif isinstance(picture, bytes):
        image = Image.open(io.BytesIO(picture))
    elif isinstance(picture, (str, os.PathLike)):
        image = Image.open(picture)
    else:
        raise InputError(f"{name}: pass a path, bytes, a PIL image or a uint8 array")
    if image.width * image.height > MAX_PICTURE_PIXELS:
        raise InputError(f"{name}: {image.width}x{image.height} is above the limit of {MAX_PICTURE_PIXELS:,} pixels")
    return image


def _fit(image: Image.Image, spec: PixelSpec) -> Image.Image:
    """Resize and crop or pad to `spec.image_size`, as torchvision's and open_clip's transforms do."""
    height, width = spec.image_size
    filter_ = Image.Resampling.BICUBIC if spec.interpolation == "bicubic" else Image.Resampling.BILINEAR
    if spec.resize_mode == "squash":
        return image.resize((width, height), filter_)
    if spec.resize_mode == "longest":
        return _crop_or_pad(_resize_ratio(image, spec, filter_, longest=True), spec)
    if height == width:
        short, long = sorted(image.size)
        scaled = int(height * long / short)
        _require_bearable(image, height * scaled)
        size = (height, scaled) if image.width <= image.height else (scaled, height)
        return _crop_or_pad(image.resize(size, filter_), spec)
    # For a tower that is not square open_clip 3.3 drops the configured filter here and always takes bicubic.
    return _crop_or_pad(_resize_ratio(image, spec, Image.Resampling.BICUBIC, longest=False), spec)


def _resize_ratio(image: Image.Image, spec: PixelSpec, filter_: Image.Resampling, *, longest: bool) -> Image.Image:
    """open_clip's ResizeKeepRatio: both sides divided by one ratio and rounded half to even."""
    ratios = (image.height / spec.image_size[0], image.width / spec.image_size[1])
    ratio = max(ratios) if longest else min(ratios)
    size = (max(1, round(image.width / ratio)), max(1, round(image.height / ratio)))
    _require_bearable(image, size[0] * size[1])
    return image.resize(size, filter_)


def _require_bearable(image: Image.Image, resized: int) -> None:
    """A strip of few pixels can grow beyond all memory before it is cropped.

    Raises:
        InputError: It would.
    """
    if resized > MAX_PICTURE_PIXELS:
        raise InputError(
            f"a picture of {image.width}x{image.height} becomes {resized:,} pixels when its shorter side is fitted, "
            f"above the limit of {MAX_PICTURE_PIXELS:,}; crop it"
        )


def _crop_or_pad(image: Image.Image, spec: PixelSpec) -> Image.Image:
    """Centre crop whose offset is rounded half to even; padding, where a side is short, as open_clip pads."""
    height, width = spec.image_size
    short_w, short_h = max(0, width - image.width), max(0, height - image.height)
    if short_w or short_h:
        border = (short_w // 2, short_h // 2, (short_w + 1) // 2, (short_h + 1) // 2)
        image = ImageOps.expand(image, border, fill=_fill(image, spec.fill_color))
    left = round((image.width - width) / 2.0)
    top = round((image.height - height) / 2.0)
    return image.crop((left, top, left + width, top + height))


def _fill(image: Image.Image, grey: int) -> int | tuple[int, ...]:
    """Padding level as torchvision sets it: every band, alpha included, gets the same."""
    bands = len(image.getbands())
    return grey if bands == 1 else (grey,) * bands
