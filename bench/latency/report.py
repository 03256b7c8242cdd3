"""What a record says: a summary, as a table, and as one HTML page with plots that needs no other file."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.bench.latency.measure import LOADS
from invariclip.bench.latency.peers import OURS, PEAK, PEER, PYTORCH
from invariclip.bench.latency.stages import CLASSES, STAGES
from invariclip.calibrate.report.rendering import (
    AFTER,
    BEFORE,
    INK,
    SERIES,
    SOFT,
    drawing,
    label,
    new_figure,
    svg,
    write_html,
)
from invariclip.console import table
from invariclip.measure.statistics import (
    FEWEST_ROUNDS,
    WIDEST,
    MeasuredInterval,
    median_of_rounds,
    percentiles,
    ratio,
    round_medians,
    spread,
)

if TYPE_CHECKING:
    from invariclip.bench.latency.session import LatencyRecord, Round


COLOURS = {PYTORCH: BEFORE, PEER: SERIES[0], OURS: AFTER}
_STAGE_COLOURS = (BEFORE, SERIES[0], SERIES[3], SERIES[1], AFTER)
WIDTH = 4.9
"""Inches; 353 points, as wide as a telephone's screen in pixels."""
SMALLEST_LOSS = 1e-9
"""Losses of cosine below this are rounding of the figure itself, and are drawn here."""


def ratio_plot(record: LatencyRecord, summary: dict[str, Any], batch: str) -> str:
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


def fidelity_plot(record: LatencyRecord, summary: dict[str, Any], batch: str) -> str:
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


def round_plot(record: LatencyRecord, summary: dict[str, Any], batch: str) -> str:
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


def _groups(record: LatencyRecord) -> dict[str, str]:
    return {entry["name"]: entry["group"] for entry in record.entries}


# Both are needed after minutes of work; that they are there is asked when the command line can still name the extra.
for _package in ("jinja2", "matplotlib"):
    if find_spec(_package) is None:
        raise ModuleNotFoundError(f"No module named {_package!r}", name=_package)

TEMPLATE = Path(__file__).with_name("report_page.html")


def write_page(path: Path, record: LatencyRecord, summary: dict[str, Any]) -> None:
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


def verdicts(record: LatencyRecord, summary: dict[str, Any]) -> list[str]:
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


def _alike(record: LatencyRecord, summary: dict[str, Any], name: str) -> str:
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


def _plots(record: LatencyRecord, summary: dict[str, Any]) -> list[str]:
    measured = [batch for batch, rows in summary["batches"].items() if rows]
    drawn = [ratio_plot(record, summary, batch) for batch in measured]
    drawn += [fidelity_plot(record, summary, batch) for batch in measured if record.accuracy]
    drawn += [stage_plot(summary)] if summary["stages"] else []
    return drawn + [round_plot(record, summary, batch) for batch in measured]


def _noise(rounds: list[Any]) -> dict[str, Any]:
    """Mean and most of steal time and of other programs; None where the system does not tell."""
    found: dict[str, Any] = {"rounds": len(rounds), "idle_cpu_s": max((one.idle_cpu_s for one in rounds), default=0.0)}
    for name in ("steal", "others"):
        known = [value for one in rounds if (value := getattr(one, name)) is not None]
        found[name] = (sum(known) / len(known), max(known)) if known else None
    return found


_AROUND = ("read", "decode", "resize", "copy")


def summarise(record: LatencyRecord) -> dict[str, Any]:
    """Everything that follows from a record, ready for JSON; see the module `report` for the keys' words.

    Args:
        record: With one batch size measured at least.

    Returns:
        `yardstick`; `batches`: batch size to candidate to its figures; `best_peer` and `against_best_peer` by batch
        size; `cold`, `stages`, `levels`; `not_measured`: candidate to reason; `warnings`: what forbids a conclusion.
    """
    groups = {entry["name"]: entry["group"] for entry in record.entries}
    towers = [name for name, group in groups.items() if group != PEAK]
    timed = [name for name in towers if any(name in one.turns for rounds in record.rounds.values() for one in rounds)]
    yardstick = timed[0] if timed else ""
    batches = {
        batch: {name: found for name in timed if (found := _figures(record, batch, name, yardstick))}
        for batch in record.rounds
    }
    best, against = {}, {}
    for batch, rows in batches.items():
        peers = [name for name in rows if groups[name] in (PYTORCH, PEER) and name != yardstick]
        if not peers:
            continue
        best[batch] = max(peers, key=lambda name: rows[name]["ratio"]["value"])
        ours = [name for name in rows if groups[name] == OURS]
        found = {name: _ratio(record.rounds[batch], best[batch], name) for name in ours}
        against[batch] = {name: interval.to_json() for name, interval in found.items() if interval is not None}
    return {
        "yardstick": yardstick,
        "batches": batches,
        "best_peer": best,
        "against_best_peer": against,
        "levels": {name: level_of(figures) for name, figures in record.accuracy.items()},
        "cold": _colds(record),
        "stages": {name: _stages(found) for name, found in record.stages.items()},
        "peaks": _peaks(record),
        "not_measured": {entry["name"]: entry["reason"] for entry in record.entries if entry["reason"]},
        "warnings": warnings_of(record, batches, yardstick),
    }


