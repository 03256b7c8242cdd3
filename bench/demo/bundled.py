"""Accuracy on the bundled images before and after a projection, answered by exported artifacts; and on own images."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

import invariclip
from invariclip.calibrate.data.images import ImageRecord, SkippedImageWarning, read_images
from invariclip.calibrate.projection.bootstrap import Bootstrap
from invariclip.calibrate.projection.classifiers import prototype_bank
from invariclip.calibrate.prompts.scores import auroc
from invariclip.errors import InputError
from invariclip.export.reference import manifest_path
from invariclip.preprocessing.find import find_images
from invariclip.preprocessing.pixels import open_image
from invariclip.preprocessing.prompts import check_prompts
from invariclip.results import host_answers
from invariclip.sites.measuring import begun, training_mean

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.console import Progress
    from invariclip.results import Prediction


@dataclass(frozen=True)
class DemoRequest:
    """What was asked for: images that can be read, and the words to choose from."""

    paths: tuple[Path, ...]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Own:
    """One of the user's images, and what it is taken for without the projection and with it."""

    path: Path
    before: Prediction
    after: Prediction

    @property
    def changed(self) -> bool:
        """Whether the projection changes the answer."""
        return self.before.label != self.after.label


def wanted(images: Path | None, classes: str | None, templates: Sequence[str]) -> DemoRequest | None:
    """Checks the options before minutes of work; images that cannot be read are named in a warning and left out.

    Args:
        images: A folder or an image.
        classes: Words with commas between them.
        templates: Prompts that the words go into.

    Returns:
        None where nothing was asked for.

    Raises:
        InputError: One option stands without the other, a word is empty or repeated, or no image can be read.
    """
    if images is None and classes is None:
        return None
    if images is None:
        raise InputError("--classes are the words for your own images: add --images DIR, or leave --classes out")
    words = tuple(word.strip() for word in (classes or "").split(",") if word.strip())
    if len(words) < 2:
        raise InputError('--images needs two words or more to choose from: add --classes "dog,cat,car"')
    check_prompts(words, templates)
    readable: list[Path] = []
    for path in find_images([images]):
        try:
            open_image(path)
        except InputError as error:
            warnings.warn(f"skipped: {error}", SkippedImageWarning, stacklevel=2)
        else:
            readable.append(path)
    if not readable:
        raise InputError(f"{images}: no image there can be read; name a folder of JPEG, PNG or WebP files")
    return DemoRequest(tuple(readable), words)


def classify_own(asked: DemoRequest, before: Path, after: Path, templates: Sequence[str]) -> list[Own]:
    """The answers of both artifacts.

    Args:
        asked: See `wanted`.
        before: Artifact without the projection.
        after: Artifact with it.
        templates: Prompts.
    """
    old, new = (
        invariclip.load(folder).with_classes(asked.classes, list(templates)).classify(list(asked.paths))
        for folder in (before, after)
    )
    return [Own(*each) for each in zip(asked.paths, old, new, strict=True)]


Protocol: TypeAlias = Literal["prototypes", "names"]

PROTOCOLS: dict[Protocol, str] = {"prototypes": "prototypes of training styles", "names": "names (zero-shot)"}
"""How a class is told: the mean of its images in training styles, or its name in a prompt; and that in words."""
FIT_SPLITS = ("train", "calibrate")
SEED = 0
PHOTOGRAPHS, DRAWINGS, MEAN = "photographs", "drawings", "mean of both"
UNFITTED, SEEN = "things not fitted", "seen styles"
_PHOTOGRAPH_STYLE = "photograph"
SHOWN = 16
"""Unlabelled images that an unseen style's shift is measured on."""


