"""Command-line options that several commands share; their values → images, `FitOptions`, `PromptOptions`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from invariclip.calibrate.data.images import PAIRS_BY, ImageRecord, keep, read_images
from invariclip.calibrate.fit import FitOptions
from invariclip.calibrate.projection.estimators import ESTIMATORS
from invariclip.calibrate.prompts.options import PromptOptions
from invariclip.cli.options import TEMPLATE_OPTIONS, prompt_templates
from invariclip.errors import InputError
from invariclip.preprocessing.interventions import CATALOGUE, GROUPS, parse_kinds
from invariclip.preprocessing.prompts import DEFAULT_TEMPLATES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from invariclip.calibrate.projection.candidates import Objective

Command = TypeVar("Command", bound="Callable[..., Any]")

FITTED_SPLITS = ("train", "calibrate")
"""Splits that are used by default where a manifest has them: images marked `test` are for measuring alone."""

TARGET_RISK = click.option(
    "--target-risk", type=float, help="With --cdc: also the uncertainty to abstain above, for this share of errors."
)
MODEL_AND_IMAGES = (
    click.option("--model", default="reference", show_default=True, help="Architecture, folder or hf-hub: id."),
    click.option("--checkpoint", type=click.Path(path_type=Path), help="File with the model's weights."),
    click.option("--tokenizer", metavar="DIR", help="Folder with tokenizer.json, or hf-hub: id; see `export`."),
    click.option(
        "--images",
        "images",
        type=click.Path(path_type=Path),
        help="Manifest (.jsonl, .csv) or environment/class/file folders; the bundled images by default.",
    ),
    click.option(
        "--pairs-by",
        default="auto",
        show_default=True,
        type=click.Choice(PAIRS_BY),
        help="What in folders is one thing: equal file names of a class, all of a class, or as the names look.",
    ),
    click.option("--allow-outside", is_flag=True, help="Accept a manifest's paths outside of its folder."),
    click.option("--environments", help="Use only these, separated by commas."),
    click.option(
        "--split", help="Only these, separated by commas, or `all` [default: train,calibrate if it has splits]."
    ),
)
"""Options of every command that learns from images."""
OUTPUT = (
    click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output."),
    click.option("--quiet", is_flag=True, help="No progress."),
)
FITTING = (
    *MODEL_AND_IMAGES,
    click.option(
        "--interventions",
        default="all",
        show_default=True,
        help=f"none, or with commas of: {', '.join([*GROUPS, *CATALOGUE])}; or a YAML or JSON file.",
    ),
    click.option("--draws", default=2, show_default=True, type=click.IntRange(1), help="Interventions per image."),
    click.option("--estimator", default="auto", show_default=True, type=click.Choice(["auto", *ESTIMATORS])),
    click.option("--rank", default="auto", show_default=True, help="Dimensions to keep."),
    click.option("--strength", default="auto", show_default=True, help="λ of icm and shrinkage."),
    click.option(
        "--objective",
        default="auto",
        show_default=True,
        type=click.Choice(["auto", "zero-shot", "prototypes", "both", "probe"]),
        help="What selection scores; auto is both where the model takes texts.",
    ),
    click.option(
        "--captions/--no-captions", default=None, help="Pair images with their class's caption; both are tried."
    ),
    *TEMPLATE_OPTIONS,
    click.option("--seed", default=0, show_default=True, type=int),
    click.option("--cache", type=click.Path(path_type=Path), help="Folder that keeps embeddings across runs."),
    click.option(
        "--report",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Also write a page about it, FILE.html; with --cdc, FILE.cdc.html about the templates.",
    ),
    *OUTPUT,
)
"""Options that `calibrate` and `build` share."""


def with_options(options: Sequence[Callable[[Command], Command]]) -> Callable[[Command], Command]:
    """A decorator that adds options in the order in which `--help` lists them."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def fit_options(values: Mapping[str, Any]) -> FitOptions:
    """What to fit, from the values of `FITTING`.

    Raises:
        InputError: An option cannot be used.
    """
    objective = "both" if values["objective"] == "auto" else values["objective"]
    return FitOptions(
        interventions=parse_kinds(values["interventions"]),
        draws=values["draws"],
        estimator=values["estimator"],
        rank=_number("--rank", values["rank"], int),
        strength=_number("--strength", values["strength"], float),
        objective=cast("Objective", objective),
        captions=values["captions"],
        templates=templates_from(values),
        seed=values["seed"],
    )


def prompt_options(cdc: bool, target_risk: float | None, values: Mapping[str, Any]) -> PromptOptions | None:
    """Which templates to learn beside a projection, with the prompts and the seed of the command.

    Args:
        cdc: Whether templates are to be learned.
        target_risk: Share of errors to find a threshold for.
        values: Of `FITTING`.

    Raises:
        InputError: A target risk without templates, or out of range.
    """
    if not cdc:
        if target_risk is not None:
            raise InputError("--target-risk is for learned templates, which know how unsure they are; add --cdc")
        return None
    seed = values["seed"]
    return PromptOptions(templates=templates_from(values), target_risk=target_risk, seed=seed, augmentation_seed=seed)


def templates_from(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The hand-written prompts, from the values of `TEMPLATE_OPTIONS`.

    Raises:
        InputError: See `prompt_templates`.
    """
    return prompt_templates(values["templates"], values["templates_file"], values["template_name"]) or DEFAULT_TEMPLATES


def images_from(values: Mapping[str, Any]) -> tuple[list[ImageRecord], str]:
    """The images that the values of `MODEL_AND_IMAGES` name; `test` images only if their split is named.

    Returns:
        The images, and a note about the splits, if there is any.

    Raises:
        InputError: The source cannot be read, or nothing is left.
    """
    source, split, environments = values["images"], values["split"], values["environments"]
    if source is None:
        from invariclip.export.reference import manifest_path

        source = manifest_path()
    images = read_images(source, allow_outside=values["allow_outside"], pairs_by=values["pairs_by"])
    splits, note = None if split in (None, "all") else _names(split or ""), ""
    if split is None and any(image.split for image in images):
        available = {image.split for image in images}
        splits = [name for name in FITTED_SPLITS if name in available]
        if not splits:
            raise InputError(f"{source}: no image has split train or calibrate; name the split with --split")
        note = f"fitting on split {', '.join(splits)}; images of other splits are not touched"
    return keep(images, environments=_names(environments) if environments else None, splits=splits), note


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _number(option: str, text: str, kind: type[int] | type[float]) -> Any:
    if text == "auto":
        return None
    try:
        value = kind(text)
    except ValueError as error:
        raise InputError(f"{option} must be auto or a number, not {text!r}") from error
    if not 0 < value < float("inf"):
        raise InputError(f"{option} must be above zero, not {text}")
    return value
