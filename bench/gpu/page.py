"""The record of a GPU as a table and as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from invariclip.bench.gpu.cases import CANDIDATES
from invariclip.calibrate.report.rendering import AFTER, BEFORE, drawing, label, new_figure, svg, write_html
from invariclip.console import table

if TYPE_CHECKING:
    from collections.abc import Sequence

GOAL_BEFORE, GOAL_OURS, GOAL = "torch.compile float16", "invariclip, TensorRT float16 islands", 1.3
"""What is compared for the goal: batch 1, images, times of the GPU."""
OURS = frozenset(one.name for one in CANDIDATES if one.graph == "ours" and one.engine == "tensorrt")
HEADER = ["case", "candidate", "GPU p50", "p99", "end to end p50", "p99", "of peak", "cosine min", "ready in"]
TEMPLATE = Path(__file__).with_name("page.html")
WIDTH = 5.0
"""Inches of a plot; about as wide as a telephone's screen in pixels."""


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the record that has figures, as text."""
    share = row.get("peak_share")
    return [
        row["case"], row["candidate"], _ms(row.get("device_p50_ms")), _ms(row.get("device_p99_ms")),
        _ms(row["total_p50_ms"]), _ms(row["total_p99_ms"]), "-" if share is None else f"{share:.1%}",
        f"{row['cosine_min']:.6f}" if "cosine_min" in row else "reference", f"{row['ready_seconds']:.1f} s",
    ]  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row as one line, while the work goes on."""
    if not has_figures(row):
        return f"{row['case']}  {row['candidate']}  not measured: {row['reason']}"
    return "  ".join(cells(row))


def has_figures(row: dict[str, Any]) -> bool:
    """Whether a row was timed; one that was not has a reason."""
    return "total_p50_ms" in row


def not_measured(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What has no figures, a line for each candidate and reason with the cases that it holds for."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if not has_figures(row):
            found.setdefault((row["candidate"], row["reason"]), []).append(row["case"])
    return [f"{candidate}: {reason} ({', '.join(names)})" for (candidate, reason), names in found.items()]


def as_text(record: dict[str, Any]) -> str:
    """The record as an aligned table, with the goal's ratios above it and what is missing below."""
    rows = record["rows"]
    lines = [*goals(rows), "", table(HEADER, [cells(row) for row in rows if has_figures(row)])]
    left = not_measured(rows)
    return "\n".join([*lines, *(["", "Not measured:", *left] if left else [])])


def goals(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How many times as fast as `torch.compile` we are on single images, by model; or that it was not measured."""
    found = {(row["case"], row["candidate"]): row.get("device_p50_ms") for row in rows}
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows if row["batch"] == 1 and row["tower"] == "image"):
        before, ours = found.get((case, GOAL_BEFORE)), found.get((case, GOAL_OURS))
        if before and ours:
            word = "reached" if before / ours >= GOAL else "missed"
            lines.append(f"{case}: {before / ours:.2f} × {GOAL_BEFORE} (goal {GOAL} ×: {word})")
        else:
            lines.append(f"{case}: the goal was not measured")
    return lines


def write_page(path: Path, record: dict[str, Any]) -> None:
    """Writes the record as one HTML file that needs no other.

    Raises:
        InputError: The file cannot be written.
    """
    write_html(
        path,
        TEMPLATE,
        record=record,
        facts=_flat(record["machine"]),
        goals=goals(record["rows"]),
        plots=[plot for tower in ("image", "text") if (plot := _plot(record, tower))],
        header=HEADER,
        rows=[(row["candidate"] in OURS, cells(row)) for row in record["rows"] if has_figures(row)],
        left=not_measured(record["rows"]),
    )


def _plot(record: dict[str, Any], tower: str) -> str:
    """Single rows: the GPU's median by candidate; empty where nothing was measured."""
    rows = [row for row in record["rows"] if row["tower"] == tower and row["batch"] == 1 and row.get("device_p50_ms")]
    if not rows:
        return ""
    title = f"{tower}, batch 1: the GPU's median, ms"
    with drawing():
        figure, axes = new_figure(title, WIDTH, 0.3 * len(rows) + 1.1)
        for place, row in enumerate(rows):
            axes.barh(place, row["device_p50_ms"], 0.66, color=AFTER if row["candidate"] in OURS else BEFORE)
        names = [label(f"{row['model']} {row['candidate']}") for row in rows]
        axes.set_yticks(range(len(rows)), names, fontsize=9)
        axes.invert_yaxis()
        return svg(figure, f"Bar plot. {title}; the figures stand in the table.")


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in facts.items():
        if isinstance(value, dict):
            found.update({inner: what for inner, what in value.items() if what is not None})
        elif value is not None:
            found[name] = value
    return found
