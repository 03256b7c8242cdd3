"""docs/cdc.md: how CDC works here, and the table, of the JSON's figures alone."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from invariclip.bench.studies.cdc.rows import MAIN, MEAN, SHOTS, SINGLE, SINGLE_FITTED, ZERO_SHOT, ZERO_SHOT_FITTED
from invariclip.bench.studies.cdc.summary import BY_DOUBT
from invariclip.bench.studies.cdc.trial import FEW, SEEN, UNSEEN
from invariclip.export.checkpoints.sources import REFERENCE

ABLATIONS = (
    "M = 1", "M = 2", MAIN, "M = 8", "softmax for evidential", "without misleading", "without diversity",
    "without consistency", "without augmentation",
)  # fmt: skip
_HEAD = "head.md"


def render(result: dict[str, Any], figure: str = "cdc.svg") -> str:
    """The page.

    Args:
        result: The JSON's content; the bundled reference's has the account of how CDC works as its head.
        figure: The plot's name beside the page.
    """
    ablations = [row for row in ABLATIONS if row in result["rows"]]
    parts = [
        _head(result),
        "## Base classes to new ones, styles adapted to and one held out",
        f"![Risk and coverage; confidence and accuracy]({figure})",
        _goals(result),
        _protocol(result),
        "### Accuracy",
        _accuracy(result, (ZERO_SHOT, SINGLE, MAIN, MEAN)),
        _baselines(result),
        "### Uncertainty",
        "AUROC: the chance that a wrong answer (or an image of a class that is not among those asked about) is more "
        "uncertain than a right answer (or an image of a class that is); *of 2 classes*: where no more are asked "
        "about, drawn fifty times. AURC: the area under risk against coverage; "
        "low is good. `u` is what an artifact answers and abstains by; `1 - max p` is what its "
        "probability misses to one.",
        _uncertainty(result),
    ]
    if len(ablations) > 1:
        parts += [
            "### What each part gives",
            f"Learned templates (M), and parts left out, all else as in {MAIN}. With more than four templates the four "
            "augmentations go round. *Softmax for evidential*: the cross-entropy of each template's softmax in place "
            "of the trusted one. Held-out style.",
            _ablations(result, ablations),
        ]
    plot = figure.removesuffix(".svg")
    return "\n\n".join([*parts, f"Made by `{_command(result, plot)}`; `{plot}.json` has every seed's figures."]) + "\n"


def _bundled(result: dict[str, Any]) -> bool:
    return str(result.get("model", REFERENCE)) == REFERENCE


def _command(result: dict[str, Any], plot: str) -> str:
    """The command that makes the page."""
    words = [] if _bundled(result) else [f"--model build/{result['model']}"]
    words.append(f"--seeds {result['seeds']}")
    if not set(ABLATIONS) <= set(result["rows"]):
        words.append("--no-ablations")
    return " ".join(["python -m invariclip.bench.studies.cdc", *words, f"-o docs/{plot}.md"])


def _head(result: dict[str, Any]) -> str:
    if _bundled(result):
        return files("invariclip.bench.studies.cdc").joinpath(_HEAD).read_text(encoding="utf-8").strip()
    return (
        f"# CDC's table on another model: {result['model']}\n\nAs in [cdc.md](cdc.md), which says how CDC works here."
    )


def _goals(result: dict[str, Any]) -> str:
    lines = []
    for goal in result["goals"]:
        digits, low_high = goal["digits"], goal["interval"]
        spread = "" if low_high is None else f" [{low_high[0]:+.{digits}f}, {low_high[1]:+.{digits}f}]"
        reached = "reached" if goal["reached"] else "**not reached**"
        lines.append([goal["goal"], f"{goal['difference']:+.{digits}f}{spread}", reached])
    words = (
        "CDC less the other (for the calibration error: the other less CDC), paired by seed: the mean with its 95 % "
        "interval over seeds of the same style; percent are points. Reached is what has the whole interval above zero."
    )
    return "\n\n".join([words, _table(["", "difference", ""], lines), *_reasons(result)])


def _reasons(result: dict[str, Any]) -> list[str]:
    """What the figures say of goals that are missed; nothing where none is."""
    missed = [goal["goal"] for goal in result["goals"] if not goal["reached"]]
    rows = {name: result["rows"][name][SEEN] for name in (ZERO_SHOT, SINGLE, MAIN)}
    told = []
    if any("harmonic" in name for name in missed):
        moved = {
            name: [rows[name][part]["mean"] - rows[ZERO_SHOT][part]["mean"] for part in ("base", "new")]
            for name in (SINGLE, MAIN)
        }
        single, ours = (
            f"{base:+.1f} points on base classes and {new:+.1f} on new ones" for base, new in moved.values()
        )
        little = (
            "one image of a class in styles that the image tower never saw teaches vectors, which stand before "
            "every class's name, little that holds"
        )
        told.append(
            "**Why no more right answers.** The images leave room (zero-shot is right on "
            f"{rows[ZERO_SHOT]['harmonic']['mean']:.0f} %), but {little}: in the adapted "
            f"styles a single template moves by {single}. CDC, tied to the hand-written prompt, moves by {ours}. What "
            "the image tower misplaces in an unseen style, no prompt puts back."
        )
    if any("AUROC" in name for name in missed):
        ours, plain = (result["rows"][name][UNSEEN]["auroc_wrong"] for name in (MAIN, ZERO_SHOT_FITTED))
        told.append(
            "**Why u is as good as a softmax, and no better.** u is what each template's softmax lacks, fused; five "
            "templates that hardly differ know hardly more together than one: "
            f"{ours['u']['mean']:.3f} against {plain['max-softmax']['mean']:.3f} for wrong answers."
        )
    return told


def _baselines(result: dict[str, Any]) -> str:
    """What the baselines are."""
    kept = result["best_steps"][SINGLE]
    trained = sum(step > 0 for step in kept)
    fitted = ", ".join(f"{value:.0f}" for value in result["temperatures"][ZERO_SHOT_FITTED])
    own = result["temperatures"][ZERO_SHOT][0]
    return (
        f"*{SINGLE}* learns as CoOp does (Zhou et al., IJCV 2022), on the same images, with the same early stop: in "
        f"{trained} of {len(kept)} seeds a step lowered its validation loss. *{ZERO_SHOT_FITTED}* and "
        f"*{SINGLE_FITTED}* answer alike, but their softmax has a temperature fitted on the images that "
        "CDC fits its evidence on: "
        f"{fitted} for zero-shot, where the checkpoint has {own:.0f}. What remains beside them is what several "
        "templates and their fusion give."
    )


def _protocol(result: dict[str, Any]) -> str:
    counts, images = result["counts"], result["images"]
    spaces = ", ".join(dict.fromkeys(result["projections"]))
    styles = ", ".join(dict.fromkeys(result["held_out"]))

    def spread(group: str, part: int) -> str:
        every = [own[part] for own in images[group]]
        return f"{min(every)} to {max(every)}"

    seen = (
        "Nothing was chosen on the unseen styles, but this table, of an earlier reference, had been read twice before "
        "the form was final: with no base rate but 1/K, and with no background."
        if _bundled(result)
        else "Nothing was chosen with this model in view."
    )
    return (
        "- **Classes.** Of the concepts that the checkpoint learnt, half are base "
        f"({counts['base_classes']}) and half new ({counts['new_classes']}), drawn anew by each seed. New classes are "
        "named among new classes.\n"
        f"- **Styles.** Four that the encoder never saw ({styles}). Each seed holds another one out; templates are "
        "learnt from the three others, *adapted styles*.\n"
        f"- **Few-shot.** {SHOTS} image of a base class, in whichever adapted style it was drawn from "
        f"({counts['train']} for {counts['taught_classes']} classes that have any); {counts['validation']} more stop "
        "the training and fit the evidence; the rest is scored.\n"
        f"- **Scored** on {spread(SEEN, 0)} base and {spread(SEEN, 1)} new images in the adapted styles (accuracy: "
        f"mean over styles), {spread(UNSEEN, 0)} and {spread(UNSEEN, 1)} in the held-out one.\n"
        "- **Space.** That of the shrinkage which calibration chooses for zero-shot on the training styles' base and "
        f"calibration concepts ({spaces}); every row is in it. Image trunk in {result['precision']}.\n"
        f"- **{result['seeds']} seeds**: of halves, held-out style, shots, starts and steps; ± is their standard "
        "deviation. The form of evidence, learning rate and steps were chosen on images of the training styles that "
        "interventions had changed (as if invert, solarize, fog and noise were the four styles), without a "
        f"projection. {seen}"
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
    header = [
        "held-out style",
        "by",
        "AUROC wrong",
        "AUROC unknown class",
        *(f"of {count} classes" for count in FEW),
        "AURC",
        "ECE",
    ]
    lines = []
    for row in (ZERO_SHOT, ZERO_SHOT_FITTED, SINGLE, SINGLE_FITTED, MEAN, MAIN):
        scores = result["rows"][row][UNSEEN]
        for place, doubt in enumerate(scores["auroc_wrong"]):
            figures = [_pm(scores[name][doubt], 3) for name in BY_DOUBT]
            lines.append([_name(row) if not place else "", doubt, *figures, _pm(scores["ece"], 3) if not place else ""])
    return _table(header, lines)


def _ablations(result: dict[str, Any], rows: list[str]) -> str:
    header = ["", "base", "new", "harmonic mean", "ECE", "AUROC wrong, u", "AUROC unknown, u", "best step"]
    lines = []
    for row in rows:
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
