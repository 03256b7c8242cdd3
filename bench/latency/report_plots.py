"""The plots of the bench's page, as SVG that stands inside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.bench.latency.peers import OURS, PEER, PYTORCH
from invariclip.bench.latency.stages import STAGES
from invariclip.bench.latency.summary import round_medians
from invariclip.calibrate.report.rendering import AFTER, BEFORE, INK, SERIES, SOFT, drawing, label, new_figure, svg

if TYPE_CHECKING:
    from invariclip.bench.latency.record import Record

COLOURS = {PYTORCH: BEFORE, PEER: SERIES[0], OURS: AFTER}
_STAGE_COLOURS = (BEFORE, SERIES[0], SERIES[3], SERIES[1], AFTER)
WIDTH = 4.9
"""Inches; 353 points, as wide as a telephone's screen in pixels."""
SMALLEST_LOSS = 1e-9
"""Losses of cosine below this are rounding of the figure itself, and are drawn here."""


def ratio_plot(record: Record, summary: dict[str, Any], batch: str) -> str:
    """A bar per candidate with its interval, fastest first: how many times as fast as the yardstick."""
    rows, groups = summary["batches"][batch], _groups(record)
    names = sorted(rows, key=lambda name: -rows[name]["ratio"]["value"])
    title = f"Batch {batch}: times as fast"
    with drawing():
        figure, axes = new_figure(title, WIDTH, 0.3 * len(names) + 1.1)
        for place, name in enumerate(names):
            ratio = rows[name]["ratio"]
            axes.barh(place, ratio["value"], 0.66, color=COLOURS[groups[name]])
            axes.plot([ratio["low"], ratio["high"]], [place, place], color=INK, linewidth=1.4)
            end = (max(ratio["high"], ratio["value"]), place)
            shift = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(f"{ratio['value']:.2f}", end, fontsize=9, **shift)
        axes.set_yticks(range(len(names)), [_name(name) for name in names], fontsize=9)
        axes.set_xlim(0, max(rows[name]["ratio"]["high"] for name in names) * 1.2)
        axes.set_xlabel(f"times as fast as {summary['yardstick']}", fontsize=9.5)
        axes.invert_yaxis()
        axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
        return svg(figure, f"Bar plot. {title}; the figures stand in the table of batch {batch}.")


def fidelity_plot(record: Record, summary: dict[str, Any], batch: str) -> str:
    """Speed over loss: the worst cosine's distance from one (to the left is better), how fast (up is better)."""
    rows, groups = summary["batches"][batch], _groups(record)
    known = [name for name in rows if record.accuracy.get(name, {}).get("cosine_min") is not None]
    losses = [max(SMALLEST_LOSS, 1 - record.accuracy[name]["cosine_min"]) for name in known]
    title = f"Batch {batch}: speed against loss of cosine"
    with drawing():
        figure, axes = new_figure(title, WIDTH, 3.2 + 0.1 * len(known))
        for number, (name, loss) in enumerate(zip(known, losses, strict=True), 1):
            value = rows[name]["ratio"]["value"]
            axes.plot(loss, value, "o", markersize=7, color=COLOURS[groups[name]], label=f"{number}  {_name(name)}")
            axes.annotate(str(number), (loss, value), xytext=(5, 4), textcoords="offset points", fontsize=9)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}")  # matplotlib's own is a formula
        axes.set_xlabel("1 − cosine, worst image", fontsize=9.5)
        axes.set_ylabel("times as fast", fontsize=9.5)
        axes.set_ylim(bottom=0)
        for bound, word in ((1e-6, "exact"), (1e-4, "near")):
            axes.axvline(bound, color=SOFT, linewidth=0.8, linestyle=":")
            axes.text(bound, 1.0, f"{word} ", transform=axes.get_xaxis_transform(), ha="right", va="top", fontsize=9)
        figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=9, handletextpad=0.2)
        return svg(figure, f"Scatter plot. {title}; the figures stand in the tables of speed and of answers.")


def stage_plot(summary: dict[str, Any]) -> str:
    """Stacked stages of each of our variants, in ms at batch 1."""
    names, title = list(summary["stages"]), "Where an image's time goes, ms at batch 1"
    with drawing():
        figure, axes = new_figure(title, WIDTH, 0.4 * len(names) + 1.3)
        left = np.zeros(len(names))
        for stage, colour in zip(STAGES, _STAGE_COLOURS, strict=True):
            taken = np.array([summary["stages"][name][stage] for name in names])
            axes.barh(range(len(names)), taken, 0.6, left=left, color=colour, label=stage)
            left += taken
        axes.set_yticks(range(len(names)), [_name(name) for name in names], fontsize=9)
        axes.invert_yaxis()
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        return svg(figure, f"Bar plot. {title}; the figures stand in the table of stages.")


def round_plot(record: Record, summary: dict[str, Any], batch: str) -> str:
    """Each candidate's median of each round over its median of all: how steady the machine was."""
    rounds, groups = record.rounds[batch], _groups(record)
    title = f"Batch {batch}: each round's median over all rounds'"
    with drawing():
        figure, axes = new_figure(title, WIDTH, 2.6)
        for name in summary["batches"][batch]:
            places = [place for place, one in enumerate(rounds) if name in one.turns]
            medians = round_medians([rounds[place].turns[name] for place in places])
            colour = COLOURS[groups[name]]
            axes.plot([p + 1 for p in places], medians / np.median(medians), color=colour, linewidth=1, alpha=0.8)
        axes.axhline(1, color=SOFT, linewidth=0.8, linestyle=":")
        axes.set_xlabel("round", fontsize=9.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        return svg(figure, f"Line plot. {title}; one line for each candidate.")


def _name(name: str) -> str:
    """A candidate's name as a plot shows it: without what its colour says, and short."""
    return label(name.removeprefix("invariclip ").removeprefix("PyTorch ").replace("OpenVINO NNCF", "NNCF"))


def _groups(record: Record) -> dict[str, str]:
    return {entry["name"]: entry["group"] for entry in record.entries}
