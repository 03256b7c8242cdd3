"""The manifest of an image set: one JSON object a line, one line an image."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

from invariclip.errors import InputError
from invariclip.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


@dataclasses.dataclass(frozen=True)
class StyleImage:
    """One image of the set.

    Attributes:
        file: Path relative to the manifest, with forward slashes.
        concept: Hexcode of what it shows.
        name: English name of the concept.
        keywords: Other English words for it.
        group: The concept's group.
        style: How it is drawn.
        split: "train", "calibrate" or "test"; always "test" in a held-out style.
        concept_split: The concept's own split: "train" means that the reference encoder learnt the concept.
        licence: SPDX identifier.
        sha256: Digest of the file.
    """

    file: str
    concept: str
    name: str
    keywords: tuple[str, ...]
    group: str
    style: str
    split: str
    concept_split: str
    licence: str
    sha256: str


def write_manifest(path: Path, images: Iterable[StyleImage]) -> None:
    """Writes a manifest whole: beside, then renamed."""
    lines = [json.dumps(dataclasses.asdict(image), ensure_ascii=False) for image in images]
    write_atomically(path, "\n".join(lines) + "\n")


def read_manifest(path: Path) -> list[StyleImage]:
    """Reads a manifest.

    Raises:
        InputError: The file is missing or a line is not an image's.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): build the image set first") from error
    images = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            images.append(StyleImage(**{**entry, "keywords": tuple(entry["keywords"])}))
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} line {number} is not an image's entry: {error}") from error
    return images
