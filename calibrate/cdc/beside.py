"""Templates learnt along with a projection, for `calibrate --cdc` and `build --cdc`; torch only once it is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import click

from invariclip.calibrate.cdc.options import Options
from invariclip.commands import prompt_templates
from invariclip.console import note
from invariclip.errors import InputError
from invariclip.prompts import DEFAULT_TEMPLATES
from invariclip.semantics import write_semantics

if TYPE_CHECKING:
    from pathlib import Path

    from invariclip.calibrate.embed import Encoder
    from invariclip.calibrate.fit import Calibration
    from invariclip.calibrate.pictures import Picture
    from invariclip.console import Progress
    from invariclip.export.models.checkpoint import Checkpoint

TARGET_RISK = click.option(
    "--target-risk", type=float, help="With --cdc: also the uncertainty to abstain above, for this share of errors."
)


def learning_of(wanted: bool, target_risk: float | None, given: dict[str, Any]) -> Options | None:
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
    return Options(templates=templates or DEFAULT_TEMPLATES, target_risk=target_risk, seed=seed, augmentation_seed=seed)


def write_templates(
    path: Path,
    encoder: Encoder,
    pictures: list[Picture],
    learning: Options,
    result: Calibration,
    cache: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Learns in the space of a projection that was just fitted, and writes the file.

    Returns:
        JSON-ready: where it lies, and what was learnt.
    """
    from invariclip.calibrate.cdc.learn import learn
    from invariclip.calibrate.cdc.summary import summary_json

    learnt = learn(cast("Checkpoint", encoder), pictures, learning, result.projection, cache=cache, progress=progress)
    write_semantics(path, learnt.semantics)
    if learnt.threshold is not None:
        note(learnt.threshold.sentence())
    return {"cdc": str(path), "cdc_facts": summary_json(learnt)}
