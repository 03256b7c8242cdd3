"""The contract asked again and again of one image tower, while a search looks for a variant that keeps it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from invariclip.artifact.manifest import EMBEDDING
from invariclip.backends import open_backend
from invariclip.export.verification import answers
from invariclip.export.verification.comparison import measure
from invariclip.export.verification.figures import failures
from invariclip.export.verification.verify import look_at_images

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.artifact.manifest import Compute
    from invariclip.console import Progress
    from invariclip.export.verification.answers import ReferenceTarget
    from invariclip.export.verification.candidate import ExportJob
    from invariclip.export.verification.evidence import ImageBatches
    from invariclip.export.verification.figures import Thresholds, TowerFigures


@dataclass
class GraphTrials:
    """Reference answers, once; then any number of graphs.

    Attributes:
        job: What they must answer like.
        bounds: What they must keep.
        shown: The images, and the reference's answers.
        bank: float64 [K, d], what best matches are sought in.
        asked: How many graphs were tried.
    """

    job: ExportJob
    bounds: Thresholds
    shown: ReferenceTarget
    bank: NDArray[np.float64]
    asked: int = field(default=0)

    @classmethod
    def look(cls, job: ExportJob, images: ImageBatches, bounds: Thresholds, progress: Progress) -> GraphTrials:
        """Runs the reference's image tower on every image.

        Raises:
            InputError: No image can be read.
            CheckpointError: The checkpoint itself answers with NaN or infinity.
        """
        shown = look_at_images(job.checkpoint, images, progress)
        return cls(job, bounds, shown, job.bank_or_prompts())

    def figures(
        self, image: Path, *, backend: str, compute: Compute = "float32", threads: int | None = None
    ) -> TowerFigures:
        """What a graph answers, measured.

        Raises:
            ArtifactError: The engine cannot load it.
            ContractError: It cannot answer.
        """
        self.asked += 1
        opened = open_backend(backend, image, threads=threads, compute=compute)
        seen = answers.compare(opened, self.shown, self.job.projection, self.shown.batches())
        return measure(seen, self.bank, self.job.head)

    def cost(self, image: Path, *, backend: str, threads: int | None = None) -> float:
        """1 - the mean cosine to the reference on a few images: what a part of a search ranks by."""
        opened = open_backend(backend, image, threads=threads)
        few = self.shown.first[: len(self.shown.raw)]
        got = opened.run({opened.input_names[0]: few}, (EMBEDDING,))[EMBEDDING].astype(np.float64)
        wanted = answers.project(self.shown.raw[: len(few)], self.job.projection)
        return float(1 - (got * wanted).sum(axis=1).mean())

    def broken(self, figures: TowerFigures) -> list[str]:
        """Every bound that figures break, in words."""
        return list(failures("image", figures, self.bounds).values())