@dataclass(frozen=True)
class Bundle:
    """The bundled images, sorted by what may be done with them.

    Attributes:
        images: All of them.
        fit: Training styles, concepts that calibration may see.
        training_styles: Styles that prototypes and the projection come from.
        held_out_styles: Styles that nothing is fitted or chosen on.
        classes: Every class name.
    """

    images: tuple[ImageRecord, ...]
    fit: tuple[ImageRecord, ...]
    training_styles: tuple[str, ...]
    held_out_styles: tuple[str, ...]
    classes: tuple[str, ...]

    @property
    def labels(self) -> NDArray[np.int64]:
        """The class of every image, int64 [N]."""
        places = {name: place for place, name in enumerate(self.classes)}
        return np.array([places[image.name] for image in self.images])

    @property
    def concepts(self) -> NDArray[np.int64]:
        """The concept of every image as a code, int64 [N]."""
        return np.unique([image.concept for image in self.images], return_inverse=True)[1]

    @property
    def fitted(self) -> NDArray[np.bool_]:
        """Images of concepts of which some image, in another style or this one, may be fitted on, bool [N]."""
        concepts = {image.concept for image in self.fit}
        return np.array([image.concept in concepts for image in self.images])

    @property
    def unseen(self) -> NDArray[np.bool_]:
        """Images in held-out styles, bool [N]."""
        return np.array([image.environment in self.held_out_styles for image in self.images])


@dataclass(frozen=True)
class Accuracy:
    """One line of the table: shares of 1, differences paired, their 95 % intervals over concepts.

    Attributes:
        style: What is asked about.
        protocol: How classes are told.
        before: Without the projection.
        after: With it.
        difference: after − before; then its ends.
        adapted: After, and with the shift of the style's own images taken away; None for styles that were fitted on.
        more: (adapted − after, low, high).
    """

    style: str
    protocol: Protocol
    before: float
    after: float
    difference: float
    low: float
    high: float
    adapted: float | None = None
    more: tuple[float, float, float] | None = None

    @property
    def seen(self) -> bool:
        """Whether it is of the styles that were fitted on."""
        return self.style == SEEN

    def __str__(self) -> str:
        return (
            f"{100 * self.before:.1f} % → {100 * self.after:.1f} % ({100 * self.difference:+.1f} points, "
            f"95 % interval {100 * self.low:+.1f} … {100 * self.high:+.1f})"
        )


@dataclass(frozen=True)
class ArtifactAnswers:
    """What one artifact says to all images: by names as class indices, unit embeddings, and how unsure it is."""

    indices: NDArray[np.int64]
    embeddings: NDArray[np.float32]
    uncertainty: NDArray[np.float32]


@dataclass(frozen=True)
class Halves:
    """How many of the unseen images that an artifact is surer of are answered right by names, and of the others.

    Attributes:
        surer: Share of right answers in the surer half.
        other: The same of the other half.
        auroc: The chance that a wrong answer is less sure than a right one; NaN where all are one or the other.
    """

    surer: float
    other: float
    auroc: float

    def __str__(self) -> str:
        return (
            f"Of the half of the unseen images that it is surer of (by energy), {self.surer:.1%} are answered right "
            f"by names; of the other half, {self.other:.1%} (AUROC {self.auroc:.2f})."
        )


@dataclass(frozen=True)
class DemoVerdict:
    """The sentence under which everything stands, and whether there is a gain and no loss."""

    helped: bool
    sentence: str


def bundle() -> Bundle:
    """Reads the bundled manifest: a style whose images are all of split `test` is held out."""
    images = tuple(read_images(manifest_path()))
    styles = dict.fromkeys(image.environment for image in images)
    training = tuple(s for s in styles if any(p.environment == s and p.split in FIT_SPLITS for p in images))
    return Bundle(
        images=images,
        fit=tuple(p for p in images if p.environment in training and p.split in FIT_SPLITS),
        training_styles=training,
        held_out_styles=tuple(s for s in styles if s not in training),
        classes=tuple(sorted({image.name for image in images})),
    )


def kind_of(image: ImageRecord) -> str:
    """`PHOTOGRAPHS` or `DRAWINGS`."""
    return PHOTOGRAPHS if image.environment == _PHOTOGRAPH_STYLE else DRAWINGS


