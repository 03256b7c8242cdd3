"""The page that `invariclip demo` leaves: one self-contained HTML file."""

from __future__ import annotations

import base64
import io
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from invariclip.artifact.parity import PARITY_HEADER, parity_rows
from invariclip.backends import DEFAULT_BACKEND
from invariclip.bench.demo.bundled import DRAWINGS, MEAN, PHOTOGRAPHS, PROTOCOLS, SHOWN, answered, kind_of
from invariclip.calibrate.report.rendering import (
    AFTER,
    BEFORE,
    SERIES,
    SOFT,
    drawing,
    label,
    new_figure,
    svg,
    write_html,
)
from invariclip.export.reference import manifest_path
from invariclip.preprocessing.decode import open_image
from invariclip.threads import available_threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from invariclip.artifact.manifest import Manifest
    from invariclip.bench.demo.bundled import Accuracy, ArtifactAnswers, Bundle, DemoVerdict, Halves, Own, Protocol
    from invariclip.bench.latency.measure import Timing
    from invariclip.calibrate.data.images import ImageRecord
    from invariclip.calibrate.fit import Calibration
    from invariclip.calibrate.projection.selection import Selection

STRIP = 4
"""Photographs, and as many drawings, on the first screen."""
GALLERY = 18
"""Images with changed answers further down."""
LEAST_SURE = 6
OWN = 48
"""The user's own images on the page; the terminal lists all."""
OWN_EDGE = 256
"""Longest edge of theirs, in pixels: a folder of camera images would make a page of hundreds of megabytes."""
TEMPLATE = Path(__file__).with_name("demo.html")
WIDTH, HEIGHT = 4.9, 3.4
"""Inches of a plot; 4.9 are as wide as a telephone's screen in pixels."""


