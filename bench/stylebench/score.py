"""Accuracies of an encoder on the picture set: by names, and by prototypes from the training styles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from invariclip.bench.stylebench.sources import STYLES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from invariclip.bench.stylebench.manifest import Picture


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows at length 1."""
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True), dtype=np.float32)


def zero_shot_hits(
    images: NDArray[np.float32], pictures: Sequence[Picture], texts: NDArray[np.float32], codes: Sequence[str]
) -> NDArray[np.bool_]:
    """Whether each picture's nearest text is its own concept's.

    Args:
        images: Unit embeddings [N, D].
        pictures: Their entries.
        texts: Unit embeddings [K, D], one a concept.
        codes: Hexcode of each text.
    """
    nearest = (images @ texts.T).argmax(axis=1)
    return np.array([codes[best] == picture.concept for best, picture in zip(nearest, pictures, strict=True)])


def prototypes(images: NDArray[np.float32], pictures: Sequence[Picture], codes: Sequence[str]) -> NDArray[np.float32]:
    """Unit class prototypes [K, D]: the mean of each concept's unit embeddings in the training styles."""
    place = {code: index for index, code in enumerate(codes)}
    sums = np.zeros((len(codes), images.shape[1]), dtype=np.float64)
    for row, picture in zip(images, pictures, strict=True):
        if not STYLES[picture.style].held_out:
            sums[place[picture.concept]] += row
    return unit(sums.astype(np.float32))


def by_style(hits: NDArray[np.bool_], pictures: Sequence[Picture]) -> dict[str, dict[str, float]]:
    """Accuracy of every style: over all its pictures, and apart by what the encoder could learn of the concept.

    Returns:
        For each style: "all", "seen" (concepts the encoder learnt), "unseen" (concepts kept from it), and "pictures".
    """
    styles = np.array([picture.style for picture in pictures])
    seen = np.array([picture.concept_split == "train" for picture in pictures])
    table: dict[str, dict[str, float]] = {}
    for style in dict.fromkeys(styles.tolist()):
        here = styles == style
        table[style] = {
            "all": _mean(hits[here]),
            "seen": _mean(hits[here & seen]),
            "unseen": _mean(hits[here & ~seen]),
            "pictures": int(here.sum()),
        }
    return table


def _mean(hits: NDArray[np.bool_]) -> float:
    return round(float(hits.mean()), 4) if len(hits) else float("nan")
