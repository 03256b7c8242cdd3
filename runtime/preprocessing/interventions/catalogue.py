"""All interventions by name, how they are asked for, and which ones an image gets.

They are named on the command line, or listed with strengths in a YAML or JSON file (docs/interventions.md):

    - all                       # a group
    - fog                       # a kind with its defaults
    - rotation: {degrees: [5, 15]}

    light-fog: {kind: fog, density: 0.5}
    heavy-fog: {kind: fog, density: [2, 4]}
    greyscale:

Which of them an image gets, and what it looks like then, depends on its content and the seed only.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from invariclip.errors import InputError
from invariclip.plain import read_plain
from invariclip.preprocessing.interventions.base import described
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
    from collections.abc import Iterable, Sequence

    from PIL import Image

    from invariclip.preprocessing.interventions.base import Intervention


SUFFIXES = (".yaml", ".yml", ".json")
LONGEST = 64
"""Characters of a label."""


def parse_kinds(text: str) -> tuple[InterventionRequest, ...]:
    """Interventions as the command line gives them: `none`, names and groups with commas, or a file.

    Raises:
        InputError: A name is not known, or the file cannot be used.
        MissingExtraError: The file is YAML and PyYAML is not installed.
    """
    if text.strip().lower().endswith(SUFFIXES):
        return read_kinds(Path(text.strip()))
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names in ([], ["none"]):
        return ()
    return tuple(dict.fromkeys(kind for name in names for kind in _named(name)))


def read_kinds(path: Path) -> tuple[InterventionRequest, ...]:
    """Interventions of a file.

    Raises:
        InputError: It cannot be read, or an entry, a name or a value cannot be used; the line names the file.
        MissingExtraError: It is YAML and PyYAML is not installed.
    """
    return kinds_of(read_plain(path, "interventions"), str(path))


def kinds_of(content: Any, where: str) -> tuple[InterventionRequest, ...]:
    """Interventions of a file's content: a list or a mapping.

    Args:
        content: Of plain types.
        where: What to call it in messages.

    Raises:
        InputError: An entry, a name or a value cannot be used.
    """
    if content in (None, [], {}):
        raise InputError(f"{where}: lists no intervention; --interventions none does without")
    if not isinstance(content, list | dict):
        raise InputError(f"{where}: holds neither a list nor a mapping of interventions")
    entries = content if isinstance(content, list) else [{label: given} for label, given in content.items()]
    chosen: dict[str, InterventionRequest] = {}
    for number, entry in enumerate(entries, 1):
        try:
            found = _entry(entry)
        except InputError as error:
            raise InputError(f"{where}: entry {number}: {error}") from error
        for kind in found:
            if kind.label in chosen:
                raise InputError(
                    f"{where}: entry {number}: {kind.label!r} stands there twice; give one another label, as in "
                    f"{{my-{kind.label}: {{kind: {kind.change.name}}}}}"
                )
            chosen[kind.label] = kind
    return tuple(chosen.values())


def _named(name: str) -> tuple[InterventionRequest, ...]:
    """A group, or a kind with its defaults."""
    if name not in GROUPS and name not in CATALOGUE:
        raise unknown("intervention", name, ["all", "none", *list(GROUPS)[1:], *CATALOGUE])
    return tuple(resolve(each) for each in GROUPS.get(name, (name,)))


def _entry(entry: Any) -> tuple[InterventionRequest, ...]:
    """A name, or one label with what is said of it."""
    if isinstance(entry, str):
        return _named(entry)
    if not isinstance(entry, dict) or len(entry) != 1:
        raise InputError("must be a name, or one label and its parameters: {fog: {density: [1, 2]}}")
    ((label, given),) = entry.items()
    if not isinstance(label, str) or not 0 < len(label) <= LONGEST or not label.isprintable():
        raise InputError(
            f"a label must be 1 to {LONGEST} printable characters; quote what YAML takes for something else"
        )
    if given is None and label in GROUPS:
        return _named(label)
    if not isinstance(given, dict | None):
        raise InputError(f"{label}: parameters must be a mapping, such as {{density: [1, 2]}}")
    return (_build(label, given or {}),)


def _build(label: str, given: dict[Any, Any]) -> InterventionRequest:
    kind = given.get("kind", label)
    if not isinstance(kind, str) or kind not in CATALOGUE:
        said = " (a label that is no kind needs `kind: NAME`)" if "kind" not in given else ""
        raise InputError(f"{unknown('intervention', str(kind)[:LONGEST], CATALOGUE)}{said}")
    known = [name for name, _, _ in described(CATALOGUE[kind])]
    values = {name: value for name, value in given.items() if name != "kind"}
    for name in values:
        if name not in known:
            raise unknown(f"parameter of {kind}", str(name)[:LONGEST], known)
    return InterventionRequest(label, CATALOGUE[kind](**values))


K = TypeVar("K")


def choose_kinds(kinds: Sequence[K], key: str, seed: int, draws: int = 1) -> tuple[K, ...]:
    """The kinds that one image gets: `draws` of `kinds` without repetition, at random (the paper draws one).

    Args:
        kinds: What to draw from.
        key: What the image is, such as the digest of its file: the draw depends on `key` and `seed` and nothing
            else, so that neither the order of the images nor parallel work changes it.
        seed: The run's seed.
        draws: How many; all of them if there are fewer.
    """
    order = _generator("choose", key, seed).permutation(len(kinds))
    return tuple(kinds[index] for index in order[:draws])


def intervene(image: Image.Image, kind: Kind, key: str, seed: int, donor: Image.Image | None = None) -> Image.Image:
    """One image under one intervention, reproducibly (see `choose_kinds` for `key` and `seed`).

    Args:
        image: RGB, as the tower sees it.
        kind: What to do; a name takes the kind's defaults.
        key: What the image is.
        seed: The run's seed.
        donor: A second image, for kinds that need one.

    Returns:
        RGB of the same size.

    Raises:
        InputError: The kind is not known, or needs a donor and there is none.
        NotApplicableError: This image has not what the kind changes.
    """
    chosen = resolve(kind)
    return chosen.change(image, _generator(chosen.label, key, seed), donor)


def _generator(*parts: str | int) -> np.random.Generator:
    """A generator of its own for every combination of parts."""
    digest = hashlib.sha256("\n".join(map(str, parts)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


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
