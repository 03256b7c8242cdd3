"""The commands that need the lean runtime alone: inspect, predict; and the options that commands share."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from invariclip.artifact.folder import checked_path, read_manifest
from invariclip.artifact.parity import parity_table
from invariclip.artifact.projection import read_projection
from invariclip.backends import ALL_BACKENDS, DEFAULT_BACKEND
from invariclip.console import UnreadableImages, bar, emit_json, note, say, silent, table
from invariclip.errors import InputError
from invariclip.preprocessing.find import find_images
from invariclip.preprocessing.pixels import PIXEL_MODES
from invariclip.preprocessing.prompts import TEMPLATE_SETS, read_lines, read_templates, template_set
from invariclip.profile import OBJECTIVES
from invariclip.results import CALIBRATED, EVIDENCE, UNCERTAINTY_KINDS, threshold, uncertainty_kind
from invariclip.selection import profile_of
from invariclip.sites.site import read_site

if TYPE_CHECKING:
    from collections.abc import Callable

    from invariclip.artifact.manifest import Manifest
    from invariclip.model import Model
    from invariclip.preprocessing.pixels import PixelMode
    from invariclip.results import AbstainAbove, Prediction, UncertaintyKind

ARTIFACT = click.argument("artifact", type=click.Path(path_type=Path))
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


@click.command()
@ARTIFACT
@click.option("--plan", is_flag=True, help="Show which exact rewrites its graphs went through, and why not others.")
@JSON
def inspect(artifact: Path, plan: bool, as_json: bool) -> None:
    """Show what an artifact is and what it was proved to do; every file's digest is checked."""
    manifest = read_manifest(artifact)
    entries = manifest.files
    for entry in entries:
        checked_path(artifact, entry)
    if as_json:
        emit_json(manifest.to_json()["plan"] if plan else {**manifest.to_json(), "tuned": _tuned(artifact, manifest)})
        return
    if plan:
        rows = [
            [tower, step.name, "applied" if step.applied else "not applied", step.detail]
            for tower, steps in manifest.plan.items()
            for step in steps
        ]
        say(table(["tower", "rewrite", "", "what it did, or why not"], rows))
        return
    tuned = [
        [f"tuned for {objective}", f"{choice['variant']} on {choice['backend']}, {choice['profile']}"]
        for objective, choice in _tuned(artifact, manifest).items()
    ]
    say(table(["what", "value"], [*_facts(manifest), *tuned]))
    say()
    say(table(["file", "bytes", "sha256"], [[e.path, f"{e.size_bytes:,}", e.sha256[:16]] for e in entries]))
    for name, variant in manifest.variants.items():
        for backend, record in variant.parity.items():
            figures = parity_table(record)
            say(f"\nparity of {name} on {backend} with {record.get('reference')}, as proved at export:\n{figures}")


def _tuned(artifact: Path, manifest: Manifest) -> dict[str, dict[str, Any]]:
    """By objective what this machine's profile lets `load` open, and where it says so."""
    found = {objective: profile_of(artifact, manifest, objective=objective) for objective in OBJECTIVES}
    return {
        objective: {**asdict(one[1].choice), "fidelity": one[1].basis.fidelity, "profile": one[0].name}
        for objective, one in found.items()
        if one is not None
    }


def _facts(manifest: Manifest) -> list[list[str]]:
    projection = manifest.projection
    folded = "none"
    if projection:
        strength = "" if projection.strength is None else f", λ = {projection.strength:g}"
        folded = (
            f"{projection.estimator}, {manifest.model.embed_dim} → {projection.rank}{strength} "
            f"(image {projection.image_fold}, text {projection.text_fold})"
        )
    size = "x".join(map(str, manifest.pixels.image_size))
    classes = f"{len(manifest.classes)}: {', '.join(manifest.classes[:8])}{' …' if len(manifest.classes) > 8 else ''}"
    return [
        ["model", manifest.model.name],
        ["checkpoint sha256", manifest.model.checkpoint_sha256],
        ["projection", folded],
        *_learned(manifest),
        *_adapted(manifest),
        ["embedding space", manifest.space_id],
        ["logit_scale", f"{manifest.model.logit_scale:g}"],
        ["pixels", f"{size}, {manifest.pixels.interpolation}, {manifest.pixels.resize_mode}"],
        ["context_length", str(manifest.text.context_length)],
        ["classes", classes if manifest.classes else "none"],
        ["templates", " | ".join(manifest.templates)],
        ["variants", ", ".join(manifest.variants)],
        ["opset", str(manifest.opset)],
        ["made by", ", ".join(f"{name} {version}" for name, version in manifest.producer.items())],
    ]


