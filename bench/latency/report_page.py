"""The page that `invariclip bench` leaves: one HTML file that needs no other."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invariclip.bench.latency import report_plots as plots
from invariclip.bench.latency.peers import OURS
from invariclip.bench.latency.stages import CLASSES, STAGES
from invariclip.calibrate.report.rendering import write_html

if TYPE_CHECKING:
    from invariclip.bench.latency.record import Record

# Both are needed after minutes of work; that they are there is asked when the command line can still name the extra.
for _package in ("jinja2", "matplotlib"):
    if find_spec(_package) is None:
        raise ModuleNotFoundError(f"No module named {_package!r}", name=_package)

TEMPLATE = Path(__file__).with_name("report_page.html")


def write_page(path: Path, record: Record, summary: dict[str, Any]) -> None:
    """Renders the page with autoescaping and writes it atomically.

    Args:
        path: The .html file.
        record: What was measured.
        summary: What `report.summarise` says of it.
    """
    write_html(
        path,
        TEMPLATE,
        record=record,
        summary=summary,
        verdicts=verdicts(record, summary),
        groups={entry["name"]: entry["group"] for entry in record.entries},
        engines={entry["name"]: engine_text(entry["engine"]) for entry in record.entries},
        plots=_plots(record, summary),
        stages=STAGES,
        classes=CLASSES,
        noise={batch: _noise(rounds) for batch, rounds in record.rounds.items()},
    )


def verdicts(record: Record, summary: dict[str, Any]) -> list[str]:
    """What the figures come to, a sentence a batch size: our fastest at each level, beside the best peer."""
    groups = {entry["name"]: entry["group"] for entry in record.entries}
    lines = []
    for batch, rows in summary["batches"].items():
        ours = [name for name in rows if groups[name] == OURS]
        parts = []
        for level in dict.fromkeys(level for level in summary["levels"].values() if level):
            alike = [name for name in ours if summary["levels"].get(name) == level]
            if alike:
                best = max(alike, key=lambda name: rows[name]["ratio"]["value"])
                parts.append(f"{level}: {best}, {_range(rows[best]['ratio'])}")
        if batch in summary["best_peer"]:
            peer = summary["best_peer"][batch]
            parts.append(f"best peer: {peer}, {_range(rows[peer]['ratio'])}{_alike(record, summary, peer)}")
            against = summary["against_best_peer"].get(batch, {})
            if against:
                best = max(against, key=lambda name: against[name]["value"])
                parts.append(f"{best} is {_range(against[best])} the best peer{_alike(record, summary, best)}")
        lines.append(f"Batch {batch}. " + "; ".join(parts) + ".")
    return lines


def _alike(record: Record, summary: dict[str, Any], name: str) -> str:
    """How alike a candidate's answers are, for a sentence about its speed; empty where they were not compared."""
    figures = record.accuracy.get(name)
    if figures is None or figures["cosine_min"] is None:
        return ""
    level = summary["levels"].get(name) or "no level"
    return f" ({level}: cosine {figures['cosine_min']:.4f}, top-1 {figures['top1_agreement']:.1%})"


def engine_text(engine: dict[str, Any]) -> str:
    """What really ran, in a few words."""
    words = [f"{engine['engine']} {engine.get('version', '')}".strip()] if engine.get("engine") else []
    words += [f"computes in {engine['computes_in']}"] if engine.get("computes_in") else []
    return ", ".join([*words, *([f"{engine['threads']} threads"] if engine.get("threads") else [])])


def _range(ratio: dict[str, Any]) -> str:
    open_ = "" if ratio["decides"] else ", undecided"
    return f"{ratio['value']:.2f} × ({ratio['low']:.2f} … {ratio['high']:.2f}{open_})"


def _plots(record: Record, summary: dict[str, Any]) -> list[str]:
    measured = [batch for batch, rows in summary["batches"].items() if rows]
    drawn = [plots.ratio_plot(record, summary, batch) for batch in measured]
    drawn += [plots.fidelity_plot(record, summary, batch) for batch in measured if record.accuracy]
    drawn += [plots.stage_plot(summary)] if summary["stages"] else []
    return drawn + [plots.round_plot(record, summary, batch) for batch in measured]


def _noise(rounds: list[Any]) -> dict[str, Any]:
    """Mean and most of steal time and of other programs; None where the system does not tell."""
    found: dict[str, Any] = {"rounds": len(rounds), "idle_cpu_s": max((one.idle_cpu_s for one in rounds), default=0.0)}
    for name in ("steal", "others"):
        known = [value for one in rounds if (value := getattr(one, name)) is not None]
        found[name] = (sum(known) / len(known), max(known)) if known else None
    return found
