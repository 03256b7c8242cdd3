"""`calibrate` fits the projection; `build` goes on to a verified artifact and resumes where it stopped."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from invariclip.backends import DEFAULT_BACKEND, require_backend
from invariclip.calibrate.estimators import ESTIMATORS
from invariclip.calibrate.fit import Calibration, Options
from invariclip.calibrate.fit import calibrate as fit_projection
from invariclip.calibrate.pictures import Picture, keep, read_pictures
from invariclip.calibrate.report import summary_json, summary_text
from invariclip.calibrate.stages import Serving, default_cache, run_build
from invariclip.commands import CLASS_OPTIONS, TEMPLATE_OPTIONS, class_names, prompt_templates
from invariclip.console import bar, emit_json, note, say, silent
from invariclip.errors import InputError
from invariclip.fidelity import LEVELS
from invariclip.interventions import CATALOGUE, GROUPS, parse_kinds
from invariclip.projection import write_projection
from invariclip.prompts import DEFAULT_TEMPLATES

if TYPE_CHECKING:
    from collections.abc import Callable

    from invariclip.calibrate.select import Objective
    from invariclip.export.models.checkpoint import Checkpoint
    from invariclip.fidelity import Fidelity

FITTED_SPLITS = ("train", "calibrate")
"""Splits that are taken where a manifest has that column: pictures marked `test` are for measuring alone."""


def fitting_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `calibrate` and `build` share."""
    options = (
        click.option("--model", default="reference", show_default=True, help="Architecture, folder or hf-hub: id."),
        click.option("--checkpoint", type=click.Path(path_type=Path), help="File with the model's weights."),
        click.option("--tokenizer", metavar="DIR", help="Folder with tokenizer.json, or hf-hub: id; see `export`."),
        click.option(
            "--pictures",
            type=click.Path(path_type=Path),
            help="Manifest (.jsonl, .csv) or environment/class/file folders; the bundled pictures by default.",
        ),
        click.option("--allow-outside", is_flag=True, help="Accept a manifest's paths outside of its folder."),
        click.option("--environments", help="Only these, with commas."),
        click.option("--split", help="Only these, with commas, or `all`; train,calibrate where the manifest says."),
        click.option(
            "--interventions",
            default="all",
            show_default=True,
            help=f"none, or with commas of: {', '.join([*GROUPS, *CATALOGUE])}; or a YAML or JSON file.",
        ),
        click.option(
            "--draws", default=2, show_default=True, type=click.IntRange(1), help="Interventions per picture."
        ),
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
            "--captions/--no-captions", default=None, help="Pair pictures with their class's caption; both are tried."
        ),
        *TEMPLATE_OPTIONS,
        click.option("--seed", default=0, show_default=True, type=int),
        click.option("--cache", type=click.Path(path_type=Path), help="Folder that keeps embeddings across runs."),
        click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output."),
        click.option("--quiet", is_flag=True, help="No progress."),
    )
    for option in reversed(options):
        command = option(command)

    @wraps(command)
    def wrapped(**given: Any) -> Any:
        return command(**given)

    return wrapped


@click.command()
@fitting_options
@click.option("-o", "--out", default=Path("projection.safetensors"), show_default=True, type=click.Path(path_type=Path))
def calibrate(out: Path, as_json: bool, quiet: bool, cache: Path | None, **given: Any) -> None:
    """Fit the invariant projection from pictures of the same things in several environments.

    Estimator, rank and strength are chosen on environments, interventions and concepts that are left out in turn; where
    nothing beats no projection, the identity is written and said.
    """
    checkpoint, pictures, options = prepare(given)
    result = fit_projection(
        checkpoint, pictures, options, cache=cache or default_cache(), progress=silent if quiet else bar
    )
    write_projection(out, result.projection)
    _answer(result, {"projection": str(out)}, as_json)