def ask(folder: Path, bundled: Bundle, progress: Progress) -> ArtifactAnswers:
    """Puts every bundled image to an artifact, through the runtime alone."""
    model = invariclip.load(folder)
    paths = [image.path for image in bundled.images]
    indices, embeddings, uncertainty = [], [], []
    starts = range(0, len(paths), 16)
    for start in progress(starts, total=len(starts), desc=f"classify with {folder.name}"):
        answers = model.answer(paths[start : start + 16])
        indices.append(answers.probabilities.argmax(axis=1))
        embeddings.append(answers.embeddings)
        uncertainty.append(answers.uncertainty)
    return ArtifactAnswers(
        np.concatenate(indices).astype(np.int64), np.concatenate(embeddings), np.concatenate(uncertainty)
    )


def adapt(folder: Path, bundled: Bundle, answers: ArtifactAnswers) -> ArtifactAnswers:
    """What the artifact says when each unseen style is a site, measured on `SHOWN` of its images, without labels.

    Two samples of each style are drawn, and an image of the one is answered with the site of the other: no image is
    answered with a site that it was measured on. Nothing is embedded again but the class names.

    Args:
        folder: The artifact.
        bundled: The images.
        answers: What it says of them by itself.
    """
    model = invariclip.load(folder)
    bank, empty = model.class_bank(), begun(model, "demo", training_mean(folder, model.manifest), None)
    embeddings = answers.embeddings.copy()
    rng = np.random.default_rng(SEED)
    for style in bundled.held_out_styles:
        rows = np.flatnonzero([image.environment == style for image in bundled.images])
        first, second = np.split(rng.permutation(rows)[: 2 * SHOWN], 2)
        for sample, asked in ((first, np.setdiff1d(rows, first)), (second, first)):
            site = empty.adding(answers.embeddings[sample], bank)
            embeddings[asked] = site.apply(answers.embeddings[asked])
    found = host_answers(embeddings, bank, model.manifest.model.logit_scale, model.manifest.model.logit_bias, None)
    return ArtifactAnswers(found.probabilities.argmax(axis=1).astype(np.int64), embeddings, found.uncertainty)


def answered(bundled: Bundle, answers: ArtifactAnswers, protocol: Protocol) -> NDArray[np.int64]:
    """The class that every image is taken for, int64 [N].

    Args:
        bundled: The images.
        answers: What the artifact says.
        protocol: Told by names, or by the mean of each class's images in training styles. An image of a training
            style is compared with means that it is no part of.
    """
    if protocol == "names":
        return answers.indices
    labels, support = bundled.labels, ~bundled.unseen
    found = _nearest(answers, labels, support, ~support)
    for left in _left_out(bundled):
        found = np.where(left, _nearest(answers, labels, support & ~left, left), found)
    return found


