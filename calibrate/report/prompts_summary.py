"""What was learnt, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from invariclip.console import table

if TYPE_CHECKING:
    from invariclip.calibrate.prompts.learn import Learnt


def summary_text(result: Learnt) -> str:
    """What was learnt from, how far training went, how sure answers are, and the threshold."""
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
    lines += ["", _scores(facts["scores"]), ""]
    if result.threshold is not None:
        lines.append(f"threshold  {result.threshold.sentence()}")
    return "\n".join(lines)


def summary_json(result: Learnt) -> dict[str, Any]:
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


def _scores(scores: dict[str, Any]) -> str:
    rows = []
    for name in ("hand-written", "cdc"):
        own = scores[name]
        apart = "–" if own["auroc_wrong"] is None else f"{own['auroc_wrong']:.3f}"
        rows.append([name, f"{own['accuracy']:.1f} %", f"{own['ece']:.3f}", apart, f"{own['aurc']:.3f}"])
    which = "held-back images" if scores["on"] == "held" else "validation images, which the evidence was fitted on"
    header = [f"{scores['images']} {which}", "top-1", "ECE", "AUROC wrong", "AURC"]
    return table(header, rows)
