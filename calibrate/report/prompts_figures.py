"""The figures of the page of learned prompts, from what `learn` knows; nothing is drawn here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from invariclip.calibrate.projection.bootstrap import AccuracyInterval, Bootstrap
from invariclip.calibrate.prompts.options import PLAIN
from invariclip.calibrate.prompts.scores import Side, fused_answers, sides

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from invariclip.calibrate.prompts.learn import LearnedResult
    from invariclip.calibrate.prompts.options import PromptOptions
    from invariclip.calibrate.prompts.scores import ScoredImages
    from invariclip.uncertainty import Fused

COVERAGES = tuple(share / 10 for share in range(1, 11))
HISTOGRAM_BINS = 20
HISTOGRAM_ENDS = (0.05, 0.1, 0.2, 0.5, 1.0)
SHOWN = 8
"""Images of each kind of example."""


@dataclass(frozen=True)
class Covered:
    """What is answered when so many images are.

    Attributes:
        answered: The n images that are least uncertain.
        hand_written: Share of wrong answers among them, by 1 - max-softmax.
        cdc: By u.
        uncertainty: The largest u among them.
    """

    answered: int
    hand_written: float
    cdc: float
    uncertainty: float


@dataclass(frozen=True)
class Mark:
    """Where the threshold to abstain above lies.

    Attributes:
        uncertainty: The threshold.
        answered: Images at or below it.
        coverage: Their share of all.
        risk: Share of wrong answers among them.
        hand_written: The same of as many images by 1 - max-softmax.
    """

    uncertainty: float
    answered: int
    coverage: float
    risk: float
    hand_written: float


@dataclass(frozen=True, eq=False)
class Histogram:
    """u of right answers and of wrong ones.

    Attributes:
        edges: float64 [B + 1], from 0; a bin holds its upper edge.
        right: int64 [B].
        wrong: int64 [B].
    """

    edges: NDArray[np.float64]
    right: NDArray[np.int64]
    wrong: NDArray[np.int64]


@dataclass(frozen=True)
class Template:
    """What one template has to say.

    Attributes:
        name: `hand-written`, or `learned m`.
        seen: The change that it saw its training images under, if it was learned.
        scale: a of its evidence.
        bias: c of its evidence.
        accuracy: Percent right by its nearest class embedding alone.
        agreement: Percent of images that it answers as all together do.
        uncertainty: Mean u of its opinion alone.
        without: Percent right of all the others together; without the hand-written one, doubt falls back to the first
            learned one's softmax.
    """

    name: str
    seen: str
    scale: float
    bias: float
    accuracy: AccuracyInterval
    agreement: float
    uncertainty: float
    without: float


@dataclass(frozen=True)
class Example:
    """An image that is shown.

    Attributes:
        row: Its place among the scored images.
        name: Its class.
        answer: What CDC says.
        hand_written: What the hand-written template says.
        uncertainty: u.
        right: Whether CDC is.
    """

    row: int
    name: str
    answer: str
    hand_written: str
    uncertainty: float
    right: bool


@dataclass(frozen=True, eq=False)
class PageFigures:
    """All of the page's figures.

    Attributes:
        hand_written: Template 0's answers, by 1 - max-softmax.
        cdc: The fused answers, by u.
        accuracy: Percent right of both, with 95 % intervals over classes.
        gain: The paired difference, in points.
        telling: Whether there are classes enough for those intervals to tell anything.
        covered: Risk at tenths of the images.
        mark: The threshold, or None where there is none.
        histogram: u of right and of wrong answers.
        templates: Template 0 first.
        unsure: The most uncertain images.
        sure_and_wrong: The wrong answers that are least uncertain.
    """

    hand_written: Side
    cdc: Side
    accuracy: tuple[AccuracyInterval, AccuracyInterval]
    gain: AccuracyInterval
    telling: bool
    covered: tuple[Covered, ...]
    mark: Mark | None
    histogram: Histogram
    templates: tuple[Template, ...]
    unsure: tuple[Example, ...]
    sure_and_wrong: tuple[Example, ...]


def figures_of(learned: LearnedResult, options: PromptOptions) -> PageFigures:
    """Computes all of them.

    Args:
        learned: What `learn` gave.
        options: Its options.
    """
    scored = learned.scored
    labels = scored.images.labels
    plain, cdc = sides(scored)
    # One group: intervals are over classes, as images of a class succeed and fail together
    bootstrap = Bootstrap(labels, np.zeros_like(labels), seed=options.seed)
    unsure, wrong = _examples(scored, plain, cdc)
    above = learned.semantics.abstain_above
    return PageFigures(
        hand_written=plain,
        cdc=cdc,
        accuracy=(bootstrap.intervals(plain.right)[-1], bootstrap.intervals(cdc.right)[-1]),
        gain=bootstrap.intervals(cdc.right, plain.right)[-1],
        telling=len(np.unique(labels)) > 1,
        covered=_covered(plain, cdc),
        mark=None if above is None else _mark(plain, cdc, above),
        histogram=_histogram(cdc),
        templates=_templates(scored, cdc, options, bootstrap),
        unsure=unsure,
        sure_and_wrong=wrong,
    )


def _covered(plain: Side, cdc: Side) -> tuple[Covered, ...]:
    total, ordered = len(cdc.right), np.sort(cdc.uncertainty)
    counts = sorted({max(1, round(share * total)) for share in COVERAGES})
    by_plain, by_cdc = plain.risk, cdc.risk
    return tuple(Covered(n, float(by_plain[n - 1]), float(by_cdc[n - 1]), float(ordered[n - 1])) for n in counts)


def _mark(plain: Side, cdc: Side, above: float) -> Mark:
    accepted = cdc.uncertainty <= above
    answered = int(accepted.sum())
    if not answered:
        return Mark(above, 0, 0.0, 0.0, 0.0)
    risk = float((~cdc.right[accepted]).mean())
    return Mark(above, answered, answered / len(accepted), risk, float(plain.risk[answered - 1]))


def _histogram(cdc: Side) -> Histogram:
    highest = cdc.uncertainty.max()
    edges = np.linspace(0, next((end for end in HISTOGRAM_ENDS if highest <= end), 1.0), HISTOGRAM_BINS + 1)
    place = np.clip(np.searchsorted(edges, cdc.uncertainty, side="left") - 1, 0, HISTOGRAM_BINS - 1)
    counts = (np.bincount(place[mask], minlength=HISTOGRAM_BINS) for mask in (cdc.right, ~cdc.right))
    return Histogram(edges, *counts)


def _templates(scored: ScoredImages, cdc: Side, options: PromptOptions, bootstrap: Bootstrap) -> tuple[Template, ...]:
    vectors, labels = scored.images.vectors, scored.images.labels
    every = np.arange(len(scored.bank))
    augmentations = ["", *(PLAIN if kind is None else kind.label for kind in options.views)]
    templates = []
    for m in every:
        own, rest = every[m : m + 1], np.delete(every, m)
        answers = (vectors @ scored.bank[m].T).argmax(axis=1)
        others = _fused(scored, rest).probabilities.argmax(axis=1)
        templates.append(
            Template(
                name=f"learned {m}" if m else "hand-written",
                seen=augmentations[m],
                scale=float(scored.scales.scale[m]),
                bias=float(scored.scales.bias[m]),
                accuracy=bootstrap.intervals(answers == labels)[-1],
                agreement=100 * float((answers == cdc.answers).mean()),
                uncertainty=float(_fused(scored, own).uncertainty.mean()),
                without=100 * float((others == labels).mean()),
            )
        )
    return tuple(templates)


def _fused(scored: ScoredImages, places: NDArray[np.int64]) -> Fused:
    """What some of the templates say together."""
    numbers = (own[places] for own in scored.scales.numbers)
    return fused_answers(scored.images.vectors, scored.bank[places], scored.logit_scale, *numbers)


def _examples(scored: ScoredImages, plain: Side, cdc: Side) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """The most uncertain images, and the least uncertain of those answered wrong."""
    images = scored.images
    # Equally uncertain ones in the order of their contents, so that the order of the files does not matter
    by_content = np.argsort(np.asarray(images.digests), kind="stable")
    ascending = by_content[np.argsort(cdc.uncertainty[by_content], kind="stable")]
    descending = by_content[np.argsort(-cdc.uncertainty[by_content], kind="stable")]

    def shown(rows: Sequence[int]) -> tuple[Example, ...]:
        return tuple(
            Example(
                row=row,
                name=images.names[images.labels[row]],
                answer=images.names[cdc.answers[row]],
                hand_written=images.names[plain.answers[row]],
                uncertainty=float(cdc.uncertainty[row]),
                right=bool(cdc.right[row]),
            )
            for row in rows
        )

    return shown(descending[:SHOWN].tolist()), shown(ascending[~cdc.right[ascending]][:SHOWN].tolist())
