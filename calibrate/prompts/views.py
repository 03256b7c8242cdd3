"""What prompts are learned from: embedded images, their split, and embeddings under each template's augmentation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from invariclip.calibrate.data.embed import embed
from invariclip.calibrate.data.pairs import codes
from invariclip.calibrate.data.versions import Donors, EmbeddingJob
from invariclip.console import Progress, silent
from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.artifact.projection import Projection
    from invariclip.calibrate.data.encoders import Encoder
    from invariclip.calibrate.data.images import ImageRecord
    from invariclip.calibrate.prompts.options import Augmentation

VALIDATION_SHOTS = 4
"""Validation images of a class at most where training is few-shot: more would not be few-shot (CoOp's protocol)."""


@dataclass(frozen=True)
class Split:
    """Rows of the images, each ascending; no image is in two of them.

    Attributes:
        train: int64, learned from.
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
        for part, part_rows in zip(parts, np.split(rows, [first, second]), strict=True):
            part.extend(int(row) for row in part_rows)
    train, checks, held_rows = (np.asarray(sorted(part), dtype=np.int64) for part in parts)
    if not len(checks):
        raise InputError(
            f"{len(labels)} images leave none to validate on; add images of the classes, or ask for fewer shots"
        )
    return Split(train, checks, held_rows)


def _whole(rng: np.random.Generator, count: float) -> int:
    return int(count) + int(rng.random() < count - int(count))


@dataclass(frozen=True, eq=False)
class LabelledEmbeddings:
    """Embedded images and their classes.

    Attributes:
        vectors: float64 [N, d], unit length, projected; of the images as they are.
        labels: int64 [N], places in `names`.
        names: The classes, sorted.
        used: The images themselves; those that could not be read are not among them.
        digests: sha256 of each one's file.
        skipped: Why others were left out.
    """

    vectors: NDArray[np.float64]
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    used: tuple[ImageRecord, ...]
    digests: tuple[str, ...]
    skipped: tuple[str, ...]

    def part(self, rows: NDArray[np.int64]) -> LabelledEmbeddings:
        """Some of them, in this order; of the same classes."""
        return replace(
            self,
            vectors=self.vectors[rows],
            labels=self.labels[rows],
            used=tuple(self.used[row] for row in rows),
            digests=tuple(self.digests[row] for row in rows),
        )


def embed_images(
    encoder: Encoder,
    images: Sequence[ImageRecord],
    projection: Projection | None,
    *,
    cache: Path | None = None,
    progress: Progress = silent,
) -> LabelledEmbeddings:
    """Embeds the images as they are.

    Raises:
        InputError: None can be used, or they are of one class alone.
    """
    embedded = embed(encoder, [EmbeddingJob(image.path) for image in images], cache=cache, progress=progress)
    used = tuple(images[index] for index in embedded.kept)
    labels, names = codes([image.name for image in used])
    if len(names) < 2:
        raise InputError(f"all images are of one class, {names[0]!r}; templates are learnt from two classes or more")
    return LabelledEmbeddings(
        vectors=_projected(embedded.vectors, projection),
        labels=labels,
        names=names,
        used=used,
        digests=tuple(embedded.digests[index] for index in embedded.kept),
        skipped=tuple(reason for _, reason in embedded.skipped),
    )


def augmented(
    encoder: Encoder,
    images: LabelledEmbeddings,
    rows: NDArray[np.int64],
    augmentations: Sequence[Augmentation],
    projection: Projection | None,
    *,
    seed: int = 0,
    cache: Path | None = None,
    progress: Progress = silent,
) -> tuple[NDArray[np.float64], dict[str, int]]:
    """Embeds some images under every augmentation.

    Where an augmentation does not apply to an image, `embed` warns of it, and the template sees it as it is.

    Args:
        encoder: Takes the images.
        images: All of them; donors are taken from `rows` alone.
        rows: int64 [R], ascending.
        augmentations: M of them.
        projection: A_inv, or None.
        seed: Of what augmentations draw.
        cache: Keeps embeddings across runs.
        progress: Progress display.

    Returns:
        float64 [M, R, d], unit length; and how many images each augmentation did not apply to, by label, where any.

    Raises:
        InputError: An augmentation needs a second image and there is none.
    """
    donors = Donors((images.digests[r], images.used[r].environment, images.used[r].path) for r in rows)
    views = np.repeat(images.vectors[rows][None], len(augmentations), axis=0)
    places, jobs = [], []
    for place, kind in enumerate(augmentations):
        if kind is None:
            continue
        for number, row in enumerate(rows):
            image, digest = images.used[row], images.digests[row]
            needed = kind.change.needs_donor
            donor = donors.choose(digest, image.environment, kind.label, seed) if needed else None
            places.append((place, number))
            jobs.append(EmbeddingJob(image.path, kind, seed, donor))
    declined: dict[str, int] = {}
    if jobs:
        embedded = embed(encoder, jobs, cache=cache, progress=progress)
        where = np.asarray([places[index] for index in embedded.kept])
        views[where[:, 0], where[:, 1]] = _projected(embedded.vectors, projection)
        for index, _ in (*embedded.declined, *embedded.skipped):
            kind = augmentations[places[index][0]]
            label = kind.label if kind else ""
            declined[label] = declined.get(label, 0) + 1
    return views, dict(sorted(declined.items()))


def _projected(vectors: NDArray[np.float64], projection: Projection | None) -> NDArray[np.float64]:
    return vectors if projection is None else projection.apply(vectors)
