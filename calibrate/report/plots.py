"""The plots of both pages: each narrow enough for a telephone, with its figures in a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.calibrate.report.rendering import AFTER, BEFORE, INK, SERIES, SOFT, drawing, label, new_figure, svg

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from invariclip.calibrate.projection.bootstrap import AccuracyInterval
    from invariclip.calibrate.projection.candidates import ProjectionCandidate
    from invariclip.calibrate.projection.selection import ScoredCandidate, Selection
    from invariclip.calibrate.report.prompts_figures import PageFigures, Template

HEIGHT = 3.4
POINTS = 400
"""Of a curve: more cannot be seen, and every one takes room in the page."""
MARKER = 110
"""Area, in square points, of a bin that holds every image."""
_SIDES = (("hand-written", BEFORE), ("CDC", AFTER))
_LEGEND: dict[str, Any] = {"loc": "outside lower center", "frameon": False, "fontsize": 9.5}
WIDTH = 4.9
"""Inches; 353 points, as wide as a telephone's screen in pixels."""
MARKERS = "osD^vP"
STRAIGHT = 2
"""Points over or under no projection up to which the axis of a curve is linear."""


def course_plot(curve: Sequence[tuple[int, float]], best_step: int) -> str:
    """Validation loss by step; the kept step is ringed.

    Args:
        curve: (step, loss) of every look.
        best_step: The one that is kept.
    """
    steps, losses = zip(*curve, strict=True)
    with drawing():
        figure, axes = new_figure("Validation loss", WIDTH, HEIGHT)
        axes.plot(steps, losses, color=AFTER, marker="o", markersize=4, linewidth=1.5)
        ring = {"markersize": 12, "mfc": "none", "mec": INK, "mew": 1.6, "linestyle": "none"}
        axes.plot(best_step, dict(curve)[best_step], "o", **ring, label=f"kept: step {best_step}")
        axes.margins(y=0.15)
        axes.xaxis.get_major_locator().set_params(integer=True)
        _name(axes, "step", "validation loss")
        figure.legend(**_LEGEND)
        return svg(figure, "Line plot. Validation loss by step; the figures stand in the table beside it.")


def risk_plot(figures: PageFigures, target: float | None) -> str:
    """Risk of what is answered by how much is answered, of both sides; the threshold is marked.

    Args:
        figures: Both sides' answers.
        target: The share of wrong answers that was allowed, or None without a target risk.
    """
    total = len(figures.cdc.right)
    places = np.unique(np.linspace(1, total, min(total, POINTS)).round().astype(int))
    with drawing():
        figure, axes = new_figure("Risk of what is answered", WIDTH, HEIGHT + 0.2)
        for (name, colour), side in zip(_SIDES, (figures.hand_written, figures.cdc), strict=True):
            # The first line is the wider, so that it shows where both are the same
            wide = {"color": colour, "linewidth": 3.4 if side is figures.hand_written else 1.6}
            axes.plot(100 * places / total, 100 * side.risk[places - 1], **wide, label=name)
        if target is not None:
            axes.axhline(100 * target, color=SOFT, linewidth=1, linestyle="--", label=f"target {100 * target:g} %")
        if figures.mark:
            point = 100 * figures.mark.coverage, 100 * figures.mark.risk
            axes.axvline(point[0], color=INK, linewidth=1, linestyle=":")
            axes.plot(*point, "D", color=INK, markersize=6, label=f"abstain above {figures.mark.uncertainty:.4g}")
        axes.set_xlim(0, 102)
        axes.set_ylim(bottom=0)
        _name(axes, "answered, % of images", "wrong, % of answers")
        figure.legend(**_LEGEND, ncols=2)
        return svg(figure, "Line plot. Risk against coverage; the figures stand in the table beside it.")


def reliability_plot(figures: PageFigures) -> str:
    """Confidence against accuracy in bins; a point's area is its bin's share of the images."""
    with drawing():
        figure, axes = new_figure("Reliability diagram", WIDTH, HEIGHT + 0.4)
        axes.plot([0, 100], [0, 100], color=SOFT, linewidth=1, linestyle=":", label="as sure as right")
        for (name, colour), side in zip(_SIDES, (figures.hand_written, figures.cdc), strict=True):
            bins = side.reliability
            filled = bins.counts > 0
            sure, right = 100 * bins.confidence[filled], 100 * bins.accuracy[filled]
            axes.plot(sure, right, color=colour, linewidth=1.3, marker="o", markersize=2.5, label=name)
            axes.scatter(sure, right, MARKER * bins.counts[filled] / bins.counts.sum(), color=colour, alpha=0.45)
        axes.set_xlim(0, 102)
        axes.set_ylim(-2, 104)
        _name(axes, "confidence, %", "right, %")
        figure.legend(**_LEGEND, ncols=3)
        return svg(
            figure, "Reliability diagram. Confidence against accuracy; the figures stand in the table beside it."
        )


