"""The figure of the page about sites: accuracy against the number of images, a panel for each table."""

from __future__ import annotations

import io
from typing import Any

from invariclip.bench.studies.sites.page import NONE, WAYS
from invariclip.bench.studies.sites.worlds import HALF, SIZES
from invariclip.calibrate.report.rendering import AFTER, BEFORE, INK, SERIES, SOFT

SKEWED = {"20 of one kind": ("v", SERIES[1]), "20 of two kinds": ("^", SERIES[0]), "20, kinds by Zipf's law":
          ("d", SERIES[3])}  # fmt: skip
"""Row → marker and colour."""
_COLUMNS = 3


def plot(result: dict[str, Any]) -> str:
    """Every table's mean accuracy as SVG; bands are 95 % intervals of the paired difference to the projection."""
    from matplotlib.figure import Figure

    tables = [(name, way, rows) for name, ways in result["worlds"].items() for way, rows in ways.items()]
    height = -(-(len(tables) + 1) // _COLUMNS)
    figure = Figure(figsize=(9.6, 2.9 * height), layout="constrained")
    panels = list(figure.subplots(height, _COLUMNS, squeeze=False).flat)
    for axes, (name, way, rows) in zip(panels, tables, strict=False):
        _panel(axes, rows)
        axes.set_title(f"{name}: {WAYS[way][0].lower() + WAYS[way][1:]}", fontsize=9, loc="left", color=INK)
    for axes in panels[len(tables) :]:
        axes.axis("off")
    panels[len(tables)].legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="center left")
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None}, facecolor="white")
    return stream.getvalue()


def _panel(axes: Any, rows: dict[str, Any]) -> None:
    names = {f"{size} images" if size > 1 else "1 image": f"{size}" for size in SIZES} | {HALF: "half"}
    shown = [name for name in names if name in rows]
    base = rows["projection"]["mean"]["value"]
    axes.axhline(rows[NONE]["mean"]["value"], color=BEFORE, lw=1, ls=":", label="no projection")
    axes.axhline(base, color=INK, lw=1, ls="--", label="projection")
    changes = [rows[name]["to_projection"] for name in shown]
    places = range(len(shown))
    axes.fill_between(places, [base + each["low"] for each in changes], [base + each["high"] for each in changes],
                      color=AFTER, alpha=0.18, lw=0, label="95 % interval against the projection")  # fmt: skip
    axes.plot(places, [base + each["value"] for each in changes], "o-", ms=3.5, color=AFTER, label="adapted")
    few = shown.index("20 images")
    for number, (row, (marker, colour)) in enumerate(SKEWED.items()):
        change = rows[row]["to_projection"]
        spread = [[change["value"] - change["low"]], [change["high"] - change["value"]]]
        axes.errorbar([few + 0.2 * (number + 1)], [base + change["value"]], yerr=spread, fmt=marker, ms=4, lw=0.9,
                      color=colour, label=row)  # fmt: skip
    axes.set_xticks(places, [names[name] for name in shown])
    axes.set_xlabel("unlabelled images of the site", fontsize=8, color=SOFT)
    axes.set_ylabel("right, %", fontsize=8, color=SOFT)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.1)
    axes.yaxis.get_major_locator().set_params(integer=True)
