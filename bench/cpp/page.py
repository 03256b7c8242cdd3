"""docs/cpp.md: how to use the C++ runtime (head.md), and what was measured of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HEAD = Path(__file__).with_name("head.md")


def page(found: Mapping[str, Any]) -> str:
    """The page, of the JSON's figures alone."""
    engines = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    before, after = found["load"]
    lines = [
        HEAD.read_text(encoding="utf-8").rstrip(),
        "",
        "## How fast",
        "",
        f"`python -m invariclip.bench.cpp ARTIFACT --rounds {found['rounds']}` ({found['model']}, {found['classes']} "
        f"classes) on {found['processor']}, {engines}, threads of an engine: "
        f"{found['threads']}. C++ and Python in a process each, {found['rounds']} rounds in turns. Medians in "
        "milliseconds; in brackets how far the slowest round is above the fastest. *C++ is faster* compares turns of "
        "the same round: median over rounds and its 95 % interval. *Fastest* is the shortest time "
        "of all. Both answered the same bytes in every row. "
        f"One-minute load average {before:.1f} before and {after:.1f} after, of {found['processors']} processors; the "
        "two that are compared are one of it.",
        "",
        f"Pixels: a decoded frame resized and cropped to {found['side']}×{found['side']} RGB, by Pillow and by C++.",
        "",
        *_table(found["rows"]["pixels"]),
    ]
    for engine, rows in found["rows"].items():
        if engine != "pixels":
            lines += ["", f"From a frame to a prediction, batch 1, in {engine}.", "", *_table(rows)]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        "| frame | Python, ms | C++, ms | C++ is faster | fastest: Python, C++, ms |",
        "|---|---|---|---|---|",
        *map(_line, rows),
    ]


def _line(row: Mapping[str, Any]) -> str:
    cells = (
        row["name"],
        f"{row['python_ms']:.2f} (+{row['python_spread']:.0%})",
        f"{row['cpp_ms']:.2f} (+{row['cpp_spread']:.0%})",
        f"{row['faster']:.2f} × [{row['low']:.2f}, {row['high']:.2f}]",
        f"{row['python_best_ms']:.2f}, {row['cpp_best_ms']:.2f}",
    )
    return f"| {' | '.join(cells)} |"
