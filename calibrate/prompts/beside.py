"""Templates learnt along with a projection, for `calibrate --cdc` and `build --cdc`; torch only once it is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import click

from invariclip.artifact.learned_prompts import read_semantics, write_semantics
from invariclip.calibrate.prompts.options import PromptOptions
from invariclip.calibrate.build import served_projection
from invariclip.cli.predict_command import prompt_templates
from invariclip.console import note
from invariclip.errors import InputError
from invariclip.preprocessing.prompts import DEFAULT_TEMPLATES

if TYPE_CHECKING:
    from pathlib import Path

    from invariclip.calibrate.data.encoder import Encoder
    from invariclip.calibrate.data.images import ImageRecord
    from invariclip.calibrate.fit import Calibration
    from invariclip.calibrate.prompts.learn import Learnt
    from invariclip.console import Progress
    from invariclip.export.checkpoints.checkpoint import Checkpoint

TARGET_RISK = click.option(
    "--target-risk", type=float, help="With --cdc: also the uncertainty to abstain above, for this share of errors."
)


def learning_of(wanted: bool, target_risk: float | None, given: dict[str, Any]) -> PromptOptions | None:
    """What to learn besides, with the prompts and the seed of the command.

    Raises:
        InputError: A target risk without templates, or out of range.
    """
    if not wanted:
        if target_risk is not None:
            raise InputError("--target-risk is for learned templates, which know how unsure they are; add --cdc")
        return None
    seed = given["seed"]
    templates = prompt_templates(given["templates"], given["templates_file"], given["template_name"])
    return PromptOptions(
        templates=templates or DEFAULT_TEMPLATES, target_risk=target_risk, seed=seed, augmentation_seed=seed
    )


def write_templates(
    path: Path,
    encoder: Encoder,
    images: list[ImageRecord],
    learning: PromptOptions,
    result: Calibration,
    cache: Path,
    progress: Progress,
    *,
    report: Path | None = None,
) -> dict[str, Any]:
    """Learns in the space of a projection that was just fitted, and writes the file.

    Args:
        path: The file.
        encoder: The checkpoint.
        images: What to learn from.
        learning: What to learn.
        result: The calibration whose projection it is.
        cache: Keeps embeddings, and where the training stands.
        progress: Progress display.
        report: The calibration's page; that of the templates is written beside it. None writes none.

    Returns:
        JSON-ready: where it lies, and what was learnt.
    """
    from invariclip.calibrate.prompts.learn import learn
    from invariclip.calibrate.report.prompts_summary import summary_json

    learnt = learn(cast("Checkpoint", encoder), images, learning, result.projection, cache=cache, progress=progress)
    write_semantics(path, learnt.semantics)
    if learnt.threshold is not None:
        note(learnt.threshold.sentence())
    facts = {"cdc": str(path), "cdc_facts": summary_json(learnt)}
    return facts | _write_beside(report, learnt, learning, images)


def write_page_of(
    templates: Path,
    checkpoint: Checkpoint,
    images: list[ImageRecord],
    learning: PromptOptions,
    result: Calibration,
    cache: Path,
    progress: Progress,
    *,
    report: Path,
) -> dict[str, Any]:
    """Writes the page of templates that `build` has learnt, now or in an earlier run.

    Args:
        templates: Their file.
        checkpoint: As for `write_templates`.
        images: As for `write_templates`.
        learning: As for `write_templates`.
        result: As for `write_templates`.
        cache: The folder that embeddings were kept in.
        progress: Progress display.
        report: The calibration's page; that of the templates is written beside it.

    Returns:
        JSON-ready: where the page lies.
    """
    from invariclip.calibrate.prompts.recall import recall

    projection = served_projection(result)
    semantics = read_semantics(templates)
    learnt = recall(checkpoint, images, learning, semantics, projection, cache=cache, progress=progress)
    return _write_beside(report, learnt, learning, images)


def _write_beside(
    report: Path | None, learnt: Learnt, learning: PromptOptions, images: list[ImageRecord]
) -> dict[str, Any]:
    if report is None:
        return {}
    from invariclip.calibrate.report.prompts_page import page_beside, write_page

    path = page_beside(report)
    write_page(path, learnt, learning, images)
    return {"cdc_report": str(path)}
