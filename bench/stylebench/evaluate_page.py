"""The committed table as a page: what the JSON says, in Markdown, and its figure."""

from __future__ import annotations

from typing import Any

from invariclip.bench.stylebench.sources import HELD_OUT_STYLES

GOALS = {"resnet18, prototypes": 5.0, "reference, zero-shot": 3.0}
"""What issue 5 asks for, in points over no projection."""
_TITLES = {
    "resnet18, prototypes": "ImageNet ResNet-18, class prototypes",
    "reference, zero-shot": "Reference checkpoint, zero-shot",
    "reference, prototypes": "Reference checkpoint, class prototypes",
}
_ROWS = {
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
    """Every table before and after the projection that selection chose, per held-out style, as SVG."""
    import io

    from matplotlib.figure import Figure

    styles = [*_styles(result), "mean"]
    figure = Figure(figsize=(11.4, 3.3), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(_TITLES)), _TITLES.items(), strict=True):
        rows = result["tables"][name]["rows"]
        for shift, row, colour, label in ((-0.2, "none", "#9aa7b5", "before"), (0.2, "auto", "#1a7f4b", "after")):
            values = [rows[row][style]["value"] for style in styles]
            places = [place + shift for place in range(len(styles))]
            bars = axes.bar(places, values, 0.38, color=colour, label=label)
            axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
        change = rows["auto"]["difference"]
        axes.set_title(f"{title}\ntop-1 %, mean {_interval(change, signed=True)}", fontsize=9, loc="left")
        axes.set_xticks(range(len(styles)), [style.replace("-", "-\n", 1) for style in styles], fontsize=7.5)
        axes.tick_params(axis="y", labelsize=7.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.14)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None}, facecolor="white")
    return stream.getvalue()


def render(result: dict[str, Any]) -> str:
    """The page; every figure in percent, means over seeds."""
    counts = result["pictures"]
    held = ", ".join(f"{style} {counts[style]}" for style in _styles(result))
    shown = ", ".join(f"{style} {count}" for style, count in counts.items() if style not in HELD_OUT_STYLES)
    parts = [
        "# Styles that nothing was fitted on",
        "![Top-1 before and after](stylebench.svg)",
        _goals(result),
        "## What was measured",
        f"- **Pictures.** {result['concepts']} concepts. Fitted and selected on training styles ({shown}), without the "
        f"concepts of split *test*; scored on held-out styles ({held}), all concepts, each style counting the same. "
        f"Chance is {100 / result['concepts']:.2f} %.\n"
        "- **Encoders.** The ImageNet ResNet-18 has 512 features and takes no texts. The reference checkpoint (sha256 "
        f"`{result['checkpoint_sha256'][:16]}`) is the same trunk with a head to 256 and a text tower, trained on "
        f"{result['learnt_concepts']} of the concepts in the training styles. Features in {result['precision']}.\n"
        '- **Protocols.** Zero-shot: "a picture of a {}." Prototypes: the mean of a class\'s pictures in the training '
        "styles.\n"
        "- **Pairs.** One concept in two styles, and a picture under the paper's seven interventions, two versions "
        "each: the defaults of `calibrate`; where the table is zero-shot, captions too if selection wants them.\n"
        "- **Selection.** Estimator, rank and λ by leaving out training styles, interventions and concepts, for the "
        "table's own protocol (one standard error rule). `auto` is what `calibrate` writes; `icm`, `generalised` and "
        "`shrinkage` are each one's best by that score, also where no projection is preferred.\n"
        "- **Baselines.** Centring, whitening and PCA of the training pictures, LDA of them by concept; PCA has the "
        "rank that `icm` was given. `published order` is that `icm` with the other end of the spectrum, as the "
        "published code has it. LEACE and SPLINCE erase the training styles by their labels; SPLINCE keeps what tells "
        "concepts apart, in as many directions as that `icm` has where there are more concepts than dimensions; LEACE "
        "also stands there with the covariance shrunk, as its authors' code has it by default. "
        "Of the reference, which takes texts: GR-CLIP (each modality's mean), IsoCLIP (the middle of the spectrum of "
        "both last layers, that rank at most), and projections away from what prompts say of the training styles, as "
        "many directions as there are phrases less one, or up to that rank; PRISM-mini projects images alone, away "
        "from the phrases themselves.\n"
        f"- **{_seeds(result)}** A seed draws the interventions and their strengths, the folds of concepts "
        "that selection leaves out, and the bootstrap. Encoders, pictures and splits are the same throughout: no "
        "projection, centring, whitening and LDA do not vary.\n"
        "- **Brackets.** 95 % intervals by bootstrap over concepts and seeds together; differences are paired. "
        "`seeds` is the standard deviation of the difference over seeds. They do not cover the choice of encoder.\n"
        "- **Read the gains as those of a development set.** No run fits or selects on the held-out styles, but how "
        "selection works (scoring changed pictures, captions as pairs, the best rather than the mildest candidate) was "
        "designed with held-out scores of the reference and of an earlier checkpoint in view; `calibrate/select.py` "
        "says how it was checked on PACS.",
        *[_scored(result, name) for name in _TITLES],
        *([_pairs(result)] if all(table["pairs"] for table in result["tables"].values()) else []),
        _breakdown(result),
        "Made by `python -m invariclip.bench.stylebench evaluate`; `stylebench.json` has all digits, every seed's "
        "difference and choice, and the first seed's curves of selection.",
    ]
    return "\n\n".join(parts) + "\n"


