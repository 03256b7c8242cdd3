"""`python -m invariclip.bench.studies.domains PACS` fits on all environments but one and scores on that one."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from invariclip.bench.studies.domains.report import plot, render, summarise
from invariclip.bench.studies.domains.trial import TrialSettings, run_trial
from invariclip.bench.studies.encoders import Precision, load_encoder
from invariclip.bench.studies.pages import write_result
from invariclip.bench.studies.trials import bound_blas
from invariclip.calibrate.data.domainbed import find_layout, read_layout
from invariclip.cli.main import run_command
from invariclip.console import bar, note, silent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from invariclip.calibrate.data.images import ImageRecord


@click.command()
@click.argument("name")
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared/data"), show_default=True,
              help="The set's folder, or the one that holds it.")  # fmt: skip
@click.option("--encoder", default="reference", show_default=True, help="As `calibrate --model`.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Weights of an encoder that needs some.")
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), default="bfloat16", show_default=True,
              help="Of the image trunk; bfloat16 needs one with a linear head.")  # fmt: skip
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="How many, counted from 0.")
@click.option("--draws", type=click.IntRange(1), default=TrialSettings().draws, show_default=True,
              help="Changed versions of every image.")  # fmt: skip
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/domains"), show_default=True,
              help="Keeps trials and selections: an interrupted run goes on from there.")  # fmt: skip
@click.option("--features", type=click.Path(path_type=Path), default=Path("build/features"), show_default=True,
              help="Keeps embeddings, or a trunk's features, which serve every head.")  # fmt: skip
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("docs/domains.md"), show_default=True,
              help="The page; .json and .svg too.")  # fmt: skip
@click.option("--quiet", is_flag=True, help="No progress.")
def main(
    name: str,
    data: Path,
    encoder: str,
    checkpoint: Path | None,
    precision: str,
    seeds: int,
    draws: int,
    work: Path,
    features: Path,
    out: Path,
    quiet: bool,
) -> None:
    """Scores every projection on each environment of the set NAME, unseen in fitting and in selection."""
    bound_blas()
    layout = find_layout(name)
    images = read_layout(layout, data)
    loaded = load_encoder(encoder, checkpoint=checkpoint, precision=cast("Precision", precision))
    settings = TrialSettings(draws=draws)
    trials = []
    for seed in range(seeds):
        for test in layout.environments:
            if not quiet:
                note(f"{layout.name}: {test} unseen, seed {seed}")
            trials.append(
                run_trial(
                    loaded,
                    images,
                    test,
                    seed,
                    settings,
                    folder=work / "trials",
                    cache=features,
                    progress=silent if quiet else bar,
                )
            )
    result = {
        "set": layout.name,
        "images": _counts(images),
        "classes": layout.class_count,
        "encoder": {"name": encoder, "sha256": loaded.sha256, "precision": precision, "width": loaded.embed_dim},
        "settings": asdict(settings),
        "seeds": seeds,
        "skipped": sorted({reason for trial in trials for reason in trial["images"]["skipped"]}),
        **summarise(trials),
        "curves": [
            {key: trial[key] for key in ("test", "seed", "selections")} for trial in trials if not trial["seed"]
        ],
    }
    write_result(out, result, render(result, out.stem), plot(result))


def _counts(images: Sequence[ImageRecord]) -> dict[str, Any]:
    return dict(sorted(Counter(image.environment for image in images).items()))


if __name__ == "__main__":
    run_command(main)
