"""Scores of several seeds put together: mean and standard deviation of every figure, and goals reached or not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.bench.cdc.rows import MAIN, ROWS, SINGLE, ZERO_SHOT
from invariclip.bench.cdc.trial import SEEN, UNSEEN

if TYPE_CHECKING:
    from collections.abc import Mapping

PLAIN = ("base", "new", "harmonic", "ece")
BY_DOUBT = ("auroc_wrong", "auroc_unknown", "aurc")


def summarise(trials: Mapping[tuple[str, int], Mapping[str, Any]], seeds: int) -> dict[str, Any]:
    """The table's figures.

    Args:
        trials: What `trial.run_trial` gave, by row and seed.
        seeds: How many seeds there are, from 0.

    Returns:
        JSON-ready: `rows` (name → group of styles → figure → {mean, sd, by_seed}), `goals`, `seeds`, `counts`,
        `projections`, `bins` and `curves` of the rows that are drawn.
    """
    rows = {
        row: {
            group: _figures([trials[row, seed]["scores"][group] for seed in range(seeds)]) for group in (SEEN, UNSEEN)
        }
        for row in ROWS
    }
    drawn = (ZERO_SHOT, SINGLE, MAIN)
    return {
        "seeds": seeds,
        "rows": rows,
        "goals": goals(rows),
        "counts": trials[MAIN, 0]["counts"],
        "pictures": {group: trials[MAIN, 0]["scores"][group]["pictures"] for group in (SEEN, UNSEEN)},
        "projections": [trials[ZERO_SHOT, seed]["projection"] for seed in range(seeds)],
        "evidence": trials[MAIN, 0]["evidence"],
        "best_steps": {row: [trials[row, s]["learnt"].get("best_step") for s in range(seeds)] for row in ROWS},
        "bins": {row: _bins([trials[row, s]["scores"][UNSEEN]["bins"] for s in range(seeds)]) for row in drawn},
        "curves": {
            row: np.mean([trials[row, s]["scores"][UNSEEN]["curve"] for s in range(seeds)], axis=0).round(5).tolist()
            for row in drawn
        },
    }


def goals(rows: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What issue 6 asks for on held-out styles: what was compared, by how much, and in how many seeds it holds."""
    ours, plain, single = (rows[row][UNSEEN] for row in (MAIN, ZERO_SHOT, SINGLE))
    return [
        _goal("harmonic mean above zero-shot", ours["harmonic"], plain["harmonic"]),
        _goal("harmonic mean above a single template", ours["harmonic"], single["harmonic"]),
        _goal("AUROC of u for wrong answers above max-softmax", ours["auroc_wrong"]["u"],
              plain["auroc_wrong"]["max-softmax"]),
        _goal("AUROC of u for unknown classes above max-softmax", ours["auroc_unknown"]["u"],
              plain["auroc_unknown"]["max-softmax"]),
        _goal("expected calibration error below zero-shot", plain["ece"], ours["ece"]),
    ]  # fmt: skip


def _goal(what: str, high: Mapping[str, Any], low: Mapping[str, Any]) -> dict[str, Any]:
    """`difference` is above zero where the goal is reached; `seeds` says in how many it is."""
    apart = np.subtract(high["by_seed"], low["by_seed"])
    return {
        "goal": what,
        "difference": round(float(apart.mean()), 4),
        "by_seed": apart.round(4).tolist(),
        "reached": bool(apart.mean() > 0 and (apart > 0).all()),
    }


def _figures(scores: list[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {name: _over_seeds([own[name] for own in scores]) for name in PLAIN}
    for name in BY_DOUBT:
        found[name] = {doubt: _over_seeds([own[name][doubt] for own in scores]) for doubt in scores[0][name]}
    found["styles"] = {
        style: [round(float(np.mean([own["styles"][style][part] for own in scores])), 3) for part in (0, 1)]
        for style in scores[0]["styles"]
    }
    return found


def _over_seeds(values: list[float]) -> dict[str, Any]:
    spread = round(float(np.std(values, ddof=1)), 5) if len(values) > 1 else None
    return {"mean": round(float(np.mean(values)), 5), "sd": spread, "by_seed": [round(float(v), 5) for v in values]}


def _bins(seeds: list[list[list[Any]]]) -> list[list[Any]]:
    """Bins of all seeds put together: count, mean confidence, accuracy."""
    together: list[list[Any]] = []
    for place in range(len(seeds[0])):
        own = [bins[place] for bins in seeds if bins[place][0]]
        count = sum(one[0] for one in own)
        if not count:
            together.append([0, None, None])
            continue
        means = [round(sum(one[0] * one[part] for one in own) / count, 5) for part in (1, 2)]
        together.append([count, *means])
    return together
