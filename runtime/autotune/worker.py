"""The process of one candidate: opens the artifact as `load` would, then answers a line of JSON with a line of JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.artifact.folder import read_manifest
from invariclip.autotune.checks import IMAGES, TEXTS, check_images
from invariclip.errors import InvariclipError
from invariclip.model import Model

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_REPETITIONS, MAX_BATCH = 10_000, 4096


class Bench:
    """One open candidate and the images that it is asked about."""

    def __init__(self, folder: str, variant: str, backend: str, threads: int) -> None:
        """Opens the image tower."""
        manifest = read_manifest(folder)
        self.model = Model(Path(folder), manifest, variant=variant, backend=backend, threads=threads)
        self._images = check_images(*manifest.pixels.image_size)

    def _batch(self, rows: int) -> NDArray[np.uint8]:
        return np.ascontiguousarray(self._images[np.arange(rows) % IMAGES])

    def time(self, batch: int, repetitions: int) -> dict[str, Any]:
        """Seconds of each of `repetitions` batches."""
        images = self._batch(min(batch, MAX_BATCH))
        times = []
        for _ in range(min(repetitions, MAX_REPETITIONS)):
            start = time.perf_counter()
            self.model.embed_images(images, batch_size=batch)
            times.append(time.perf_counter() - start)
        return {"seconds": times}

    def images(self, batch: int) -> dict[str, Any]:
        """Embeddings of the check images, each as part of a batch of that many."""
        rows = -(-IMAGES // batch) * batch
        return {"embeddings": self.model.embed_images(self._batch(rows), batch_size=batch)[:IMAGES].tolist()}

    def texts(self) -> dict[str, Any]:
        """Embeddings of the check texts."""
        return {"embeddings": self.model.embed_texts(TEXTS).tolist()}


def main() -> None:
    """Serves until standard input ends."""
    # What an engine prints must not come between the answers, so they have a descriptor of their own
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        bench = Bench(**json.loads(sys.argv[1]))
        answer(bench.model.describe())
        for line in sys.stdin:
            question = json.loads(line)
            answer(getattr(bench, question.pop("do"))(**question))
    except InvariclipError as error:
        answer({"error": str(error)})
        sys.exit(1)
    except Exception as error:  # the end of a process: whoever started it is told why
        answer({"error": f"{type(error).__name__}: {error}"})
        sys.exit(1)


if __name__ == "__main__":
    main()
