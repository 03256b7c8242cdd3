"""The table of an unseen environment: trials put together with paired intervals, and the committed page.

There are figures for each test environment, their mean and the worst, over seeds; the page is made of the JSON alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.bench.studies.domains.trial import MAIN, OWN, WIDE
from invariclip.bench.studies.pages import PLAIN_COLOUR, PROJECTED_COLOUR, as_svg, interval, table, trim
from invariclip.bench.studies.trials import ESTIMATORS, ICM_STRENGTHS, Stratified, ends, unpack
from invariclip.calibrate.projection.bootstrap import AccuracyInterval, Bootstrap

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray


_TITLES = {
    "probe": "Linear probe, C = 0.316",
    "probe, own C": "Linear probe, C chosen on the training environments",
    "prototypes": "Class prototypes",
    "zero-shot": "Zero-shot",
}


def plot(result: dict[str, Any]) -> str:
    """The linear probe before and after, per unseen environment, with 95 % intervals, as SVG."""
    from matplotlib.figure import Figure

    tests = [*result["images"], "mean"]
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axes = figure.subplots()
    for shift, row, colour, label in ((-0.2, "none", PLAIN_COLOUR, "before"), (0.2, MAIN, PROJECTED_COLOUR, "after")):
        scores = [result["rows"][row]["probe"][test] for test in tests]
        values = [score["value"] for score in scores]
        around = [
            [score["value"] - score["low"] for score in scores],
            [score["high"] - score["value"] for score in scores],
        ]
        places = [place + shift for place in range(len(tests))]
        bars = axes.bar(places, values, 0.38, yerr=around, color=colour, label=label, ecolor="#1c2430", capsize=2)
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    axes.set_title(f"{result['set']}: linear probe on the unseen environment, top-1 %", fontsize=10, loc="left")
    axes.set_xticks(range(len(tests)), [test.replace("_", " ") for test in tests], fontsize=8)
    trim(axes, margin=0.14)
    axes.legend(frameon=False, fontsize=8)
    return as_svg(figure)


def render(result: dict[str, Any], stem: str) -> str:
    """The page; every figure in percent, with its 95 % bootstrap interval over images.

    Args:
        result: What the JSON beside it holds.
        stem: Name of the JSON and of the plot, without their endings.
    """
    counts = ", ".join(f"{name} {count}" for name, count in result["images"].items())
    encoder, settings = result["encoder"], result["settings"]
    seeds = "one seed" if result["seeds"] == 1 else f"{result['seeds']} seeds"
    ways = [way for way in _TITLES if way in result["rows"][MAIN]]
    skipped = f"\n- Left out because they cannot be read: {len(result['skipped'])}." if result["skipped"] else ""
    strengths = " and ".join(f"{value:g}" for value in ICM_STRENGTHS)
    few = f" In a space this wide λ of `icm` is {strengths} alone." if encoder["width"] >= WIDE else ""
    parts = [
        f"# An unseen environment: {result['set']}",
        _verdict(result, ways),
        "\n".join(_above(result, way) for way in ways if way != "probe, own C"),
        *([_cost_in_a_line(result)] if result["home"] else []),
        f"![before and after]({stem}.svg)",
        f"Made by `python -m invariclip.bench.studies.domains {result['set']} --encoder {encoder['name']} --precision "
        f"{encoder['precision']} --seeds {result['seeds']} --draws {settings['draws']}`; all digits, and the "
        f"selections' curves of seed 0, are in `{stem}.json`.",
        f"- Images: {counts}; {result['classes']} classes.{skipped}\n"
        f"- Encoder: {encoder['name']}, {encoder['width']} wide, {encoder['precision']}, sha256 "
        f"`{encoder['sha256'][:16]}`. {seeds[0].upper() + seeds[1:]}.\n"
        f"- Fitted on: of every class and training environment half of the images, {settings['fitted']} at most, and "
        f"{settings['draws']} changed version of each, drawn from {', '.join(settings['interventions'])}; donors of "
        "style are training images too. Probes and prototypes are made of the same images. Scored on all images "
        "of the unseen environment.\n"
        "- Each environment is unseen in turn: no image and no label of it enters fitting, selection, probes or "
        "prototypes. Estimator, rank and λ are chosen by leaving out one *training* environment and half of the "
        f"interventions at a time; no projection is a candidate.{few} Rows `icm`, `generalised` and `shrinkage` are "
        "each estimator's best by that score, also where selection prefers no projection. `published` keeps the other "
        "end of that `icm`'s spectrum, as the published code does, and `pca` its rank; `leace` and `splince` "
        "erase the training environments by their labels, and `splince` keeps the covariance with classes "
        "(`shrunk`: with the covariance of embeddings shrunk, as the authors' code has it). Encoders "
        "that take texts have `gr-clip` (each modality's mean), `isoclip` (the middle of the spectrum of both last "
        "layers) and projections away from what prompts say of the training environments' names: `text-styles`, and "
        "`prism-mini` of images alone. Baselines with an offset need a bias, which the towers' last linear maps, where "
        "projections are folded in, do not have: all of these but `published`, `isoclip`, `text-styles` and "
        "`prism-mini`.\n"
        "- No run looks at the unseen environment, but the scheme does not come from nowhere: that the main rows pair "
        "interventions and not images of one class, and that the probe is what is selected for, was decided with "
        "results of an earlier encoder on all of PACS in view, and figures of a quick ridge regression on it were in "
        "view when the bundled reference was set out (export/reference/reference/card.md). On that set, read the gains "
        "as those of a development set.\n"
        "- In brackets: 95 % intervals by bootstrap over images, of results averaged over seeds; differences are "
        "paired. `seeds` are the lowest and the highest difference among seeds.",
        *[f"## {_TITLES[way]}\n\n{_NOTES.get(way, '')}{_scores_table(result, 'rows', way)}" for way in ways],
        *([f"## What it costs where nothing has shifted\n\n{_COST}\n\n{_cost(result)}"] if result["home"] else []),
        f"## What to pair\n\n{_SOURCES}\n\n{_scores_table(result, 'sources', 'probe')}",
        f"## Classes that were not fitted on\n\n{_OPEN}\n\n{_open(result)}",
        f"## What is left of the environment\n\n{_MEASURES}\n\n{_measures_table(result)}",
        f"## What was chosen\n\n{_chosen_table(result)}",
    ]
    return "\n\n".join(parts) + "\n"


_NOTES = {
    "probe, own C": (
        "A fixed C is a weaker penalty where vectors lie further apart, and taking away what all images share drives "
        "them apart: part of a gain at C = 0.316 can be that alone. Here both rows have the C that suits them best "
        "when each training environment is left out in turn.\n\n"
    ),
}
_COST = (
    "The other images of the training environments, which nothing was fitted on: each environment is asked about by "
    "itself, probes and prototypes being made of its own images. Here a projection has nothing to gain. Intervals by "
    "bootstrap over images within environment and class."
)
_HARM = 0.5
"""Points that a projection may cost where nothing has shifted."""
_SOURCES = (
    "Shrinkage, λ selected for prototypes each time, scored by the probe. `same class`: two images of one class in "
    "two training environments, which share nothing but the class."
)
_OPEN = (
    "The paper's in-the-wild protocol: fitted and selected on half of the classes (another half for every seed); then "
    "all classes are told apart, by prototypes, in the unseen environment."
)
_MEASURES = (
    "Leakage: how often a linear probe names the environment of an image it was not fitted on, with the class's "
    "centre taken away. Gap: how far an intervention moves images of the unseen environment, as a share of how far "
    "apart any two of them are. Shrinkage shortens directions and keeps them all, so a probe that is fitted anew finds "
    "the environment in them still; what changes is how much those directions weigh in a cosine."
)


def _verdict(result: dict[str, Any], ways: list[str]) -> str:
    lines = []
    for way in ways:
        scores = result["rows"][OWN[way]].get(way)
        if scores is None:
            continue
        before, after = result["rows"]["none"][way]["mean"], scores["mean"]
        by_seed = scores["by_seed"]
        each = f"; by seed {min(by_seed):+.1f} to {max(by_seed):+.1f}" if len(by_seed) > 1 else ""
        lines.append(
            f"- {_TITLES[way]}, `{OWN[way]}`: {before['value']:.1f} → {after['value']:.1f}, "
            f"**{interval(scores['difference'], signed=True)} points**{each}."
        )
    return "Mean over unseen environments, before and after what was selected:\n\n" + "\n".join(lines)


def _above(result: dict[str, Any], way: str) -> str:
    """One line: which baselines are above what was selected for a way of naming classes."""
    rows = {name: row[way] for name, row in result["rows"].items() if way in row}
    others = [name for name in rows if name != "none" and name not in ESTIMATORS and not name.startswith("auto")]
    above = {name: rows[name]["to_own"] for name in others if rows[name].get("to_own", {"value": 0.0})["value"] > 0}
    if not above:
        return f"- {_TITLES[way]}: no baseline is above `{OWN[way]}`."
    found = sorted(above, key=lambda name: -above[name]["value"])
    listed = ", ".join(f"{name} ({interval(above[name], signed=True)})" for name in found)
    return f"- {_TITLES[way]}: **{len(found)} of the baselines stand above `{OWN[way]}`**, in points: {listed}."


def _cost_in_a_line(result: dict[str, Any]) -> str:
    change = result["home"][MAIN]["probe"]["difference"]
    kept = "within" if change["value"] >= -_HARM else "**beyond**"
    return (
        f"Within a training environment, where nothing has shifted, `{MAIN}` changes the probe by "
        f"{interval(change, signed=True)} points ({kept} the bound of -{_HARM:g})."
    )


def _cost(result: dict[str, Any]) -> str:
    rows = [
        [name, way, interval(scores["mean"]), interval(scores["difference"], signed=True) if name != "none" else ""]
        for name, ways in result["home"].items()
        for way, scores in ways.items()
    ]
    return table(["projection", "by", "accuracy", "to none"], rows)


def _scores_table(result: dict[str, Any], group: str, way: str) -> str:
    tests = list(result["images"])
    rows = []
    for name, ways in result[group].items():
        if way not in ways:
            continue
        scores = ways[way]
        cells = [f"{scores[test]['value']:.1f}" for test in tests]
        own = name != "none"
        spread = f"{min(scores['by_seed']):+.1f} … {max(scores['by_seed']):+.1f}"
        rows.append(
            [
                name,
                *cells,
                interval(scores["mean"]),
                interval(scores["difference"], signed=True) if own else "",
                spread if own and result["seeds"] > 1 else "",
                f"{scores['worst']['value']:.1f}",
                interval(scores["worst_difference"], signed=True) if own else "",
            ]
        )
    header = ["projection" if group == "rows" else "pairs", *tests, "mean", "to none", "seeds", "worst", "to none"]
    return table(header, rows)


def _open(result: dict[str, Any]) -> str:
    rows = []
    for name in result["base"]:
        for way in ("prototypes", "zero-shot"):
            if way in result["base"][name]:
                base, new = result["base"][name][way], result["open"][name][way]
                pair = (base["mean"]["value"], new["mean"]["value"])
                harmonic = 2 * pair[0] * pair[1] / sum(pair) if sum(pair) else 0.0
                to_none = [interval(s["difference"], signed=True) if name != "none" else "" for s in (base, new)]
                rows.append([name, way, f"{pair[0]:.1f}", to_none[0], f"{pair[1]:.1f}", to_none[1], f"{harmonic:.1f}"])
    return table(["projection", "by", "base classes", "to none", "open classes", "to none", "harmonic mean"], rows)


def _measures_table(result: dict[str, Any]) -> str:
    rows = [
        [name, f"{m['leakage']:.1f}", f"{m['chance']:.1f}", "" if m["gap"] is None else f"{m['gap']:.3f}"]
        for name, m in result["measures"].items()
    ]
    return table(["projection", "leakage %", "chance %", "invariance gap"], rows)


def _chosen_table(result: dict[str, Any]) -> str:
    tests = list(result["images"])
    rows = [[name, *(", ".join(dict.fromkeys(by[test])) for test in tests)] for name, by in result["chosen"].items()]
    return table(["row", *tests], rows)


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
    masks = masks or [np.ones(len(trial["labels"]), dtype=np.bool_) for trial in trials]
    ways = list(dict.fromkeys(way for part in parts for row in part.values() for way in row["answers"]))
    found: dict[str, dict[str, Any]] = {}
    for way in ways:
        names = [name for name in parts[0] if all(way in part[name]["answers"] for part in parts)]
        right = {
            name: [
                unpack(part[name]["answers"][way], len(mask)) & mask for part, mask in zip(parts, masks, strict=True)
            ]
            for name in names
        }
        counted = _by_test(trials, masks)
        tests = sorted(counted)
        kept = {test: counted[test] > 0 for test in tests}
        environments = np.concatenate([np.full(int(kept[test].sum()), code) for code, test in enumerate(tests)])
        bootstrap = Bootstrap(np.arange(len(environments)), environments)
        flat = {}
        for name in names:
            sums = _by_test(trials, right[name])
            flat[name] = np.concatenate([sums[test][kept[test]] / counted[test][kept[test]] for test in tests])
        seeds = {name: _by_seed(trials, right[name], masks) for name in names}
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


def _by_test(trials: Sequence[Mapping[str, Any]], flags: Sequence[NDArray[np.bool_]]) -> dict[str, NDArray[np.float64]]:
    """In how many seeds each image's flag is set, by test environment."""
    found: dict[str, NDArray[np.float64]] = {}
    for trial, own in zip(trials, flags, strict=True):
        found[trial["test"]] = found.get(trial["test"], np.zeros(len(own))) + own
    return found


