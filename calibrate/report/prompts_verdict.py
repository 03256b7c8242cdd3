"""What learned templates come to, in plain words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from invariclip.calibrate.report.prompts_summary import course
from invariclip.calibrate.report.verdict import Conclusion, signed

if TYPE_CHECKING:
    from invariclip.calibrate.prompts.learn import Learnt
    from invariclip.calibrate.report.prompts_figures import PageFigures


def conclude(learnt: Learnt, figures: PageFigures) -> Conclusion:
    """The first thing on the page: the gain, and what there is to know before it is used."""
    plain, cdc, gain = figures.hand_written, figures.cdc, figures.gain
    which = "held-back" if learnt.scored.held else "validation"
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
    if not learnt.scored.held:
        sentences.append(
            "No images were held back: all scores are of the validation images, which stopped the training and "
            "which the evidence was fitted on, so they flatter CDC."
        )
    if learnt.facts["best_step"] == 0:
        sentences.append(f"Training: {course(learnt.facts)}.")
    sentences.append(_threshold(learnt))
    return Conclusion(helps, headline, tuple(sentences))


def _threshold(learnt: Learnt) -> str:
    if learnt.threshold is None:
        return "No target risk was asked for, so there is no threshold to abstain above (--target-risk)."
    said = learnt.threshold.sentence()
    return f"{said[0].upper()}{said[1:]}."
