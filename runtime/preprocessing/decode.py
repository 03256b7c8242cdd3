"""One picture, decoded: whole, or smaller by what a JPEG's decoder can leave out.

A JPEG is stored as frequencies of blocks of 8x8 pixels. Its decoder can give a half, a quarter or an eighth of the
picture from the lowest of them, for a fraction of the time.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from invariclip.errors import InputError

T = TypeVar("T")
N = TypeVar("N", int, float)

Picture: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]
"""A path, encoded bytes, a PIL image, or a uint8 array [H, W, 3] (RGB) or [H, W] (greyscale)."""
Size: TypeAlias = tuple[int, int]
"""Width and height, in pixels, as PIL has them."""
Box: TypeAlias = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels of an image."""

MAX_PICTURE_PIXELS = 200_000_000
"""Pictures above this are refused before they are decoded (600 MB as RGB)."""
JPEG_FORMATS = ("JPEG", "MPO")
"""What Pillow calls a JPEG: cameras' files that hold several are `MPO`, and only the first is looked at."""

_ORIENTATION = 0x0112
# which EXIF orientations exchange the sides, and which put the stored picture's right or lower edge first
_SWAPPED, _RIGHT_FIRST, _LOWER_FIRST = {5, 6, 7, 8}, {2, 3, 6, 7}, {3, 4, 7, 8}
_shared = threading.Lock()
"""Held while a caller's own image is decoded: it may stand in a list twice, or be known to other threads."""


def open_picture(picture: Picture, *, exif_transpose: bool = False) -> Image.Image:
    """Decodes one picture fully, in the mode it is stored in.

    Args:
        picture: See `Picture`.
        exif_transpose: Turn the picture as its EXIF orientation says. Off by default: open_clip does not.

    Raises:
        InputError: It is missing, not a picture, truncated, too large, or an array of another dtype or shape.
    """
    name = picture_name(picture)

    def decoded() -> Image.Image:
        image = _opened(picture, name)
        with _shared if image is picture else nullcontext():
            image.load()
        return ImageOps.exif_transpose(image) if exif_transpose else image

    return _in_one_line(name, decoded)


def open_reduced(
    picture: str | os.PathLike[str] | bytes, least: Callable[[Size], Size], *, exif_transpose: bool = False
) -> tuple[Image.Image, Size, Box | None]:
    """Decodes one picture, a JPEG no larger than it needs to be.

    Args:
        picture: A path or encoded bytes.
        least: The picture's whole size to the width and height that the decoded one must have at least.
        exif_transpose: See `open_picture`.

    Returns:
        The picture, in the mode it is stored in; its whole size; and which part of the image the whole is. The last
        column or row of a reduced picture may stand for less than a pixel, so that part may end in a fraction. It is
        None for anything but a JPEG, which is decoded as `open_picture` does.

    Raises:
        InputError: What `open_picture` refuses, or what `least` raises.
    """
    name = picture_name(picture)

    def decoded() -> tuple[Image.Image, Size, Box | None]:
        image = _opened(picture, name)
        if image.format not in JPEG_FORMATS:
            image.load()
            image = ImageOps.exif_transpose(image) if exif_transpose else image
            return image, image.size, None
        turn = image.getexif().get(_ORIENTATION, 1) if exif_transpose else 1
        whole = _turned(image.size, turn)
        try:
            wanted = least(whole)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        drafted = image.draft(None, _turned(wanted, turn))
        end = image.size if drafted is None else drafted[1][2:]
        image.load()
        image = ImageOps.exif_transpose(image) if exif_transpose else image
        right, lower = _turned(end, turn)
        left = image.width - right if turn in _RIGHT_FIRST else 0.0
        top = image.height - lower if turn in _LOWER_FIRST else 0.0
        return image, whole, (left, top, left + right, top + lower)

    return _in_one_line(name, decoded)


def picture_facts(picture: Picture) -> tuple[str, Size]:
    """What kind of picture it is, by Pillow's name of the format, and its size; only its head is read.

    An array or an image that was made in memory is of no format: an empty name.

    Raises:
        InputError: It is missing, not a picture, or too large.
    """

    def read() -> tuple[str, Size]:
        image = _opened(picture, picture_name(picture))
        return image.format or "", image.size

    return _in_one_line(picture_name(picture), read)


def picture_name(picture: Picture) -> str:
    """What to call a picture in an error message."""
    if isinstance(picture, (str, os.PathLike)):
        return os.fspath(picture)
    return f"<{len(picture)} bytes>" if isinstance(picture, bytes) else f"<{type(picture).__name__}>"


def _turned(size: tuple[N, N], turn: int) -> tuple[N, N]:
    """Width and height after an EXIF orientation; the same from there back."""
    return (size[1], size[0]) if turn in _SWAPPED else size


def _in_one_line(name: str, decoded: Callable[[], T]) -> T:
    """What `decoded` gives, or whatever it raises as one typed line that names the picture."""
    try:
        return decoded()
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


def _opened(picture: Picture, name: str) -> Image.Image:
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
