"""Scores of several seeds put together: mean and standard deviation of every figure, and goals reached or not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import t as student

from invariclip.bench.studies.cdc.rows import FITTED, MAIN, ROWS, SINGLE, SINGLE_FITTED, ZERO_SHOT, ZERO_SHOT_FITTED
from invariclip.bench.studies.cdc.trial import FEW, SEEN, UNSEEN

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

MAX_SOFTMAX, ENERGY = "max-softmax", "energy"
"""What a plain model has for an uncertainty, without a template learnt; see `evaluate.uncertainties`."""
PLAIN = ("base", "new", "harmonic", "ece")
BY_DOUBT = ("auroc_wrong", "auroc_unknown", *(f"auroc_of_{count}" for count in FEW), "aurc")


def summarise(trials: Mapping[tuple[str, int], Mapping[str, Any]], seeds: int) -> dict[str, Any]:
    """The table's figures.

    Args:
        trials: What `trial.run_trial` gave, by row and seed; rows of `ROWS` may be missing, those of `COMPARED` not.
        seeds: How many seeds there are, from 0.

    Returns:
        JSON-ready: `rows` (name → group of styles → figure → {mean, sd, by_seed}), `goals`, `seeds`, `counts`,
        `projections`, `bins` and `curves` of the rows that are drawn.
    """
    learnt = [row for row in ROWS if (row, 0) in trials]
    rows = {
        row: {
            group: _figures([trials[row, seed]["scores"][group] for seed in range(seeds)]) for group in (SEEN, UNSEEN)
        }
        for row in learnt
    }
    drawn = (ZERO_SHOT, ZERO_SHOT_FITTED, MAIN)
    return {
        "seeds": seeds,
        "rows": rows,
        "goals": goals(rows, [trials[MAIN, s]["held_out"] for s in range(seeds)]),
        "counts": trials[MAIN, 0]["counts"],
        "images": {
            group: [trials[MAIN, s]["scores"][group]["images"] for s in range(seeds)] for group in (SEEN, UNSEEN)
        },
        "held_out": [trials[MAIN, s]["held_out"] for s in range(seeds)],
        "temperatures": {row: [trials[row, s]["temperature"] for s in range(seeds)] for row in (ZERO_SHOT, *FITTED)},
        "projections": [trials[ZERO_SHOT, seed]["projection"] for seed in range(seeds)],
        "evidence": trials[MAIN, 0]["evidence"],
        "best_steps": {row: [trials[row, s]["learnt"].get("best_step") for s in range(seeds)] for row in learnt},
        "bins": {row: _bins([trials[row, s]["scores"][UNSEEN]["bins"] for s in range(seeds)]) for row in drawn},
        "curves": {
            row: np.mean([trials[row, s]["scores"][UNSEEN]["curve"] for s in range(seeds)], axis=0).round(5).tolist()
            for row in drawn
        },
    }


def goals(rows: Mapping[str, Any], styles: Sequence[str]) -> list[dict[str, Any]]:
    """What issue 6 asks for: what was compared, by how much, and how sure that is.

    Args:
        rows: See `summarise`.
        styles: The style that each seed held out.
    """
    found = []
    for group in (SEEN, UNSEEN):
        ours, plain, single = (rows[row][group]["harmonic"] for row in (MAIN, ZERO_SHOT, SINGLE))
        found += [
            _goal(f"harmonic mean above zero-shot, {group}", ours, plain, styles, 1),
            _goal(f"harmonic mean above a single template, {group}", ours, single, styles, 1),
        ]
    ours = rows[MAIN][UNSEEN]
    for row in (ZERO_SHOT, ZERO_SHOT_FITTED, SINGLE_FITTED):
        other = rows[row][UNSEEN]
        for what, figure in (
            ("wrong answers", "auroc_wrong"),
            ("unknown classes", "auroc_unknown"),
            *((f"unknown classes, of {count} asked about,", f"auroc_of_{count}") for count in FEW),
        ):
            for doubt in (MAX_SOFTMAX, ENERGY):
                goal = f"AUROC of u for {what} above {doubt} of {row}"
                found.append(_goal(goal, ours[figure]["u"], other[figure][doubt], styles, 3))
        found.append(_goal(f"expected calibration error below {row}", other["ece"], ours["ece"], styles, 3))
    return found


def _goal(
    what: str, high: Mapping[str, Any], low: Mapping[str, Any], styles: Sequence[str], digits: int
) -> dict[str, Any]:
    """`difference` is above zero where the goal is reached; for `interval` see `_interval`."""
    apart = np.subtract(high["by_seed"], low["by_seed"])
    interval = _interval(apart, styles)
    return {
        "goal": what,
        "digits": digits,
        "interval": interval,
        "difference": round(float(apart.mean()), 4),
        "by_seed": apart.round(4).tolist(),
        "reached": interval is not None and interval[0] > 0,
    }


def _interval(apart: NDArray[np.float64], styles: Sequence[str]) -> list[float] | None:
    """95 % of the mean difference, by Student's t on what seeds of the same held-out style differ by.

    Styles are four and fixed, and differ far more than seeds do. None where no style was held out twice.
    """
    groups = [apart[np.asarray(styles) == style] for style in sorted(set(styles))]
    freedom = len(apart) - len(groups)
    if freedom < 1:
        return None
    variance = sum(float(((own - own.mean()) ** 2).sum()) for own in groups) / freedom
    half = float(student.ppf(0.975, freedom)) * (variance / len(apart)) ** 0.5
    return [round(float(apart.mean()) + side * half, 4) for side in (-1, 1)]


def _figures(scores: list[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {name: _over_seeds([own[name] for own in scores]) for name in PLAIN}
    for name in BY_DOUBT:
        found[name] = {doubt: _over_seeds([own[name][doubt] for own in scores]) for doubt in scores[0][name]}
    # Each seed holds another style out: a style's figure is of the seeds that have it
    found["styles"] = {
        style: [
            round(float(np.mean([own["styles"][style][part] for own in scores if style in own["styles"]])), 3)
            for part in (0, 1)
        ]
        for style in sorted({style for own in scores for style in own["styles"]})
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
