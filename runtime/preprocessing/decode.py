"""One image, decoded: whole, or smaller by what a JPEG's decoder can leave out.

A JPEG is stored as frequencies of blocks of 8x8 pixels. Its decoder can give a half, a quarter or an eighth of the
image from the lowest of them, for a fraction of the time.
"""

from __future__ import annotations

import io
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from invariclip.errors import ImageSizeError, InputError, ScaledImageWarning

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
MAX_RESIZED_PIXELS = 25_000_000
"""Pixels that an image may have after the resize and before the crop (100 MB: Pillow takes 4 bytes for each)."""
IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm",
    ".tif", ".tiff", ".webp",
)  # fmt: skip
"""Files with these endings are taken for images; others by their first bytes, see `looks_like`."""
HEIC_SUFFIXES = (".heic", ".heif")
"""Decoded where the package pillow-heif has registered itself with Pillow."""
FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of what is decoded, and of nothing else: some of its other plug-ins start programs (EPS)."""
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"), (b"\x89PNG\r\n\x1a\n", "PNG"), (b"GIF8", "GIF"), (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"), (b"\xff\x4f\xff\x51", "JPEG2000"),
)  # fmt: skip
_HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"}
_WIDE_MODES = ("I;16", "I;16B", "I;16L", "I;16N")
JPEG_FORMATS = ("JPEG", "MPO")
"""What Pillow calls a JPEG: cameras' files that hold several are `MPO`, and only the first is looked at."""

_ORIENTATION = 0x0112
# which EXIF orientations exchange the sides, and which put the stored image's right or lower edge first
_SWAPPED, _RIGHT_FIRST, _LOWER_FIRST = {5, 6, 7, 8}, {2, 3, 6, 7}, {3, 4, 7, 8}
_shared = threading.Lock()
"""Held while a caller's own image is decoded: it may stand in a list twice, or be known to other threads."""


def looks_like(head: bytes) -> str | None:
    """The format that a file's first 32 bytes are of, `HEIC` among them; None for anything else."""
    for magic, name in _MAGIC:
        if head.startswith(magic):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        return "AVIF" if head[8:12] in (b"avif", b"avis") else "HEIC" if head[8:12] in _HEIC_BRANDS else None
    return None


@cache
def _load_plugins() -> None:
    for name in ("AvifImagePlugin", "Jpeg2KImagePlugin", "TiffImagePlugin", "WebPImagePlugin"):
        with suppress(ImportError):  # a Pillow that was built without it
            import_module(f"PIL.{name}")
    Image.preinit()


def _formats() -> list[str]:
    """Those of `FORMATS` that this Pillow has; a plug-in may register itself at any time."""
    _load_plugins()
    return [name for name in FORMATS if name in Image.OPEN]


def decodes_heic() -> bool:
    """Whether Pillow has a plug-in for HEIC."""
    return "HEIF" in Image.OPEN


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
        with _opened(image, name) as opened:
            with _shared if opened is image else nullcontext():
                opened.load()
            turned = ImageOps.exif_transpose(opened) if exif_transpose else opened
            return _to_eight_bits(turned, name)

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
        with _opened(image, name) as opened:
            return _reduced(opened, name, least, exif_transpose=exif_transpose)

    return _in_one_line(name, decoded)


