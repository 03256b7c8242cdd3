"""The commands `export` and `verify`."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from invariclip.artifact import checked_path, read_manifest
from invariclip.commands import JSON, QUIET, THREADS, class_names
from invariclip.console import bar, emit_json, note, say, silent
from invariclip.errors import CheckpointError
from invariclip.parity import parity_table
from invariclip.projection import read_projection
from invariclip.prompts import DEFAULT_TEMPLATES

if TYPE_CHECKING:
    from collections.abc import Callable

    from invariclip.artifact import Manifest
    from invariclip.export.checkpoint import Checkpoint
    from invariclip.export.figures import Thresholds

# Torch is imported when a command runs, so that --help is quick; that it is there is asked now, while the command line
# can still answer with the extra to install.
for _package in ("torch", "open_clip", "onnx", "onnxscript"):
    if find_spec(_package) is None:
        raise ModuleNotFoundError(f"No module named {_package!r}", name=_package)


def _shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `export` and `verify` have in common."""
    options = (
        click.option(
            "--checkpoint", type=click.Path(path_type=Path), help="Weights: .safetensors or a tensors-only .pt."
        ),
        click.option("--random-weights", type=int, metavar="SEED", help="Random weights, to look at structure."),
        click.option(
            "--images", multiple=True, type=click.Path(path_type=Path), help="Pictures and folders to verify on."
        ),
        click.option("--min-cosine", type=click.FloatRange(-1, 1), help="Bound of the contract [default: 0.999999]."),
        click.option("--max-abs-diff", type=click.FloatRange(0), help="Bound of the contract [default: 1e-5]."),
        THREADS,
        JSON,
        QUIET,
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.option("--model", default="reference", show_default=True, help="reference, open_clip name, folder, or hf-hub:…")
@click.option("--projection", type=click.Path(path_type=Path), help="What `invariclip calibrate` wrote.")
@click.option("--classes", help='Classes to bake in: "cat,dog,tree".')
@click.option("--classes-file", type=click.Path(path_type=Path), help="The same, one class per line.")
@click.option("--template", "templates", multiple=True, help='Prompt with one {}: "a sketch of a {}."; repeatable.')
@click.option("--out", "-o", required=True, type=click.Path(path_type=Path), help="The artifact to write: NAME.icm.")
@_shared
def export(
    model: str, projection: Path | None, classes: str | None, classes_file: Path | None, templates: tuple[str, ...],
    out: Path, checkpoint: Path | None, random_weights: int | None, images: tuple[Path, ...], min_cosine: float | None,
    max_abs_diff: float | None, threads: int | None, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Write a verified ONNX artifact of a checkpoint."""
    names = class_names(classes, classes_file)
    matrix = None if projection is None else read_projection(projection)
    from invariclip.export.assemble import export_artifact

    loaded = _load(model, checkpoint, random_weights, threads)
    manifest = export_artifact(
        loaded,
        out,
        projection=matrix,
        classes=names,
        templates=templates or DEFAULT_TEMPLATES,
        pictures=images or None,
        thresholds=_bounds(min_cosine, max_abs_diff),
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


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--model", help="The checkpoint's model [default: the one the artifact names].")
@click.option("--projection", type=click.Path(path_type=Path), help="Hold it against another one [default: its own].")
@_shared
def verify(
    artifact: Path, model: str | None, projection: Path | None, checkpoint: Path | None, random_weights: int | None,
    images: tuple[Path, ...], min_cosine: float | None, max_abs_diff: float | None, threads: int | None,
    as_json: bool, quiet: bool,
) -> int:  # fmt: skip
    """Check an artifact against its checkpoint on real pictures; exit code 1 if it fails."""
    manifest = read_manifest(artifact)
    if projection is None and manifest.projection_file is not None:
        projection = checked_path(artifact, manifest.projection_file)
    checked_path(artifact, manifest.tokenizer)
    paths = {
        name: (checked_path(artifact, variant.image), checked_path(artifact, variant.text))
        for name, variant in manifest.variants.items()
    }
    from invariclip.export import evidence
    from invariclip.export.verify import Candidate, check, prepare

    loaded = _load(model or manifest.model.name, checkpoint, random_weights, threads)
    if loaded.sha256 != manifest.model.checkpoint_sha256:
        raise CheckpointError(
            f"{artifact}: was exported from another checkpoint (sha256 {manifest.model.checkpoint_sha256[:12]}…, "
            f"{loaded.source} has {loaded.sha256[:12]}…); name its own with --model and --checkpoint"
        )
    matrix = None if projection is None else read_projection(projection)
    if matrix is not None:
        matrix.require_width(loaded.embed_dim, loaded.name)
    job = prepare(loaded, matrix, manifest.classes, manifest.templates)
    candidates = {name: Candidate.open(*pair, job, threads=threads) for name, pair in paths.items()}
    pictures = evidence.pictures_of(images or None, loaded.pixels)
    pictures.require_readable()
    verdicts = check(candidates, pictures, _bounds(min_cosine, max_abs_diff), progress=silent if quiet else bar)
    broken = [f"{name}: {line}" for name, verdict in verdicts.items() for line in verdict.broken]
    if as_json:
        variants = {name: verdict.parity for name, verdict in verdicts.items()}
        emit_json({"artifact": str(artifact), "passed": not broken, "failures": broken, "variants": variants})
    else:
        for name, verdict in verdicts.items():
            say(f"{artifact}, {name}")
            say(parity_table(verdict.parity))
    # the table is the result and is out already, so the failure is one more line and not an exception
    if broken:
        note(f"invariclip: {artifact} does not answer like its checkpoint: {'; '.join(broken)}")
    return 1 if broken else 0


def _summary(manifest: Manifest) -> str:
    projection = manifest.projection
    folded = "no projection"
    if projection is not None:
        how = f"image {projection.image_fold}, text {projection.text_fold}"
        folded = f"{projection.estimator} {manifest.model.embed_dim} → {projection.rank} ({how})"
    return f"{manifest.model.name}, {folded}, {len(manifest.classes)} classes, space {manifest.space_id}"


def _load(model: str, checkpoint: Path | None, random_weights: int | None, threads: int | None) -> Checkpoint:
    """Loads the checkpoint that the options name.

    Raises:
        CheckpointError: A seed is given beside weights, or what `load_checkpoint` raises.
    """
    from invariclip.export.checkpoint import load_checkpoint

    if checkpoint is not None and random_weights is not None:
        raise CheckpointError("give --checkpoint or --random-weights, not both")
    if random_weights is None:
        return load_checkpoint(model, checkpoint, threads=threads)
    loaded = load_checkpoint(model, threads=threads, allow_random=True, seed=random_weights)
    if not loaded.source.startswith("random weights"):
        raise CheckpointError(f"{model}: has weights of its own ({loaded.source}); leave --random-weights out")
    return loaded


def _bounds(min_cosine: float | None, max_abs_diff: float | None) -> Thresholds:
    """Float32's bounds with the user's own in their place; no option loosens the others."""
    from invariclip.export.figures import FLOAT32

    bounds = FLOAT32 if min_cosine is None else replace(FLOAT32, min_cosine=min_cosine)
    return bounds if max_abs_diff is None else replace(bounds, max_abs_diff=max_abs_diff)