def histogram_plot(figures: PageFigures) -> str:
    """Uncertainty of right and of wrong answers, each as shares of its own kind: there are often few wrong ones."""
    histogram = figures.histogram
    width = histogram.edges[1] - histogram.edges[0]
    with drawing():
        figure, axes = new_figure("Uncertainty u of right and of wrong answers", WIDTH, HEIGHT)
        kinds = (("right", histogram.right, AFTER, 0.0), ("wrong", histogram.wrong, SERIES[1], width / 2))
        for name, counts, colour, shift in kinds:
            total = int(counts.sum())
            if total:
                shares = 100 * counts / total
                label = f"{name} ({total:,})"
                axes.bar(histogram.edges[:-1] + shift, shares, width / 2, align="edge", color=colour, label=label)
        if figures.mark:
            axes.axvline(figures.mark.uncertainty, color=INK, linewidth=1, linestyle=":", label="abstain above")
        axes.set_xlim(0, histogram.edges[-1])
        _name(axes, "u", "% of the right, of the wrong")
        figure.legend(**_LEGEND, ncols=3)
        return svg(
            figure, "Histogram. Uncertainty of right and wrong answers; the figures stand in the table beside it."
        )


def templates_plot(templates: Sequence[Template], together: float) -> str:
    """How often each template alone is right, beside all of them together (percent)."""
    bars = [Bar(f"{one.name}, {one.seen}" if one.seen else one.name, one.accuracy, None) for one in templates]
    return bar_plot(
        "Right answers of each template alone", bars, unit="% right", reference=(together, "together (CDC)")
    )


def _name(axes: Any, across: str, up: str) -> None:
    axes.set_xlabel(across, fontsize=9.5)
    axes.set_ylabel(up, fontsize=9.5)


@dataclass(frozen=True)
class Bar:
    """A name with a measure without the projection and, if there is one, with it."""

    name: str
    before: AccuracyInterval
    after: AccuracyInterval | None


@dataclass(frozen=True)
class Curve:
    """Candidates of one estimator along one of its settings.

    Attributes:
        title: Of the panel.
        axis: What varies along the panel: `rank d` or `λ`.
        lines: Name of the line → its candidates.
    """

    title: str
    axis: str
    lines: dict[str, list[ScoredCandidate]]


def bar_plot(title: str, bars: Sequence[Bar], *, unit: str, reference: tuple[float, str] | None = None) -> str:
    """A bar or two for every name, with 95 % intervals.

    Args:
        title: Above the plot.
        bars: From top to bottom.
        unit: Under the axis.
        reference: A value to mark, and its name.
    """
    paired = any(bar.after is not None for bar in bars)
    with drawing():
        figure, axes = new_figure(title, WIDTH, (0.42 if paired else 0.3) * len(bars) + (1.1 if paired else 0.85))
        sides = (("without", BEFORE, -0.2), ("with the projection", AFTER, 0.2)) if paired else (("", BEFORE, 0.0),)
        for name, colour, shift in sides:
            values = [bar.after if name.startswith("with ") else bar.before for bar in bars]
            known = [(place, value) for place, value in enumerate(values) if value is not None]
            places = [place + shift for place, _ in known]
            axes.barh(places, [v.value for _, v in known], 0.38 if paired else 0.6, color=colour, label=name)
            for place, value in zip(places, (value for _, value in known), strict=True):
                axes.plot([value.low, value.high], [place, place], color=INK, linewidth=1)
        top = max(max(bar.before.high, bar.after.high if bar.after else 0) for bar in bars)
        axes.set_xlim(0, max(top, 1e-9) * 1.04)
        if reference:
            axes.axvline(reference[0], color=SOFT, linewidth=1, linestyle="--", label=reference[1])
        axes.set_yticks(range(len(bars)), [label(bar.name) for bar in bars])
        axes.set_xlabel(unit, fontsize=9.5)
        axes.invert_yaxis()
        if paired or reference:
            figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9.5)
        return svg(figure, f"Bar plot. {title}; the figures stand in the table below.")


