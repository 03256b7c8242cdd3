"""Trials put together: per test environment, their mean and the worst, over seeds, with paired intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.bench.studies.domains.trial import OWN, unpack
from invariclip.bench.studies.resampling import Stratified
from invariclip.calibrate.projection.bootstrap import LEVEL, AccuracyInterval, Bootstrap

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

NONE = "none"


def summarise(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The tables' figures.

    Args:
        trials: Results of `trial.run_trial`, the same seeds for every test environment.

    Returns:
        JSON-ready: `rows`, `sources` (name → way → scores), `base` and `open` (the same, over images of base and of
        open classes), `measures` (name → leakage and gap, in means over trials), `chosen` (name → test → choices),
        `home` (name → way → {`mean`, `difference`}: training environments by themselves, see `_home`).
    """
    base = [frozenset(trial["open"]["base"]) for trial in trials]
    labels = [np.asarray(trial["labels"]) for trial in trials]
    is_base = [np.isin(names, list(known)) for names, known in zip(labels, base, strict=True)]
    rows = [trial["rows"] for trial in trials]
    # Pairs of every source are held against no projection, which stands among the rows.
    sources = [{NONE: trial["rows"][NONE], **trial["sources"]} for trial in trials]
    opened = [trial["open"]["rows"] for trial in trials]
    return {
        "rows": _scores(trials, rows),
        "sources": _scores(trials, sources),
        "base": _scores(trials, opened, is_base),
        "open": _scores(trials, opened, [~mask for mask in is_base]),
        "measures": _measures(rows),
        "chosen": _chosen(trials),
        "home": _home(trials),
    }


