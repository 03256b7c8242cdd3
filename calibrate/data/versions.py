"""The changed versions of images: under which interventions, and which other image one of them borrows from.

Both depend on content and seed alone, not on the order of the images.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from invariclip.calibrate.data.embed import EmbeddingJob
from invariclip.errors import InputError
from invariclip.preprocessing.interventions import choose_kinds

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from invariclip.calibrate.data.images import ImageRecord
    from invariclip.preprocessing.interventions import InterventionRequest


@dataclass(frozen=True)
class Version:
    """One changed version of an image.

    Attributes:
        origin: Which of the images.
        kind: Which of the interventions.
        job: The embedding to make.
    """

    origin: int
    kind: int
    job: EmbeddingJob


def changed_versions(
    images: Sequence[ImageRecord],
    digests: Sequence[str],
    kinds: Sequence[InterventionRequest],
    *,
    draws: int,
    seed: int,
) -> list[Version]:
    """`draws` versions of every image, each under another intervention.

    Args:
        images: They are also what is borrowed from.
        digests: Hexadecimal sha256 of every image's file.
        kinds: Interventions to draw from.
        draws: Versions of every image; as many as there are kinds, if those are fewer.
        seed: Of the draws.

    Raises:
        InputError: An intervention needs a second image and there is none.
    """
    rows = list(zip(images, digests, strict=True))
    donors = Donors((digest, image.environment, image.path) for image, digest in rows)
    versions = []
    for origin, (image, digest) in enumerate(rows):
        for code in choose_kinds(range(len(kinds)), digest, seed, draws):
            kind, donor = kinds[code], None
            if kind.change.needs_donor:
                donor = donors.choose(digest, image.environment, kind.label, seed)
            versions.append(Version(origin, code, EmbeddingJob(image.path, kind, seed, donor)))
    return versions


class Donors:
    """Images to borrow from, by environment.

    Digests lie evenly on a circle, and the donor is the next one after a drawn point (consistent hashing, Karger et
    al., STOC 1997): an image that is added or lost changes the donors of its own neighbourhood only, so that a cache
    of what was made with them stays worth keeping.
    """

    def __init__(self, images: Iterable[tuple[str, str, Path]]) -> None:
        """Takes digest (hexadecimal sha256), environment and file of every image; order does not matter."""
        self._files: dict[str, Path] = {}
        circles: dict[str, set[str]] = defaultdict(set)
        for digest, environment, path in images:
            # the same content may lie in several files; which of them is read does not matter
            self._files.setdefault(digest, path)
            circles[environment].add(digest)
        self._circles = {environment: sorted(digests) for environment, digests in circles.items()}

    def choose(self, digest: str, environment: str, label: str, seed: int) -> Path:
        """The file that one image borrows from: of another environment if there is one, never the same content.

        Args:
            digest: Of the image that is changed.
            environment: Its own.
            label: Of the intervention; every intervention draws anew.
            seed: The run's seed.

        Raises:
            InputError: There is no other image.
        """
        point = _point(digest, label, seed)
        others = sorted(self._circles.keys() - {environment}, key=lambda name: _point(digest, label, seed, name))
        for name in (*others, environment):
            circle = self._circles.get(name, [])
            start = bisect_left(circle, point)
            for place in (start, start + 1):
                if circle and circle[place % len(circle)] != digest:
                    return self._files[circle[place % len(circle)]]
        raise InputError(f"{label} needs a second image and there is none; add images, or leave it out")


def _point(*parts: str | int) -> str:
    return hashlib.sha256("\n".join(map(str, ("donor", *parts))).encode()).hexdigest()
