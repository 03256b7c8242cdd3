"""The commands `inspect` and `predict`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from invariclip.artifact.folder import checked_path, read_manifest
from invariclip.artifact.parity import parity_table
from invariclip.cli.options import (
    BACKEND,
    BATCH,
    JSON,
    OTHER_PROJECTION,
    PIXEL_MODE,
    QUIET,
    SITE,
    THREADS,
    UNCERTAINTY_OPTION,
    artifact_argument,
    class_names,
    number_or_word,
    open_model,
    prompt_templates,
    zero_shot_options,
)
from invariclip.console import UnreadableImages, bar, emit_json, note, say, silent, table
from invariclip.errors import InputError
from invariclip.preprocessing.find import find_images
from invariclip.profile import OBJECTIVES
from invariclip.results import CALIBRATED, EVIDENCE, threshold, uncertainty_kind
from invariclip.selection import profile_of

if TYPE_CHECKING:
    from invariclip.artifact.manifest import Manifest
    from invariclip.preprocessing.pixels import PixelMode
    from invariclip.results import AbstainAbove, Prediction, UncertaintyKind


@click.command()
@artifact_argument
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


@click.command()
@artifact_argument
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
    # JSON has it always; in words an energy that nobody asked for is a number that explains nothing
    told = kind == EVIDENCE or uncertainty is not None or limit is not None
    bad = UnreadableImages()
    paths = find_images(images)
    shown = progress(paths, total=len(paths), desc="images")
    for answer in model.stream(shown, batch_size=batch_size, unreadable=bad):
        prediction = answer.prediction(top_k, abstain_above=limit, uncertainty=kind)
        results.append({"image": str(answer.image), **prediction.to_json()})
        if not as_json:
            say(f"{answer.image}  {_in_words(prediction, told=told)}")
    if as_json:
        emit_json({"engine": model.describe(), "space_id": model.space_id, "predictions": results, **bad.facts()})
    return 2 if bad.count else 0


def _in_words(prediction: Prediction, *, told: bool) -> str:
    words = [f"{label} {share:.1%}" for label, share in prediction.ranking]
    if prediction.uncertainty is not None and told:
        # An energy is no share of anything, and differs in its later digits
        evidence = prediction.uncertainty_kind == EVIDENCE
        words.append(f"unsure {prediction.uncertainty:.1%}" if evidence else f"energy {prediction.uncertainty:.4f}")
    return "  ".join(["not sure:" if prediction.abstained else "", *words]).strip()
