"""The image set as the table of CDC sees it: base and new classes, styles to adapt to and one held out, the space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from invariclip.bench.studies.stylebench.sources import HELD_OUT_STYLES, TRAINING_STYLES
from invariclip.calibrate.fit import FitOptions, calibrate
from invariclip.calibrate.prompts.views import LabelledEmbeddings, embed_images
from invariclip.console import Progress, silent
from invariclip.preprocessing.interventions import PAPER

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.artifact.projection import Projection
    from invariclip.bench.studies.stylebench.encoders import Quick
    from invariclip.calibrate.data.images import ImageRecord

TEMPLATES = ("a picture of a {}.",)


@dataclass(frozen=True, eq=False)
class CdcWorld:
    """Half of the learnt concepts to learn templates from, the other half new to them.

    Attributes:
        base: Images of base classes in the styles adapted to, which the encoder was never trained on.
        new: Images of new classes in the same styles.
        base_unseen: Images of base classes in the held-out style.
        new_unseen: The same of new classes.
        projection: The space of all vectors, or None.
        held_out: The held-out style.
        base_names: Every base class, sorted; not each has images in all styles.
        new_names: Every new class, sorted.
    """

    base: LabelledEmbeddings
    new: LabelledEmbeddings
    base_unseen: LabelledEmbeddings
    new_unseen: LabelledEmbeddings
    projection: Projection | None
    held_out: str
    base_names: tuple[str, ...]
    new_names: tuple[str, ...]


def make_world(
    encoder: Quick, images: Sequence[ImageRecord], seed: int, cache: Path, progress: Progress = silent
) -> CdcWorld:
    """Draws the halves, fits the shrinkage that `calibrate` chooses, and embeds everything in its space.

    The projection is fitted and selected on the training styles of the base concepts and of those that no encoder has
    learnt (split `calibrate`): it has seen neither new classes nor any of the four styles. Of those, one is held out,
    another one with every seed, and templates are learnt from the other three.

    Args:
        encoder: The encoder.
        images: The whole set.
        seed: Of the halves; the style held out is number `seed` of the four, and round again.
        cache: Keeps embeddings.
        progress: Progress display.
    """
    seen = [p for p in images if p.environment in TRAINING_STYLES]
    learnt = sorted({p.name for p in seen if p.split == "train"})
    order = np.random.default_rng([seed, 53]).permutation(len(learnt))
    half = len(learnt) // 2
    base = {learnt[index] for index in order[:half]}
    new = set(learnt) - base
    fit_on = [p for p in seen if p.split == "calibrate" or p.name in base]
    # The seed of what interventions draw stays the same, so that one set of embeddings serves every seed
    options = FitOptions(interventions=PAPER, estimator="shrinkage", objective="zero-shot", templates=TEMPLATES)
    found = calibrate(encoder, fit_on, options, cache=cache, progress=progress).projection
    projection = None if found.estimator == "identity" else found
    held_out = HELD_OUT_STYLES[seed % len(HELD_OUT_STYLES)]
    parts = []
    for styles in ([style for style in HELD_OUT_STYLES if style != held_out], [held_out]):
        for names in (base, new):
            some = [p for p in images if p.environment in styles and p.name in names]
            parts.append(embed_images(encoder, some, projection, cache=cache, progress=progress))
    return CdcWorld(
        parts[0], parts[1], parts[2], parts[3], projection, held_out, tuple(sorted(base)), tuple(sorted(new))
    )


def places_of(images: LabelledEmbeddings, names: Sequence[str]) -> NDArray[np.int64]:
    """Labels of images as places in a list of classes that has all of theirs."""
    places = {name: place for place, name in enumerate(names)}
    return np.asarray([places[name] for name in images.names], dtype=np.int64)[images.labels]
