"""The command `export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from invariclip.commands import class_names
from invariclip.console import bar, emit_json, say, silent
from invariclip.export.options import bounds_of, load, shared
from invariclip.parity import parity_table
from invariclip.projection import read_projection
from invariclip.prompts import DEFAULT_TEMPLATES

if TYPE_CHECKING:
    from invariclip.artifact import Manifest


@click.command()
@click.option("--model", default="reference", show_default=True, help="reference, open_clip name, folder, or hf-hub:…")
@click.option("--projection", type=click.Path(path_type=Path), help="What `invariclip calibrate` wrote.")
@click.option("--classes", help='Classes to bake in: "cat,dog,tree".')
@click.option("--classes-file", type=click.Path(path_type=Path), help="The same, one class per line.")
@click.option("--template", "templates", multiple=True, help='Prompt with one {}: "a sketch of a {}."; repeatable.')
@click.option("--out", "-o", required=True, type=click.Path(path_type=Path), help="The artifact to write: NAME.icm.")
@shared
def export(
    model: str, projection: Path | None, classes: str | None, classes_file: Path | None, templates: tuple[str, ...],
    out: Path, checkpoint: Path | None, random_weights: int | None, images: tuple[Path, ...], min_cosine: float | None,
    max_abs_diff: float | None, threads: int | None, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Write a verified ONNX artifact of a checkpoint."""
    names = class_names(classes, classes_file)
    matrix = None if projection is None else read_projection(projection)
    from invariclip.export.assemble import export_artifact

    loaded = load(model, checkpoint, random_weights, threads)
    manifest = export_artifact(
        loaded,
        out,
        projection=matrix,
        classes=names,
        templates=templates or DEFAULT_TEMPLATES,
        pictures=images or None,
        thresholds=bounds_of(min_cosine, max_abs_diff),
        threads=threads,
        progress=silent if quiet else bar,
    )
    if as_json:
        emit_json({"out": str(out), **manifest.to_json()})
        return
    say(f"{out}: {_summary(manifest)}")
    for variant in manifest.variants.values():
        say()
        say(parity_table(variant.parity))


def _summary(manifest: Manifest) -> str:
    projection = manifest.projection
    folded = "no projection"
    if projection is not None:
        how = f"image {projection.image_fold}, text {projection.text_fold}"
        folded = f"{projection.estimator} {manifest.model.embed_dim} → {projection.rank} ({how})"
    return f"{manifest.model.name}, {folded}, {len(manifest.classes)} classes, space {manifest.space_id}"
