"""Trials of several seeds put together: per style and their mean, with intervals over concepts and seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.bench.stylebench.trial import unpack
from invariclip.calibrate.evaluate import LEVEL, Bootstrap

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from invariclip.bench.stylebench.world import World

NONE = "none"


def summarise(world: World, trials: Sequence[Mapping[str, Any]], by_pairs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The figures of one encoder by one protocol.

    Args:
        world: Says what the queries are; the same under every seed.
        trials: Results of `trial.rows`, one for each seed.
        by_pairs: That of `trial.pairs` under the first seed, or None.

    Returns:
        JSON-ready: `rows` and `pairs` (name → scores, see `_scores`), and `learnt` and `never_seen`: `none` and `auto`
        over concepts that the reference checkpoint was trained on, and over the others.
    """
    everything = np.ones(int(world.queries.sum()), dtype=np.bool_)
    rows = [trial["rows"] for trial in trials]
    few = [{name: row[name] for name in (NONE, "auto")} for row in rows]
    # Other pairs are held against no projection, which stands among the rows.
    pairs = [{NONE: rows[0][NONE], **by_pairs["rows"]}] if by_pairs else []
    return {
        "rows": _scores(world, rows, everything),
        "pairs": _scores(world, pairs, everything) if pairs else {},
        "learnt": _scores(world, few, world.is_learnt),
        "never_seen": _scores(world, few, ~world.is_learnt),
    }


def _scores(world: World, parts: Sequence[Mapping[str, Any]], mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Name → {style or `mean`: {value, low, high}}, `difference` (of the mean to `none`), `spread`, `chosen`, ….

    `by_seed` are the differences of each seed, `spread` their standard deviation; `chosen` what each seed chose.
    """
    queries = world.queries
    concepts, styles = world.table.concepts[queries][mask], world.table.environments[queries][mask]
    bootstrap = Bootstrap(concepts, styles)
    columns = [*(world.table.environment_names[code] for code in bootstrap.codes), "mean"]
    samples: dict[str, NDArray[np.float64]] = {}
    found: dict[str, Any] = {}
    for name in parts[0]:
        answers = [unpack(part[name]["answers"], len(mask))[mask] for part in parts]
        own = samples[name] = np.stack([bootstrap.samples(right) for right in answers])
        differences = own - samples[NONE]
        by_seed = differences[:, 0, -1]
        measured = [key for key in ("left_out", "left_out_changed") if key in parts[0][name]]
        found[name] = {
            **dict(zip(columns, intervals(own), strict=True)),
            "difference": intervals(differences)[-1],
            "by_seed": [round(float(value), 3) for value in by_seed],
            "spread": round(float(by_seed.std(ddof=1)), 3) if len(by_seed) > 1 else None,
            "chosen": [part[name]["chosen"] for part in parts],
            **{key: round(float(np.mean([part[name][key] for part in parts])), 3) for key in measured},
        }
    return found


def intervals(samples: NDArray[np.float64]) -> list[dict[str, float]]:
    """The mean over seeds of every column, and its bootstrap interval over concepts and seeds at `LEVEL`.

    Every resample of the concepts takes a resample of the seeds with it, so the interval covers both: that the concepts
    might have been others, and the seeds.

    Args:
        samples: [S, 1 + R, C], of every seed what `Bootstrap.samples` gives, or differences of that: row 0 as observed.

    Returns:
        C of them, in percent or points, rounded to a thousandth.
    """
    seeds, rows, _ = samples.shape
    drawn = np.random.default_rng(0).integers(seeds, size=(seeds, rows - 1))
    resampled = samples[drawn, np.arange(1, rows)].mean(axis=0)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(resampled, [tail, 100 - tail], axis=0)
    return [
        {"value": round(float(v), 3), "low": round(float(a), 3), "high": round(float(b), 3)}
        for v, a, b in zip(samples[:, 0].mean(axis=0), low, high, strict=True)
    ]
