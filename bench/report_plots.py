"""The plots of the bench's page, as SVG that stands inside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.bench.peers import OURS, PEER, PYTORCH
from invariclip.bench.plots import INK, new_figure, svg
from invariclip.bench.stages import STAGES
from invariclip.bench.summary import round_medians

if TYPE_CHECKING:
    from invariclip.bench.record import Record

COLOURS = {PYTORCH: "#9aa7b5", PEER: "#4a7fb5", OURS: "#1a7f4b"}
_STAGE_COLOURS = ("#c9d3dd", "#8fb3d9", "#4a7fb5", "#dcb35c", "#1a7f4b")
SMALLEST_LOSS = 1e-9
"""Losses of cosine below this are rounding of the figure itself, and are drawn here."""


def ratio_plot(record: Record, summary: dict[str, Any], batch: str) -> str:
    """A bar per candidate with its interval, fastest first: how many times as fast as the yardstick."""
    rows, groups = summary["batches"][batch], _groups(record)
    names = sorted(rows, key=lambda name: -rows[name]["ratio"]["value"])
    figure, axes = new_figure(f"Batch {batch}: times as fast as {summary['yardstick']}", 7.4, 0.32 * len(names) + 1)
    for place, name in enumerate(names):
        ratio = rows[name]["ratio"]
        axes.barh(place, ratio["value"], 0.66, color=COLOURS[groups[name]])
        axes.plot([ratio["low"], ratio["high"]], [place, place], color=INK, linewidth=1.4)
        axes.text(max(ratio["high"], ratio["value"]), place, f"  {ratio['value']:.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlim(0, max(rows[name]["ratio"]["high"] for name in names) * 1.14)
    axes.invert_yaxis()
    axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    return svg(figure)


def fidelity_plot(record: Record, summary: dict[str, Any], batch: str) -> str:
    """Speed over loss: the worst cosine's distance from one (to the left is better), how fast (up is better)."""
    rows, groups = summary["batches"][batch], _groups(record)
    known = [name for name in rows if record.accuracy.get(name, {}).get("cosine_min") is not None]
    figure, axes = new_figure(f"Batch {batch}: speed against the worst picture's loss of cosine", 7.4, 3.6)
    losses = [max(SMALLEST_LOSS, 1 - record.accuracy[name]["cosine_min"]) for name in known]
    for number, (name, loss) in enumerate(zip(known, losses, strict=True), 1):
        value = rows[name]["ratio"]["value"]
        axes.plot(loss, value, "o", markersize=7, color=COLOURS[groups[name]], label=f"{number}  {name}")
        axes.annotate(str(number), (loss, value), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("1 − cosine, worst picture", fontsize=8)
    axes.set_ylabel("times as fast", fontsize=8)
    axes.set_ylim(bottom=0)
    for bound, word in ((1e-6, "exact"), (1e-4, "near")):
        axes.axvline(bound, color=INK, linewidth=0.8, linestyle=":")
        axes.text(bound, 1.0, f"{word} ", transform=axes.get_xaxis_transform(), ha="right", va="top", fontsize=8)
    figure.legend(loc="outside right center", frameon=False, fontsize=7.5, handletextpad=0.2)
    return svg(figure)


def stage_plot(summary: dict[str, Any]) -> str:
    """Stacked stages of each of our variants, in ms at batch 1."""
    names = list(summary["stages"])
    figure, axes = new_figure("Where a picture's time goes, ms at batch 1", 7.4, 0.4 * len(names) + 1.3)
    left = np.zeros(len(names))
    for stage, colour in zip(STAGES, _STAGE_COLOURS, strict=True):
        taken = np.array([summary["stages"][name][stage] for name in names])
        axes.barh(range(len(names)), taken, 0.6, left=left, color=colour, label=stage)
        left += taken
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=len(STAGES), frameon=False, fontsize=8)
    return svg(figure)


def round_plot(record: Record, summary: dict[str, Any], batch: str) -> str:
    """Each candidate's median of each round over its median of all: how steady the machine was."""
    rounds, groups = record.rounds[batch], _groups(record)
    figure, axes = new_figure(f"Batch {batch}: each round's median over that of all rounds", 7.4, 2.6)
    for name in summary["batches"][batch]:
        places = [place for place, one in enumerate(rounds) if name in one.turns]
        medians = round_medians([rounds[place].turns[name] for place in places])
        axes.plot(
            [p + 1 for p in places], medians / np.median(medians), color=COLOURS[groups[name]], linewidth=1, alpha=0.8
        )
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xlabel("round", fontsize=8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return svg(figure)


def _groups(record: Record) -> dict[str, str]:
    return {entry["name"]: entry["group"] for entry in record.entries}
