"""The table of stylebench: trials of several seeds put together, with intervals over concepts and seeds, and its pages.

One page holds the table, another what the same maps do to another set's images. Both are made of the JSON alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.bench.studies.pages import PLAIN_COLOUR, PROJECTED_COLOUR, as_svg, interval, table, trim
from invariclip.bench.studies.stylebench.sources import HELD_OUT_STYLES
from invariclip.bench.studies.stylebench.trial import (
    CONCEPT_PARTS,
    DRAWS,
    ELSEWHERE_TEMPLATES,
    TEMPLATES,
)
from invariclip.bench.studies.trials import ICM_STRENGTHS, Stratified, ends, unpack
from invariclip.calibrate.projection.bootstrap import Bootstrap

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from invariclip.bench.studies.stylebench.trial import StyleWorld
    from invariclip.bench.studies.trials import Resampler


GOALS = {"zero-shot": 3.0, "prototypes": 5.0}
"""Points over no projection on the held-out styles."""
HARM = 0.5
"""Points that a projection may cost where nothing has shifted."""
TITLES = {"zero-shot": "Zero-shot", "prototypes": "Class prototypes"}
NAMES = {
    "none": "no projection",
    "lda": "LDA",
    "pca": "PCA of equal rank",
    "published": "published order",
    "leace": "LEACE",
    "leace, shrunk": "LEACE, shrunk covariance",
    "splince": "SPLINCE",
    "gr-clip": "GR-CLIP",
    "isoclip": "IsoCLIP",
    "text-styles": "style prompts",
    "text-styles, equal rank": "style prompts, equal rank",
    "prism-mini": "PRISM-mini",
    "auto": "**auto**",
}


def plot(result: dict[str, Any]) -> str:
    """Both tables before and after the projection that selection chose, per held-out style, as SVG."""
    from matplotlib.figure import Figure

    styles = [*_styles(result), "mean"]
    figure = Figure(figsize=(8.4, 3.3), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(TITLES)), TITLES.items(), strict=True):
        rows = result["tables"][name]["rows"]
        for shift, row, colour, label in (
            (-0.2, "none", PLAIN_COLOUR, "before"),
            (0.2, "auto", PROJECTED_COLOUR, "after"),
        ):
            values = [rows[row][style]["value"] for style in styles]
            places = [place + shift for place in range(len(styles))]
            bars = axes.bar(places, values, 0.38, color=colour, label=label)
            axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
        change = rows["auto"]["difference"]
        axes.set_title(f"{title}\ntop-1 %, mean {interval(change, signed=True)}", fontsize=9, loc="left")
        axes.set_xticks(range(len(styles)), [style.replace("-", "-\n", 1) for style in styles], fontsize=7.5)
        axes.tick_params(axis="y", labelsize=7.5)
        trim(axes, margin=0.14)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    return as_svg(figure)


def render(result: dict[str, Any]) -> str:
    """The page; every figure in percent, means over seeds."""
    counts = result["images"]
    held = ", ".join(f"{style} {counts[style]}" for style in _styles(result))
    shown = ", ".join(f"{style} {count}" for style, count in counts.items() if style not in HELD_OUT_STYLES)
    strengths = " and ".join(f"{value:g}" for value in ICM_STRENGTHS)
    parts = [
        "# Styles that nothing was fitted on",
        "![Top-1 before and after](stylebench.svg)",
        _goals(result),
        "\n".join(above_auto(TITLES[way], result["tables"][way]["rows"]) for way in TITLES),
        _harm_in_a_line(result),
        "## What was measured",
        f"- **Images.** {result['concepts']} concepts. Fitted and selected on training styles ({shown}), without the "
        f"concepts of split *test*; scored on held-out styles ({held}), all concepts, each style counting the same. "
        f"Chance is {100 / result['concepts']:.2f} %.\n"
        f"- **Encoder.** `{result['model']}` (sha256 `{result['checkpoint_sha256'][:16]}`), {result['width']} wide: a "
        f"frozen ImageNet trunk and a sentence encoder with a learnt end. Images in {result['precision']}.\n"
        f'- **Protocols.** Zero-shot: "{TEMPLATES[0]}" Prototypes: the mean of a class\'s images in the training '
        "styles.\n"
        "- **Pairs.** One concept in two styles, and an image under one of the paper's seven interventions "
        f"({DRAWS} version; `calibrate` draws two); by name, captions too if selection wants them.\n"
        "- **Selection.** Estimator, rank and λ by leaving out training styles, interventions and concepts, for the "
        "table's own protocol (one standard error rule). `auto` is what was chosen; `icm`, `generalised` and "
        "`shrinkage` are each one's best by that score, also where no projection is preferred. In a space this wide "
        f"each λ of `icm` is dear: {strengths} were tried, captions with shrinkage alone, and concepts left out in "
        f"{CONCEPT_PARTS} parts; `calibrate` has six λ, captions with all, and four parts.\n"
        "- **Baselines.** Centring, whitening and PCA of the training images, LDA of them by concept; PCA has the "
        "rank that `icm` was given. `published order` is that `icm` with the other end of the spectrum, as the "
        "published code has it. LEACE and SPLINCE erase the training styles by their labels; SPLINCE keeps what tells "
        "concepts apart, in as many directions as that `icm` has where there are more concepts than dimensions; LEACE "
        "also stands there with the covariance shrunk, as its authors' code has it by default. "
        "GR-CLIP takes each modality's mean away; IsoCLIP keeps the middle of the spectrum of "
        "both last linear layers (of the text tower's MLP the last), that rank at most; style prompts project away "
        "from what prompts say of the training styles, as "
        "many directions as there are phrases less one, or up to that rank; PRISM-mini projects images alone, away "
        "from the phrases themselves.\n"
        f"- **{_seeds(result)}** A seed draws the interventions and their strengths, the folds of concepts "
        "that selection leaves out, and the bootstrap. Encoder, images and splits are the same throughout: no "
        "projection, centring, whitening and LDA do not vary.\n"
        "- **Brackets.** 95 % intervals by bootstrap over concepts and seeds together; differences are paired. "
        "`seeds` is the standard deviation of the difference over seeds. They do not cover the choice of encoder.\n"
        "- **What was looked at while choosing.** No run fits or selects on the held-out styles. But how selection "
        "works (scoring changed images, captions as pairs, the best rather than the mildest candidate) was designed "
        "with held-out scores of earlier reference checkpoints in view; `calibrate/projection/selection.py` says how "
        "it was checked "
        "on PACS. The reference's form was chosen by other images, with `shrinkage` λ = 1 in the criterion, but "
        "held-out accuracies of three of its forerunners had been printed by then ([its card]"
        "(../export/reference/reference/card.md)). Read the gains as those of a development set.",
        *[_scored(result, way) for way in TITLES],
        _harm(result),
        _photographs(result),
        _side_effects(result),
        *([_pairs(result)] if all(table["pairs"] for table in result["tables"].values()) else []),
        _breakdown(result),
        "Made by `python -m invariclip.bench.studies.stylebench evaluate`; `stylebench.json` has all digits, every "
        "seed's difference and choice, and the first seed's curves of selection.",
    ]
    return "\n\n".join(parts) + "\n"


def above_auto(title: str, rows: dict[str, Any]) -> str:
    """One line: which baselines are above what was chosen on what nothing was fitted on."""
    found = better(rows)
    if not found:
        return f"- {title}: no baseline is above `auto`."
    listed = ", ".join(
        f"{NAMES.get(name, name)} ({interval(rows[name]['to_auto'], signed=True)} points to `auto`)" for name in found
    )
    return f"- {title}: **{len(found)} of the baselines stand above `auto`**: {listed}."


def _styles(result: dict[str, Any]) -> list[str]:
    return [style for style in HELD_OUT_STYLES if result["images"].get(style)]


def _seeds(result: dict[str, Any]) -> str:
    return f"{result['seeds']} seeds." if result["seeds"] > 1 else "One seed only: nothing here says what others give."


def _goals(result: dict[str, Any]) -> str:
    lines = []
    for way, goal in GOALS.items():
        rows = result["tables"][way]["rows"]
        change = rows["auto"]["difference"]
        reached = "reached" if change["value"] >= goal and change["low"] > 0 else "**not reached**"
        lines.append(
            f"- {TITLES[way]}: {rows['none']['mean']['value']:.1f} % → {rows['auto']['mean']['value']:.1f} %, "
            f"**{interval(change, signed=True)} points**. Goal +{goal:.0f}: {reached}."
        )
    return "Mean over the held-out styles, before and after what selection chooses by itself:\n\n" + "\n".join(lines)


def _scored(result: dict[str, Any], way: str) -> str:
    styles = _styles(result)
    body = [
        [
            NAMES.get(row, row),
            *(f"{scores[style]['value']:.1f}" for style in styles),
            interval(scores["mean"]),
            *(("", "") if row == "none" else (interval(scores["difference"], signed=True), _spread(scores))),
            chosen(scores["chosen"]),
        ]
        for row, scores in result["tables"][way]["rows"].items()
    ]
    header = ["", *styles, "mean", "to no projection", "seeds", "chosen"]
    return f"## {TITLES[way]}\n\n{table(header, body)}"


def _harm_in_a_line(result: dict[str, Any]) -> str:
    said = []
    for way, title in TITLES.items():
        change = result["tables"][way]["home"]["auto"]["difference"]
        kept = "" if change["value"] >= -HARM else " (**more than it may**)"
        said.append(f"{title.lower()} {interval(change, signed=True)} points{kept}")
    return (
        f"Where test and training styles are the same, and it may cost {HARM:g} points, what is chosen changes "
        f"{', '.join(said)}."
    )


def _harm(result: dict[str, Any]) -> str:
    text = (
        f"The training styles themselves, in {result['home_concepts']} concepts of split *test*, which nothing was "
        "fitted or selected on: here a projection has nothing to gain. Zero-shot among the names of these concepts "
        f"alone (chance is {100 / result['home_concepts']:.1f} %); prototypes among all concepts, from all images of "
        "the training styles but the one that is asked about. Interval over concepts and seeds."
    )
    tables = result["tables"]
    body = []
    for row in tables["zero-shot"]["home"]:
        cells = []
        for way in TITLES:
            scores = tables[way]["home"][row]
            cells += [
                f"{scores['mean']['value']:.1f}", interval(scores["difference"], signed=True) if row != "none" else "",
            ]  # fmt: skip
        body.append([NAMES.get(row, row), *cells])
    header = ["", *(cell for title in TITLES.values() for cell in (title.lower(), "to no projection"))]
    return f"## What it costs where nothing has shifted\n\n{text}\n\n{table(header, body)}"


def _photographs(result: dict[str, Any]) -> str:
    own = result["tables"]["zero-shot"]
    style = "photograph"
    if style not in own["rows"]["none"] or not own["group"]:
        return "## Photographs\n\nThis set has none."
    body = [
        [
            NAMES.get(row, row),
            *(
                cell
                for part in (own["rows"], own["group"])
                for cell in (
                    interval(part[row][style]),
                    interval(part[row]["differences"][style], signed=True) if row != "none" else "",
                )
            ),
        ]
        for row in own["rows"]
    ]
    text = (
        f"The {result['images'][style]} photographs by name, among all {result['concepts']} names and among those of "
        "the concept's own group (animals and nature, food and drink, and so on)."
    )
    header = ["", f"of {result['concepts']}", "to no projection", "of its group", "to no projection"]
    return f"## Photographs\n\n{text}\n\n{table(header, body)}"


def _side_effects(result: dict[str, Any]) -> str:
    body = [
        [
            title,
            effect["attribute"],
            interval(effect["before"]),
            interval(effect["after"]),
            interval(effect["difference"], signed=True),
            "**worse**" if effect["worse"] else "no",
        ]
        for way, title in TITLES.items()
        for effect in result["tables"][way]["side_effects"]
    ]
    text = (
        "No pair says anything about the group that a concept belongs to. How well the nearest centroid tells it on "
        "the held-out styles, concepts left out in turn, before and after what was chosen "
        "(`calibrate/evaluation/invariance.py`;"
        f" first seed; chance is {result['tables']['zero-shot']['side_effects'][0]['chance']:.0f} %)."
    )
    header = ["chosen for", "attribute", "before", "after", "difference", "worse?"]
    return f"## What nobody asked about\n\n{text}\n\n{table(header, body)}"


def _pairs(result: dict[str, Any]) -> str:
    text = (
        "Shrinkage, λ selected for each; one seed. `left out` and `changed`: what selection saw, the gain on unchanged "
        "and on changed images of left-out training styles. `held out`: the gain on the held-out styles. *All "
        "eighteen* are all interventions that there are, style exchange and backgrounds among them; "
        "their changed images are others than those of the seven, so `changed` compares within a list only."
    )
    parts = ["## Which pairs", text]
    for way, title in TITLES.items():
        body = [
            [
                row,
                f"{scores['left_out']:+.1f}",
                f"{scores['left_out_changed']:+.1f}",
                interval(scores["difference"], signed=True),
                chosen(scores["chosen"]),
            ]
            for row, scores in result["tables"][way]["pairs"].items()
            if row != "none"
        ]
        parts += [f"**{title}**", table(["pairs", "left out", "changed", "held out", "chosen"], body)]
    return "\n\n".join(parts)


def _breakdown(result: dict[str, Any]) -> str:
    body = []
    for group, words in (("learnt", "of split train"), ("never_seen", "of the others")):
        for way, title in TITLES.items():
            before, after = (result["tables"][way][group][row] for row in ("none", "auto"))
            change = interval(after["difference"], signed=True)
            body.append([words, title, *(f"{row['mean']['value']:.1f}" for row in (before, after)), change])
    header = ["concepts", "", "before", "after", "difference"]
    text = f"The reference learnt the {result['learnt_concepts']} concepts of split *train*, and none of the others."
    return f"## Concepts that the reference learnt, and that it never saw\n\n{text}\n\n{table(header, body)}"


def _spread(scores: dict[str, Any]) -> str:
    return "" if scores["spread"] is None else f"± {scores['spread']:.1f}"


def chosen(choices: list[str]) -> str:
    """What the seeds chose, the most frequent first, with how often where they differ."""
    counts = {choice: choices.count(choice) for choice in choices if choice}
    ordered = sorted(counts, key=lambda choice: -counts[choice])
    return ", ".join(f"{choice} ({counts[choice]}×)" if len(counts) > 1 else choice for choice in ordered)


def render_transfer(result: dict[str, Any]) -> str:
    """The page; every figure in percent, means over seeds."""
    rows, domains = result["rows"], list(result["elsewhere"])
    change = rows["auto"]["difference"]
    held = [style for style in result["images"] if style not in HELD_OUT_STYLES]
    seeds = f"{result['seeds']} seeds" if result["seeds"] > 1 else "one seed"
    counts = ", ".join(f"{name} {count}" for name, count in result["elsewhere"].items())
    templates = " and ".join(f'"{template}"' for template in ELSEWHERE_TEMPLATES)
    body = [
        [
            NAMES.get(name, name),
            *(
                f"{scores[domain]['value']:.1f}"
                + ("" if name == "none" else f" ({scores['differences'][domain]['value']:+.1f})")
                for domain in domains
            ),
            interval(scores["mean"]),
            "" if name == "none" else interval(scores["difference"], signed=True),
            "" if scores["spread"] is None or name == "none" else f"± {scores['spread']:.1f}",
            chosen(scores["chosen"]),
        ]
        for name, scores in rows.items()
    ]
    parts = [
        "# Fitted on emoji, asked about PACS",
        f"A projection fitted and selected on pairs of emoji alone, zero-shot on PACS, mean over its domains: "
        f"{rows['none']['mean']['value']:.1f} % → {rows['auto']['mean']['value']:.1f} %, "
        f"**{interval(change, signed=True)} points**.",
        above_auto("Zero-shot on PACS", rows),
        *_worse(rows["auto"], domains),
        "## What was measured",
        f"- **Fitted and selected** on the training styles of [stylebench](stylebench.md) ({', '.join(held)}), for "
        "zero-shot, exactly as there: the rows are the very maps of its zero-shot table.\n"
        f"- **Scored** on PACS ({counts} images, every image that is at hand), among its {len(result['classes'])} "
        f"class names ({', '.join(result['classes'])}); the prompts are {templates}, their embeddings averaged. No "
        "image, name or domain of PACS enters a fit or a selection.\n"
        f"- **Encoder.** `{result['model']}` (sha256 `{result['checkpoint_sha256'][:16]}`), {result['width']} wide, "
        f"images in {result['precision']}; {seeds}.\n"
        "- **Brackets.** 95 % intervals by bootstrap over images within every domain and class, and over seeds; "
        "differences are paired. In parentheses: the difference of a domain. Other classes, domains and encoders are "
        "not covered.\n"
        "- **What was looked at while choosing.** Nothing of this table was chosen on PACS. But PACS with an earlier "
        "encoder was looked at when `calibrate`'s rule of selection was settled "
        "(`calibrate/projection/selection.py`), and figures "
        "of a quick ridge regression on it were in view when the reference was set out: people were taught to it "
        "because of them ([its card](../export/reference/reference/card.md)).",
        table(["", *domains, "mean", "to no projection", "seeds", "chosen"], body),
        "Made by `python -m invariclip.bench.studies.stylebench evaluate --pacs FOLDER`, with the table of stylebench.",
    ]
    return "\n\n".join(parts) + "\n"


def _worse(scores: dict[str, Any], domains: list[str]) -> list[str]:
    """Domains that what was chosen harms, surely."""
    changes = {domain: scores["differences"][domain] for domain in domains}
    harmed = [f"{domain} {interval(change, signed=True)}" for domain, change in changes.items() if change["high"] < 0]
    return [f"- **It is worse on** {', '.join(harmed)}."] if harmed else []


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
    low, high = ends(resampled, axis=0)
    return [
        {"value": round(float(v), 3), "low": round(float(a), 3), "high": round(float(b), 3)}
        for v, a, b in zip(samples[:, 0].mean(axis=0), low, high, strict=True)
    ]