@dataclass(frozen=True)
class Demo:
    """Everything one run found out; see `bench.demo.run`."""

    bundled: Bundle
    calibration: Calibration
    answers: tuple[ArtifactAnswers, ArtifactAnswers]
    accuracy: list[Accuracy]
    timings: list[Timing]
    busy: str | None
    manifest: Manifest
    artifact: Path
    halves: Halves
    verdict: DemoVerdict
    own: tuple[Own, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def chosen(self) -> str:
        """The projection in words, e.g. `shrinkage λ=3`."""
        selection, projection = self.calibration.selection, self.calibration.projection
        return str(selection.chosen) if selection else f"{projection.estimator} d={projection.rank}"

    @property
    def next_lines(self) -> list[str]:
        """Commands to type next, with the paths of this run."""
        photographs = [p.path for p in self.bundled.images if kind_of(p) == PHOTOGRAPHS]
        paths = [
            self.artifact, (photographs or [self.bundled.images[0].path])[0], manifest_path(),
            self.artifact.with_name("mine.icm"),
        ]  # fmt: skip
        artifact, image, manifest, mine = (shlex.quote(_near(path)) for path in paths)
        return [
            f"invariclip predict {artifact} {image}",
            f"invariclip serve {artifact}",
            f'invariclip build --images {manifest} --classes "dog,cat,car" -o {mine}'
            "  # yours: --model ViT-B-32 --checkpoint FILE --images FOLDER",
        ]


@dataclass(frozen=True)
class Changed:
    """An unseen image whose answer the projection changed."""

    image: ImageRecord
    before: str
    after: str

    def item(self) -> dict[str, str]:
        """As the page shows it."""
        image = self.image
        return {
            "src": image_source(image.path), "truth": image.name, "style": image.environment,
            "before": self.before, "after": self.after,
        }  # fmt: skip


def image_source(path: Path) -> str:
    """An image as a data URI, so that the page needs no other file."""
    kind = {"jpg": "jpeg"}.get(path.suffix[1:].lower(), path.suffix[1:].lower())
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def accuracy_plot(rows: Sequence[Accuracy]) -> str:
    """Bars before, after and adapted, in percent, three for each row."""
    title = "Top-1 on unseen styles (%)"
    with drawing():
        figure, axes = new_figure(title, WIDTH, 0.75 * len(rows) + 1.1)
        places = range(len(rows))
        series = (("before", BEFORE), ("after", AFTER), ("adapted", SERIES[0]))
        for turn, (name, colour) in enumerate(series):
            values = [100 * (getattr(row, name) or 0.0) for row in rows]
            bars = axes.barh([place + 0.27 * (turn - 1) for place in places], values, 0.25, color=colour, label=name)
            axes.bar_label(bars, fmt="%.1f", fontsize=9.5, padding=2)
        axes.set_yticks(list(places), [label(f"{row.style}, {row.protocol}") for row in rows])
        axes.set_xlim(0, max(100 * max(row.before, row.after, row.adapted or 0.0) for row in rows) * 1.15 + 1)
        axes.invert_yaxis()
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9.5)
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
    shown = shown_protocol(demo.accuracy)
    fixed, broken = _changed(demo, shown)
    strip = [item for kind in (PHOTOGRAPHS, DRAWINGS) for item in _sample(fixed, broken, STRIP, kind)]
    write_html(
        path,
        TEMPLATE,
        image_count=len(bundled.images),
        concept_count=len({image.concept for image in bundled.images}),
        class_count=len(bundled.classes),
        training_styles=bundled.training_styles,
        held_out_styles=bundled.held_out_styles,
        verdict=demo.verdict,
        means=[row for row in reversed(demo.accuracy) if row.style == MEAN],  # names, which all know, first
        protocols=PROTOCOLS,
        shown=PROTOCOLS[shown],
        site_images=SHOWN,
        strip=strip,
        style_row=_style_row(bundled),
        accuracy=sorted(demo.accuracy, key=lambda row: row.seen),
        mean=MEAN,
        changed=_sample(fixed, broken, GALLERY),
        fixed_count=len(fixed),
        broken_count=len(broken),
        own=[_own(one) for one in demo.own[:OWN]],
        own_count=len(demo.own),
        selection=_selection_text(demo),
        plots=_plots(demo),
        parity={"header": PARITY_HEADER, "rows": parity_rows(manifest.variants["float32"].parity[DEFAULT_BACKEND])},
        latency=demo.timings,
        busy=demo.busy,
        threads=available_threads(),
        artifact=demo.artifact,
        halves=demo.halves,
        least_sure=_least_sure(demo),
        files=[f"{file.name:24} {file.stat().st_size:>12,} bytes" for file in sorted(demo.artifact.iterdir())],
        next_lines=demo.next_lines,
        provenance=", ".join(f"{name} {value}" for name, value in manifest.producer.items()),
    )


def shown_protocol(rows: Sequence[Accuracy]) -> Protocol:
    """Whose answers the images show: the first protocol whose gain is clear, else the first."""
    clear = [row.protocol for row in rows if row.style == MEAN and row.low > 0]
    return clear[0] if clear else next(iter(PROTOCOLS))


def _near(path: Path) -> str:
    """A path as it is typed from here."""
    return os.path.relpath(path) if path.is_absolute() and path.is_relative_to(Path.cwd()) else str(path)


def _style_row(bundled: Bundle) -> list[dict[str, str]]:
    """One thing in every style: the first by its identifier that has a photograph."""
    concept = min((p.concept for p in bundled.images if kind_of(p) == PHOTOGRAPHS), default=bundled.fit[0].concept)
    same = [image for image in bundled.images if image.concept == concept]
    return [{"src": image_source(p.path), "name": p.name, "style": p.environment} for p in same]


def _changed(demo: Demo, protocol: Protocol) -> tuple[list[Changed], list[Changed]]:
    """Unseen images whose answer became right, and those whose answer became wrong."""
    bundled = demo.bundled
    old, new = (answered(bundled, answers, protocol) for answers in demo.answers)
    fixed: list[Changed] = []
    broken: list[Changed] = []
    for image, asked, before, after in zip(bundled.images, bundled.unseen, old, new, strict=True):
        one = Changed(image, bundled.classes[before], bundled.classes[after])
        right = one.before == image.name, one.after == image.name
        if asked and right[0] != right[1]:
            (fixed if right[1] else broken).append(one)
    return fixed, broken


