"""`python -m invariclip.bench.studies.cdc`: the table of CDC on the multi-style image set; writes docs/cdc.md."""

from __future__ import annotations

from functools import cache as once
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from invariclip.bench.studies.cdc.trial import COMPARED, ROWS
from invariclip.bench.studies.pages import write_result
from invariclip.bench.studies.trials import bound_blas
from invariclip.calibrate.data.images import read_images
from invariclip.cli.main import run_command
from invariclip.console import bar, note
from invariclip.files import sha256_file

if TYPE_CHECKING:
    from invariclip.bench.studies.cdc.trial import CdcWorld
    from invariclip.bench.studies.encoders import Precision

DATA = Path("build/stylebench")


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=DATA, show_default=True, help="The built image set.")
@click.option("--model", default="reference", show_default=True,
              help="As `calibrate --model`; its image tower has to be a trunk with a linear head.")  # fmt: skip
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="How many, counted from 0.")
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), default="bfloat16", show_default=True,
              help="Of the image trunk.")  # fmt: skip
@click.option("--ablations/--no-ablations", default=True, show_default=True, help="Rows with parts left out, too.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/cdc"), show_default=True,
              help="Keeps embeddings, trainings and scores: an interrupted run goes on from there.")  # fmt: skip
@click.option("--features", type=click.Path(path_type=Path), default=Path("build/features"), show_default=True,
              help="Keeps the trunk's features, whatever the checkpoint's head and texts.")  # fmt: skip
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The page; .json and .svg too.")
def main(
    data: Path, model: str, seeds: int, precision: str, ablations: bool, work: Path, features: Path, out: Path
) -> None:
    """Learns every row of the table under every seed, scores it, and writes the page."""
    from invariclip.bench.studies.cdc.report import plot, render, summarise
    from invariclip.bench.studies.cdc.trial import make_world, run_trial
    from invariclip.bench.studies.encoders import Quick
    from invariclip.export.checkpoints.checkpoint import load_checkpoint

    bound_blas()
    manifest = data / "manifest.jsonl"
    images = read_images(manifest)
    checkpoint = load_checkpoint(model)
    encoder = Quick(checkpoint, cast("Precision", precision), features)
    embeddings = work / "embeddings"

    @once
    def world(seed: int) -> CdcWorld:
        note(f"seed {seed}: classes, projection, embeddings")
        return make_world(encoder, images, seed, embeddings, bar)

    key = {"images": encoder.sha256, "manifest": sha256_file(manifest)}
    trials = {}
    for seed in range(seeds):
        for row in ROWS if ablations else COMPARED:
            note(f"seed {seed}: {row}")
            trials[row, seed] = run_trial(
                row, seed, key, partial(world, seed), (checkpoint, encoder), work / "trials", embeddings, bar
            )
    result = summarise(trials, seeds) | {
        "model": checkpoint.name,
        "checkpoint_sha256": checkpoint.sha256,
        "manifest_sha256": key["manifest"],
        "precision": precision,
    }
    write_result(out, result, render(result, out.with_suffix(".svg").name), plot(result))


if __name__ == "__main__":
    run_command(main)