def _nearest(
    answers: ArtifactAnswers, labels: NDArray[np.int64], support: NDArray[np.bool_], asked: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """The nearest prototype of the images that are asked about, -1 for the others."""
    classes, bank = prototype_bank(answers.embeddings[support], labels[support])
    found = np.full(len(labels), -1, dtype=np.int64)
    found[asked] = classes[np.argmax(answers.embeddings[asked] @ bank.T, axis=1)]
    return found


def _left_out(bundled: Bundle) -> list[NDArray[np.bool_]]:
    """Images of training styles in as many parts as there are styles: of each concept one image, bool [N] each."""
    styles = np.array([[p.environment == style for p in bundled.images] for style in bundled.training_styles])
    turns = np.arange(len(styles))
    return [styles[(bundled.concepts + turn) % len(styles), np.arange(len(bundled.images))] for turn in turns]


def score(bundled: Bundle, before: ArtifactAnswers, after: ArtifactAnswers, adapted: ArtifactAnswers) -> list[Accuracy]:
    """Both protocols on unseen drawings, on photographs and their mean, and on two kinds of images that tell more.

    Every share counts images of its kind alike; the mean counts drawings and photographs half each. Most things were
    fitted on in other styles; `UNFITTED` are the unseen images of those that were not. In `SEEN` styles nothing
    should be lost.
    """
    unseen, labels = bundled.unseen, bundled.labels
    kinds = np.array([[DRAWINGS, PHOTOGRAPHS].index(kind_of(image)) for image in bundled.images])
    names = [name for code, name in enumerate((DRAWINGS, PHOTOGRAPHS)) if (kinds[unseen] == code).any()]
    rows: list[Accuracy] = []
    for protocol in PROTOCOLS:
        old, new, own = (answered(bundled, answers, protocol) == labels for answers in (before, after, adapted))
        for asked, titles in (
            (unseen, (*names, MEAN)),
            (unseen & ~bundled.fitted, (UNFITTED,)),
            (~unseen, (SEEN,)),
        ):
            if not asked.any():
                continue
            groups = kinds[asked] if asked is unseen else np.zeros(int(asked.sum()), dtype=np.int64)
            bootstrap = Bootstrap(bundled.concepts[asked], groups, seed=SEED)
            told = [
                bootstrap.intervals(*each)
                for each in (
                    (old[asked],),
                    (new[asked],),
                    (new[asked], old[asked]),
                    (own[asked],),
                    (own[asked], new[asked]),
                )
            ]
            for title, was, became, gain, fitted, more in zip(titles, *told, strict=False):
                percent = was.value, became.value, gain.value, gain.low, gain.high
                row = Accuracy(title, protocol, *(value / 100 for value in percent))
                if title != SEEN:
                    ends = more.value / 100, more.low / 100, more.high / 100
                    row = replace(row, adapted=fitted.value / 100, more=ends)
                rows.append(row)
    return rows


def halves(bundled: Bundle, answers: ArtifactAnswers) -> Halves:
    """How well the uncertainty tells right answers by names from wrong ones, on unseen images."""
    asked = bundled.unseen
    wrong = answers.indices[asked] != bundled.labels[asked]
    order = np.argsort(answers.uncertainty[asked], kind="stable")
    surer, other = np.array_split(~wrong[order], [len(order) // 2])
    return Halves(float(surer.mean()), float(other.mean()), auroc(answers.uncertainty[asked].astype(np.float64), wrong))


def verdict(rows: Sequence[Accuracy], chosen: str) -> DemoVerdict:
    """What the table says of unseen images, by every protocol, in plain words.

    Args:
        rows: From `score`.
        chosen: The estimator.
    """
    if chosen == "identity":
        return DemoVerdict(
            False, "There is no gain: on styles left out no projection beat doing nothing, so nothing was changed."
        )
    means = [row for row in rows if row.style == MEAN]
    gains = [row for row in means if row.low > 0]
    losses = [row for row in means if row.high < 0]
    unclear = [row for row in means if row not in gains and row not in losses]
    parts = [
        f"{words} with {PROTOCOLS[row.protocol]}, {row}"
        for words, found in (("gains", gains), ("loses", losses), ("shows no clear change", unclear))
        for row in found
    ]
    lost = [
        f"{row.style} with {PROTOCOLS[row.protocol]}: {row}"
        for row in rows
        if row.high < 0 and row.style not in (MEAN, UNFITTED, SEEN)
    ]
    others = [f"{_words(row)} with {PROTOCOLS[row.protocol]}, {row}" for row in rows if row.style == UNFITTED]
    seen = [f"{PROTOCOLS[row.protocol]}: {row}" for row in rows if row.style == SEEN and row.high < 0]
    sentence = f"On images in styles that it has not seen, the projection {'; it '.join(parts)}."
    sentence += f" It loses on {'; '.join(lost)}." if lost else ""
    sentence += (
        f" Most of these things were fitted on in other styles. Those that were not: {'; '.join(others)}."
        if others
        else ""
    )
    sentence += f" On the styles that it was fitted on it costs something with {'; '.join(seen)}." if seen else ""
    own = [
        f"{100 * row.adapted:.1f} % with {PROTOCOLS[row.protocol]} ({100 * row.more[0]:+.1f} over the projection, 95 % "
        f"interval {100 * row.more[1]:+.1f} … {100 * row.more[2]:+.1f})"
        for row in means
        if row.adapted is not None and row.more is not None
    ]
    if own:
        sentence += f" Adapted to {SHOWN} unlabelled images of each style: {'; '.join(own)}."
    return DemoVerdict(bool(gains) and not losses, sentence)


def _words(row: Accuracy) -> str:
    return "a gain" if row.low > 0 else "a loss" if row.high < 0 else "no clear change"
