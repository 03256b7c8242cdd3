"""Changed versions of images: which interventions are drawn, and which other image an intervention borrows from.

Both depend on content and seed alone, not on the order of the images.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from invariclip.errors import InputError, NotApplicableError
from invariclip.preprocessing.interventions import InterventionRequest, choose_kinds, intervene, resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.calibrate.data.images import ImageRecord
    from invariclip.preprocessing.interventions import InterventionRequest, Kind


@dataclass(frozen=True)
class Versions:
    """The changed versions of one image.

    Attributes:
        images: uint8 [H, W, 3] each.
        labels: What made each.
        declined: Labels and reasons of those that could not be made.
    """

    images: list[NDArray[np.uint8]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    declined: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Changes:
    """Which versions to make of every image.

    Attributes:
        kinds: Interventions to draw from; none for no versions.
        draws: Versions of every image, or all of the kinds where they are fewer.
        seed: What is drawn depends on it and on the image's content, and nothing else.
    """

    kinds: tuple[Kind, ...] = ()
    draws: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses what cannot be drawn, before anything is read.

        Raises:
            InputError: A kind is not known, or there are fewer than one draw.
        """
        object.__setattr__(self, "kinds", tuple(resolve(kind) for kind in self.kinds))
        if self.draws < 1:
            raise InputError(f"draws must be one or more, not {self.draws}; for none leave the interventions out")

    @property
    def chosen(self) -> tuple[InterventionRequest, ...]:
        """The kinds with their labels and parameters."""
        return tuple(resolve(kind) for kind in self.kinds)

    @property
    def needs_donor(self) -> bool:
        """Whether a kind takes something from a second image."""
        return any(kind.change.needs_donor for kind in self.chosen)

    def versions(
        self, image: NDArray[np.uint8], digest: str, donor: Callable[[str], NDArray[np.uint8] | None]
    ) -> Versions:
        """The changed versions of one image.

        Args:
            image: uint8 [H, W, 3], as the tower sees it.
            digest: sha256 of its content.
            donor: The second image for an intervention's label, as the tower sees it; None if there is none.
        """
        made = Versions()
        for kind in choose_kinds(self.chosen, digest, self.seed, self.draws):
            try:
                lent = donor(kind.label) if kind.change.needs_donor else None
                made.images.append(changed(image, kind, digest, self.seed, lent))
                made.labels.append(kind.label)
            except InputError as error:  # not applicable to this image, or nothing to borrow from
                made.declined.append(f"{kind.label}: {error}")
        return made

    def to_json(self) -> dict[str, Any] | None:
        """What the versions depend on beside the images; None where there are none."""
        kinds = [kind.to_json() for kind in self.chosen]
        return {"kinds": kinds, "draws": self.draws, "seed": self.seed} if kinds else None


NO_CHANGES = Changes()


def changed(
    image: NDArray[np.uint8], kind: Kind, digest: str, seed: int, donor: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """One image under one intervention, which must change something: else it would be paired with itself.

    Args:
        image: uint8 [H, W, 3], as the tower sees it.
        kind: What to do.
        digest: sha256 of its content.
        seed: The run's seed.
        donor: The second image, as the tower sees it.

    Raises:
        NotApplicableError: The image stays as it is, such as a grey one made grey; or see `intervene`.
        InputError: A second image is needed and there is none.
    """
    second = None if donor is None else Image.fromarray(donor)
    made = np.asarray(intervene(Image.fromarray(image), kind, digest, seed, second))
    if np.array_equal(made, image):
        raise NotApplicableError("it changes nothing in this image")
    return made


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


@dataclass(frozen=True)
class EmbeddingJob:
    """One embedding to make.

    Attributes:
        path: The image's file.
        kind: The intervention to apply, or None for the image as it is.
        seed: Seed of the intervention; without meaning where there is none.
        donor: The second image's file, for interventions that need one.
    """

    path: Path
    kind: Kind | None = None
    seed: int = 0
    donor: Path | None = None
