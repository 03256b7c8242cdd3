"""The page's plots, each of figures that also stand in a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.calibrate.report.rendering import AFTER, BEFORE, INK, SERIES, SOFT, drawing, new_figure, svg
from invariclip.calibrate.report.plots import WIDTH, Bar, bar_plot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from invariclip.calibrate.report.prompts_figures import PageFigures, Template

HEIGHT = 3.4
POINTS = 400
"""Of a curve: more cannot be seen, and every one takes room in the page."""
MARKER = 110
"""Area, in square points, of a bin that holds every image."""
_SIDES = (("hand-written", BEFORE), ("CDC", AFTER))
_LEGEND: dict[str, Any] = {"loc": "outside lower center", "frameon": False, "fontsize": 9.5}


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
        target: The share of wrong answers that was allowed, or None where none was asked for.
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
    found = figures.histogram
    width = found.edges[1] - found.edges[0]
    with drawing():
        figure, axes = new_figure("Uncertainty u of right and of wrong answers", WIDTH, HEIGHT)
        kinds = (("right", found.right, AFTER, 0.0), ("wrong", found.wrong, SERIES[1], width / 2))
        for name, counts, colour, shift in kinds:
            total = int(counts.sum())
            if total:
                shares = 100 * counts / total
                label = f"{name} ({total:,})"
                axes.bar(found.edges[:-1] + shift, shares, width / 2, align="edge", color=colour, label=label)
        if figures.mark:
            axes.axvline(figures.mark.uncertainty, color=INK, linewidth=1, linestyle=":", label="abstain above")
        axes.set_xlim(0, found.edges[-1])
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
