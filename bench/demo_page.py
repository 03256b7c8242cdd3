"""The page that `invariclip demo` leaves: one self-contained HTML file."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from invariclip.backends import DEFAULT_BACKEND
from invariclip.backends.threads import available_threads
from invariclip.calibrate.report.look import AFTER, BEFORE, SOFT, drawing, label, new_figure, svg, write_html
from invariclip.parity import PARITY_HEADER, parity_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from invariclip.bench.bundled import Accuracy, Answers, Bundle
    from invariclip.bench.demo_unsure import Told, Unsure
    from invariclip.bench.latency import Timing
    from invariclip.calibrate.fit import Calibration
    from invariclip.manifest import Manifest

GALLERY = 18
"""Pictures with changed answers on the page; up to four of them are ones that became wrong."""
TEMPLATE = Path(__file__).with_name("demo.html")
WIDTH, HEIGHT = 4.9, 3.4
"""Inches of a plot; 4.9 are as wide as a telephone's screen in pixels."""


@dataclass(frozen=True)
class Demo:
    """Everything one run found out; see `bench.demo.run`."""

    bundled: Bundle
    calibration: Calibration
    answers: tuple[Answers, Answers]
    accuracy: list[Accuracy]
    timings: list[Timing]
    manifest: Manifest
    artifact: Path
    unsure: Unsure
    helped: bool
    verdict: str

    @property
    def chosen(self) -> str:
        """The projection in words, e.g. `shrinkage λ=3`."""
        selection, projection = self.calibration.selection, self.calibration.projection
        return str(selection.chosen) if selection else f"{projection.estimator} d={projection.rank}"


def picture_source(path: Path) -> str:
    """A picture as a data URI, so that the page needs no other file."""
    kind = {"jpg": "jpeg"}.get(path.suffix[1:].lower(), path.suffix[1:].lower())
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def accuracy_plot(labels: Sequence[str], before: Sequence[float], after: Sequence[float]) -> str:
    """Bars before and after, in percent, one pair per label."""
    title = "Top-1 on unseen styles (%)"
    with drawing():
        figure, axes = new_figure(title, WIDTH, 0.55 * len(labels) + 1.1)
        places = range(len(labels))
        for shift, values, colour, name in ((-0.2, before, BEFORE, "before"), (0.2, after, AFTER, "after")):
            bars = axes.barh([place + shift for place in places], values, 0.38, color=colour, label=name)
            axes.bar_label(bars, fmt="%.1f", fontsize=9.5, padding=2)
        axes.set_yticks(list(places), [label(name) for name in labels])
        axes.set_xlim(0, max([*before, *after, 1.0]) * 1.15)
        axes.invert_yaxis()
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9.5)
        return svg(figure, f"Bar plot. {title}; the figures stand in the table of accuracy.")


def spectrum_plot(eigenvalues: NDArray[np.float64], title: str) -> str:
    """The estimator's spectrum, from the direction that is most kept to the one that is least."""
    with drawing():
        figure, axes = new_figure(title, WIDTH, HEIGHT)
        axes.plot(range(1, len(eigenvalues) + 1), eigenvalues, color=AFTER, linewidth=1.8)
        axes.set_xlabel("direction", fontsize=9.5)
        return svg(figure, f"Line plot. {title}, falling from {eigenvalues[0]:.3g} to {eigenvalues[-1]:.3g}.")


def curve_plot(names: Sequence[str], gains: Sequence[tuple[float, float, float]], chosen: str, title: str) -> str:
    """Candidates of the selection, (value, low, high) each, in points; the chosen one is marked."""
    with drawing():
        figure, axes = new_figure(title, WIDTH, 0.26 * len(names) + 0.9)
        for place, (name, (value, low, high)) in enumerate(zip(names, gains, strict=True)):
            colour = AFTER if name == chosen else BEFORE
            axes.plot([low, high], [place, place], color=colour, linewidth=1.6)
            axes.plot(value, place, "o", color=colour, markersize=5)
        axes.axvline(0, color=SOFT, linewidth=1, linestyle=":")
        axes.set_yticks(range(len(names)), [label(name) for name in names])
        axes.invert_yaxis()
        best = f"{names[0]} at {gains[0][0]:+.1f}" if names else "none"
        return svg(figure, f"Interval plot. {title}, best first: {best}.")


