"""The command `verify`."""

from __future__ import annotations

from pathlib import Path

import click

from invariclip.artifact import checked_path, read_manifest
from invariclip.console import bar, emit_json, note, say, silent
from invariclip.errors import CheckpointError
from invariclip.export.options import bounds_of, load, shared
from invariclip.parity import parity_table
from invariclip.projection import read_projection


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--model", help="The checkpoint's model [default: the one the artifact names].")
@click.option("--projection", type=click.Path(path_type=Path), help="Hold it against another one [default: its own].")
@shared
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

    loaded = load(model or manifest.model.name, checkpoint, random_weights, threads)
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
    verdicts = check(candidates, pictures, bounds_of(min_cosine, max_abs_diff), progress=silent if quiet else bar)
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