def _by_seed(
    trials: Sequence[Mapping[str, Any]], right: Sequence[NDArray[np.bool_]], masks: Sequence[NDArray[np.bool_]]
) -> dict[int, float]:
    """The mean over test environments, in percent, for every seed."""
    found: dict[int, list[float]] = {}
    for trial, own, mask in zip(trials, right, masks, strict=True):
        if mask.any():
            found.setdefault(trial["seed"], []).append(100 * float(own[mask].mean()))
    return {seed: float(np.mean(values)) for seed, values in sorted(found.items())}


def _worst(
    bootstrap: Bootstrap, scores: NDArray[np.float64], baseline: NDArray[np.float64] | None = None
) -> AccuracyInterval:
    """The lowest of the environments' accuracies, each resample's own, or its difference to the baseline's lowest."""
    samples = np.nanmin(bootstrap.samples(scores)[:, :-1], axis=1)
    if baseline is not None:
        samples = samples - np.nanmin(bootstrap.samples(baseline)[:, :-1], axis=1)
    return AccuracyInterval(float(samples[0]), *map(float, ends(samples[1:])))


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
    samples = {
        key: stratified.samples(np.concatenate([sums[place] / counted[place] for place in order]))[:, -1]
        for key, sums in right.items()
    }
    found: dict[str, dict[str, Any]] = {}
    for (name, way), own in samples.items():
        scores = {}
        for what, values in (("mean", own), ("difference", own - samples[NONE, way])):
            scores[what] = AccuracyInterval(float(values[0]), *map(float, ends(values[1:]))).to_json()
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