def write_page(path: Path, demo: Demo) -> None:
    """Renders the page with autoescaping and writes it atomically."""
    bundled, manifest = demo.bundled, demo.manifest
    fixed, broken = _changed(demo)
    write_html(
        path,
        TEMPLATE,
        picture_count=len(bundled.pictures),
        concept_count=len({picture.concept for picture in bundled.pictures}),
        class_count=len(bundled.classes),
        training_styles=bundled.training_styles,
        held_out_styles=bundled.held_out_styles,
        helped=demo.helped,
        verdict=demo.verdict,
        style_row=_style_row(bundled),
        accuracy=demo.accuracy,
        changed=_shuffled(fixed, GALLERY - 4) + _shuffled(broken, 4),
        fixed_count=len(fixed),
        broken_count=len(broken),
        selection=_selection_text(demo),
        plots=_plots(demo),
        parity={"header": PARITY_HEADER, "rows": parity_rows(manifest.variants["float32"].parity[DEFAULT_BACKEND])},
        latency=demo.timings,
        threads=available_threads(),
        artifact=demo.artifact,
        unsure={
            "artifact": demo.unsure.artifact,
            "sentence": demo.unsure.sentence,
            "ends": [
                ("Least sure", [_told(one) for one in demo.unsure.least_sure]),
                ("Surest", [_told(one) for one in demo.unsure.surest]),
            ],
        },
        files=[f"{file.name:24} {file.stat().st_size:>12,} bytes" for file in sorted(demo.artifact.iterdir())],
        provenance=", ".join(f"{name} {value}" for name, value in manifest.producer.items()),
    )


def _style_row(bundled: Bundle) -> list[dict[str, str]]:
    """One thing in every style: a training concept, the first by its identifier."""
    concept = min(p.concept for p in bundled.fit if p.split == "train")
    same = [picture for picture in bundled.pictures if picture.concept == concept]
    return [{"src": picture_source(p.path), "name": p.name, "style": p.environment} for p in same]


def _changed(demo: Demo) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Held-out pictures whose zero-shot answer became right, and those whose answer became wrong."""
    bundled, (old, new) = demo.bundled, demo.answers
    fixed: list[dict[str, str]] = []
    broken: list[dict[str, str]] = []
    for picture, before, after in zip(bundled.pictures, old.indices, new.indices, strict=True):
        names = bundled.classes[before], bundled.classes[after]
        right = [name == picture.name for name in names]
        if picture.environment not in bundled.held_out_styles or right[0] == right[1]:
            continue
        item = {"src": picture_source(picture.path), "truth": picture.name, "style": picture.environment}
        (fixed if right[1] else broken).append({**item, "before": names[0], "after": names[1]})
    return fixed, broken


def _told(one: Told) -> dict[str, object]:
    return {
        "src": picture_source(one.picture.path),
        "truth": one.picture.name,
        "style": one.picture.environment,
        "answer": one.answer,
        "right": one.right,
        "uncertainty": one.uncertainty,
    }


def _shuffled(items: list[dict[str, str]], count: int) -> list[dict[str, str]]:
    """A seeded sample, so that the gallery is not the first style alone."""
    order = np.random.default_rng(0).permutation(len(items))
    return [items[index] for index in order[:count]]


def _selection_text(demo: Demo) -> str:
    selection = demo.calibration.selection
    if selection is None:
        return f"{demo.chosen}, as asked for; nothing could be left out to select by."
    scored = selection.result()
    return (
        f"Chosen: {demo.chosen}, out of {len(selection.curve)} candidates, no projection being one. Left out in turn: "
        f"{selection.left_out}. Scored on {selection.queries} pictures that each fit had not seen, it gained "
        f"{scored.gain.value:+.1f} points (95 % interval {scored.gain.low:+.1f} … {scored.gain.high:+.1f}) over no "
        "projection. No projection is kept where it is within one standard error of the best candidate; otherwise the "
        "best is taken, of equally good ones the one that answers most clearly."
    )


def _plots(demo: Demo) -> list[str]:
    zero_shot = [row for row in demo.accuracy if row.protocol == "zero-shot"]
    percent = [100 * row.before for row in zero_shot], [100 * row.after for row in zero_shot]
    plots = [accuracy_plot([row.style for row in zero_shot], *percent)]
    selection = demo.calibration.selection
    if selection:
        curve = sorted(selection.curve, key=lambda scored: -scored.gain.value)[:16]
        names = [str(scored.candidate) for scored in curve]
        gains = [(scored.gain.value, scored.gain.low, scored.gain.high) for scored in curve]
        plots.append(curve_plot(names, gains, demo.chosen, "Gain where left out (points)"))
    if demo.calibration.projection.eigenvalues.size:
        plots.append(spectrum_plot(demo.calibration.projection.eigenvalues, f"Spectrum of {demo.chosen}"))
    return plots
