"""The changed versions that an image gets: the one place where sources meet the interventions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from invariclip.errors import InputError, NotApplicableError
from invariclip.preprocessing.interventions import InterventionRequest, choose_kinds, intervene, resolve

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from invariclip.preprocessing.interventions import Kind


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
