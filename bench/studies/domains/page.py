"""The committed page: what the JSON says, in Markdown, and the bars as SVG."""

from __future__ import annotations

import io
from typing import Any

from invariclip.bench.studies.domains.trial import ESTIMATORS, ICM_STRENGTHS, MAIN, OWN, WIDE

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
    for shift, row, colour, label in ((-0.2, "none", "#9aa7b5", "before"), (0.2, MAIN, "#1a7f4b", "after")):
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
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.14)
    axes.legend(frameon=False, fontsize=8)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None}, facecolor="white")
    return stream.getvalue()


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
        *[f"## {_TITLES[way]}\n\n{_NOTES.get(way, '')}{_scores(result, 'rows', way)}" for way in ways],
        *([f"## What it costs where nothing has shifted\n\n{_COST}\n\n{_cost(result)}"] if result["home"] else []),
        f"## What to pair\n\n{_SOURCES}\n\n{_scores(result, 'sources', 'probe')}",
        f"## Classes that were not fitted on\n\n{_OPEN}\n\n{_open(result)}",
        f"## What is left of the environment\n\n{_MEASURES}\n\n{_measures(result)}",
        f"## What was chosen\n\n{_chosen(result)}",
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
            f"**{_interval(scores['difference'], signed=True)} points**{each}."
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
    listed = ", ".join(f"{name} ({_interval(above[name], signed=True)})" for name in found)
    return f"- {_TITLES[way]}: **{len(found)} of the baselines stand above `{OWN[way]}`**, in points: {listed}."


def _cost_in_a_line(result: dict[str, Any]) -> str:
    change = result["home"][MAIN]["probe"]["difference"]
    kept = "within" if change["value"] >= -_HARM else "**beyond**"
    return (
        f"Within a training environment, where nothing has shifted, `{MAIN}` changes the probe by "
        f"{_interval(change, signed=True)} points ({kept} the bound of -{_HARM:g})."
    )


def _cost(result: dict[str, Any]) -> str:
    rows = [
        [name, way, _interval(scores["mean"]), _interval(scores["difference"], signed=True) if name != "none" else ""]
        for name, ways in result["home"].items()
        for way, scores in ways.items()
    ]
    return _table(["projection", "by", "accuracy", "to none"], rows)


def _scores(result: dict[str, Any], group: str, way: str) -> str:
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
                _interval(scores["mean"]),
                _interval(scores["difference"], signed=True) if own else "",
                spread if own and result["seeds"] > 1 else "",
                f"{scores['worst']['value']:.1f}",
                _interval(scores["worst_difference"], signed=True) if own else "",
            ]
        )
    header = ["projection" if group == "rows" else "pairs", *tests, "mean", "to none", "seeds", "worst", "to none"]
    return _table(header, rows)


def _open(result: dict[str, Any]) -> str:
    rows = []
    for name in result["base"]:
        for way in ("prototypes", "zero-shot"):
            if way in result["base"][name]:
                base, new = result["base"][name][way], result["open"][name][way]
                pair = (base["mean"]["value"], new["mean"]["value"])
                harmonic = 2 * pair[0] * pair[1] / sum(pair) if sum(pair) else 0.0
                to_none = [_interval(s["difference"], signed=True) if name != "none" else "" for s in (base, new)]
                rows.append([name, way, f"{pair[0]:.1f}", to_none[0], f"{pair[1]:.1f}", to_none[1], f"{harmonic:.1f}"])
    return _table(["projection", "by", "base classes", "to none", "open classes", "to none", "harmonic mean"], rows)


def _measures(result: dict[str, Any]) -> str:
    rows = [
        [name, f"{m['leakage']:.1f}", f"{m['chance']:.1f}", "" if m["gap"] is None else f"{m['gap']:.3f}"]
        for name, m in result["measures"].items()
    ]
    return _table(["projection", "leakage %", "chance %", "invariance gap"], rows)


def _chosen(result: dict[str, Any]) -> str:
    tests = list(result["images"])
    rows = [[name, *(", ".join(dict.fromkeys(by[test])) for test in tests)] for name, by in result["chosen"].items()]
    return _table(["row", *tests], rows)


def _interval(value: dict[str, float], *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{value['value']:{sign}.1f} [{value['low']:{sign}.1f}, {value['high']:{sign}.1f}]"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
