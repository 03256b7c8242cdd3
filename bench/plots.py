"""Plots as the pages of this room show them: one look, and SVG that stands in the page."""

from __future__ import annotations

import io
from typing import Any

INK = "#1c2430"


def new_figure(title: str, width: float, height: float) -> tuple[Any, Any]:
    """An empty matplotlib figure of so many inches with its axes and a title."""
    from matplotlib.figure import Figure  # the object interface: no global state, no display

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return figure, axes


def svg(figure: Any) -> str:
    """The figure as an `<svg>` element, without a date, so that the same numbers give the same page."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