def _styles(result: dict[str, Any]) -> list[str]:
    return [style for style in HELD_OUT_STYLES if result["pictures"].get(style)]


def _seeds(result: dict[str, Any]) -> str:
    return f"{result['seeds']} seeds." if result["seeds"] > 1 else "One seed only: nothing here says what others give."


def _goals(result: dict[str, Any]) -> str:
    lines = []
    for name, goal in GOALS.items():
        rows = result["tables"][name]["rows"]
        change = rows["auto"]["difference"]
        reached = "reached" if change["value"] >= goal and change["low"] > 0 else "**not reached**"
        lines.append(
            f"- {_TITLES[name]}: {rows['none']['mean']['value']:.1f} % → {rows['auto']['mean']['value']:.1f} %, "
            f"**{_interval(change, signed=True)} points**. Goal +{goal:.0f}: {reached}."
        )
    return "Mean over four held-out styles, before and after what `calibrate` chooses by itself:\n\n" + "\n".join(lines)


def _scored(result: dict[str, Any], name: str) -> str:
    styles = _styles(result)
    rows = [
        [
            _ROWS.get(row, row),
            *(f"{scores[style]['value']:.1f}" for style in styles),
            _interval(scores["mean"]),
            *(("", "") if row == "none" else (_interval(scores["difference"], signed=True), _spread(scores))),
            _chosen(scores["chosen"]),
        ]
        for row, scores in result["tables"][name]["rows"].items()
    ]
    header = ["", *styles, "mean", "to no projection", "seeds", "chosen"]
    return f"## {_TITLES[name]}\n\n{_table(header, rows)}"


def _pairs(result: dict[str, Any]) -> str:
    text = (
        "Shrinkage, λ selected for each; one seed. `left out` and `changed`: what selection saw, the gain on unchanged "
        "and on changed pictures of left-out training styles. `held out`: the gain on the held-out styles. *All "
        "eighteen* are all interventions that there are, style exchange and backgrounds among them, two versions of a "
        "picture; their changed pictures are others than those of the seven, so `changed` compares within a list only."
    )
    parts = ["## Which pairs", text]
    for name, title in _TITLES.items():
        rows = [
            [
                row,
                f"{scores['left_out']:+.1f}",
                f"{scores['left_out_changed']:+.1f}",
                _interval(scores["difference"], signed=True),
                _chosen(scores["chosen"]),
            ]
            for row, scores in result["tables"][name]["pairs"].items()
            if row != "none"
        ]
        parts += [f"**{title}**", _table(["pairs", "left out", "changed", "held out", "chosen"], rows)]
    return "\n\n".join(parts)


def _breakdown(result: dict[str, Any]) -> str:
    rows = []
    for group, words in (("learnt", "learnt by the reference"), ("never_seen", "never seen by it")):
        for name, title in _TITLES.items():
            before, after = (result["tables"][name][group][row] for row in ("none", "auto"))
            change = _interval(after["difference"], signed=True)
            rows.append([words, title, *(f"{row['mean']['value']:.1f}" for row in (before, after)), change])
    header = ["concepts", "", "before", "after", "difference"]
    return f"## Concepts that the reference learnt, and that it never saw\n\n{_table(header, rows)}"


def _spread(scores: dict[str, Any]) -> str:
    return "" if scores["spread"] is None else f"± {scores['spread']:.1f}"


def _chosen(choices: list[str]) -> str:
    """What the seeds chose, the most frequent first, with how often where they differ."""
    counts = {choice: choices.count(choice) for choice in choices if choice}
    ordered = sorted(counts, key=lambda choice: -counts[choice])
    return ", ".join(f"{choice} ({counts[choice]}×)" if len(counts) > 1 else choice for choice in ordered)


def _interval(value: dict[str, float], *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{value['value']:{sign}.1f} [{value['low']:{sign}.1f}, {value['high']:{sign}.1f}]"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
