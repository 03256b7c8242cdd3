"""The conclusion of a calibration in plain words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from invariclip.calibrate.fit import Calibration, FitOptions
    from invariclip.calibrate.projection.bootstrap import AccuracyInterval
    from invariclip.calibrate.projection.selection import ScoredCandidate, Selection

_SCORED = {
    "zero-shot": "by the nearest class text",
    "prototypes": "by the nearest class mean of the other images",
    "both": "by the nearest class text and by the nearest class mean, half each",
    "probe": "by logistic regression on the other images",
}


@dataclass(frozen=True)
class Conclusion:
    """The first thing on the page.

    Attributes:
        helps: True for a gain that the interval bears out, False for a loss, None for neither.
        headline: One sentence.
        sentences: What more there is to know before it is used.
    """

    helps: bool | None
    headline: str
    sentences: tuple[str, ...]


def signed(value: float, digits: int = 1) -> str:
    """A difference, with a true minus: `−1.0`."""
    return f"{value:+.{digits}f}".replace("-", "−")


def conclude(result: Calibration, options: FitOptions) -> Conclusion:
    """The conclusion of a calibration.

    Args:
        result: What was fitted.
        options: What was asked for: a candidate that they name in full was not chosen.
    """
    if result.selection is None:
        name = str(options.fixed())
        return Conclusion(
            None,
            f"{name} was fitted as asked for; whether it helps is not known.",
            ("Nothing could be left out to measure on: there are too few environments, interventions or concepts.",),
        )
    selection = result.selection
    scored = selection.result()
    if scored.candidate.estimator == "identity":
        return _none(selection, requested=options.fixed() is not None)
    return _projection(selection, scored, requested=options.fixed() is not None)


def _none(selection: Selection, *, requested: bool) -> Conclusion:
    others = [one for one in selection.curve if one.candidate.estimator != "identity"]
    if requested or not others:
        return Conclusion(None, "No projection, as asked for: the encoder's embeddings stay as they are.", ())
    best = max(others, key=lambda one: one.gain.value)
    if best.gain.value > 0:
        why = f"The best of {len(others)} projections, {best.candidate}, gained {_points(best)} on what was left out; "
        why += "that is within one standard error of nothing, so it was not taken."
    else:
        why = f"None of {len(others)} projections gained on what was left out; the best was {best.candidate}: "
        why += f"{_points(best)}."
    return Conclusion(
        None,
        "Nothing is clearly better than no projection: the encoder's embeddings stay as they are.",
        (why, _how(selection)),
    )


def _projection(selection: Selection, scored: ScoredCandidate, *, requested: bool) -> Conclusion:
    gain, before, after = scored.gain, selection.baseline().accuracy["mean"], scored.accuracy["mean"]
    origin = "was asked for" if requested else "was chosen"
    if gain.low > 0:
        helps, headline = True, f"gains {_points(scored)} over no projection where it was left out."
    elif gain.high < 0:
        helps, headline = False, f"loses against no projection where it was left out: {_points(scored)}."
    else:
        helps, headline = None, f"changes {_points(scored)} where it was left out: that may be chance."
    headline = f"{scored.candidate} {origin} and {headline}"
    sentences = [f"Right answers went from {before.value:.1f} % to {after.value:.1f} % on average. {_how(selection)}"]
    sentences += _by_concept(selection)
    changes = {
        name: new.value - old.value
        for (name, old), new in zip(selection.baseline().accuracy.items(), scored.accuracy.values(), strict=True)
        if name != "mean"
    }
    worse = sorted((name for name in changes if changes[name] < 0), key=lambda name: changes[name])
    if worse:
        names = ", ".join(f"{name} {signed(changes[name])}" for name in worse[:3])
        more = f" and {len(worse) - 3} more" if len(worse) > 3 else ""
        sentences.append(f"It is worse on {len(worse)} of the {len(changes)} parts that were left out: {names}{more}.")
    else:
        sentences.append(f"None of the {len(changes)} parts that were left out got worse.")
    return Conclusion(helps, headline, tuple(sentences))


def _by_concept(selection: Selection) -> list[str]:
    gains = selection.by_concept
    if gains is None:
        return []
    if gains.unfitted is None:
        return ["That is on concepts that were fitted: too few to leave any out, so nothing is known of others."]
    return [
        f"That is on concepts that were not fitted: {_interval(gains.unfitted)}; on concepts whose other images were "
        f"fitted, scored in the same folds, it was {_interval(gains.fitted)}."
    ]


def _how(selection: Selection) -> str:
    return (
        f"Left out of the fit: {selection.left_out}. Scored {_SCORED.get(selection.objective, selection.objective)}, "
        f"on {selection.queries:,} images."
    )


def _points(scored: ScoredCandidate) -> str:
    return _interval(scored.gain)


def _interval(gain: AccuracyInterval) -> str:
    return f"{signed(gain.value)} points (95 % interval {signed(gain.low)} … {signed(gain.high)})"
