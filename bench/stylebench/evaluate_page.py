"""The committed table as a page: what the JSON says, in Markdown."""

from __future__ import annotations

from typing import Any

from invariclip.bench.stylebench.sources import HELD_OUT_STYLES

_TITLES = {"zero-shot": 'Zero-shot ("a picture of a {}.")', "prototypes": "Class prototypes from the training styles"}


def plot(result: dict[str, Any]) -> str:
    """Both protocols before and after the projection that selection chose for both, per held-out style, as SVG."""
    import io

    from matplotlib.figure import Figure

    styles = [*(style for style in HELD_OUT_STYLES if result["pictures"].get(style)), "mean"]
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    for axes, protocol in zip(figure.subplots(1, 2), ("zero-shot", "prototypes"), strict=True):
        for shift, row, colour, name in (
            (-0.2, "none", "#9aa7b5", "before"),
            (0.2, "auto, for both", "#1a7f4b", "after"),
        ):
            values = [result["held_out"][protocol][row][style]["value"] for style in styles]
            bars = axes.bar([place + shift for place in range(len(styles))], values, 0.38, color=colour, label=name)
            axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
        axes.set_title(f"{protocol}, {result['concepts']} classes, top-1 %", fontsize=10, loc="left")
        axes.set_xticks(range(len(styles)), [style.replace("-", "-\n", 1) for style in styles], fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.14)
    axes.legend(frameon=False, fontsize=8)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None}, facecolor="white")
    return stream.getvalue()


def render(result: dict[str, Any]) -> str:
    """The page; every figure in percent, with its 95 % bootstrap interval over concepts."""
    styles = [style for style in HELD_OUT_STYLES if result["pictures"].get(style)]
    shown = ", ".join(f"{style} {count}" for style, count in result["pictures"].items() if style not in styles)
    held = ", ".join(f"{style} {result['pictures'][style]}" for style in styles)
    parts = [
        "# Styles that nothing was fitted on",
        "Made by `python -m invariclip.bench.stylebench evaluate`; the figures with all digits, and every selection's "
        "whole curve, are in `stylebench.json`.",
        f"- Checkpoint: {result['model']}, sha256 `{result['checkpoint_sha256'][:16]}`. Seed {result['seed']}.\n"
        f"- Training styles (pictures): {shown}. Fitted on: their concepts of splits train and calibrate, natural "
        "pairs, the seven interventions (two a picture), and, where selection says so, captions.\n"
        f"- Held-out styles: {held}. Nothing is fitted or selected on them.\n"
        f"- {result['concepts']} concepts; the encoder learnt {result['learnt_concepts']} of them, in the training "
        "styles. Chance is "
        f"{100 / result['concepts']:.2f} %.\n"
        "- Estimator, rank and λ are chosen by leaving out training styles, interventions and concepts (one standard "
        "error rule). Rows `icm`, `generalised` and `shrinkage` are each estimator's best by that score, also where "
        "selection prefers no projection. `published order` keeps the other end of `icm`'s spectrum, as the published "
        "code does.\n"
        "- In brackets: 95 % intervals by bootstrap over concepts; differences are paired. They cover the choice of "
        "concepts, not of seed or encoder: this is one seed of one checkpoint.\n"
        "- Read the gains as those of a development set. No run fits or selects on the held-out styles, but the scheme "
        "of selection (scoring changed pictures, captions as pairs, taking the best rather than the mildest candidate) "
        "was designed with held-out scores of an earlier checkpoint and of this one in view. On PACS, looked at "
        "afterwards and only to compare the two rules, it gained as well (see `calibrate/select.py`).",
        *[_protocol(result, protocol, styles) for protocol in ("zero-shot", "prototypes")],
        _breakdown(result),
        _variants(result),
    ]
    return "\n\n".join(parts) + "\n"


def _protocol(result: dict[str, Any], protocol: str, styles: list[str]) -> str:
    rows = [
        [
            name,
            result["chosen"][name],
            *(f"{scores[style]['value']:.1f}" for style in styles),
            _interval(scores["mean"]),
            "" if name == "none" else _interval(scores["difference"], signed=True),
        ]
        for name, scores in result["held_out"][protocol].items()
    ]
    header = ["projection", "chosen", *styles, "mean", "difference to none"]
    return f"## {_TITLES[protocol]}\n\n{_table(header, rows)}"


def _breakdown(result: dict[str, Any]) -> str:
    rows = []
    for group, name in (("learnt", "learnt by the encoder"), ("never_seen", "never seen by it")):
        for protocol, found in result[group].items():
            for projection, scores in found.items():
                difference = "" if projection == "none" else _interval(scores["difference"], signed=True)
                rows.append([name, protocol, projection, _interval(scores["mean"]), difference])
    header = ["concepts", "protocol", "projection", "mean over held-out styles", "difference to none"]
    return f"## Concepts that the encoder learnt, and that it never saw\n\n{_table(header, rows)}"


def _variants(result: dict[str, Any]) -> str:
    rows = [
        [
            row["concepts"],
            row["pairs"],
            row["chosen"],
            *(
                cell
                for protocol in ("zero-shot", "prototypes")
                for cell in (_interval(row[protocol]["mean"]), _interval(row[protocol]["difference"], signed=True))
            ),
        ]
        for row in result["variants"]
    ]
    header = ["fitted on concepts", "pairs", "chosen", "zero-shot", "to none", "prototypes", "to none"]
    text = (
        "Shrinkage, with λ chosen each time for both protocols at once; `identity` where nothing was clearly "
        "better than no projection."
    )
    return f"## What to fit on\n\n{text}\n\n{_table(header, rows)}"


def _interval(value: dict[str, float], *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{value['value']:{sign}.1f} [{value['low']:{sign}.1f}, {value['high']:{sign}.1f}]"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
