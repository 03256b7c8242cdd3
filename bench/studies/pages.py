"""The committed pages of studies: figures with intervals, tables, plots as SVG, and the files that they go to."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

from invariclip.console import note
from invariclip.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

PLAIN_COLOUR, PROJECTED_COLOUR = "#9aa7b5", "#1a7f4b"
"""Of bars and lines before a projection, and after it."""


def interval(value: Mapping[str, float], *, signed: bool = False) -> str:
    """A figure with its interval, from `value`, `low` and `high`."""
    sign = "+" if signed else ""
    return f"{value['value']:{sign}.1f} [{value['low']:{sign}.1f}, {value['high']:{sign}.1f}]"


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def trim(*panels: Any, margin: float | None = None) -> None:
    """Takes the frame of a plot's axes away, and leaves room above for what stands on bars."""
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        if margin is not None:
            axes.margins(y=margin)


def as_svg(figure: Any) -> str:
    """A figure of matplotlib as SVG without a date."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None}, facecolor="white")
    return stream.getvalue()


def write_result(out: Path, result: Any, page: str, plot: str | None = None) -> None:
    """Writes the page, its record as .json beside it, and its plot as .svg where it has one.

    Args:
        out: The page's file.
        result: The record, JSON-ready.
        page: The page's text.
        plot: The plot.
    """
    write_atomically(out.with_suffix(".json"), json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    write_atomically(out, page)
    if plot is not None:
        write_atomically(out.with_suffix(".svg"), plot)
    note(f"wrote {out}, its .json and its .svg" if plot is not None else f"wrote {out} and its .json")
