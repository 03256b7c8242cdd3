"""The page that `invariclip demo` leaves: one self-contained HTML file."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invariclip.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

TEMPLATE = Path(__file__).parent / "templates" / "demo.html"
_BEFORE, _AFTER, _INK = "#9aa7b5", "#1a7f4b", "#1c2430"


def picture_source(path: Path) -> str:
    """A picture as a data URI, so that the page needs no other file."""
    kind = {"jpg": "jpeg"}.get(path.suffix[1:].lower(), path.suffix[1:].lower())
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def accuracy_plot(labels: Sequence[str], before: Sequence[float], after: Sequence[float]) -> str:
    """Bars before and after, in percent, one pair per label."""
    figure, axes = _figure("Top-1 on unseen styles (%)")
    places = range(len(labels))
    for shift, values, colour, name in ((-0.2, before, _BEFORE, "before"), (0.2, after, _AFTER, "after")):
        bars = axes.bar([place + shift for place in places], values, 0.38, color=colour, label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    axes.set_xticks(list(places), labels, fontsize=8)
    axes.set_ylim(0, max([*before, *after, 1.0]) * 1.18)
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def spectrum_plot(eigenvalues: NDArray[np.float64], title: str) -> str:
    """The estimator's spectrum, from the direction that is most kept to the one that is least."""
    figure, axes = _figure(title)
    axes.plot(range(1, len(eigenvalues) + 1), eigenvalues, color=_AFTER, linewidth=1.8)
    axes.set_xlabel("direction", fontsize=8)
    return _svg(figure)


def curve_plot(names: Sequence[str], scores: Sequence[float], errors: Sequence[float], chosen: str, title: str) -> str:
    """Every candidate of the selection with its standard error; the chosen one is marked."""
    figure, axes = _figure(title)
    for place, (name, score, error) in enumerate(zip(names, scores, errors, strict=True)):
        colour = _AFTER if name == chosen else _BEFORE
        axes.errorbar(score, place, xerr=error, fmt="o", color=colour, markersize=5, linewidth=1.4)
    axes.axvline(0, color=_INK, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    return _svg(figure)


def write_page(path: Path, **facts: Any) -> None:
    """Renders the template with autoescaping and writes it atomically."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(**facts)
    write_atomically(path, page)


def _figure(title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # the object interface: no global state, no display

    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10, loc="left", color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return figure, axes


def _svg(figure: Any) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