def level_of(figures: dict[str, Any]) -> str:
    """The closest level of fidelity that a candidate's answers reach, by its cosine and its best matches alone.

    What the contract says of an artifact is more: it looks at both towers, at batches and at reruns too.
    """
    from invariclip.artifact.fidelity import LEVELS
    from invariclip.export.verification.figures import THRESHOLDS

    for level in LEVELS:
        bounds = THRESHOLDS[level]
        cosine, top1 = figures["cosine_min"], figures["top1_agreement"]
        if cosine is not None and cosine >= bounds.min_cosine and top1 >= bounds.min_top1:
            return level
    return ""


def warnings_of(record: LatencyRecord, batches: dict[str, dict[str, Any]], yardstick: str) -> list[str]:
    """Why the figures allow no conclusion, in words; empty where they do."""
    found = []
    for batch, rounds in record.rounds.items():
        for field, most, words in LOADS:
            known = [value for one in rounds if (value := getattr(one, field)) is not None]
            if known and np.mean(known) > most:
                found.append(
                    f"batch {batch}: {np.mean(known):.1%} of processor time {words}, at most {max(known):.0%} in a "
                    f"round; above {most:.0%} timings mean little"
                )
        if 0 < len(rounds) < FEWEST_ROUNDS:
            found.append(
                f"batch {batch}: {len(rounds)} rounds are too few for an interval; take {FEWEST_ROUNDS} or more"
            )
        wide = [
            name
            for name, row in batches[batch].items()
            if name != yardstick and row["ratio"]["rounds"] >= FEWEST_ROUNDS and not row["ratio"]["decides"]
        ]
        if wide:
            found.append(
                f"batch {batch}: the interval of the ratio is wider than {WIDEST:.0%} for {_some(wide)}; run again "
                "on a quieter machine, or with more --rounds"
            )
    return found


def summary_table(record: LatencyRecord, summary: dict[str, Any]) -> str:
    """The summary as aligned text: a row per candidate and batch size, and what could not be measured."""
    header = ["candidate", "batch", "p50", "p95", "p99", "a second", "against the first", "of peak", "cold", "memory",
              "cos min", "top-1", "gap +", "level"]  # fmt: skip
    rows = []
    for batch, found in summary["batches"].items():
        for name, row in found.items():
            figures = record.accuracy.get(name, {})
            cold, memory = summary["cold"].get(name, {}), record.memory.get(name)
            rows.append(
                [
                    name,
                    batch,
                    *(f"{row[key]:.2f} ms" for key in ("p50_ms", "p95_ms", "p99_ms")),
                    f"{row['per_second']:.1f}",
                    interval_text(row["ratio"]),
                    _share(row.get("peak_share")),
                    _text(cold.get("median_s"), "{:.2f} s"),
                    _text(None if memory is None else memory / 2**20, "{:,.0f} MiB"),
                    _text(figures.get("cosine_min"), "{:.6f}"),
                    _share(figures.get("top1_agreement"), 1),
                    _text(figures.get("gap_increase"), "{:+.1e}"),
                    summary["levels"].get(name) or "–",
                ]
            )
    lines = [table(header, rows)] if rows else []
    lines += [f"{name}: not measured: {reason}" for name, reason in summary["not_measured"].items()]
    return "\n".join(lines)


def stage_table(summary: dict[str, Any]) -> str:
    """Where an image's time goes, in ms at batch 1; empty where nothing of ours was measured."""
    header = ["candidate", *STAGES, "around / encode", "end to end", f"head of {1000:,} classes"]
    rows = [
        [
            name,
            *(f"{found[stage]:.2f}" for stage in STAGES),
            _share(found["around_share"], 1),
            f"{found['end_to_end']:.2f}",
            f"{found['head']['value'] - 1:+.2%} ({found['head']['low'] - 1:+.2%} … {found['head']['high'] - 1:+.2%})",
        ]
        for name, found in summary["stages"].items()
    ]
    return table(header, rows) if rows else ""


