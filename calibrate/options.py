"""Options as they are typed → what to calibrate on, and how."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from invariclip.calibrate.data.images import ImageRecord, keep, read_images
from invariclip.calibrate.data.names import PAIRS_BY
from invariclip.calibrate.fit import FitOptions
from invariclip.calibrate.projection.estimators import ESTIMATORS
from invariclip.cli.predict_command import TEMPLATE_OPTIONS, prompt_templates
from invariclip.errors import InputError
from invariclip.preprocessing.interventions import CATALOGUE, GROUPS, parse_kinds
from invariclip.preprocessing.prompts import DEFAULT_TEMPLATES

if TYPE_CHECKING:
    from collections.abc import Callable

    from invariclip.calibrate.data.names import PairsBy
    from invariclip.calibrate.projection.scorer import Objective

FITTED_SPLITS = ("train", "calibrate")
"""Splits that are taken where a manifest has that column: images marked `test` are for measuring alone."""

PAIRS_BY_OPTION = click.option(
    "--pairs-by",
    default="auto",
    show_default=True,
    type=click.Choice(PAIRS_BY),
    help="What in folders is one thing: equal file names of a class, all of a class, or as the names look.",
)


def fitting_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `calibrate` and `build` share."""
    options = (
        click.option("--model", default="reference", show_default=True, help="Architecture, folder or hf-hub: id."),
        click.option("--checkpoint", type=click.Path(path_type=Path), help="File with the model's weights."),
        click.option("--tokenizer", metavar="DIR", help="Folder with tokenizer.json, or hf-hub: id; see `export`."),
        click.option(
            "--images",
            "images",
            type=click.Path(path_type=Path),
            help="Manifest (.jsonl, .csv) or environment/class/file folders; the bundled images by default.",
        ),
        PAIRS_BY_OPTION,
        click.option("--allow-outside", is_flag=True, help="Accept a manifest's paths outside of its folder."),
        click.option("--environments", help="Use only these, separated by commas."),
        click.option(
            "--split",
            help="Only these, separated by commas, or `all` [default: train,calibrate if it has splits].",
        ),
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
        click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output."),
        click.option("--quiet", is_flag=True, help="No progress."),
    )
    for option in reversed(options):
        command = option(command)

    @wraps(command)
    def wrapped(**given: Any) -> Any:
        return command(**given)

    return wrapped


def options_of(given: dict[str, Any]) -> FitOptions:
    """What to fit.

    Raises:
        InputError: An option cannot be used.
    """
    templates = prompt_templates(given["templates"], given["templates_file"], given["template_name"])
    objective = "both" if given["objective"] == "auto" else given["objective"]
    return FitOptions(
        interventions=parse_kinds(given["interventions"]),
        draws=given["draws"],
        estimator=given["estimator"],
        rank=_number("--rank", given["rank"], int),
        strength=_number("--strength", given["strength"], float),
        objective=cast("Objective", objective),
        captions=given["captions"],
        templates=templates or DEFAULT_TEMPLATES,
        seed=given["seed"],
    )


def images_of(given: dict[str, Any]) -> tuple[list[ImageRecord], str]:
    """The images that were named, see `choose_images`."""
    names = ("images", "environments", "split", "allow_outside", "pairs_by")
    return choose_images(*(given[name] for name in names))


def choose_images(
    source: Path | None,
    environments: str | None,
    split: str | None,
    allow_outside: bool = False,
    pairs_by: PairsBy = "auto",
) -> tuple[list[ImageRecord], str]:
    """The images to fit on, `test` ones only if they are asked for by name; and what to say of it, if anything.

    Raises:
        InputError: The source cannot be read, or nothing is left.
    """
    if source is None:
        from invariclip.export.reference import manifest_path

        source = manifest_path()
    images = read_images(source, allow_outside=allow_outside, pairs_by=pairs_by)
    splits, told = None if split in (None, "all") else _names(split or ""), ""
    if split is None and any(image.split for image in images):
        have = {image.split for image in images}
        splits = [name for name in FITTED_SPLITS if name in have]
        if not splits:
            raise InputError(f"{source}: no image has split train or calibrate; name the split with --split")
        told = f"fitting on split {', '.join(splits)}; images of other splits are not touched"
    return keep(images, environments=_names(environments) if environments else None, splits=splits), told


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
