"""A calibration, and learned prompts, in words: a short table for people, the same as JSON for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from invariclip.calibrate.data.problems import ProblemCounts
from invariclip.calibrate.projection.diagnostics import few
from invariclip.console import table

if TYPE_CHECKING:
    from invariclip.calibrate.fit import Calibration
    from invariclip.calibrate.projection.bootstrap import AccuracyInterval
    from invariclip.calibrate.projection.selection import Selection
    from invariclip.calibrate.prompts.learn import LearnedResult


def prompts_text(result: LearnedResult) -> str:
    """What was learned from, how far training went, how sure answers are, and the threshold."""
    facts, semantics = result.facts, result.semantics
    environments = ", ".join(f"{name} {count}" for name, count in facts["environments"].items())
    lines = [
        f"images   {facts['images']} of {facts['classes']} classes ({environments})",
        f"split      {facts['train']} to learn from, {facts['validation']} to validate, {facts['held']} held back",
        f"templates  {semantics.learned} learned, {semantics.context_tokens} vectors each, beside "
        f"{', '.join(repr(template) for template in semantics.templates[:2])}"
        + (f" and {len(semantics.templates) - 2} more" if len(semantics.templates) > 2 else ""),
        f"training   {course(facts)}",
    ]
    if facts["declined"]:
        counts = ", ".join(f"{label} {count}" for label, count in facts["declined"].items())
        lines.append(f"declined   augmentations that did not apply, the image taken as it is: {counts}")
    if facts["skipped"]:
        lines.append(f"problem    {len(facts['skipped'])} images left out; the first: {facts['skipped'][0]}")
    lines += ["", _prompts_scores(facts["scores"]), ""]
    if result.threshold is not None:
        lines.append(f"threshold  {result.threshold.sentence()}")
    return "\n".join(lines)


def prompts_json(result: LearnedResult) -> dict[str, Any]:
    """The same, JSON-ready."""
    semantics = result.semantics
    return {
        "learned": semantics.learned,
        "context_tokens": semantics.context_tokens,
        "evidence_scale": semantics.evidence_scale.tolist(),
        "evidence_bias": semantics.evidence_bias.tolist(),
        "background": semantics.background.tolist(),
        "sha256": semantics.digest,
        "facts": result.facts,
    }


def course(facts: dict[str, Any]) -> str:
    """How far training went, in words."""
    losses = dict(map(tuple, facts["curve"]))
    start, best = losses[0], losses[facts["best_step"]]
    if facts["best_step"] == 0:
        return (
            f"{facts['steps']} steps made validation loss no better than the start's {start:.3f}: the templates are "
            "the hand-written words with noise; more images, or a smaller --rate, may help"
        )
    return f"{facts['steps']} steps, best at {facts['best_step']}: validation loss {start:.3f} → {best:.3f}"


def _prompts_scores(scores: dict[str, Any]) -> str:
    rows = []
    for name in ("hand-written", "cdc"):
        own = scores[name]
        apart = "–" if own["auroc_wrong"] is None else f"{own['auroc_wrong']:.3f}"
        rows.append([name, f"{own['accuracy']:.1f} %", f"{own['ece']:.3f}", apart, f"{own['aurc']:.3f}"])
    which = "held-back images" if scores["on"] == "held" else "validation images, which the evidence was fitted on"
    header = [f"{scores['images']} {which}", "top-1", "ECE", "AUROC wrong", "AURC"]
    return table(header, rows)


def projection_text(result: Calibration) -> str:
    """Whether it helps, what was fitted on, what was chosen, and how it did on what was left out."""
    facts, projection = result.facts, result.projection
    lines = _verdict(result.selection) if result.selection else []
    lines += _sources(facts) if "sources" in facts else _images(facts)
    strength = "" if projection.strength is None else f", λ = {projection.strength:g}"
    lines.append(f"projection {projection.estimator}{strength}, {projection.rank} of {projection.embed_dim} dimensions")
    if projection.estimator != "identity":
        lines += [
            f"keeps      {facts['kept_variation']:.0%} of what varies between images, "
            f"{facts['kept_movement']:.0%} of what environments and interventions move",
            f"spectrum   {_spectrum(facts['spectrum'])}",
            *_sureness(facts, projection.embed_dim, projection.rank),
        ]
    if result.selection:
        lines += [*_asked(result.selection), "", _scores(result.selection), ""]
    return "\n".join(lines)


def _images(facts: dict[str, Any]) -> list[str]:
    """What was fitted on, where it was images."""
    environments = ", ".join(f"{name} {count}" for name, count in facts["environments"].items())
    lines = [
        f"images   {facts['images']} of {facts['concepts']} concepts ({environments})",
        f"pairs      {facts['natural_pairs']} natural, {facts['interventional_pairs']} interventional, "
        f"{facts['caption_pairs']} with captions",
    ]
    lines += [f"problem    {line}" for line in ProblemCounts.from_json(facts["problems"]).lines()]
    if facts["declined"]:
        counts = ", ".join(f"{label} {count}" for label, count in facts["declined"].items())
        lines.append(f"declined   interventions that did not apply to an image: {counts}")
    return lines


def _sources(facts: dict[str, Any]) -> list[str]:
    """What was fitted on, where it was collected from sources."""
    lines = [f"shards     {facts['shards']:,}"]
    for source, counts in facts["sources"].items():
        listing = ", ".join(f"{number:,} {part}" for part, number in counts.items())
        weight = facts["weights"].get(source, 1.0)
        lines.append(f"source     {source}: {listing}" + (f", weight {weight:g}" if weight != 1 else ""))
    for source, plain in facts["left_out"].items():
        lines += [f"problem    {source}: {line}" for line in ProblemCounts.from_json(plain).lines()]
    return lines


def projection_json(result: Calibration) -> dict[str, Any]:
    """The same, JSON-ready, with the whole selection curve."""
    projection = result.projection
    return {
        "estimator": projection.estimator,
        "strength": projection.strength,
        "rank": projection.rank,
        "embed_dim": projection.embed_dim,
        "sha256": projection.digest,
        "facts": result.facts,
        "selection": result.selection.to_json() if result.selection else None,
    }


def _verdict(selection: Selection) -> list[str]:
    """Whether the projection is worth having, before any figure that needs explaining."""
    chosen = selection.result()
    if chosen.candidate.estimator == "identity":
        return ["verdict    no projection is clearly better than none: what is written changes no answer"]
    gain = chosen.gain
    sure = "better" if gain.low > 0 else ("WORSE" if gain.high < 0 else "NOT clearly better")
    line = f"verdict    {sure} than no projection: {_points(gain)} points of accuracy on what the fit did not see"
    return [f"{line} (95 % interval)"]


def _asked(selection: Selection) -> list[str]:
    """How it was chosen."""
    chosen = selection.result()
    lines = [
        f"left out   {selection.left_out}",
        f"scored     {selection.objective} on {selection.queries} images, {len(selection.curve)} candidates",
    ]
    if selection.screened:
        few = f"{len(selection.screened)} others were dropped after a few folds, the best of them"
        lines.append(f"screened   {few} {-max(selection.screened.values()):.1f} points behind")
    if selection.separations:
        lines.append(f"chosen     the clearest answers of {len(selection.separations)} equally good candidates")
    if chosen.candidate.estimator != "identity":
        lines += _by_concept(selection)
    return lines


def _by_concept(selection: Selection) -> list[str]:
    """The gain apart for things that were fitted and things that were not."""
    gains = selection.by_concept
    if gains is None:
        return []
    fitted = _points(gains.fitted)
    if gains.unfitted is None:
        return [f"concepts   {fitted} on concepts that were fitted; too few to leave any out, so not known of others"]
    return [
        f"concepts   {_points(gains.unfitted)} on concepts that were not fitted, which is the verdict's gain; "
        f"{fitted} on concepts that were"
    ]


def _scores(selection: Selection) -> str:
    """Before and after, for everything that was left out; the figures that selection itself looked at."""
    before, after = selection.baseline(), selection.result()
    rows = [
        [name, f"{old.value:.1f}", f"{new.value:.1f}", f"{new.value - old.value:+.1f}"]
        for (name, old), new in zip(before.accuracy.items(), after.accuracy.values(), strict=True)
    ]
    return table(["left out", "none %", "chosen %", "gain"], rows)


def _points(gain: AccuracyInterval) -> str:
    return f"{gain.value:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}]"


def _spectrum(quantiles: list[float]) -> str:
    highest, *inner, lowest = quantiles
    return f"highest {highest:.3g}, quartiles {' / '.join(f'{value:.3g}' for value in inner)}, lowest {lowest:.3g}"


def _sureness(facts: dict[str, Any], width: int, rank: int) -> list[str]:
    """How sure the fit is, and whether it is from little data."""
    lines = []
    sure = facts["confidence"]
    if sure is None:
        lines.append("sure       not known: too few concepts for resamples, or nothing is cut")
    elif rank < width:
        lines.append(
            f"sure       to {_angle(sure['mean_angle'])} of the kept subspace on average, to "
            f"{_angle(sure['largest_angle'])} along its worst direction"
        )
    else:
        deviation = sure["deviation"]
        lines.append(
            f"sure       to {_angle(sure['mean_angle'])} on average of the {sure['rank']} directions that move most; "
            f"similarities to {deviation['median']:.0%} (95 %: {deviation['high']:.0%})"
        )
    if few(facts, width):
        points, pairs = facts["sigma"], facts["sigma_delta"]
        done = f"{facts['mixed']:.0%} of both moments is an identity" if facts["mixed"] else "moments are as they were"
        lines.append(
            f"few data   as good as {points['effective']:.0f} independent images and {pairs['effective']:.0f} pairs "
            f"in {width} dimensions, {points['identity']:.0%} and {pairs['identity']:.0%} noise (Ledoit-Wolf); {done}"
        )
    return lines


def _angle(spread: dict[str, float]) -> str:
    return f"{spread['median']:.0f}° (95 %: {spread['high']:.0f}°)"
