"""`invariclip demo`: the whole path on the bundled images, and a page that shows it."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from invariclip.artifact.folder import read_manifest
from invariclip.artifact.parity import parity_table
from invariclip.artifact.projection import write_projection
from invariclip.backends import DEFAULT_BACKEND
from invariclip.bench.demo.bundled import (
    PROTOCOLS,
    SEED,
    SHOWN,
    adapt,
    ask,
    bundle,
    classify_own,
    halves,
    score,
    verdict,
    wanted,
)
from invariclip.bench.demo.page import Demo, write_page
from invariclip.bench.latency.measure import artifact_candidate, busy_machine, measure
from invariclip.bench.latency.worker import LatencyCandidate
from invariclip.calibrate.data.encoders import ArtifactEncoder
from invariclip.calibrate.fit import FitOptions, calibrate
from invariclip.console import bar, emit_json, say, silent, table
from invariclip.export.build import export_artifact
from invariclip.export.checkpoints.check_texts import spread
from invariclip.export.checkpoints.checkpoint import load_checkpoint
from invariclip.export.config import ExportConfig
from invariclip.preprocessing.interventions import PAPER
from invariclip.threads import available_threads

if TYPE_CHECKING:
    from collections.abc import Iterator

    from invariclip.bench.demo.bundled import DemoRequest, Own
    from invariclip.calibrate.data.encoders import Encoder
    from invariclip.console import Progress

TEMPLATES = ("a picture of a {}.",)
DRAWS = 1
"""Changed versions of each image that is fitted on; `calibrate` takes two, and the embedding twice the time."""
CHECKED = {"before.icm": 8, "after.icm": 24}
"""Images that each graph is held against PyTorch on; they are evenly spread over the styles."""


@click.command()
@click.option("--out", "-o", type=click.Path(path_type=Path), default=Path("invariclip-demo"), show_default=True,
              help="Folder for everything it makes.")  # fmt: skip
@click.option("--images", metavar="DIR", type=click.Path(path_type=Path),
              help="Also classify your own images, before and after; needs --classes.")  # fmt: skip
@click.option("--classes", help='The words for your own images: "dog,cat,car".')
@click.option("--rounds", type=click.IntRange(min=3), default=5, show_default=True, help="Turns of the timing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", is_flag=True, help="No progress bars.")
def demo(out: Path, images: Path | None, classes: str | None, rounds: int, as_json: bool, quiet: bool) -> None:
    """See the whole path on the bundled images: calibrate, export, verify, classify unseen styles, time it."""
    own = wanted(images, classes, TEMPLATES)
    result = run(out, rounds=rounds, own=own, progress=silent if quiet or as_json else bar)
    page = out / "index.html"
    write_page(page, result)
    if as_json:
        emit_json(
            {
                "verdict": result.verdict.sentence,
                "helped": result.verdict.helped,
                "projection": result.chosen,
                "accuracy": [asdict(row) for row in result.accuracy],
                "parity": result.manifest.variants["float32"].parity,
                "latency": [timing.to_json() for timing in result.timings],
                "busy_machine": result.busy,
                "artifact": str(result.artifact),
                "uncertainty": asdict(result.halves),
                "own_images": [
                    {"path": str(one.path), "before": one.before.to_json(), "after": one.after.to_json()}
                    for one in result.own
                ],
                "seconds": {name: round(seconds, 1) for name, seconds in result.seconds.items()},
                "page": str(page),
            }
        )
    else:
        _print(result, page)


def run(out: Path, *, rounds: int, progress: Progress, own: DemoRequest | None = None) -> Demo:
    """Exports without the projection, calibrates on that artifact, exports with it, classifies and times.

    Calibration embeds through the exported graph, not through PyTorch, which is several times slower on a CPU. Every
    figure of accuracy comes from the two artifacts through the runtime.

    Args:
        out: Everything lands below it.
        rounds: Turns of the timing.
        progress: `console.bar` or `console.silent`.
        own: The user's own images and words.
    """
    bundled = bundle()
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start

    with timed("load"):
        checkpoint = load_checkpoint("reference", progress=progress)
    before, after = out / "before.icm", out / "after.icm"
    projection = None
    for folder in (before, after):
        if folder == after:
            with timed("calibrate"):
                options = FitOptions(interventions=PAPER, draws=DRAWS, objective="both", templates=TEMPLATES, seed=SEED)
                encoder = cast("Encoder", ArtifactEncoder(before))
                calibration = calibrate(encoder, bundled.fit, options, cache=out / "cache", progress=progress)
                projection = calibration.projection
                write_projection(out / "projection.safetensors", projection)
        with timed("export"):
            config = ExportConfig(
                classes=bundled.classes,
                templates=TEMPLATES,
                images=spread([image.path for image in bundled.images], CHECKED[folder.name]),
            )
            export_artifact(checkpoint, folder, config, projection=projection, progress=progress)
    with timed("classify"):
        answers = ask(before, bundled, progress), ask(after, bundled, progress)
        accuracy = score(bundled, *answers, adapt(after, bundled, answers[1]))
        mine = tuple(classify_own(own, before, after, TEMPLATES)) if own else ()
    candidates = [
        LatencyCandidate("PyTorch eager", "pytorch", "reference"),
        artifact_candidate("ONNX, no projection", before),
        artifact_candidate("ONNX, projection folded in", after),
    ]
    with timed("time"):
        timings = measure(candidates, rounds=rounds, seconds_per_turn=0.3, progress=progress)
    return Demo(
        bundled=bundled,
        calibration=calibration,
        answers=answers,
        accuracy=accuracy,
        timings=timings,
        busy=busy_machine(timings),
        manifest=read_manifest(after),
        artifact=after,
        halves=halves(bundled, answers[1]),
        verdict=verdict(accuracy, calibration.projection.estimator),
        own=mine,
        seconds=seconds,
    )


def _print(result: Demo, page: Path) -> None:
    say("\nTop-1 in styles that nothing was fitted or chosen on; the last lines are the styles that were fitted on")
    accuracy = [
        [r.style, PROTOCOLS[r.protocol], f"{r.before:.1%}", f"{r.after:.1%}", _points(r.difference, r.low, r.high),
         f"{r.adapted:.1%}" if r.adapted is not None else "", _points(*r.more) if r.more else ""]
        for r in sorted(result.accuracy, key=lambda row: row.seen)
    ]  # fmt: skip
    say(table(["images", "classes told by", "before", "after", "points", "adapted", "points more"], accuracy))
    say(f"(95 % intervals; adapted: to {SHOWN} unlabelled images of the style, see `invariclip adapt`)")
    say(f"\n{result.halves}")
    say("\nThe exported graph against PyTorch")
    say(parity_table(result.manifest.variants["float32"].parity[DEFAULT_BACKEND]))
    say(f"\nLatency of the image tower, {available_threads()} threads")
    timings = [
        [t.name, str(t.batch), f"{t.median_ms:.2f} ms", f"{t.p95_ms:.2f} ms",
         f"{t.ratio:.2f} × ({t.ratio_low:.2f} … {t.ratio_high:.2f})"]
        for t in result.timings
    ]  # fmt: skip
    say(table(["candidate", "batch", "median", "p95", "against PyTorch"], timings))
    if result.busy:
        say(result.busy)
    if result.own:
        _print_own(result.own)
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items())
    say(f"\n{result.verdict.sentence}\n\nTook {sum(result.seconds.values()):.0f} s: {spent}")
    say(f"Artifact: {result.artifact}\nPage:     {page}\n\nNext:")
    for line in result.next_lines:
        say(f"  {line}")


def _points(value: float, low: float, high: float) -> str:
    return f"{100 * value:+.1f} ({100 * low:+.1f} … {100 * high:+.1f})"


def _print_own(own: tuple[Own, ...]) -> None:
    say("\nYour own images")
    rows = [
        [one.path.name, *(f"{each.label} {each.probability:.0%}" for each in (one.before, one.after)),
         "changed" if one.changed else ""]
        for one in own
    ]  # fmt: skip
    say(table(["image", "before", "after", ""], rows))
