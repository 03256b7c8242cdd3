"""The options that commands share, and what they come to."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from invariclip.artifact.projection import read_projection
from invariclip.artifact.signature import REQUIRED
from invariclip.backends import ALL_BACKENDS, DEFAULT_BACKEND
from invariclip.errors import InputError
from invariclip.preprocessing.pixels import PIXEL_MODES
from invariclip.preprocessing.prompts import TEMPLATE_SETS, read_lines, read_templates, template_set
from invariclip.results import UNCERTAINTY_KINDS
from invariclip.sites.site import read_site

if TYPE_CHECKING:
    from collections.abc import Callable

    from invariclip.model import Model
    from invariclip.preprocessing.pixels import PixelMode


def _required(ctx: click.Context, _param: click.Parameter, value: Path | None) -> None:
    """Every artifact that the command and its children read must be signed by one of these keys."""
    if value is None:
        return
    before = os.environ.get(REQUIRED)

    def restore() -> None:
        if before is None:
            os.environ.pop(REQUIRED, None)
        else:
            os.environ[REQUIRED] = before

    os.environ[REQUIRED] = str(value.absolute())
    ctx.call_on_close(restore)


ARTIFACT_PATH = click.argument("artifact", type=click.Path(path_type=Path))
SIGNED = click.option(
    "--require-signature", metavar="KEY.pub.pem", type=click.Path(path_type=Path), expose_value=False, is_eager=True,
    callback=_required, envvar=REQUIRED,
    help="Refuse an artifact that none of these public keys has signed (see `sign`).",
)  # fmt: skip


def artifact_argument(command: Callable[..., Any]) -> Callable[..., Any]:
    """The artifact that a command reads, and whose signature it must carry."""
    return ARTIFACT_PATH(SIGNED(command))


JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
QUIET = click.option("--quiet", is_flag=True, help="No progress bar.")
THREADS = click.option(
    "--threads", type=click.IntRange(min=1), help="Engine threads [default: what this process may use]."
)
BATCH = click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True)
BACKEND = click.option(
    "--backend",
    type=click.Choice(ALL_BACKENDS),
    help=f"The engine [default: what `invariclip tune` chose on this machine, else {DEFAULT_BACKEND}].",
)
PIXEL_MODE = click.option(
    "--pixel-mode",
    type=click.Choice(PIXEL_MODES),
    default="exact",
    show_default=True,
    help="exact equals open_clip's pixels; fast decodes large JPEGs smaller, and is a few levels of 255 off.",
)
OTHER_PROJECTION = click.option(
    "--projection",
    type=click.Path(path_type=Path),
    help="Another projection of the same shape, for artifacts exported with --projection-as-input-initializer.",
)

SITE = click.option(
    "--site",
    type=click.Path(path_type=Path),
    help="The site that the images come from, written by `invariclip adapt`.",
)

UNCERTAINTY_OPTION = click.option(
    "--uncertainty",
    type=click.Choice(UNCERTAINTY_KINDS),
    help="What to tell and abstain by: evidence of learned templates, or energy, which every artifact has "
    "[default: evidence where it can be had].",
)


def number_or_word(_ctx: click.Context, _param: click.Parameter, value: str | None) -> float | str | None:
    """An option's value: a number as one; `threshold` refuses other words than `calibrated`."""
    try:
        return None if value is None else float(value)
    except ValueError:
        return value


CLASS_OPTIONS = (
    click.option("--classes", help='Class names: "cat,dog,tree".'),
    click.option("--classes-file", type=click.Path(path_type=Path), help="The same, one class per line."),
)
TEMPLATE_OPTIONS = (
    click.option("--template", "templates", multiple=True, help='Prompt with one {}: "a sketch of a {}."; repeatable.'),
    click.option(
        "--templates-file", type=click.Path(path_type=Path), help="Prompts, one per line; # begins a comment."
    ),
    click.option("--templates", "template_name", help=f"Prompts by name: {', '.join(TEMPLATE_SETS)}."),
)


def zero_shot_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that name classes and their prompts: see `class_names` and `prompt_templates`."""
    for option in reversed(CLASS_OPTIONS + TEMPLATE_OPTIONS):
        command = option(command)
    return command


def class_names(classes: str | None, classes_file: Path | None) -> tuple[str, ...]:
    """Class names from `--classes "a,b"` or from a text file with one per line.

    Raises:
        InputError: Both are given, the file cannot be read, or none is named.
    """
    if classes is not None and classes_file is not None:
        raise InputError("give --classes or --classes-file, not both")
    if classes_file is not None:
        return read_lines(classes_file, "classes")
    if classes is None:
        return ()
    names = tuple(name.strip() for name in classes.split(",") if name.strip())
    if not names:
        raise InputError(f'--classes {classes!r}: names no class; write "cat,dog", or leave it out')
    return names


def prompt_templates(
    templates: tuple[str, ...], templates_file: Path | None, template_name: str | None
) -> tuple[str, ...]:
    """Prompt templates from `--template`, `--templates-file` or `--templates`; empty where none is given.

    Raises:
        InputError: More than one of them is given, the file holds a wrong one, or no set has the name.
    """
    if sum((bool(templates), templates_file is not None, template_name is not None)) > 1:
        raise InputError("give one of --template, --templates-file and --templates")
    if templates_file is not None:
        return read_templates(templates_file)
    return templates if template_name is None else template_set(template_name)


def open_model(
    artifact: Path, projection: Path | None, backend: str | None, threads: int | None, pixel_mode: PixelMode,
    site: Path | None = None,
) -> Model:  # fmt: skip
    """The artifact as the options say, with another projection and for a site where they are named."""
    from invariclip.loading import load

    other = None if projection is None else read_projection(projection)
    place = None if site is None else read_site(site)
    model = load(artifact, backend=backend, threads=threads, pixel_mode=pixel_mode)
    model = model if other is None else model.with_projection(other)
    return model if place is None else model.with_site(place)