def curve_plot(curve: Curve, chosen: ProjectionCandidate) -> str:
    """Gain over no projection along a setting, a line for each value of the other one; the chosen one is ringed."""
    values = sorted({_setting(scored, curve.axis) for line in curve.lines.values() for scored in line})
    with drawing():
        figure, axes = new_figure(curve.title, WIDTH, 3.1 + 0.17 * ((len(curve.lines) + 2) // 3))
        axes.axhline(0, color=SOFT, linewidth=1, linestyle="--")
        for number, (name, line) in enumerate(curve.lines.items()):
            colour, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
            # Lines stand a little beside each other, so that their intervals do not hide each other.
            shift = 0.09 * (number - (len(curve.lines) - 1) / 2)
            places = [values.index(_setting(scored, curve.axis)) + shift for scored in line]
            axes.plot(
                places,
                [scored.gain.value for scored in line],
                color=colour,
                marker=marker,
                markersize=4.5,
                linewidth=1.3,
                linestyle="--" if line[0].candidate.captions else "-",
                label=name,
            )
            for place, scored in zip(places, line, strict=True):
                axes.plot([place, place], [scored.gain.low, scored.gain.high], color=colour, linewidth=1)
                if scored.candidate == chosen:
                    ring = {"markersize": 12, "mfc": "none", "mec": INK, "mew": 1.6, "linestyle": "none"}
                    axes.plot(place, scored.gain.value, "o", **ring, label="chosen")
        axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        axes.margins(y=0.12)
        _bend(axes)
        axes.set_xlabel(curve.axis, fontsize=9.5)
        axes.set_ylabel("points over no projection", fontsize=9.5)
        names = axes.get_legend_handles_labels()[1]
        if len(names) > 1:
            columns = 4 if len(names) == 4 else 3
            figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9.5, columnspacing=1.2)
        return svg(figure, f"Line plot. {curve.title}; the figures stand in the table of all candidates.")


def _bend(axes: Any) -> None:
    """Draws large gains and losses closer together: what is chosen differs by a point, what cuts too deep by thirty."""
    low, high = 1.15 * axes.dataLim.y0, max(1.15 * axes.dataLim.y1, 0.6)
    if max(-low, high) <= 4 * STRAIGHT:
        return
    axes.set_yscale("symlog", linthresh=STRAIGHT, linscale=1.2)
    axes.set_ylim(low, high)
    ticks = [sign * size for size in (50, 20, 10, 5, 2, 1) for sign in (-1, 1)] + [0]
    visible = sorted(tick for tick in ticks if low <= tick <= high)
    axes.set_yticks(visible, [f"{tick:+d}".replace("-", "−") if tick else "0" for tick in visible])
    axes.set_yticks([], minor=True)


def spectrum_plot(eigenvalues: NDArray[np.float64], title: str, rank: int) -> str:
    """The estimator's spectrum, from the direction that is most kept to the one that is least; the cut is marked."""
    with drawing():
        figure, axes = new_figure(title, WIDTH, 3.1)
        axes.plot(range(1, len(eigenvalues) + 1), eigenvalues, color=AFTER, linewidth=1.8)
        if rank < len(eigenvalues):
            axes.axvline(rank + 0.5, color=INK, linewidth=1, linestyle="--", label=f"kept: the first {rank}")
            figure.legend(loc="outside lower center", frameon=False, fontsize=9.5)
        axes.set_xlabel("direction, the most invariant first", fontsize=9.5)
        return svg(figure, f"Line plot. {title}; the figures stand in the table below.")


def curves(selection: Selection) -> list[Curve]:
    """A panel for every estimator and setting that was tried in two values or more.

    Where an estimator has both settings, what was fitted with captions has its own panels: the lines would be too
    many to tell apart.
    """
    panels = []
    tried = [one for one in selection.curve if one.candidate.estimator != "identity"]
    for estimator in dict.fromkeys(one.candidate.estimator for one in tried):
        members = [one for one in tried if one.candidate.estimator == estimator]
        crowded = len({_setting(one, "rank d") for one in members}) > 1 < len({_setting(one, "λ") for one in members})
        for axis, other in (("rank d", "λ"), ("λ", "rank d")):
            for captions in sorted({one.candidate.captions for one in members}) if crowded else [None]:
                some = [one for one in members if captions is None or one.candidate.captions == captions]
                if len({_setting(one, axis) for one in some}) < 2:
                    continue
                lines: dict[str, list[ScoredCandidate]] = {}
                for one in sorted(some, key=lambda one: _setting(one, axis)):
                    lines.setdefault(_line(one, other, crowded), []).append(one)
                added = " (with captions)" if captions else ""
                panels.append(Curve(f"{estimator}: gain by {axis}{added}", axis, lines))
    return panels


def _setting(scored: ScoredCandidate, axis: str) -> float:
    value = scored.candidate.rank if axis == "rank d" else scored.candidate.strength
    return -1.0 if value is None else float(value)


def _line(scored: ScoredCandidate, other: str, crowded: bool) -> str:
    value = _setting(scored, other)
    words = [f"{other[-1]} = {value:g}"] if value > 0 else []
    words += ["with captions"] if scored.candidate.captions and not crowded else []
    return ", ".join(words) or "pairs of images"
