"""The pictures and texts that the contract is checked on: the bundled ones, or the user's own."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from invariclip.errors import InputError
from invariclip.pixels import find_pictures, pixels

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.pixels import PixelSpec
    from invariclip.tokenizer import Tokenizer

BUNDLED_LIMIT = 240
"""Bundled pictures used when the user names none: two hundred and a reserve, so that large models stay bearable."""

_THINGS = (
    "dog", "cat", "horse", "elephant", "giraffe", "guitar", "violin", "house", "person", "bicycle", "bus", "airplane",
    "boat", "apple", "pineapple", "bread", "pizza", "cup of coffee", "chair", "clock", "camera", "telephone", "book",
    "key", "hammer", "umbrella", "mountain", "river", "tree", "mushroom", "sunflower", "rose", "butterfly", "spider",
    "whale", "owl", "penguin", "snake", "crab", "snail", "moon", "rainbow", "fire", "snowman", "football", "trophy",
    "lighthouse", "bridge", "castle", "tractor", "rocket", "candle", "piano", "drum", "scissors", "envelope",
)  # fmt: skip
_MANNERS = ("{}", "a photo of a {}.", "a flat sticker of a {}", "a black and white line drawing of a {}, on paper")
_ODD = (
    "",
    "日本の城と桜",
    "ein Foto eines Hundes, der über die Wiese läuft",
    "👩‍🚀🚀 &amp; friends <3",
    "It's the dog's; they'd say we've won 42-17!",
    "<start_of_text> a text about <end_of_text> tokens",
    "a very long caption " + "with one more detail and another one " * 12,
)
TEXTS = (*(manner.format(thing) for thing in _THINGS for manner in _MANNERS), *_ODD)
"""What the text tower is checked on: short and long prompts, other scripts, empty, and one that is cut."""
PROMPTS = tuple(f"a photo of a {thing}." for thing in _THINGS)
"""What pictures are matched with where no classes are baked in."""


@dataclass
class Pictures:
    """Pictures read batch by batch; one that cannot be read is warned of and counted, never skipped in silence.

    Attributes:
        paths: The files.
        spec: How the tower wants them.
        read: How many were read so far.
        unreadable: Messages of those that could not be.
    """

    paths: Sequence[Path]
    spec: PixelSpec
    read: int = 0
    unreadable: list[str] = field(default_factory=list)

    def batches(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """uint8 [n, H, W, 3] with n up to `size`, in order.

        Raises:
            InputError: None of the pictures can be read.
        """
        rows: list[NDArray[np.uint8]] = []
        for path in self.paths:
            try:
                rows.append(pixels(path, self.spec))
            except InputError as error:
                self.unreadable.append(str(error))
                warnings.warn(f"left out of the check: {error}", UnreadablePictureWarning, stacklevel=2)
                continue
            self.read += 1
            if len(rows) == size:
                yield np.stack(rows)
                rows = []
        if rows:
            yield np.stack(rows)
        if not self.read:
            raise InputError(f"none of the {len(self.paths)} pictures can be read; the first: {self.unreadable[0]}")

    def require_readable(self) -> None:
        """Looks for one picture that can be read, so that a mistake shows before minutes of work and not after.

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
        raise InputError(f"none of the {len(self.paths)} pictures can be read; the first: {first}")


class UnreadablePictureWarning(UserWarning):
    """A picture that was named for the check cannot be read."""


def pictures_of(given: Sequence[str | Path] | None, spec: PixelSpec) -> Pictures:
    """The user's pictures, or the bundled ones.

    Args:
        given: Files and folders; None or empty takes up to `BUNDLED_LIMIT` bundled pictures, evenly spread.
        spec: How the tower wants them.

    Raises:
        InputError: A path does not exist or a folder is empty.
    """
    if given:
        return Pictures(find_pictures(list(given)), spec)
    from invariclip.export.reference import pictures_path

    bundled = find_pictures([pictures_path()])
    places = np.linspace(0, len(bundled) - 1, min(BUNDLED_LIMIT, len(bundled))).round().astype(int)
    return Pictures([bundled[place] for place in places], spec)


def ids_of(texts: Sequence[str], tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Ids of the texts, int64 [N, L], without a warning for the one that is meant to be too long."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tokenizer(list(texts))
