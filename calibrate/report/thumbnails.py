"""Small images that a page carries in itself, as data URIs."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

THUMBNAIL = 112
"""Pixels of the longer side."""
MAX_BYTES = 4000
"""Of one small image. The page of a calibration has at most 152 of them (48 in pairs that were changed, 36 natural
ones, 68 around what was found): below 1 MB, base64 included."""


@dataclass(frozen=True)
class Thumbnail:
    """An image of a page.

    Attributes:
        src: A data URI.
        name: Its class.
        setting: Its environment, and how it was changed, if it was.
    """

    src: str
    name: str
    setting: str

    @property
    def alt(self) -> str:
        """What it shows, for those who do not see it."""
        return f"{self.name}, {self.setting}"


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """uint8 [H, W, 3] as a WebP of at most `MAX_BYTES` bytes."""
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    content = b""
    for quality in (80, 60, 40, 20, 5):
        stream = io.BytesIO()
        image.save(stream, "WEBP", quality=quality, method=6)
        content = stream.getvalue()
        if len(content) <= MAX_BYTES:
            break
    return f"data:image/webp;base64,{base64.b64encode(content).decode()}"
