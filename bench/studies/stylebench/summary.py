"""Trials of several seeds put together: per style and their mean, with intervals over concepts and seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.bench.studies.resampling import Stratified
from invariclip.bench.studies.stylebench.trial import unpack
from invariclip.calibrate.projection.bootstrap import LEVEL, Bootstrap

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from invariclip.bench.studies.resampling import Resampler
    from invariclip.bench.studies.stylebench.world import StyleWorld

NONE, AUTO = "none", "auto"
OURS = ("icm", "generalised", "shrinkage", AUTO)


def summarise(
    world: StyleWorld, trials: Sequence[Mapping[str, Any]], by_pairs: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The figures by one protocol.

    Args:
        world: Says what the queries are; the same under every seed.
        trials: Results of `trial.rows`, one for each seed.
        by_pairs: That of `trial.pairs` under the first seed, or None.

    Returns:
        JSON-ready: `rows` and `pairs` (name → scores, see `_scores`); `learnt` and `never_seen`: `none` and `auto`
        over concepts of split train, and over the others; `home`: every row where test and training are the same;
        `group`: every row among the names of the concept's own group, or nothing; `side_effects` of the first seed.
    """
    queries, table, home = world.queries, world.table, world.home
    concepts, styles = table.concepts[queries], table.environments[queries]
    everything = np.ones(int(queries.sum()), dtype=np.bool_)
    rows = [trial["rows"] for trial in trials]
    few = [{name: row[name] for name in (NONE, AUTO)} for row in rows]
    # Other pairs are held against no projection, which stands among the rows.
    pairs = [{NONE: rows[0][NONE], **by_pairs["rows"]}] if by_pairs else []

    def scored(
        parts: Sequence[Mapping[str, Any]], mask: NDArray[np.bool_] = everything, key: str = "answers"
    ) -> dict[str, Any]:
        bootstrap = Bootstrap(concepts[mask], styles[mask])
        return scores(parts, bootstrap, table.environment_names, key, mask)

    at_home = Bootstrap(table.concepts[home], table.environments[home])
    return {
        "rows": scored(rows),
        "pairs": scored(pairs) if pairs else {},
        "learnt": scored(few, world.is_learnt),
        "never_seen": scored(few, ~world.is_learnt),
        "home": scores(rows, at_home, table.environment_names, "home", np.ones(int(home.sum()), dtype=np.bool_)),
        "group": scored(rows, key="group") if "group" in rows[0][NONE] else {},
        "side_effects": trials[0]["side_effects"],
    }


def elsewhere_scores(world: StyleWorld, trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every row on the other set: name → scores, see `scores`; images resampled within environment and class."""
    if world.elsewhere is None:
        return {}
    table = world.elsewhere.table
    stratified = Stratified(table.labels, table.environments)
    everything = np.ones(len(table.labels), dtype=np.bool_)
    return scores([trial["rows"] for trial in trials], stratified, table.environment_names, "elsewhere", everything)


def scores(
    parts: Sequence[Mapping[str, Any]],
    bootstrap: Resampler,
    names: Sequence[str],
    key: str,
    mask: NDArray[np.bool_],
) -> dict[str, Any]:
    """Name → {environment or `mean`: {value, low, high}}, `difference` (of the mean to `none`), `spread`, `chosen`, ….

    `differences` are those of every environment, `to_auto` is that of the mean to `auto`; `by_seed` are the differences
    of each seed, `spread` their standard deviation; `chosen` what each seed chose.

    Args:
        parts: A trial's rows, for each seed.
        bootstrap: Over what is scored.
        names: Environments by code.
        key: Which answers of a row.
        mask: bool, which of those answers are scored.
    """
    columns = [*(names[code] for code in bootstrap.codes), "mean"]
    samples = {
        name: np.stack([bootstrap.samples(unpack(part[name][key], len(mask))[mask]) for part in parts])
        for name in parts[0]
    }
    found: dict[str, Any] = {}
    for name, own in samples.items():
        differences = own - samples[NONE]
        by_seed = differences[:, 0, -1]
        measured = [key for key in ("left_out", "left_out_changed") if key in parts[0][name]]
        changes = intervals(differences)
        found[name] = {
            **dict(zip(columns, intervals(own), strict=True)),
            "difference": changes[-1],
            "differences": dict(zip(columns, changes, strict=True)),
            "to_auto": intervals(own - samples[AUTO])[-1] if AUTO in samples else None,
            "by_seed": [round(float(value), 3) for value in by_seed],
            "spread": round(float(by_seed.std(ddof=1)), 3) if len(by_seed) > 1 else None,
            "chosen": [part[name]["chosen"] for part in parts],
            **{key: round(float(np.mean([part[name][key] for part in parts])), 3) for key in measured},
        }
    return found


def better(rows: Mapping[str, Any]) -> list[str]:
    """Baselines whose mean is above that of `auto`, the best first."""
    above = [name for name in rows if name not in OURS and rows[name]["to_auto"]["value"] > 0]
    return sorted(above, key=lambda name: -rows[name]["to_auto"]["value"])


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
