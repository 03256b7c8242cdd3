"""Turns artwork into square RGB images on white, with nothing distorted and nothing cut off."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from PIL import Image

from invariclip.errors import InputError

if TYPE_CHECKING:
    from invariclip.bench.studies.stylebench.artwork import Artwork

SIZE = 256
"""Side of every image in pixels."""

_WHITE = (255, 255, 255, 255)


def render(artwork: Artwork, size: int = SIZE) -> Image.Image:
    """Renders artwork.

    Args:
        artwork: An SVG text, an SVG file or a raster file.
        size: Side of the image in pixels.

    Returns:
        An RGB image of size x size.

    Raises:
        InputError: The artwork cannot be read.
    """
    try:
        if artwork.svg is not None:
            return letterbox(_rasterise(artwork.svg, size), size)
        if artwork.path is None:
            raise InputError("an artwork needs an SVG text or a file")
        if artwork.path.suffix == ".svg":
            return letterbox(_rasterise(artwork.path.read_text(encoding="utf-8"), size), size)
        with Image.open(artwork.path) as image:
            return letterbox(image, size)
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{artwork.path or 'an SVG text'} cannot be rendered: {error}") from error


def _rasterise(svg: str, size: int) -> Image.Image:
    # a stated width and height would win over ours for non-square drawings, so the longer side decides
    import resvg_py

    drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size))))
    if drawn.height > size:
        drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, height=size))))
    return drawn


def letterbox(image: Image.Image, size: int) -> Image.Image:
    """Fits an image into a white square: aspect kept, whole, centred, transparency laid on white.

    Example:
        >>> letterbox(Image.new("RGB", (10, 20), "red"), 8).getpixel((0, 4))
        (255, 255, 255)
    """
    colour = image.convert("RGBA")
    scale = size / max(colour.size)
    fitted = (max(1, round(colour.width * scale)), max(1, round(colour.height * scale)))
    if fitted != colour.size:
        # premultiplied, or the unseen colour of transparent pixels bleeds into the edges
        colour = colour.convert("RGBa").resize(fitted, Image.Resampling.BICUBIC).convert("RGBA")
    canvas = Image.new("RGBA", (size, size), _WHITE)
    canvas.alpha_composite(colour, ((size - fitted[0]) // 2, (size - fitted[1]) // 2))
    return canvas.convert("RGB")
