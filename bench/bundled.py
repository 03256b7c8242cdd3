"""Accuracy on the bundled pictures, before and after a projection, answered by exported artifacts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

import invariclip
from invariclip.calibrate.evaluate import Bootstrap, prototypes
from invariclip.calibrate.pictures import Picture, read_pictures
from invariclip.export.reference import manifest_path

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.console import Progress

FIT_SPLITS = ("train", "calibrate")
SEED = 0


@dataclass(frozen=True)
class Bundle:
    """The bundled pictures, sorted by what may be done with them.

    Attributes:
        pictures: All of them.
        fit: Training styles, concepts that calibration may see.
        training_styles: Styles that prototypes and the projection come from.
        held_out_styles: Styles that nothing is fitted or chosen on.
        classes: Every class name.
    """

    pictures: tuple[Picture, ...]
    fit: tuple[Picture, ...]
    training_styles: tuple[str, ...]
    held_out_styles: tuple[str, ...]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Accuracy:
    """One line of the table: shares of 1, the difference paired, its 95 % interval over concepts."""

    style: str
    protocol: str
    before: float
    after: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Answers:
    """What one artifact says to all pictures: zero-shot answers as class indices, and unit embeddings."""

    indices: NDArray[np.int64]
    embeddings: NDArray[np.float32]


def bundle() -> Bundle:
    """Reads the bundled manifest: a style whose pictures are all of split `test` is held out."""
    pictures = tuple(read_pictures(manifest_path()))
    styles = dict.fromkeys(picture.environment for picture in pictures)
    training = tuple(s for s in styles if any(p.environment == s and p.split in FIT_SPLITS for p in pictures))
    return Bundle(
        pictures=pictures,
        fit=tuple(p for p in pictures if p.environment in training and p.split in FIT_SPLITS),
        training_styles=training,
        held_out_styles=tuple(s for s in styles if s not in training),
        classes=tuple(sorted({picture.name for picture in pictures})),
    )


def ask(folder: Path, bundled: Bundle, progress: Progress) -> Answers:
    """Puts every bundled picture to an artifact, through the runtime alone."""
    model = invariclip.load(folder)
    paths = [picture.path for picture in bundled.pictures]
    indices, embeddings = [], []
    starts = range(0, len(paths), 16)
    for start in progress(starts, total=len(starts), desc=f"classify with {folder.name}"):
        embedding, probabilities, _ = model.answer(paths[start : start + 16])
        indices.append(probabilities.argmax(axis=1))
        embeddings.append(embedding)
    return Answers(np.concatenate(indices).astype(np.int64), np.concatenate(embeddings))


def score(bundled: Bundle, before: Answers, after: Answers) -> list[Accuracy]:
    """Zero-shot and class prototypes on every held-out style and their mean, before and after."""
    labels = np.array([bundled.classes.index(picture.name) for picture in bundled.pictures])
    style_names = np.array([picture.environment for picture in bundled.pictures])
    queries = np.isin(style_names, bundled.held_out_styles)
    support = ~queries
    _, concepts = np.unique([p.concept for p in bundled.pictures], return_inverse=True)
    styles = np.array([bundled.held_out_styles.index(name) for name in style_names[queries]])
    bootstrap = Bootstrap(concepts[queries], styles, seed=SEED)

    def by_prototypes(answers: Answers) -> NDArray[np.bool_]:
        return prototypes(answers.embeddings[support], labels[support], answers.embeddings[queries], labels[queries])

    results = {
        "zero-shot": [answers.indices[queries] == labels[queries] for answers in (before, after)],
        "prototypes": [by_prototypes(answers) for answers in (before, after)],
    }
    rows: list[Accuracy] = []
    for protocol, (old, new) in results.items():
        intervals = bootstrap.intervals(old), bootstrap.intervals(new), bootstrap.intervals(new, old)
        for style, was, became, gain in zip((*bundled.held_out_styles, "mean"), *intervals, strict=True):
            percent = was.value, became.value, gain.value, gain.low, gain.high
            rows.append(Accuracy(style, protocol, *(value / 100 for value in percent)))
    return rows


def verdict(rows: Sequence[Accuracy], chosen: str) -> tuple[bool, str]:
    """Whether the projection helped on unseen styles, and the plain sentence that says so."""
    if chosen == "identity":
        return False, "There is no gain: on styles left out no projection beat doing nothing, so nothing was changed."
    means = {row.protocol: row for row in rows if row.style == "mean"}
    parts = [
        f"{name} {100 * row.before:.1f} % → {100 * row.after:.1f} % ({100 * row.difference:+.1f} points, "
        f"95 % interval {100 * row.low:+.1f} … {100 * row.high:+.1f})"
        for name, row in means.items()
    ]
    helped = any(row.low > 0 for row in means.values()) and all(row.difference > 0 for row in means.values())
    opening = "The projection helps on styles it has not seen" if helped else "No clear gain on these few pictures"
    closing = "" if helped else " docs/stylebench.md has the same measured on the full picture set."
    return helped, f"{opening}: {'; '.join(parts)}.{closing}"
