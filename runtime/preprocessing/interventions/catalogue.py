"""All interventions by name, and the names of groups of them."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from invariclip.errors import InputError
from invariclip.preprocessing.interventions.degrade import GaussianNoise, Jpeg, ShotNoise
from invariclip.preprocessing.interventions.exchange import StyleExchange
from invariclip.preprocessing.interventions.geometric import Crop, Flip, Perspective, Rotation
from invariclip.preprocessing.interventions.photometric import (
    ColourJitter,
    Equalize,
    GaussianBlur,
    Greyscale,
    Invert,
    Posterize,
    Solarize,
)
from invariclip.preprocessing.interventions.scene import BackgroundSwap, BackgroundTexture, Fog

if TYPE_CHECKING:
    from collections.abc import Iterable

    from invariclip.preprocessing.interventions.base import Intervention

PAPER = ("colour-jitter", "greyscale", "gaussian-blur", "invert", "posterize", "solarize", "equalize")
"""CLIP-ICM's seven, what `all` stands for; the parity contract draws from these too."""

CATALOGUE: dict[str, type[Intervention]] = {
    kind.name: kind
    for kind in (
        *(ColourJitter, Greyscale, GaussianBlur, Invert, Posterize, Solarize, Equalize),
        *(Crop, Rotation, Perspective, Flip),
        *(Jpeg, GaussianNoise, ShotNoise),
        *(Fog, BackgroundTexture),
        *(BackgroundSwap, StyleExchange),
    )
}
"""By the names that the command line, files and provenance use."""

GROUPS: dict[str, tuple[str, ...]] = {
    "all": PAPER,
    "extended": tuple(name for name, kind in CATALOGUE.items() if not kind.needs_donor),
    "everything": tuple(CATALOGUE),
}
"""The paper's seven; all that need no second image; all."""


@dataclass(frozen=True)
class InterventionRequest:
    """An intervention as it was asked for.

    Attributes:
        label: What tells it from others of its kind; the kind's name unless something else was said. Random choices
            depend on it, so that two of one kind differ.
        change: The kind with its parameters.
    """

    label: str
    change: Intervention

    @property
    def identity(self) -> dict[str, Any] | str:
        """All that a changed image depends on beside image, donor and seed; the paper's seven go by their names."""
        return self.label if self == _PLAIN.get(self.label) else self.to_json()

    def to_json(self) -> dict[str, Any]:
        """Label, kind and every parameter, JSON-ready."""
        return {"label": self.label, "kind": self.change.name, "parameters": self.change.parameters()}


Kind = str | InterventionRequest
"""A name stands for the kind with its defaults."""


def resolve(kind: Kind) -> InterventionRequest:
    """The intervention that a name stands for.

    Raises:
        InputError: No intervention is called that.
    """
    if isinstance(kind, InterventionRequest):
        return kind
    if kind not in CATALOGUE:
        raise unknown("intervention", kind, CATALOGUE)
    return InterventionRequest(kind, CATALOGUE[kind]())


def unknown(what: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that is not known, with the nearest that is and all there are."""
    names = list(known)
    near = get_close_matches(name[:64], names, 1)
    hint = f"; nearest: {near[0]}" if near else ""
    return InputError(f"no {what} is called {name[:64]!r}{hint}; available: {', '.join(names) or 'none'}")


_PLAIN = {name: InterventionRequest(name, CATALOGUE[name]()) for name in PAPER}
