"""The pictures and texts that the contract is checked on: the bundled ones, or the user's own."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import Image

from invariclip.errors import InputError
from invariclip.interventions import PAPER, choose_kinds, intervene
from invariclip.pixels import find_pictures, pixels
from invariclip.semantics import LEARNED_TEXT, context_ids

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.pixels import PixelSpec
    from invariclip.tokenizer import Tokenizer

T = TypeVar("T")

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
_BEHIND = 8
"""Things that are put behind each learned template's vectors."""
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
            InputError: None of the pictures can be read.
        """
        rows: list[NDArray[np.uint8]] = []
        self.read = 0
        for path in self.readable:
            try:
                rows.append(pixels(path, self.spec))
            except InputError as error:
                self.unreadable[path] = str(error)
                warnings.warn(f"left out of the check: {error}", UnreadablePictureWarning, stacklevel=2)
                continue
            self.read += 1
            if len(rows) == size:
                yield np.stack(rows)
                rows = []
        if rows:
            yield np.stack(rows)
        if not self.read:
            first = next(iter(self.unreadable.values()), "no path was given")
            raise InputError(f"none of the {len(self.paths)} pictures can be read; the first: {first}")

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
    return Pictures(spread(bundled, BUNDLED_LIMIT), spec)


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, evenly spread, in order."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in places]


def altered(batch: NDArray[np.uint8], seed: int = 0) -> NDArray[np.uint8]:
    """Each picture under one photometric intervention, drawn by its content alone.

    Args:
        batch: uint8 [n, H, W, 3], as the tower sees them.
        seed: Of the draws.

    Returns:
        The same shape and dtype.
    """
    changed = []
    for picture in batch:
        key = hashlib.sha256(picture.tobytes()).hexdigest()
        (kind,) = choose_kinds(PAPER, key, seed)
        changed.append(np.asarray(intervene(Image.fromarray(picture), kind, key, seed)))
    return np.stack(changed)


def ids_behind(contexts: tuple[int, int], tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Ids of some things behind the vectors of each learned template, int64 [N, L].

    Args:
        contexts: M and n, see `semantics.context_ids`.
        tokenizer: The checkpoint's.
    """
    learned, tokens = contexts
    texts = [LEARNED_TEXT.format(thing) for thing in spread(_THINGS, _BEHIND)]
    return np.concatenate(
        [tokenizer(texts, prefix=context_ids(template, tokens)) for template in range(1, learned + 1)]
    )


def ids_of(texts: Sequence[str], tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Ids of the texts, int64 [N, L], without a warning for the one that is meant to be too long."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tokenizer(list(texts))
