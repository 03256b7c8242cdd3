"""What every template sees of the images: embeddings under its own augmentation, made once and kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from invariclip.calibrate.data.embed import EmbeddingJob, embed
from invariclip.calibrate.data.pairs import codes
from invariclip.calibrate.data.versions import Donors
from invariclip.console import Progress, silent
from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.artifact.projection import Projection
    from invariclip.calibrate.data.encoder import Encoder
    from invariclip.calibrate.data.images import ImageRecord
    from invariclip.calibrate.prompts.options import Augmentation


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
    found = embed(encoder, [EmbeddingJob(image.path) for image in images], cache=cache, progress=progress)
    used = tuple(images[index] for index in found.kept)
    labels, names = codes([image.name for image in used])
    if len(names) < 2:
        raise InputError(f"all images are of one class, {names[0]!r}; templates are learnt from two classes or more")
    return LabelledEmbeddings(
        vectors=_projected(found.vectors, projection),
        labels=labels,
        names=names,
        used=used,
        digests=tuple(found.digests[index] for index in found.kept),
        skipped=tuple(reason for _, reason in found.skipped),
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
        found = embed(encoder, jobs, cache=cache, progress=progress)
        where = np.asarray([places[index] for index in found.kept])
        views[where[:, 0], where[:, 1]] = _projected(found.vectors, projection)
        for index, _ in (*found.declined, *found.skipped):
            kind = augmentations[places[index][0]]
            label = kind.label if kind else ""
            declined[label] = declined.get(label, 0) + 1
    return views, dict(sorted(declined.items()))


def _projected(vectors: NDArray[np.float64], projection: Projection | None) -> NDArray[np.float64]:
    return vectors if projection is None else projection.apply(vectors)
