"""Which images are learnt from, which say when to stop, and which are held back for the threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from invariclip.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

VALIDATION_SHOTS = 4
"""Validation images of a class at most where training is few-shot: more would not be few-shot (CoOp's protocol)."""


@dataclass(frozen=True)
class Split:
    """Rows of the images, each ascending; no image is in two of them.

    Attributes:
        train: int64, learnt from.
        validation: int64, for early stopping and for the evidence's scale.
        held: int64, for the threshold alone.
    """

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    held: NDArray[np.int64]


def split_rows(labels: NDArray[np.int64], *, shots: int | None, validation: float, held: float, seed: int) -> Split:
    """Draws the three parts class by class, so that each knows as many classes as it can.

    Few-shot: `shots` images to learn from, up to as many (and `VALIDATION_SHOTS`) to validate on, the rest is held
    back. Otherwise by shares; where a share of a class is no whole number of images, chance decides, so that no class
    is favoured. Every class keeps one image to learn from.

    Args:
        labels: int64 [N].
        shots: Training images of a class, or None.
        validation: Share for validation where `shots` is None.
        held: Share to hold back where `shots` is None.
        seed: Of the draw.

    Raises:
        InputError: No image is left for validation.
    """
    rng = np.random.default_rng([seed, 17])
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        if shots is not None:
            first, second = shots, shots + min(shots, VALIDATION_SHOTS)
        else:
            spare = len(rows) - 1
            back = min(_whole(rng, held * len(rows)), spare)
            checked = min(_whole(rng, validation * len(rows)), spare - back)
            first, second = len(rows) - back - checked, len(rows) - back
        for part, taken in zip(parts, np.split(rows, [first, second]), strict=True):
            part.extend(int(row) for row in taken)
    train, checks, kept = (np.asarray(sorted(part), dtype=np.int64) for part in parts)
    if not len(checks):
        raise InputError(
            f"{len(labels)} images leave none to validate on; add images of the classes, or ask for fewer shots"
        )
    return Split(train, checks, kept)


def _whole(rng: np.random.Generator, count: float) -> int:
    return int(count) + int(rng.random() < count - int(count))