@click.command()
@fitting_options
@CLASS_OPTIONS[0]
@CLASS_OPTIONS[1]
@click.option("--work", type=click.Path(path_type=Path), help="Folder of finished stages; OUT.work by default.")
@click.option("--backend", "backends", multiple=True, help="As for `export`; repeatable [default: onnxruntime].")
@click.option("--variant", "variants", multiple=True, help="As for `export`; repeatable.")
@click.option(
    "--fidelity", type=click.Choice(LEVELS), default="fast", show_default=True, help="What variants must keep."
)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The artifact, NAME.icm.")
def build(
    out: Path,
    backends: tuple[str, ...],
    variants: tuple[str, ...],
    fidelity: Fidelity,
    work: Path | None,
    classes: str | None,
    classes_file: Path | None,
    as_json: bool,
    quiet: bool,
    cache: Path | None,
    **given: Any,
) -> None:
    """Calibrate, export and verify in one go; run it again to continue where it stopped."""
    names = class_names(classes, classes_file)
    for name in backends:
        require_backend(name)
    if variants:
        from invariclip.export.precision.variants import require_kinds

        require_kinds(variants)
    checkpoint, pictures, options = prepare(given)
    folder = work or out.with_name(out.name + ".work")
    result, facts = run_build(
        checkpoint,
        pictures,
        options,
        out=out,
        work=folder,
        cache=cache or folder / "embeddings",
        classes=names,
        serving=Serving(backends or (DEFAULT_BACKEND,), variants, fidelity),
        progress=silent if quiet else bar,
        tell=note,
    )
    _answer(result, facts, as_json)


def prepare(given: dict[str, Any]) -> tuple[Checkpoint, list[Picture], Options]:
    """Options as they were typed → checkpoint, pictures, and what to fit.

    Raises:
        InputError: An option cannot be used.
        CheckpointError: The checkpoint cannot be loaded.
    """
    kinds = parse_kinds(given["interventions"])
    rank, strength = _number("--rank", given["rank"], int), _number("--strength", given["strength"], float)
    templates = prompt_templates(given["templates"], given["templates_file"], given["template_name"])
    pictures, told = choose_pictures(given["pictures"], given["environments"], given["split"], given["allow_outside"])
    # Torch is loaded only once it is known that there is something to do.
    from invariclip.export.models.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(given["model"], given["checkpoint"], tokenizer=given["tokenizer"])
    objective = "both" if given["objective"] == "auto" else given["objective"]
    options = Options(
        interventions=kinds,
        draws=given["draws"],
        estimator=given["estimator"],
        rank=rank,
        strength=strength,
        objective=cast("Objective", objective),
        captions=given["captions"],
        templates=templates or DEFAULT_TEMPLATES,
        seed=given["seed"],
    )
    # Said only now that nothing can be wrong with the input any more: a mistake gets its own line alone.
    if told:
        note(told)
    return checkpoint, pictures, options


def choose_pictures(
    source: Path | None, environments: str | None, split: str | None, allow_outside: bool = False
) -> tuple[list[Picture], str]:
    """The pictures to fit on, `test` ones only if they are asked for by name; and what to say of it, if anything.

    Raises:
        InputError: The source cannot be read, or nothing is left.
    """
    if source is None:
        from invariclip.export.reference import manifest_path

        source = manifest_path()
    pictures = read_pictures(source, allow_outside=allow_outside)
    splits, told = None if split in (None, "all") else _names(split or ""), ""
    if split is None and any(picture.split for picture in pictures):
        have = {picture.split for picture in pictures}
        splits = [name for name in FITTED_SPLITS if name in have]
        if not splits:
            raise InputError(f"{source}: no picture has split train or calibrate; name the split with --split")
        told = f"fitting on split {', '.join(splits)}; pictures of other splits are not touched"
    return keep(pictures, environments=_names(environments) if environments else None, splits=splits), told


def _answer(result: Calibration, facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        emit_json({**facts, **summary_json(result)})
        return
    say(summary_text(result))
    for name, value in facts.items():
        say(f"{name:<10} {value}")


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
