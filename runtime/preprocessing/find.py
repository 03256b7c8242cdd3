"""Images below folders: one walk for every command, and nothing that is passed over without a word.

A file is taken for an image by its suffix, or by its first bytes where the suffix says nothing. Linked folders are
entered, each folder once, so a loop of links ends. What a walk cannot take is counted and warned of by name.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from invariclip.console import printable
from invariclip.errors import InputError, SkippedFilesWarning
from invariclip.preprocessing.decode import HEIC_SUFFIXES, IMAGE_SUFFIXES, decodes_heic, looks_like

_SHOWN = 3
"""Names of each kind that a warning gives."""


def find_images(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Files as given, folders replaced by the images below them, sorted by path.

    Raises:
        InputError: A path does not exist, or a folder holds no image.

    Warns:
        SkippedFilesWarning: Folders that may not be entered, and images that cannot be decoded here.
    """
    return list(walk_images(paths))


def walk_images(paths: Sequence[str | os.PathLike[str]]) -> Iterator[Path]:
    """As `find_images`, one by one; no more than the names in one folder, and in those above it, are held.

    Raises:
        InputError: As `find_images`, when the walk comes there.

    Warns:
        SkippedFilesWarning: As `find_images`, when a folder's walk ends.
    """
    for given in map(Path, paths):
        try:
            is_folder, exists = given.is_dir(), given.exists()
        except OSError as error:
            raise InputError(f"{given}: cannot be read ({error.strerror or error})") from error
        if is_folder:
            walk = _Walk()
            inside = walk.below(given)
            first = next(inside, None)
            if first is None:
                walk.warn(given)
                raise InputError(f"{given}: no image in this folder; known endings: {' '.join(IMAGE_SUFFIXES)}")
            yield first
            yield from inside
            walk.warn(given)
        elif exists:
            yield given
        else:
            raise InputError(f"{given}: no such file or folder")


@dataclass
class _Walk:
    """A walk below one folder, and what it could not take: by kind, how many, and the first names."""

    entered: set[tuple[int, int]] = field(default_factory=set)
    left: dict[str, tuple[int, list[str]]] = field(default_factory=dict)

    def below(self, folder: Path) -> Iterator[Path]:
        """Images in a folder and in those below it, sorted.

        Raises:
            InputError: The folder where the walk begins cannot be listed.
        """
        try:
            facts = folder.stat()
            with os.scandir(folder) as entries:
                wanted = sorted((entry.name, entry.is_dir()) for entry in entries)
        except OSError as error:
            if not self.entered:
                raise InputError(f"{folder}: cannot be listed ({error.strerror or error})") from error
            self._leave("folders that cannot be entered", folder)
            return
        if (facts.st_dev, facts.st_ino) in self.entered:
            return
        self.entered.add((facts.st_dev, facts.st_ino))
        for name, is_folder in wanted:
            path = folder / name
            if is_folder:
                yield from self.below(path)
            elif self._is_image(path):
                yield path

    def warn(self, top: Path) -> None:
        """Says what was left out, if anything."""
        if self.left:
            said = "; ".join(
                f"{count} {kind}: {', '.join(names)}{', …' if count > len(names) else ''}"
                for kind, (count, names) in self.left.items()
            )
            warnings.warn(f"{printable(str(top))}: left out: {said}", SkippedFilesWarning, stacklevel=4)

    def _is_image(self, path: Path) -> bool:
        suffix = path.suffix.lower()
        if suffix in HEIC_SUFFIXES and not decodes_heic():
            self._leave("HEIC images, which need the package pillow-heif", path)
            return False
        try:
            if suffix in IMAGE_SUFFIXES or suffix in HEIC_SUFFIXES:
                return path.is_file()
            if not path.is_file():
                return False
            with path.open("rb") as stream:
                kind = looks_like(stream.read(32))
        except OSError:
            self._leave("files that cannot be read", path)
            return False
        if kind == "HEIC" and not decodes_heic():
            self._leave("HEIC images, which need the package pillow-heif", path)
            return False
        return kind is not None

    def _leave(self, kind: str, path: Path) -> None:
        count, names = self.left.get(kind, (0, []))
        self.left[kind] = (count + 1, names if len(names) == _SHOWN else [*names, printable(str(path))])
