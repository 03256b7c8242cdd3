"""The table of CDC: scores of several seeds put together, goals reached or not, and docs/cdc.md with its figure.

The page is made of the JSON's figures alone.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import t as student

from invariclip.bench.studies.cdc.trial import (
    FEW,
    FITTED,
    MAIN,
    MEAN,
    ROWS,
    SEEN,
    SHOTS,
    SINGLE,
    SINGLE_FITTED,
    UNSEEN,
    ZERO_SHOT,
    ZERO_SHOT_FITTED,
)
from invariclip.bench.studies.pages import PLAIN_COLOUR, PROJECTED_COLOUR, as_svg, table, trim
from invariclip.calibrate.report.rendering import INK
from invariclip.export.checkpoints.sources import REFERENCE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray


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
    return "\n\n".join([words, table(["", "difference", ""], lines), *_reasons(result)])


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
    return table(header, lines)


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
    return table(header, lines)


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
    return table(header, lines)


def _name(row: str) -> str:
    return f"**{row}**" if row == MAIN else row


def _pm(value: dict[str, Any], digits: int) -> str:
    spread = "" if value["sd"] is None else f" ± {value['sd']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{spread}"


COLOURS = {ZERO_SHOT: PLAIN_COLOUR, ZERO_SHOT_FITTED: "#c77d1e", MAIN: PROJECTED_COLOUR}


def plot(result: dict[str, Any]) -> str:
    """Both plots side by side, as SVG without a date."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row, colour in COLOURS.items():
        curve = result["curves"][row]
        left.plot(100 * np.linspace(0, 1, len(curve)), 100 * np.asarray(curve), color=colour, label=row)
        bins = [one for one in result["bins"][row] if one[0]]
        right.plot(
            [100 * one[1] for one in bins], [100 * one[2] for one in bins], "o-", ms=3.5, color=colour, label=row
        )
    right.plot([0, 100], [0, 100], color=INK, lw=0.8, ls=":")
    for axes, title, across, up in (
        (left, "Risk of what is answered, held-out style", "answered, %", "wrong, %"),
        (right, "Confidence and accuracy, held-out style", "confidence, %", "right, %"),
    ):
        axes.set_title(title, fontsize=10, loc="left", color=INK)
        axes.set_xlabel(across, fontsize=8)
        axes.set_ylabel(up, fontsize=8)
        axes.tick_params(labelsize=8)
        trim(axes)
    left.legend(frameon=False, fontsize=8, loc="lower right")
    return as_svg(figure)


MAX_SOFTMAX, ENERGY = "max-softmax", "energy"
"""What a plain model has for an uncertainty, without a template learnt; see `evaluate.uncertainties`."""
PLAIN = ("base", "new", "harmonic", "ece")
BY_DOUBT = ("auroc_wrong", "auroc_unknown", *(f"auroc_of_{count}" for count in FEW), "aurc")


def summarise(trials: Mapping[tuple[str, int], Mapping[str, Any]], seeds: int) -> dict[str, Any]:
    """The table's figures.

    Args:
        trials: What `trial.run_trial` gave, by row and seed; rows of `ROWS` may be missing, those of `COMPARED` not.
        seeds: How many seeds there are, from 0.

    Returns:
        JSON-ready: `rows` (name → group of styles → figure → {mean, sd, by_seed}), `goals`, `seeds`, `counts`,
        `projections`, `bins` and `curves` of the rows that are drawn.
    """
    learnt = [row for row in ROWS if (row, 0) in trials]
    rows = {
        row: {
            group: _figures([trials[row, seed]["scores"][group] for seed in range(seeds)]) for group in (SEEN, UNSEEN)
        }
        for row in learnt
    }
    drawn = (ZERO_SHOT, ZERO_SHOT_FITTED, MAIN)
    return {
        "seeds": seeds,
        "rows": rows,
        "goals": goals(rows, [trials[MAIN, s]["held_out"] for s in range(seeds)]),
        "counts": trials[MAIN, 0]["counts"],
        "images": {
            group: [trials[MAIN, s]["scores"][group]["images"] for s in range(seeds)] for group in (SEEN, UNSEEN)
        },
        "held_out": [trials[MAIN, s]["held_out"] for s in range(seeds)],
        "temperatures": {row: [trials[row, s]["temperature"] for s in range(seeds)] for row in (ZERO_SHOT, *FITTED)},
        "projections": [trials[ZERO_SHOT, seed]["projection"] for seed in range(seeds)],
        "evidence": trials[MAIN, 0]["evidence"],
        "best_steps": {row: [trials[row, s]["learnt"].get("best_step") for s in range(seeds)] for row in learnt},
        "bins": {row: _bins([trials[row, s]["scores"][UNSEEN]["bins"] for s in range(seeds)]) for row in drawn},
        "curves": {
            row: np.mean([trials[row, s]["scores"][UNSEEN]["curve"] for s in range(seeds)], axis=0).round(5).tolist()
            for row in drawn
        },
    }


