"""The page of learned prompts: one self-contained HTML file, with a table of figures beside every plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invariclip.calibrate.data.embed import encoder_input
from invariclip.calibrate.data.versions import EmbeddingJob
from invariclip.calibrate.report import plots
from invariclip.calibrate.report.prompts_figures import figures_of
from invariclip.calibrate.report.rendering import Thumbnail, data_uri, skipped_by_reason, write_html
from invariclip.calibrate.report.summary import course
from invariclip.calibrate.report.verdict import Conclusion, signed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from invariclip.calibrate.data.images import ImageRecord
    from invariclip.calibrate.prompts.learn import LearnedResult
    from invariclip.calibrate.prompts.options import PromptOptions
    from invariclip.calibrate.prompts.scores import Reliability, ScoredImages
    from invariclip.calibrate.report.prompts_figures import Example, Histogram, PageFigures

TEMPLATE = Path(__file__).with_name("prompts_page.html")


def conclude(learned: LearnedResult, figures: PageFigures) -> Conclusion:
    """The first thing on the page: the gain, and what there is to know before it is used."""
    plain, cdc, gain = figures.hand_written, figures.cdc, figures.gain
    which = "held-back" if learned.scored.held else "validation"
    helps: bool | None = None
    if not figures.telling:
        word = "All of these images are of one class, so there is no interval."
    elif gain.low > 0:
        helps, word = True, "That is a gain."
    elif gain.high < 0:
        helps, word = False, "That is a loss."
    else:
        same = bool((figures.hand_written.right == figures.cdc.right).all())
        word = "They are right on the very same images." if same else "That may be chance."
    interval = f" (95 % interval {signed(gain.low)} … {signed(gain.high)})" if figures.telling else ""
    headline = (
        f"CDC answers {cdc.accuracy:.1f} % of {len(cdc.right):,} {which} images right, the hand-written template "
        f"alone {plain.accuracy:.1f} %: {signed(gain.value)} points{interval}. {word}"
    )
    before, after = plain.reliability.error, cdc.reliability.error
    sentences = [f"The expected calibration error went from {before:.3f} to {after:.3f}."]
    if not learned.scored.held:
        sentences.append(
            "No images were held back: all scores are of the validation images, which stopped the training and "
            "which the evidence was fitted on, so they flatter CDC."
        )
    if learned.facts["best_step"] == 0:
        sentences.append(f"Training: {course(learned.facts)}.")
    sentences.append(_threshold(learned))
    return Conclusion(helps, headline, tuple(sentences))


def _threshold(learned: LearnedResult) -> str:
    if learned.threshold is None:
        return "No target risk was asked for, so there is no threshold to abstain above (--target-risk)."
    said = learned.threshold.sentence()
    return f"{said[0].upper()}{said[1:]}."


def page_beside(report: Path) -> Path:
    """Where the page of templates lies beside another report: `R.html` gives `R.cdc.html`."""
    return report.with_name(f"{report.stem}.cdc.html")


def write_page(path: Path, learned: LearnedResult, options: PromptOptions, images: Sequence[ImageRecord]) -> None:
    """Renders the page and writes it atomically.

    Args:
        path: The .html file.
        learned: What `learn` gave.
        options: Its options.
        images: What was given to it, with those that were skipped.

    Raises:
        InputError: The file cannot be written, or an image cannot be read any more.
    """
    figures, facts = figures_of(learned, options), learned.facts
    curve = [(int(step), float(loss)) for step, loss in facts["curve"]]
    wrong = not (figures.hand_written.right.all() and figures.cdc.right.all())
    # Where neither side is ever wrong there is no risk: words instead of two lines at zero
    risk = plots.risk_plot(figures, options.target_risk) if wrong else None
    write_html(
        path,
        TEMPLATE,
        learned=learned,
        facts=facts,
        semantics=learned.semantics,
        figures=figures,
        sides=(figures.hand_written, figures.cdc),
        conclusion=conclude(learned, figures),
        skipped=skipped_by_reason(facts["skipped"], frozenset(str(image.path) for image in images)),
        projection=_projection(learned),
        course={"plot": plots.course_plot(curve, facts["best_step"]), "rows": curve, "words": course(facts)},
        risk={"plot": risk, "rows": _covered(figures)},
        reliability={"plot": plots.reliability_plot(figures), "rows": _bins(figures)},
        histogram={"plot": plots.histogram_plot(figures), "rows": _histogram(figures.histogram)},
        templates_plot=plots.templates_plot(figures.templates, figures.cdc.accuracy),
        unsure=[_card(learned.scored, one) for one in figures.unsure],
        sure_and_wrong=[_card(learned.scored, one) for one in figures.sure_and_wrong],
        wrong=int((~figures.cdc.right).sum()),
        options=json.dumps(options.to_json(), indent=2, ensure_ascii=False),
        signed=signed,
    )


def _projection(learned: LearnedResult) -> str:
    space = learned.projection
    if space is None or space.estimator == "identity":
        return "none: the encoder's own embeddings"
    strength = "" if space.strength is None else f", λ = {space.strength:g}"
    return f"{space.estimator}{strength}, {space.rank} of {space.embed_dim} dimensions"


def _covered(figures: PageFigures) -> list[tuple[int, float, float, float, bool]]:
    """Answered, hand-written risk, CDC's, u, and whether it is the threshold; in the order of how many are answered."""
    rows = [(one.answered, one.hand_written, one.cdc, one.uncertainty, False) for one in figures.covered]
    if figures.mark:
        mark = figures.mark
        rows.append((mark.answered, mark.hand_written, mark.risk, mark.uncertainty, True))
    return sorted(rows, key=lambda row: (row[0], row[-1]))


def _bins(figures: PageFigures) -> list[dict[str, Any]]:
    """A row for every bin that either side has images in; a side without any has None for confidence and accuracy."""
    both = figures.hand_written.reliability, figures.cdc.reliability
    bins = len(both[0].counts)
    return [
        {"low": 100 * place / bins, "high": 100 * (place + 1) / bins, "sides": [_bin(side, place) for side in both]}
        for place in range(bins)
        if any(side.counts[place] for side in both)
    ]


def _bin(side: Reliability, place: int) -> tuple[int, float | None, float | None]:
    if not side.counts[place]:
        return 0, None, None
    return int(side.counts[place]), 100 * float(side.confidence[place]), 100 * float(side.accuracy[place])


def _histogram(histogram: Histogram) -> list[tuple[float, float, int, int]]:
    """Bins that hold images: lower edge, upper edge, right, wrong."""
    rows = zip(histogram.edges[:-1], histogram.edges[1:], histogram.right, histogram.wrong, strict=True)
    return [(float(low), float(high), int(right), int(wrong)) for low, high, right, wrong in rows if right or wrong]


def _card(scored: ScoredImages, example: Example) -> dict[str, Any]:
    image, digest = scored.images.used[example.row], scored.images.digests[example.row]
    pixels = encoder_input(EmbeddingJob(image.path), digest, scored.pixels)
    return {"image": Thumbnail(data_uri(pixels), example.name, image.environment), "example": example}
