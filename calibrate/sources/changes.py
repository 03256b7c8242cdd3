"""The changed versions that a picture gets: the one place where sources meet the interventions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from invariclip.errors import InputError
from invariclip.files import sha256_file
from invariclip.interventions import INTERVENTIONS, choose_kinds, intervene

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Changes:
    """Which versions to make of every picture.

    Attributes:
        kinds: Interventions to draw from; none for no versions.
        draws: Versions of every picture, or all of the kinds where they are fewer.
        seed: What is drawn depends on it and on the picture's content, and nothing else.
    """

    kinds: tuple[str, ...] = ()
    draws: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses what cannot be drawn, before anything is read.

        Raises:
            InputError: A kind is not known, or there are fewer than one draw.
        """
        unknown = [kind for kind in self.kinds if kind not in INTERVENTIONS]
        if unknown:
            raise InputError(f"no intervention is called {unknown[0]!r}; available: {', '.join(INTERVENTIONS)}")
        if self.draws < 1:
            raise InputError(f"draws must be one or more, not {self.draws}; for none leave the interventions out")

    def versions(self, picture: NDArray[np.uint8], digest: str) -> list[tuple[str, NDArray[np.uint8]]]:
        """The changed versions of one picture, and what each is called.

        Args:
            picture: uint8 [H, W, 3], as the tower sees it.
            digest: sha256 of its content.
        """
        chosen = choose_kinds(self.kinds, digest, self.seed, self.draws)
        image = Image.fromarray(picture) if chosen else None
        return [(kind, np.asarray(intervene(image, kind, digest, self.seed))) for kind in chosen if image]

    def to_json(self) -> dict[str, Any] | None:
        """What the versions depend on beside the pictures; None where there are none."""
        return {"kinds": list(self.kinds), "draws": self.draws, "seed": self.seed} if self.kinds else None


NO_CHANGES = Changes()


def digest_of(picture: Path | bytes) -> str:
    """Hexadecimal sha256 of a picture's content.

    Raises:
        OSError: The file cannot be read.
    """
    return hashlib.sha256(picture).hexdigest() if isinstance(picture, bytes) else sha256_file(picture)
