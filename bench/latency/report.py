"""What a record says: percentiles, ratios, peaks, memory, answers and stages in one summary, and as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.bench.latency.measure import LOADS
from invariclip.bench.latency.peers import OURS, PEAK, PEER, PYTORCH
from invariclip.bench.latency.stages import STAGES
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
    from invariclip.bench.latency.record import Record, Round

_AROUND = ("read", "decode", "resize", "copy")


def summarise(record: Record) -> dict[str, Any]:
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


def warnings_of(record: Record, batches: dict[str, dict[str, Any]], yardstick: str) -> list[str]:
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


def summary_table(record: Record, summary: dict[str, Any]) -> str:
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


def _figures(record: Record, batch: str, name: str, yardstick: str) -> dict[str, Any]:
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


def _peak_share(record: Record, batch: str, name: str) -> float | None:
    """The tower's operations a second over those of large products of its own arithmetic, round by round."""
    arithmetic = {entry["name"]: entry["arithmetic"] for entry in record.entries}[name]
    peak = next((e["name"] for e in record.entries if e["group"] == PEAK and e["arithmetic"] == arithmetic), "")
    both = [one.turns for one in record.rounds[batch] if peak in one.turns and name in one.turns]
    if not both:
        return None
    tower = record.flops[batch] / round_medians([turns[name] for turns in both])
    largest = record.peaks[peak] / round_medians([turns[peak] for turns in both])
    return float(np.median(tower / largest))


def _peaks(record: Record) -> dict[str, dict[str, float]]:
    found = {}
    for name, flop in record.peaks.items():
        turns = [one.turns[name] for rounds in record.rounds.values() for one in rounds if name in one.turns]
        if turns:
            medians = flop / round_medians(turns) / 1e9
            low, middle, high = np.percentile(medians, [0, 50, 100])
            found[name] = {"gflop_per_second": float(middle), "slowest": float(low), "fastest": float(high)}
    return found


def _colds(record: Record) -> dict[str, dict[str, float | None]]:
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
