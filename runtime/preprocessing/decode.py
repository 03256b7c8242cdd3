"""One image, decoded: whole, or smaller by what a JPEG's decoder can leave out.

A JPEG is stored as frequencies of blocks of 8x8 pixels. Its decoder can give a half, a quarter or an eighth of the
image from the lowest of them, for a fraction of the time.
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

ImageInput: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]
"""A path, encoded bytes, a PIL image, or a uint8 array [H, W, 3] (RGB) or [H, W] (greyscale)."""
Size: TypeAlias = tuple[int, int]
"""Width and height, in pixels, as PIL has them."""
Box: TypeAlias = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels of an image."""

MAX_IMAGE_PIXELS = 200_000_000
"""Images above this are refused before they are decoded (600 MB as RGB)."""
JPEG_FORMATS = ("JPEG", "MPO")
"""What Pillow calls a JPEG: cameras' files that hold several are `MPO`, and only the first is looked at."""

_ORIENTATION = 0x0112
# which EXIF orientations exchange the sides, and which put the stored image's right or lower edge first
_SWAPPED, _RIGHT_FIRST, _LOWER_FIRST = {5, 6, 7, 8}, {2, 3, 6, 7}, {3, 4, 7, 8}
_shared = threading.Lock()
"""Held while a caller's own image is decoded: it may stand in a list twice, or be known to other threads."""


def open_image(image: ImageInput, *, exif_transpose: bool = False) -> Image.Image:
    """Decodes one image fully, in the mode it is stored in.

    Args:
        image: See `ImageInput`.
        exif_transpose: Turn the image as its EXIF orientation says. Off by default: open_clip does not.

    Raises:
        InputError: It is missing, not an image, truncated, too large, or an array of another dtype or shape.
    """
    name = image_name(image)

    def decoded() -> Image.Image:
        opened = _opened(image, name)
        with _shared if opened is image else nullcontext():
            opened.load()
        return ImageOps.exif_transpose(opened) if exif_transpose else opened

    return _in_one_line(name, decoded)


def open_reduced(
    image: str | os.PathLike[str] | bytes, least: Callable[[Size], Size], *, exif_transpose: bool = False
) -> tuple[Image.Image, Size, Box | None]:
    """Decodes one image, a JPEG no larger than it needs to be.

    Args:
        image: A path or encoded bytes.
        least: The image's whole size to the width and height that the decoded one must have at least.
        exif_transpose: See `open_image`.

    Returns:
        The image, in the mode it is stored in; its whole size; and which part of the image the whole is. The last
        column or row of a reduced image may stand for less than a pixel, so that part may end in a fraction. It is
        None for anything but a JPEG, which is decoded as `open_image` does.

    Raises:
        InputError: What `open_image` refuses, or what `least` raises.
    """
    name = image_name(image)

    def decoded() -> tuple[Image.Image, Size, Box | None]:
        opened = _opened(image, name)
        if opened.format not in JPEG_FORMATS:
            opened.load()
            opened = ImageOps.exif_transpose(opened) if exif_transpose else opened
            return opened, opened.size, None
        turn = opened.getexif().get(_ORIENTATION, 1) if exif_transpose else 1
        whole = _turned(opened.size, turn)
        try:
            wanted = least(whole)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        drafted = opened.draft(None, _turned(wanted, turn))
        end = opened.size if drafted is None else drafted[1][2:]
        opened.load()
        opened = ImageOps.exif_transpose(opened) if exif_transpose else opened
        right, lower = _turned(end, turn)
        left = opened.width - right if turn in _RIGHT_FIRST else 0.0
        top = opened.height - lower if turn in _LOWER_FIRST else 0.0
        return opened, whole, (left, top, left + right, top + lower)

    return _in_one_line(name, decoded)


def image_facts(image: ImageInput) -> tuple[str, Size]:
    """What kind of image it is, by Pillow's name of the format, and its size; only its head is read.

    An array or an image that was made in memory is of no format: an empty name.

    Raises:
        InputError: It is missing, not an image, or too large.
    """

    def read() -> tuple[str, Size]:
        opened = _opened(image, image_name(image))
        return opened.format or "", opened.size

    return _in_one_line(image_name(image), read)


def image_name(image: ImageInput) -> str:
    """What to call an image in an error message."""
    if isinstance(image, (str, os.PathLike)):
        return os.fspath(image)
    return f"<{len(image)} bytes>" if isinstance(image, bytes) else f"<{type(image).__name__}>"


def _turned(size: tuple[N, N], turn: int) -> tuple[N, N]:
    """Width and height after an EXIF orientation; the same from there back."""
    return (size[1], size[0]) if turn in _SWAPPED else size


def _in_one_line(name: str, decoded: Callable[[], T]) -> T:
    """What `decoded` gives, or whatever it raises as one typed line that names the image."""
    try:
        return decoded()
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"{name}: is a directory, not an image") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{name}: not an image that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: {error}") from error
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error, ... on damaged files
        raise InputError(f"{name}: damaged image ({error})") from error


def _opened(image: ImageInput, name: str) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
            raise InputError(
                f"{name}: an array of {image.dtype} {list(image.shape)}; pass uint8 [H, W, 3] (RGB) or [H, W]"
            )
        opened = Image.fromarray(image)
    elif isinstance(image, bytes):
        opened = Image.open(io.BytesIO(image))
    elif isinstance(image, (str, os.PathLike)):
        opened = Image.open(image)
    else:
        raise InputError(f"{name}: pass a path, bytes, a PIL image or a uint8 array")
    if opened.width * opened.height > MAX_IMAGE_PIXELS:
        raise InputError(f"{name}: {opened.width}x{opened.height} is above the limit of {MAX_IMAGE_PIXELS:,} pixels")
    return opened