def _learned(manifest: Manifest) -> list[list[str]]:
    learned = manifest.cdc
    if learned is None:
        return []
    limit = "not calibrated" if learned.abstain_above is None else f"calibrated to {learned.abstain_above:g}"
    numbers = zip(learned.evidence_scale, learned.evidence_bias, learned.background, strict=True)
    return [
        ["learned templates", f"{learned.learned} of {learned.context_tokens} vectors, sha256 {learned.sha256[:16]}"],
        ["evidence", "; ".join(f"scale {a:.3g}, bias {c:+.3g}, background {r:.3g}" for a, c, r in numbers)],
        ["abstains above", limit],
    ]


def _adapted(manifest: Manifest) -> list[list[str]]:
    site = manifest.site
    if site is None:
        return []
    return [["adapted to", f"{site.name}: {site.images} images of about {site.kinds:.0f} kinds, {site.weight:.0%}"]]


UNCERTAINTY_OPTION = click.option(
    "--uncertainty",
    type=click.Choice(UNCERTAINTY_KINDS),
    help="What to tell and abstain by: evidence of learned templates, or energy, which every artifact has "
    "[default: evidence where it can be had].",
)


@click.command()
@ARTIFACT
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@zero_shot_options
@OTHER_PROJECTION
@SITE
@click.option("--top-k", type=click.IntRange(min=1), default=3, show_default=True)
@click.option(
    "--abstain-above",
    metavar="U",
    callback=number_or_word,
    help=f"Give no label where the uncertainty is above this, from 0 to 1, or {CALIBRATED}.",
)
@UNCERTAINTY_OPTION
@BATCH
@PIXEL_MODE
@BACKEND
@THREADS
@JSON
@QUIET
def predict(
    artifact: Path, images: tuple[Path, ...], classes: str | None, classes_file: Path | None,
    templates: tuple[str, ...], templates_file: Path | None, template_name: str | None, projection: Path | None,
    site: Path | None, top_k: int, abstain_above: AbstainAbove, uncertainty: UncertaintyKind | None, batch_size: int,
    pixel_mode: PixelMode, backend: str | None, threads: int | None, as_json: bool, quiet: bool,
) -> int:  # fmt: skip
    """Classify images (files or folders). Unreadable ones are named, and make the exit code 2."""
    names = class_names(classes, classes_file)
    prompts = prompt_templates(templates, templates_file, template_name)
    progress = silent if quiet or as_json else bar
    model = open_model(artifact, projection, backend, threads, pixel_mode, site)
    kind = uncertainty_kind(model.manifest.cdc, uncertainty)
    limit = threshold(model.manifest.cdc, abstain_above, kind)
    names = names or model.classes
    # Other prompts or another projection give the artifact's own classes other embeddings
    if names and (names != model.classes or prompts or projection is not None):
        model = model.with_classes(names, prompts or None, progress=progress)
    if not model.classes:
        raise InputError(f"{artifact}: has no classes; give --classes or --classes-file")
    if len(model.classes) == 1 and model.manifest.model.logit_bias is None:
        note("invariclip: warning: one class only, so every image is answered with it; commas part --classes")
    results: list[dict[str, Any]] = []

    bad = UnreadableImages()
    paths = find_images(images)
    shown = progress(paths, total=len(paths), desc="images")
    for answer in model.stream(shown, batch_size=batch_size, unreadable=bad):
        prediction = answer.prediction(top_k, abstain_above=limit, uncertainty=kind)
        results.append({"image": str(answer.image), **prediction.to_json()})
        if not as_json:
            say(f"{answer.image}  {_in_words(prediction)}")
    if as_json:
        emit_json({"engine": model.describe(), "space_id": model.space_id, "predictions": results, **bad.facts()})
    return 2 if bad.count else 0


def _in_words(prediction: Prediction) -> str:
    words = [f"{label} {share:.1%}" for label, share in prediction.ranking]
    if prediction.uncertainty is not None:
        # An energy is no share of anything, and differs in its later digits
        evidence = prediction.uncertainty_kind == EVIDENCE
        words.append(f"unsure {prediction.uncertainty:.1%}" if evidence else f"energy {prediction.uncertainty:.4f}")
    return "  ".join(["not sure:" if prediction.abstained else "", *words]).strip()


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
