"""The images and texts that the contract is checked on: the bundled ones, or the user's own."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from invariclip.errors import InputError
from invariclip.export.checkpoints.check_texts import spread
from invariclip.preprocessing.find import find_images
from invariclip.preprocessing.interventions import PAPER, choose_kinds, intervene
from invariclip.preprocessing.pixels import pixels

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.preprocessing.pixels import PixelSpec

BUNDLED_LIMIT = 240
"""Bundled images used when the user names none: two hundred and a reserve, so that large models stay bearable."""


@dataclass
class ImageBatches:
    """Images read batch by batch; one that cannot be read is warned of and counted, never skipped in silence.

    Attributes:
        paths: The files.
        spec: How the tower wants them.
        read: How many the last pass gave.
        unreadable: Path to message of those that could not be read.
    """

    paths: Sequence[Path]
    spec: PixelSpec
    read: int = 0
    unreadable: dict[Path, str] = field(default_factory=dict)

    @property
    def readable(self) -> list[Path]:
        """The files that nothing is known against; after one pass of `batches`, those that it gave."""
        return [path for path in self.paths if path not in self.unreadable]

    def batches(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """uint8 [n, H, W, 3] with n up to `size`, in order; every pass gives the same.

        Raises:
            InputError: None of the images can be read.
        """
        rows: list[NDArray[np.uint8]] = []
        self.read = 0
        for path in self.readable:
            try:
                rows.append(pixels(path, self.spec))
            except InputError as error:
                self.unreadable[path] = str(error)
                warnings.warn(f"left out of the check: {error}", UnreadableImageWarning, stacklevel=2)
                continue
            self.read += 1
            if len(rows) == size:
                yield np.stack(rows)
                rows = []
        if rows:
            yield np.stack(rows)
        if not self.read:
            first = next(iter(self.unreadable.values()), "no path was given")
            raise InputError(f"none of the {len(self.paths)} images can be read; the first: {first}")

    def require_readable(self) -> None:
        """Looks for one image that can be read, so that a mistake shows before minutes of work and not after.

        Raises:
            InputError: None of them can.
        """
        first = None
        for path in self.paths:
            try:
                pixels(path, self.spec)
            except InputError as error:
                first = first or error
            else:
                return
        raise InputError(f"none of the {len(self.paths)} images can be read; the first: {first}")


class UnreadableImageWarning(UserWarning):
    """An image that was named for the check cannot be read."""


def images_of(paths: Sequence[str | Path] | None, spec: PixelSpec) -> ImageBatches:
    """The user's images, or the bundled ones.

    Args:
        paths: Files and folders; None or empty takes up to `BUNDLED_LIMIT` bundled images, evenly spread.
        spec: How the tower wants them.

    Raises:
        InputError: A path does not exist or a folder is empty.
    """
    if paths:
        return ImageBatches(find_images(list(paths)), spec)
    from invariclip.export.reference import images_path

    bundled = find_images([images_path()])
    return ImageBatches(spread(bundled, BUNDLED_LIMIT), spec)


def altered(batch: NDArray[np.uint8], seed: int = 0) -> NDArray[np.uint8]:
    """Each image under one photometric intervention, drawn by its content alone.

    Args:
        batch: uint8 [n, H, W, 3], as the tower sees them.
        seed: Of the draws.

    Returns:
        The same shape and dtype.
    """
    changed = []
    for image in batch:
        key = hashlib.sha256(image.tobytes()).hexdigest()
        (kind,) = choose_kinds(PAPER, key, seed)
        changed.append(np.asarray(intervene(Image.fromarray(image), kind, key, seed)))
    return np.stack(changed)