def _scores(
    trials: Sequence[Mapping[str, Any]],
    parts: Sequence[Mapping[str, Any]],
    masks: Sequence[NDArray[np.bool_]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Name → way → {test, `mean`, `worst`: {value, low, high}; `difference`, `worst_difference`; `by_seed`: [points]}.

    An image's score is the share of seeds in which it was named right, of those in which it counts. Images are
    resampled, the same ones for every row, so differences are paired; what other seeds would give stands apart, in
    `by_seed`, the differences of the means, one for each seed.
    """
    ways = list(dict.fromkeys(way for part in parts for row in part.values() for way in row["answers"]))
    found: dict[str, dict[str, Any]] = {}
    for way in ways:
        names = [name for name in parts[0] if all(way in part[name]["answers"] for part in parts)]
        shares = {name: _shares(trials, parts, masks, name, way) for name in names}
        counted = _counted(trials, masks)
        tests = sorted(counted)
        kept = {test: counted[test] > 0 for test in tests}
        environments = np.concatenate([np.full(int(kept[test].sum()), code) for code, test in enumerate(tests)])
        bootstrap = Bootstrap(np.arange(len(environments)), environments)
        flat = {name: np.concatenate([shares[name][test][kept[test]] for test in tests]) for name in names}
        seeds = {name: _by_seed(trials, parts, masks, name, way) for name in names}
        for name in names:
            columns = (*tests, "mean")
            intervals = bootstrap.intervals(flat[name])
            scores: dict[str, Any] = {c: i.to_json() for c, i in zip(columns, intervals, strict=True)}
            scores["worst"] = _worst(bootstrap, flat[name]).to_json()
            if NONE in flat:
                scores["difference"] = bootstrap.intervals(flat[name], flat[NONE])[-1].to_json()
                scores["worst_difference"] = _worst(bootstrap, flat[name], flat[NONE]).to_json()
                if OWN[way] in flat:
                    scores["to_own"] = bootstrap.intervals(flat[name], flat[OWN[way]])[-1].to_json()
                scores["by_seed"] = [round(seeds[name][seed] - seeds[NONE][seed], 3) for seed in seeds[name]]
            found.setdefault(name, {})[way] = scores
    return found


def _right(trial: Mapping[str, Any], part: Mapping[str, Any], name: str, way: str) -> NDArray[np.bool_]:
    return unpack(part[name]["answers"][way], len(trial["labels"]))


def _mask(trial: Mapping[str, Any], masks: Sequence[NDArray[np.bool_]] | None, index: int) -> NDArray[np.bool_]:
    return np.ones(len(trial["labels"]), dtype=np.bool_) if masks is None else masks[index]


def _counted(
    trials: Sequence[Mapping[str, Any]], masks: Sequence[NDArray[np.bool_]] | None
) -> dict[str, NDArray[np.int64]]:
    """In how many seeds each image of a test environment counts."""
    found: dict[str, NDArray[np.int64]] = {}
    for index, trial in enumerate(trials):
        mask = _mask(trial, masks, index).astype(np.int64)
        found[trial["test"]] = found.get(trial["test"], np.zeros_like(mask)) + mask
    return found


def _shares(
    trials: Sequence[Mapping[str, Any]],
    parts: Sequence[Mapping[str, Any]],
    masks: Sequence[NDArray[np.bool_]] | None,
    name: str,
    way: str,
) -> dict[str, NDArray[np.float64]]:
    """Each image's share of right answers over the seeds in which it counts, by test environment."""
    right: dict[str, NDArray[np.float64]] = {}
    for index, (trial, part) in enumerate(zip(trials, parts, strict=True)):
        own = (_right(trial, part, name, way) & _mask(trial, masks, index)).astype(np.float64)
        right[trial["test"]] = right.get(trial["test"], np.zeros_like(own)) + own
    counted = _counted(trials, masks)
    return {test: values / np.maximum(counted[test], 1) for test, values in right.items()}


def _by_seed(
    trials: Sequence[Mapping[str, Any]],
    parts: Sequence[Mapping[str, Any]],
    masks: Sequence[NDArray[np.bool_]] | None,
    name: str,
    way: str,
) -> dict[int, float]:
    """The mean over test environments, in percent, for every seed."""
    found: dict[int, list[float]] = {}
    for index, (trial, part) in enumerate(zip(trials, parts, strict=True)):
        mask = _mask(trial, masks, index)
        if mask.any():
            found.setdefault(trial["seed"], []).append(100 * float(_right(trial, part, name, way)[mask].mean()))
    return {seed: float(np.mean(values)) for seed, values in sorted(found.items())}


def _worst(
    bootstrap: Bootstrap, scores: NDArray[np.float64], baseline: NDArray[np.float64] | None = None
) -> AccuracyInterval:
    """The lowest of the environments' accuracies, each resample's own, or its difference to the baseline's lowest."""
    samples = np.nanmin(bootstrap.samples(scores)[:, :-1], axis=1)
    if baseline is not None:
        samples = samples - np.nanmin(bootstrap.samples(baseline)[:, :-1], axis=1)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(samples[1:], [tail, 100 - tail])
    return AccuracyInterval(float(samples[0]), float(low), float(high))


def _home(trials: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name → way → {`mean`, `difference`} over training environments by themselves; nothing where none was asked about.

    The same images are asked about whenever their environment is not the unseen one; an image's score is the share
    of those trials in which it was named right. Images are resampled within environment and class.
    """
    parts = [trial["home"] for trial in trials if trial.get("home")]
    if not parts:
        return {}
    right: dict[tuple[str, str], dict[str, NDArray[np.float64]]] = {}
    counted: dict[str, int] = {}
    labels: dict[str, NDArray[np.str_]] = {}
    for part in parts:
        places = np.asarray(part["places"])
        for place in np.unique(places):
            mask = places == place
            counted[str(place)] = counted.get(str(place), 0) + 1
            labels[str(place)] = np.asarray(part["labels"])[mask]
            for name, row in part["rows"].items():
                for way, text in row["answers"].items():
                    own = unpack(text, len(places))[mask].astype(np.float64)
                    sums = right.setdefault((name, way), {})
                    sums[str(place)] = sums.get(str(place), np.zeros_like(own)) + own
    order = sorted(counted)
    environments = np.concatenate([np.full(len(labels[place]), code) for code, place in enumerate(order)])
    classes = np.unique(np.concatenate([labels[place] for place in order]), return_inverse=True)[1]
    stratified = Stratified(classes, environments)
    tail = 100 * (1 - LEVEL) / 2
    samples = {
        key: stratified.samples(np.concatenate([sums[place] / counted[place] for place in order]))[:, -1]
        for key, sums in right.items()
    }
    found: dict[str, dict[str, Any]] = {}
    for (name, way), own in samples.items():
        scores = {}
        for what, values in (("mean", own), ("difference", own - samples[NONE, way])):
            low, high = np.percentile(values[1:], [tail, 100 - tail])
            scores[what] = AccuracyInterval(float(values[0]), float(low), float(high)).to_json()
        found.setdefault(name, {})[way] = scores
    return found


def _measures(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    found: dict[str, dict[str, float | None]] = {}
    for name in rows[0]:
        gaps = [row[name]["gap"] for row in rows]
        found[name] = {
            "leakage": round(float(np.mean([row[name]["leakage"] for row in rows])), 3),
            "chance": round(float(np.mean([row[name]["chance"] for row in rows])), 3),
            "gap": None if None in gaps else round(float(np.mean(gaps)), 4),
        }
    return found


def _chosen(trials: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[str]]]:
    """What was chosen, by row and test environment, one for each seed."""
    found: dict[str, dict[str, list[str]]] = {}
    for trial in trials:
        groups = (("", trial["rows"]), ("pairs: ", trial["sources"]), ("base classes: ", trial["open"]["rows"]))
        for prefix, group in groups:
            for name, row in group.items():
                if row["chosen"]:
                    found.setdefault(prefix + name, {}).setdefault(trial["test"], []).append(row["chosen"])
    return found