def goals(rows: Mapping[str, Any], styles: Sequence[str]) -> list[dict[str, Any]]:
    """What issue 6 asks for: what was compared, by how much, and how sure that is.

    Args:
        rows: See `summarise`.
        styles: The style that each seed held out.
    """
    found = []
    for group in (SEEN, UNSEEN):
        ours, plain, single = (rows[row][group]["harmonic"] for row in (MAIN, ZERO_SHOT, SINGLE))
        found += [
            _goal(f"harmonic mean above zero-shot, {group}", ours, plain, styles, 1),
            _goal(f"harmonic mean above a single template, {group}", ours, single, styles, 1),
        ]
    ours = rows[MAIN][UNSEEN]
    for row in (ZERO_SHOT, ZERO_SHOT_FITTED, SINGLE_FITTED):
        other = rows[row][UNSEEN]
        for what, figure in (
            ("wrong answers", "auroc_wrong"),
            ("unknown classes", "auroc_unknown"),
            *((f"unknown classes, of {count} asked about,", f"auroc_of_{count}") for count in FEW),
        ):
            for doubt in (MAX_SOFTMAX, ENERGY):
                goal = f"AUROC of u for {what} above {doubt} of {row}"
                found.append(_goal(goal, ours[figure]["u"], other[figure][doubt], styles, 3))
        found.append(_goal(f"expected calibration error below {row}", other["ece"], ours["ece"], styles, 3))
    return found


def _goal(
    what: str, high: Mapping[str, Any], low: Mapping[str, Any], styles: Sequence[str], digits: int
) -> dict[str, Any]:
    """`difference` is above zero where the goal is reached; for `interval` see `_interval`."""
    apart = np.subtract(high["by_seed"], low["by_seed"])
    interval = _interval(apart, styles)
    return {
        "goal": what,
        "digits": digits,
        "interval": interval,
        "difference": round(float(apart.mean()), 4),
        "by_seed": apart.round(4).tolist(),
        "reached": interval is not None and interval[0] > 0,
    }


def _interval(apart: NDArray[np.float64], styles: Sequence[str]) -> list[float] | None:
    """95 % of the mean difference, by Student's t on what seeds of the same held-out style differ by.

    Styles are four and fixed, and differ far more than seeds do. None where no style was held out twice.
    """
    groups = [apart[np.asarray(styles) == style] for style in sorted(set(styles))]
    freedom = len(apart) - len(groups)
    if freedom < 1:
        return None
    variance = sum(float(((own - own.mean()) ** 2).sum()) for own in groups) / freedom
    half = float(student.ppf(0.975, freedom)) * (variance / len(apart)) ** 0.5
    return [round(float(apart.mean()) + side * half, 4) for side in (-1, 1)]


def _figures(scores: list[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {name: _over_seeds([own[name] for own in scores]) for name in PLAIN}
    for name in BY_DOUBT:
        found[name] = {doubt: _over_seeds([own[name][doubt] for own in scores]) for doubt in scores[0][name]}
    # Each seed holds another style out: a style's figure is of the seeds that have it
    found["styles"] = {
        style: [
            round(float(np.mean([own["styles"][style][part] for own in scores if style in own["styles"]])), 3)
            for part in (0, 1)
        ]
        for style in sorted({style for own in scores for style in own["styles"]})
    }
    return found


def _over_seeds(values: list[float]) -> dict[str, Any]:
    spread = round(float(np.std(values, ddof=1)), 5) if len(values) > 1 else None
    return {"mean": round(float(np.mean(values)), 5), "sd": spread, "by_seed": [round(float(v), 5) for v in values]}


def _bins(seeds: list[list[list[Any]]]) -> list[list[Any]]:
    """Bins of all seeds put together: count, mean confidence, accuracy."""
    together: list[list[Any]] = []
    for place in range(len(seeds[0])):
        own = [bins[place] for bins in seeds if bins[place][0]]
        count = sum(one[0] for one in own)
        if not count:
            together.append([0, None, None])
            continue
        means = [round(sum(one[0] * one[part] for one in own) / count, 5) for part in (1, 2)]
        together.append([count, *means])
    return together
