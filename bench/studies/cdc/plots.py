"""The table's figure: risk against coverage, and confidence against accuracy, on held-out style."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from invariclip.bench.studies.cdc.rows import MAIN, ZERO_SHOT, ZERO_SHOT_FITTED
from invariclip.calibrate.report.rendering import INK

COLOURS = {ZERO_SHOT: "#9aa7b5", ZERO_SHOT_FITTED: "#c77d1e", MAIN: "#1a7f4b"}


def plot(result: dict[str, Any]) -> str:
    """Both plots side by side, as SVG without a date."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row, colour in COLOURS.items():
        curve = result["curves"][row]
        left.plot(100 * np.linspace(0, 1, len(curve)), 100 * np.asarray(curve), color=colour, label=row)
        bins = [one for one in result["bins"][row] if one[0]]
        right.plot(
            [100 * one[1] for one in bins], [100 * one[2] for one in bins], "o-", ms=3.5, color=colour, label=row
        )
    right.plot([0, 100], [0, 100], color=INK, lw=0.8, ls=":")
    for axes, title, across, up in (
        (left, "Risk of what is answered, held-out style", "answered, %", "wrong, %"),
        (right, "Confidence and accuracy, held-out style", "confidence, %", "right, %"),
    ):
        axes.set_title(title, fontsize=10, loc="left", color=INK)
        axes.set_xlabel(across, fontsize=8)
        axes.set_ylabel(up, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8, loc="lower right")
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None}, facecolor="white")
    return stream.getvalue()
