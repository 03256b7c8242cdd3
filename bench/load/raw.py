"""An artifact without a server: the same images, decoded and answered in one process; the yardstick of `overhead`."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from invariclip import load
from invariclip.cli.main import run_command
from invariclip.console import emit_json
from invariclip.preprocessing.find import find_images
from invariclip.preprocessing.streams import LOOK_AHEAD

if TYPE_CHECKING:
    from collections.abc import Iterator

    from invariclip.results import Answer


def _answer(answers: Iterator[Answer], batch: int, seconds: float) -> int:
    """Whole batches, for so long; one at least."""
    count, end = 0, time.perf_counter() + seconds
    while True:
        count += sum(1 for _ in itertools.islice(answers, batch))
        if time.perf_counter() >= end:
            return count


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path, exists=True))
@click.argument("images", type=click.Path(path_type=Path, exists=True))
@click.option("--batch", type=click.IntRange(min=1), required=True)
@click.option("--warm", type=click.FloatRange(min=0), required=True)
@click.option("--seconds", type=click.FloatRange(min=0.1), required=True)
@click.option("--threads", type=click.IntRange(min=1))
def raw(artifact: Path, images: Path, batch: int, warm: float, seconds: float, threads: int | None) -> None:
    """Answer encoded images for so many seconds; tell how many, and the processor time of the whole process."""
    model = load(artifact, threads=threads)
    sent = [path.read_bytes() for path in find_images([images])]
    # one at a time is what a single client gets: nothing is decoded ahead
    ahead = 0 if batch == 1 else LOOK_AHEAD
    answers = model.stream(itertools.cycle(sent), batch_size=batch, look_ahead=ahead)
    _answer(answers, batch, warm)
    began, cpu = time.perf_counter(), time.process_time()
    count = _answer(answers, batch, seconds)
    took = time.process_time() - cpu
    emit_json({"images": count, "per_second": count / (time.perf_counter() - began), "cpu_ms": 1000 * took / count})


if __name__ == "__main__":
    run_command(raw)
