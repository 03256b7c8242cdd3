"""What `ask.cpp` does, in Python, with the same arguments: one frame answered again and again.

python -m invariclip.bench.cpp.worker FRAME COLUMNS ROWS OUT pixels SIDE
python -m invariclip.bench.cpp.worker FRAME COLUMNS ROWS OUT classify ARTIFACT ENGINE THREADS
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from PIL import Image

import invariclip
from invariclip.preprocessing.pixels import PixelSpec, pixels

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


def main(words: list[str]) -> None:
    """Writes the first answer to OUT, then times as many as each line of standard input asks for, in milliseconds."""
    path, columns, rows, out, what, *rest = words
    frame = np.fromfile(path, dtype=np.uint8).reshape(int(rows), int(columns), 3)
    answer = _pixels(frame, int(rest[0])) if what == "pixels" else _classify(frame, rest[0], rest[1], int(rest[2]))
    Path(out).write_bytes(answer().tobytes())
    click.echo("ready")
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            began = time.perf_counter()
            answer()
            times.append(1e3 * (time.perf_counter() - began))
        click.echo(" ".join(map(str, times)))


def _pixels(frame: NDArray[np.uint8], side: int) -> Callable[[], NDArray[np.uint8]]:
    """Pillow alone is timed: its image is made once."""
    spec = PixelSpec((side, side), (0.5,) * 3, (0.5,) * 3)
    image = Image.fromarray(frame)
    return lambda: pixels(image, spec)


def _classify(frame: NDArray[np.uint8], artifact: str, engine: str, threads: int) -> Callable[[], Any]:
    """Probabilities, through the very call that a program makes."""
    model = invariclip.load(artifact, backend=engine, variant="float32", threads=threads)
    everything = len(model.classes)

    def answer() -> NDArray[np.float32]:
        found = dict(model.classify([frame], top_k=everything)[0].ranking)
        return np.array([found[name] for name in model.classes], dtype=np.float32)

    return answer


if __name__ == "__main__":
    main(sys.argv[1:])
