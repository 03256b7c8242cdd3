"""The process of one candidate, which opens the artifact as `load` would, and the side that asks it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.artifact.folder import read_manifest
from invariclip.autotune.checks import IMAGES, TEXTS, check_images
from invariclip.measure.worker import Served, Worker, module, serve
from invariclip.model import Model

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from invariclip.autotune.candidates import TuneCandidate

LONGEST_ANSWER = 300.0
"""Seconds after which a process counts as stuck."""


class TuneWorker(Worker):
    """A running candidate; its turns are asked for with `batch`."""

    def __init__(self, folder: Path, candidate: TuneCandidate) -> None:
        """Starts it and waits until the artifact is open.

        Raises:
            WorkerError: It cannot be opened here.
        """
        named = {"folder": str(folder), "variant": candidate.variant, "backend": candidate.backend}
        asked = json.dumps({**named, "threads": candidate.threads})
        command = module("invariclip.autotune.worker", asked)
        super().__init__(candidate.name, command, longest=LONGEST_ANSWER, quiet=True)

    def images(self, batch: int) -> NDArray[np.float32]:
        """Embeddings [IMAGES, d] of `checks.check_images`, in batches of that many.

        Raises:
            WorkerError: The process stopped or could not answer.
        """
        return np.asarray(self.ask("images", batch=batch)["embeddings"], dtype=np.float32)

    def texts(self) -> NDArray[np.float32]:
        """Embeddings [len(TEXTS), d] of `checks.TEXTS`.

        Raises:
            WorkerError: See `images`.
        """
        return np.asarray(self.ask("texts")["embeddings"], dtype=np.float32)


class Bench:
    """One open candidate and the images that it is asked about."""

    def __init__(self, folder: str, variant: str, backend: str, threads: int) -> None:
        """Opens the image tower."""
        manifest = read_manifest(folder)
        self.model = Model(Path(folder), manifest, variant=variant, backend=backend, threads=threads)
        self._images = check_images(*manifest.pixels.image_size)

    def _batch(self, rows: int) -> NDArray[np.uint8]:
        return np.ascontiguousarray(self._images[np.arange(rows) % IMAGES])

    def images(self, batch: int) -> dict[str, Any]:
        """Embeddings of the check images, each as part of a batch of that many."""
        rows = -(-IMAGES // batch) * batch
        return {"embeddings": self.model.embed_images(self._batch(rows), batch_size=batch)[:IMAGES].tolist()}

    def texts(self) -> dict[str, Any]:
        """Embeddings of the check texts."""
        return {"embeddings": self.model.embed_texts(TEXTS).tolist()}

    def served(self) -> Served:
        """A turn embeds one batch of `batch` images."""

        def run(batch: int) -> Any:
            images = self._batch(batch)
            return lambda: self.model.embed_images(images, batch_size=batch)

        return Served(self.model.describe(), run, {"images": self.images, "texts": self.texts})


def main() -> None:
    """Serves until standard input ends."""
    serve(lambda: Bench(**json.loads(sys.argv[1])).served())


if __name__ == "__main__":
    main()