def _sample(fixed: list[Changed], broken: list[Changed], count: int, kind: str | None = None) -> list[dict[str, str]]:
    """A seeded sample in which right and wrong changes stand in proportion, at least one of each that there is."""
    ours, theirs = ([one for one in each if kind in (None, kind_of(one.image))] for each in (fixed, broken))
    total = len(ours) + len(theirs)
    wrong = min(len(theirs), max(1, round(count * len(theirs) / total)) if total else 0)
    wrong = max(wrong, min(len(theirs), count - len(ours)))
    return [one.item() for one in (*_shuffled(ours, count - wrong), *_shuffled(theirs, wrong))]


def _shuffled(items: list[Changed], count: int) -> list[Changed]:
    """A seeded sample, so that the gallery is not the first style alone."""
    order = np.random.default_rng(0).permutation(len(items))
    return [items[index] for index in order[: max(0, count)]]


def _least_sure(demo: Demo) -> list[dict[str, object]]:
    """The unseen images that the artifact is least sure of, told by names."""
    bundled, answers = demo.bundled, demo.answers[1]
    places = np.flatnonzero(bundled.unseen)
    order = places[np.argsort(-answers.uncertainty[places], kind="stable")][:LEAST_SURE]
    return [
        {
            "src": image_source(bundled.images[place].path),
            "truth": bundled.images[place].name,
            "style": bundled.images[place].environment,
            "answer": bundled.classes[answers.indices[place]],
            "uncertainty": float(answers.uncertainty[place]),
        }
        for place in order
    ]


def _own(one: Own) -> dict[str, object]:
    image = open_image(one.path, exif_transpose=True).convert("RGB")
    image.thumbnail((OWN_EDGE, OWN_EDGE))
    stream = io.BytesIO()
    image.save(stream, format="WEBP", quality=80)
    source = f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"
    return {"src": source, "name": one.path.name, "before": one.before, "after": one.after, "changed": one.changed}


def _selection_text(demo: Demo) -> str:
    selection = demo.calibration.selection
    if selection is None:
        return f"{demo.chosen}, as asked for; nothing could be left out to select by."
    scored = selection.result()
    count = len(selection.curve) + len(selection.screened)
    return (
        f"Chosen: {demo.chosen}, out of {count} candidates, no projection being one{_screened(selection)}. "
        "Left out in turn: "
        f"{selection.left_out}. Scored on {selection.queries} images that each fit had not seen, it gained "
        f"{scored.gain.value:+.1f} points (95 % interval {scored.gain.low:+.1f} … {scored.gain.high:+.1f}) over no "
        "projection. No projection is kept where it is within one standard error of the best candidate; otherwise the "
        "best is taken, of equally good ones the one that answers most clearly."
    )


def _screened(selection: Selection) -> str:
    few = "of which were dropped after a few folds" if selection.screened else ""
    return f", {len(selection.screened)} {few}" if few else ""


def _plots(demo: Demo) -> list[str]:
    unseen = [row for row in demo.accuracy if row.style in (DRAWINGS, PHOTOGRAPHS, MEAN)]
    plots = [accuracy_plot(unseen)]
    selection = demo.calibration.selection
    if selection:
        curve = sorted(selection.curve, key=lambda scored: -scored.gain.value)[:16]
        names = [str(scored.candidate) for scored in curve]
        gains = [(scored.gain.value, scored.gain.low, scored.gain.high) for scored in curve]
        plots.append(curve_plot(names, gains, demo.chosen, "Gain where left out (points)"))
    if demo.calibration.projection.eigenvalues.size:
        plots.append(spectrum_plot(demo.calibration.projection.eigenvalues, f"Spectrum of {demo.chosen}"))
    return plots
