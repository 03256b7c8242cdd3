"""docs/cdc.md: how CDC works here, and the table, of the JSON's figures alone."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from invariclip.bench.cdc.rows import MAIN, MEAN, SHOTS, SINGLE, ZERO_SHOT
from invariclip.bench.cdc.trial import SEEN, UNSEEN

ABLATIONS = (
    "M = 1", "M = 2", MAIN, "M = 8", "softmax for evidential", "without misleading", "without diversity",
    "without consistency", "without augmentation",
)  # fmt: skip
_HEAD = "head.md"


def render(result: dict[str, Any]) -> str:
    """The page."""
    parts = [
        files("invariclip.bench.cdc").joinpath(_HEAD).read_text(encoding="utf-8").strip(),
        "## Base classes to new ones, seen styles to unseen ones",
        "![Risk and coverage; confidence and accuracy](cdc.svg)",
        _goals(result),
        _protocol(result),
        "### Accuracy",
        _accuracy(result, (ZERO_SHOT, SINGLE, MAIN, MEAN)),
        "### Uncertainty",
        "AUROC: the chance that a wrong answer (or a picture of a class that is not among those asked about) is more "
        "uncertain than a right answer (or a picture of a class that is). AURC: the area under risk against coverage; "
        "low is good. `u` is what an artifact answers and abstains by; `1 - max b` is what is missing to the answer's "
        "belief.",
        _uncertainty(result),
        "### What each part gives",
        f"Learned templates (M), and parts left out, all else as in {MAIN}. With more than four templates the four "
        "augmentations go round. *Softmax for evidential*: the cross-entropy of each template's softmax in place of "
        "the trusted one. Held-out styles.",
        _ablations(result),
        _caveats(result),
        "Made by `python -m invariclip.bench.cdc`; `cdc.json` has every seed's figures.",
    ]
    return "\n\n".join(parts) + "\n"


def _goals(result: dict[str, Any]) -> str:
    lines = []
    for goal in result["goals"]:
        seeds = ", ".join(f"{value:+.3f}" for value in goal["by_seed"])
        reached = "reached" if goal["reached"] else "**not reached**"
        lines.append(f"- {goal['goal']}: {goal['difference']:+.3f} (seeds {seeds}): {reached}.")
    words = "Goals, on held-out styles; reached is what holds in the mean and under every seed (percent are points):"
    return words + "\n\n" + "\n".join(lines) + "\n\n" + _reasons(result)


def _reasons(result: dict[str, Any]) -> str:
    """What the figures say about goals that are missed; nothing where none is."""
    missed = {goal["goal"] for goal in result["goals"] if not goal["reached"]}
    ours, plain = result["rows"][MAIN][UNSEEN], result["rows"][ZERO_SHOT][UNSEEN]
    told = []
    if any("harmonic" in name for name in missed):
        seen = result["rows"][ZERO_SHOT][SEEN]["harmonic"]["mean"]
        told.append(
            f"The encoder learnt all of these concepts in the training styles, where zero-shot is at {seen:.1f} % "
            "already: few-shot pictures of those styles have next to nothing left to teach a template, and what it "
            "learns of them says little about a style that the image tower misplaces."
        )
    if any("AUROC" in name for name in missed):
        other = ours["auroc_wrong"]["1 - max b"]["mean"]
        told.append(
            "u is small where there is much evidence for anything, also for two classes alike; max-softmax, and the "
            f"belief in the answer, see the rival. `1 - max b` of the same answers has {other:.3f} for wrong answers, "
            f"max-softmax {plain['auroc_wrong']['max-softmax']['mean']:.3f}; energy, which like u sums over classes, "
            f"{plain['auroc_wrong']['energy']['mean']:.3f}."
        )
    return "\n".join(f"- Why: {line}" for line in told)


def _caveats(result: dict[str, Any]) -> str:
    """What the baselines are not."""
    kept = result["best_steps"][SINGLE]
    untrained = sum(step == 0 for step in kept)
    return (
        f"Two things to know of the baselines. Under {untrained} of {len(kept)} seeds no step of *{SINGLE}* lowered "
        "its validation loss, so what stands there is its start, the hand-written words with noise: being above it "
        "says nothing about tuning. And zero-shot has the checkpoint's own temperature, while the scales of evidence "
        "are fitted on validation pictures: the gain in calibration error is that of fitting and of fusing together, "
        "and a temperature fitted on the same pictures is not in the table."
    )


def _protocol(result: dict[str, Any]) -> str:
    counts, pictures = result["counts"], result["pictures"]
    spaces = ", ".join(dict.fromkeys(result["projections"]))
    return (
        "- **Classes.** Of the concepts that the reference checkpoint learnt, half are base "
        f"({counts['base_classes']}) and half new ({counts['new_classes']}), drawn anew by each seed. New classes are "
        "named among new classes.\n"
        f"- **Few-shot.** {SHOTS} pictures of a base class, in the training styles ({counts['train']}); "
        f"{counts['validation']} more stop the training and fit the evidence; the rest is scored.\n"
        f"- **Scored** on {pictures[SEEN][0]} base and {pictures[SEEN][1]} new pictures in the training styles, "
        f"{pictures[UNSEEN][0]} and {pictures[UNSEEN][1]} in the four held-out ones (accuracy: mean over styles). The "
        "encoder itself was trained on the training styles' pictures, so figures there are those of a training set.\n"
        "- **Space.** That of the projection which calibration chooses for zero-shot on base and calibration concepts "
        f"({spaces}); every row is in it. Image trunk in {result['precision']}.\n"
        f"- **{result['seeds']} seeds**: of halves, shots, starts and steps; ± is their standard deviation. Learning "
        "rate, steps and the evidence's fit were set on the training styles alone: on other halves, without a "
        "projection, on pictures changed by the paper's seven interventions. Nothing was chosen on held-out styles, "
        "but held-out scores of the first seed had been printed when the fit of the scales took its final form, which "
        "keeps every template a say."
    )


def _accuracy(result: dict[str, Any], rows: tuple[str, ...]) -> str:
    header = ["", *(f"{part}, {group}" for group in (SEEN, UNSEEN) for part in ("base", "new", "harmonic mean"))]
    lines = [
        [_name(row), *(_pm(result["rows"][row][group][part], 1) for group in (SEEN, UNSEEN)
                       for part in ("base", "new", "harmonic"))]
        for row in rows
    ]  # fmt: skip
    return _table(header, lines)


def _uncertainty(result: dict[str, Any]) -> str:
    header = ["held-out styles", "by", "AUROC wrong", "AUROC unknown class", "AURC", "ECE"]
    lines = []
    for row in (ZERO_SHOT, SINGLE, MEAN, MAIN):
        scores = result["rows"][row][UNSEEN]
        for place, doubt in enumerate(scores["auroc_wrong"]):
            figures = [_pm(scores[name][doubt], 3) for name in ("auroc_wrong", "auroc_unknown", "aurc")]
            lines.append([_name(row) if not place else "", doubt, *figures, _pm(scores["ece"], 3) if not place else ""])
    return _table(header, lines)


def _ablations(result: dict[str, Any]) -> str:
    header = ["", "base", "new", "harmonic mean", "ECE", "AUROC wrong, u", "AUROC unknown, u", "best step"]
    lines = []
    for row in ABLATIONS:
        scores = result["rows"][row][UNSEEN]
        steps = "/".join(str(step) for step in result["best_steps"][row])
        lines.append([
            "**M = 4, all of it**" if row == MAIN else row,
            *(_pm(scores[name], 1) for name in ("base", "new", "harmonic")),
            _pm(scores["ece"], 3), _pm(scores["auroc_wrong"]["u"], 3), _pm(scores["auroc_unknown"]["u"], 3), steps,
        ])  # fmt: skip
    return _table(header, lines)


def _name(row: str) -> str:
    return f"**{row}**" if row == MAIN else row


def _pm(value: dict[str, Any], digits: int) -> str:
    spread = "" if value["sd"] is None else f" ± {value['sd']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{spread}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
