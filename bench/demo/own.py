"""`invariclip demo --images DIR --classes …`: the user's own images with the user's own words, before and after."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import invariclip
from invariclip.calibrate.data.images import SkippedImageWarning
from invariclip.errors import InputError
from invariclip.preprocessing.find import find_images
from invariclip.preprocessing.pixels import open_image
from invariclip.preprocessing.prompts import check_prompts

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from invariclip.results import Prediction


@dataclass(frozen=True)
class DemoRequest:
    """What was asked for: images that can be read, and the words to choose from."""

    paths: tuple[Path, ...]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Own:
    """One of the user's images, and what it is taken for without the projection and with it."""

    path: Path
    before: Prediction
    after: Prediction

    @property
    def changed(self) -> bool:
        """Whether the projection changes the answer."""
        return self.before.label != self.after.label


def wanted(images: Path | None, classes: str | None, templates: Sequence[str]) -> DemoRequest | None:
    """Checks the options before minutes of work; images that cannot be read are named in a warning and left out.

    Args:
        images: A folder or an image.
        classes: Words with commas between them.
        templates: Prompts that the words go into.

    Returns:
        None where nothing was asked for.

    Raises:
        InputError: One option stands without the other, a word is empty or repeated, or no image can be read.
    """
    if images is None and classes is None:
        return None
    if images is None:
        raise InputError("--classes are the words for your own images: add --images DIR, or leave --classes out")
    words = tuple(word.strip() for word in (classes or "").split(",") if word.strip())
    if len(words) < 2:
        raise InputError('--images needs two words or more to choose from: add --classes "dog,cat,car"')
    check_prompts(words, templates)
    readable: list[Path] = []
    for path in find_images([images]):
        try:
            open_image(path)
        except InputError as error:
            warnings.warn(f"skipped: {error}", SkippedImageWarning, stacklevel=2)
        else:
            readable.append(path)
    if not readable:
        raise InputError(f"{images}: no image there can be read; name a folder of JPEG, PNG or WebP files")
    return DemoRequest(tuple(readable), words)


def classify_own(asked: DemoRequest, before: Path, after: Path, templates: Sequence[str]) -> list[Own]:
    """The answers of both artifacts.

    Args:
        asked: See `wanted`.
        before: Artifact without the projection.
        after: Artifact with it.
        templates: Prompts.
    """
    old, new = (
        invariclip.load(folder).with_classes(asked.classes, list(templates)).classify(list(asked.paths))
        for folder in (before, after)
    )
    return [Own(*each) for each in zip(asked.paths, old, new, strict=True)]