def image_facts(image: ImageInput) -> tuple[str, Size]:
    """What kind of image it is, by Pillow's name of the format, and its size; only its head is read.

    An array or an image that was made in memory is of no format: an empty name.

    Raises:
        InputError: It is missing, not an image, or too large.
    """

    def read() -> tuple[str, Size]:
        with _opened(image, image_name(image)) as opened:
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
        raise InputError(f"{name}: not an image of a known format: {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise ImageSizeError(f"{name}: {str(error).rstrip('.')}; make the image smaller") from error
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error, ... on damaged files
        raise InputError(f"{name}: damaged image ({error})") from error


def _reduced(
    opened: Image.Image, name: str, least: Callable[[Size], Size], *, exif_transpose: bool
) -> tuple[Image.Image, Size, Box | None]:
    """What `open_reduced` returns, of an image whose head was read."""
    if opened.format not in JPEG_FORMATS:
        opened.load()
        whole = _to_eight_bits(ImageOps.exif_transpose(opened) if exif_transpose else opened, name)
        return whole, whole.size, None
    turn = opened.getexif().get(_ORIENTATION, 1) if exif_transpose else 1
    size = _turned(opened.size, turn)
    try:
        wanted = least(size)
    except InputError as error:
        raise type(error)(f"{name}: {error}") from error
    drafted = opened.draft(None, _turned(wanted, turn))
    end = opened.size if drafted is None else drafted[1][2:]
    opened.load()
    turned = ImageOps.exif_transpose(opened) if exif_transpose else opened
    right, lower = _turned(end, turn)
    left = turned.width - right if turn in _RIGHT_FIRST else 0.0
    top = turned.height - lower if turn in _LOWER_FIRST else 0.0
    return turned, size, (left, top, left + right, top + lower)


@contextmanager
def _opened(image: ImageInput, name: str) -> Iterator[Image.Image]:
    """The image with its head read; a file that is opened here is closed when the block ends."""
    if isinstance(image, Image.Image):
        _require_size(name, image.width, image.height)
        yield image
    elif isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
            raise InputError(
                f"{name}: an array of {image.dtype} {list(image.shape)}; pass uint8 [H, W, 3] (RGB) or [H, W]"
            )
        _require_size(name, image.shape[1], image.shape[0])
        yield Image.fromarray(image)
    elif isinstance(image, (bytes, str, os.PathLike)):
        with io.BytesIO(image) if isinstance(image, bytes) else Path(image).open("rb") as stream:
            opened = Image.open(stream, formats=_formats())
            _require_size(name, opened.width, opened.height)
            yield opened
    else:
        raise InputError(f"{name}: pass a path, bytes, a PIL image or a uint8 array")


def _require_size(name: str, width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise InputError(f"{name}: is empty: {width}x{height} pixels")
    if width * height > MAX_IMAGE_PIXELS:
        raise ImageSizeError(
            f"{name}: {width}x{height} is above the limit of {MAX_IMAGE_PIXELS:,} pixels; make the image smaller"
        )


def _to_eight_bits(image: Image.Image, name: str) -> Image.Image:
    """An image of more than eight bits as one of eight, by the range that its numbers are of.

    Pillow's own conversion, which open_clip uses, clips at 255, so that most of a 16-bit image is white. Images of 16
    bits are divided by 257. Those of 32 bits and of floating point do not say what range they are of: it is told from
    their numbers, and warned of. Images of eight bits come back as they are.

    Raises:
        InputError: The numbers are below 0, above 65,535, or not finite.
    """
    if image.mode in _WIDE_MODES:
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    if image.mode not in ("I", "F"):
        return image
    numbers = np.asarray(image).astype(np.float64)
    low, high = (float(numbers.min()), float(numbers.max())) if np.isfinite(numbers).all() else (math.nan, math.nan)
    limit = next((top for top in (1.0, 255.0, 65535.0) if high <= top and not (top == 1 and image.mode == "I")), None)
    if limit is None or not low >= 0:
        raise InputError(
            f"{name}: its numbers are from {low:g} to {high:g}, and an image's are from 0 to 1, 255 or 65535; "
            "convert it to eight bits first"
        )
    what = "whole numbers of 32 bits" if image.mode == "I" else "floating-point numbers"
    warnings.warn(f"{name}: holds {what} up to {high:g}, read as from 0 to {limit:g}", ScaledImageWarning, stacklevel=2)
    return Image.fromarray(np.rint(numbers * (255 / limit)).astype(np.uint8))
