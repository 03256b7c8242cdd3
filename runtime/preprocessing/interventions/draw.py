"""Which interventions an image gets, and the image under one: by what the image is, and the seed, alone."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from invariclip.preprocessing.interventions.catalogue import Kind, resolve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

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
