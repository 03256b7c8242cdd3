"""The record of a GPU as a table and as one HTML page."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

from invariclip.bench.plots import new_figure, svg
from invariclip.console import table

if TYPE_CHECKING:
    from collections.abc import Sequence

GOAL_BEFORE, GOAL_OURS, GOAL = "torch.compile float16", "invariclip, TensorRT float16 islands", 1.3
"""What is compared for the goal: batch 1, pictures, times of the GPU."""
HEADER = ["case", "candidate", "GPU p50", "p99", "end to end p50", "p99", "of peak", "cosine min", "ready in"]
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1c2430}"
    "table{border-collapse:collapse;width:100%}td,th{padding:.25rem .6rem;text-align:left;"
    "border-bottom:1px solid #d8dee8;font-variant-numeric:tabular-nums}"
    "@media(prefers-color-scheme:dark){body{background:#12161d;color:#dfe6f0}td,th{border-color:#2c3644}"
    "svg{background:#fff;border-radius:.4rem}}"
)


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the record as text; one without figures says why in place of them."""
    if "total_p50_ms" not in row:
        return [row["case"], row["candidate"], f"not measured: {row.get('reason', 'unknown')}", *[""] * 6]
    share = row.get("peak_share")
    return [
        row["case"], row["candidate"], _ms(row.get("device_p50_ms")), _ms(row.get("device_p99_ms")),
        _ms(row["total_p50_ms"]), _ms(row["total_p99_ms"]), "-" if share is None else f"{share:.1%}",
        f"{row['cosine_min']:.6f}" if "cosine_min" in row else "reference", f"{row['ready_seconds']:.1f} s",
    ]  # fmt: skip


def as_text(record: dict[str, Any]) -> str:
    """The record as an aligned table, with the goal's ratios above it."""
    lines = [*goals(record["rows"]), "", table(HEADER, [cells(row) for row in record["rows"]])]
    return "\n".join(lines)


def goals(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How many times as fast as `torch.compile` we are on single pictures, by model; or that it was not measured."""
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


def as_page(record: dict[str, Any]) -> str:
    """The record as one HTML file that needs no other."""
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells(row))}</tr>" for row in record["rows"]
    )
    head = "".join(f"<th>{html.escape(name)}</th>" for name in HEADER)
    facts = html.escape(", ".join(f"{name} {value}" for name, value in _flat(record["machine"]).items()))
    said = "".join(f"<li>{html.escape(line)}</li>" for line in goals(record["rows"]))
    plots = "".join(_plot(record, tower) for tower in ("image", "text"))
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>CLIP on a GPU</title><style>{_STYLE}</style><h1>CLIP on a GPU</h1>"
        f"<p>{html.escape(record['date'])}. {facts}. Random weights; times in milliseconds.</p>"
        f"<ul>{said}</ul>{plots}<table><tr>{head}</tr>{body}</table></html>"
    )


def _plot(record: dict[str, Any], tower: str) -> str:
    """Single rows: the GPU's median by candidate; empty where nothing was measured."""
    rows = [row for row in record["rows"] if row["tower"] == tower and row["batch"] == 1 and row.get("device_p50_ms")]
    if not rows:
        return ""
    figure, axes = new_figure(f"{tower}, batch 1: median time of the GPU, ms", 8, 0.3 * len(rows) + 1)
    names = [f"{row['model']}: {row['candidate']}" for row in rows]
    axes.barh(names, [row["device_p50_ms"] for row in rows])
    axes.invert_yaxis()
    return f"<figure>{svg(figure)}</figure>"


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
