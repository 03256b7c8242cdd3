"""`invariclip demo`: the whole path on the bundled pictures, and a page that shows it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from invariclip.artifact import read_manifest
from invariclip.backends import DEFAULT_BACKEND
from invariclip.backends.threads import available_threads
from invariclip.bench import latency
from invariclip.bench.bundled import SEED, ask, bundle, score, verdict
from invariclip.bench.demo_page import Demo, write_page
from invariclip.bench.demo_unsure import make_unsure
from invariclip.calibrate.fit import Options, calibrate
from invariclip.console import bar, emit_json, say, silent, table
from invariclip.export.assemble import export_artifact
from invariclip.export.models.checkpoint import load_checkpoint
from invariclip.interventions import PAPER
from invariclip.parity import parity_table
from invariclip.projection import write_projection

if TYPE_CHECKING:
    from invariclip.console import Progress

TEMPLATES = ("a picture of a {}.",)


@click.command()
@click.option("--out", "-o", type=click.Path(path_type=Path), default=Path("invariclip-demo"), show_default=True,
              help="Folder for everything it makes.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(min=3), default=7, show_default=True, help="Turns of the timing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def demo(out: Path, rounds: int, as_json: bool, quiet: bool) -> None:
    """See the whole path on the bundled pictures: calibrate, export, verify, classify unseen styles, time it."""
    result = run(out, rounds=rounds, progress=silent if quiet or as_json else bar)
    page = out / "index.html"
    write_page(page, result)
    if as_json:
        emit_json(
            {
                "verdict": result.verdict,
                "helped": result.helped,
                "projection": result.chosen,
                "accuracy": [asdict(row) for row in result.accuracy],
                "parity": result.manifest.variants["float32"].parity,
                "latency": [timing.to_json() for timing in result.timings],
                "artifact": str(result.artifact),
                "unsure": {
                    "artifact": str(result.unsure.artifact),
                    "right_of_the_surer_half": result.unsure.halves[0],
                    "right_of_the_other_half": result.unsure.halves[1],
                    "auroc": result.unsure.separation,
                },
                "page": str(page),
            }
        )
    else:
        _print(result, page)


def run(out: Path, *, rounds: int, progress: Progress) -> Demo:
    """Calibrates, exports with and without the projection, classifies, and times; everything lands below `out`."""
    bundled = bundle()
    checkpoint = load_checkpoint("reference")
    options = Options(interventions=PAPER, objective="both", templates=TEMPLATES, seed=SEED)
    calibration = calibrate(checkpoint, bundled.fit, options, cache=out / "cache", progress=progress)
    write_projection(out / "projection.safetensors", calibration.projection)
    before, after = out / "before.icm", out / "after.icm"
    for folder, projection in ((before, None), (after, calibration.projection)):
        export_artifact(
            checkpoint,
            folder,
            projection=projection,
            classes=bundled.classes,
            templates=TEMPLATES,
            pictures=[picture.path for picture in bundled.pictures] if projection else None,
            progress=progress,
        )
    answers = ask(before, bundled, progress), ask(after, bundled, progress)
    accuracy = score(bundled, *answers)
    candidates = [
        latency.Candidate("PyTorch eager", "pytorch", "reference"),
        latency.artifact_candidate("ONNX, no projection", before),
        latency.artifact_candidate("ONNX, projection folded in", after),
    ]
    unsure = make_unsure(checkpoint, bundled, calibration.projection, TEMPLATES, out, seed=SEED, progress=progress)
    helped, sentence = verdict(accuracy, calibration.projection.estimator)
    return Demo(
        bundled=bundled,
        calibration=calibration,
        answers=answers,
        accuracy=accuracy,
        timings=latency.measure(candidates, rounds=rounds, progress=progress),
        manifest=read_manifest(after),
        artifact=after,
        unsure=unsure,
        helped=helped,
        verdict=sentence,
    )


def _print(result: Demo, page: Path) -> None:
    say("\nTop-1 on styles that nothing was fitted or chosen on")
    accuracy = [
        [r.style, r.protocol, f"{r.before:.1%}", f"{r.after:.1%}", f"{100 * r.difference:+.1f}",
         f"{100 * r.low:+.1f} … {100 * r.high:+.1f}"]
        for r in result.accuracy
    ]  # fmt: skip
    say(table(["style", "protocol", "before", "after", "points", "95 % interval"], accuracy))
    say("\nThe exported graph against PyTorch")
    say(parity_table(result.manifest.variants["float32"].parity[DEFAULT_BACKEND]))
    say(f"\nLatency of the image tower, {available_threads()} threads")
    timings = [
        [t.name, str(t.batch), f"{t.median_ms:.2f} ms", f"{t.p95_ms:.2f} ms",
         f"{t.ratio:.2f} × ({t.ratio_low:.2f} … {t.ratio_high:.2f})"]
        for t in result.timings
    ]  # fmt: skip
    say(table(["candidate", "batch", "median", "p95", "against PyTorch"], timings))
    unsure = result.unsure
    say("\nHow unsure an answer is: learned templates beside the prompt, in one graph with the projection")
    least = [
        [one.picture.name, one.picture.environment, one.answer, f"{one.uncertainty:.2f}"] for one in unsure.least_sure
    ]
    say(table(["least sure of", "style", "answer", "uncertainty"], least))
    say(f"\n{unsure.sentence}")
    say(f"\n{result.verdict}\n\nArtifact: {result.artifact}\nUnsure:   {unsure.artifact}\nPage:     {page}")