def interval_text(plain: dict[str, Any]) -> str:
    """A ratio with its interval; `?` where it decides nothing."""
    return f"{plain['value']:.2f} × ({plain['low']:.2f} … {plain['high']:.2f}){'' if plain['decides'] else ' ?'}"


def _figures(record: LatencyRecord, batch: str, name: str, yardstick: str) -> dict[str, Any]:
    rounds = record.rounds[batch]
    turns = [one.turns[name] for one in rounds if name in one.turns]
    faster = _ratio(rounds, yardstick, name)
    if not turns or faster is None:
        return {}
    times = {f"{key}_ms": value * 1e3 for key, value in percentiles(turns).items()}
    return {
        **times,
        "batches_timed": sum(map(len, turns)),
        "spread": spread(turns),
        "per_second": int(batch) / times["p50_ms"] * 1e3,
        "ratio": faster.to_json(),
        "gflop_per_second": record.flops[batch] / times["p50_ms"] / 1e6,
        "peak_share": _peak_share(record, batch, name),
    }


def _ratio(rounds: list[Round], first: str, other: str) -> MeasuredInterval | None:
    """Of the rounds that both have."""
    both = [one.turns for one in rounds if first in one.turns and other in one.turns]
    return ratio([turns[first] for turns in both], [turns[other] for turns in both]) if both else None


def _peak_share(record: LatencyRecord, batch: str, name: str) -> float | None:
    """The tower's operations a second over those of large products of its own arithmetic, round by round."""
    arithmetic = {entry["name"]: entry["arithmetic"] for entry in record.entries}[name]
    peak = next((e["name"] for e in record.entries if e["group"] == PEAK and e["arithmetic"] == arithmetic), "")
    both = [one.turns for one in record.rounds[batch] if peak in one.turns and name in one.turns]
    if not both:
        return None
    tower = record.flops[batch] / round_medians([turns[name] for turns in both])
    largest = record.peaks[peak] / round_medians([turns[peak] for turns in both])
    return float(np.median(tower / largest))


def _peaks(record: LatencyRecord) -> dict[str, dict[str, float]]:
    found = {}
    for name, flop in record.peaks.items():
        turns = [one.turns[name] for rounds in record.rounds.values() for one in rounds if name in one.turns]
        if turns:
            medians = flop / round_medians(turns) / 1e9
            low, middle, high = np.percentile(medians, [0, 50, 100])
            found[name] = {"gflop_per_second": float(middle), "slowest": float(low), "fastest": float(high)}
    return found


def _colds(record: LatencyRecord) -> dict[str, dict[str, float | None]]:
    """Each candidate's cold starts; ours beside the same engine's own, on the export without rewrites in float32.

    `over_plain` is artifact → first answer over that engine's loading alone.
    """
    found: dict[str, dict[str, float | None]] = {name: {**_cold(starts)} for name, starts in record.cold.items()}
    plain = {
        entry["engine"].get("engine"): record.cold[entry["name"]]
        for entry in reversed(record.entries)  # so that the first of each engine stays: float32, not quantised
        if entry["group"] == PEER and entry["name"] in record.cold
    }
    for entry in record.entries:
        name, engine = entry["name"], entry["engine"].get("engine")
        if entry["group"] == OURS and name in found and engine in plain:
            own = _cold(record.cold[name])
            found[name]["over_plain"] = (own["load_s"] + own["first_answer_s"]) / _cold(plain[engine])["load_s"]
    return found


def _cold(starts: list[dict[str, float]]) -> dict[str, float]:
    """The first start, which finds nothing in memory, and the median of the others (of it, where it is alone)."""
    later = starts[1:] or starts
    return {
        "first_s": starts[0]["start_s"],
        "median_s": float(np.median([start["start_s"] for start in later])),
        "load_s": float(np.median([start["load_s"] for start in later])),
        "first_answer_s": float(np.median([start["first_s"] for start in later])),
    }


def _stages(found: dict[str, Any]) -> dict[str, Any]:
    """Medians in ms; the head as the median of (with it / without it) over pairs of calls."""
    taken = {stage: float(np.median(found["stages"][stage])) * 1e3 for stage in STAGES}
    head = found["head"]
    pairs = np.array(head["headed"]) / np.array(head["bare"])
    return {
        **taken,
        "around_share": sum(taken[stage] for stage in _AROUND) / taken["encode"],
        "end_to_end": float(np.median(found["end_to_end"])) * 1e3,
        "head": median_of_rounds(pairs).to_json(),
    }


def _some(names: list[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _share(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:.{digits}%}"


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
