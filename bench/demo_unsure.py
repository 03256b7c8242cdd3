"""The demo's last part: templates learned in the projection's space, and pictures that the artifact is unsure of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

import invariclip
from invariclip.calibrate.cdc.evaluate import auroc
from invariclip.calibrate.cdc.learn import learn
from invariclip.calibrate.cdc.options import Options
from invariclip.export.assemble import export_artifact
from invariclip.semantics import write_semantics

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.bench.bundled import Bundle
    from invariclip.calibrate.pictures import Picture
    from invariclip.console import Progress
    from invariclip.export.models.checkpoint import Checkpoint
    from invariclip.projection import Projection

STEPS = 60
"""Of training: some twenty seconds; on these pictures it stops by itself before that."""
SHOWN = 12
"""Pictures at each end."""


@dataclass(frozen=True)
class Told:
    """One held-out picture: what it shows, what it was taken for, and how unsure that is."""

    picture: Picture
    answer: str
    uncertainty: float

    @property
    def right(self) -> bool:
        """Whether the answer is the picture's name."""
        return self.answer == self.picture.name


@dataclass(frozen=True)
class Unsure:
    """What the composed artifact says of pictures in held-out styles.

    Attributes:
        artifact: Projection and learned templates in one.
        told: Every held-out picture, the surest first.
    """

    artifact: Path
    told: tuple[Told, ...]

    @property
    def halves(self) -> tuple[float, float]:
        """Share of right answers in the surer half, and in the other."""
        right = np.array([one.right for one in self.told])
        middle = len(right) // 2
        return float(right[:middle].mean()), float(right[middle:].mean())

    @property
    def separation(self) -> float:
        """The chance that a wrong answer is less sure than a right one (AUROC); NaN where all are one or the other."""
        wrong = np.array([not one.right for one in self.told])
        scores = np.array([one.uncertainty for one in self.told])
        return auroc(scores, wrong)

    @property
    def sentence(self) -> str:
        """The same in words."""
        surer, other = self.halves
        return (
            f"Of the half of the unseen pictures that it is surer of, {surer:.1%} are answered right; of the other "
            f"half, {other:.1%} (AUROC {self.separation:.2f})."
        )

    @property
    def surest(self) -> tuple[Told, ...]:
        """The first `SHOWN`."""
        return self.told[:SHOWN]

    @property
    def least_sure(self) -> tuple[Told, ...]:
        """The last `SHOWN`, the least sure first."""
        return self.told[::-1][:SHOWN]


def make_unsure(
    checkpoint: Checkpoint,
    bundled: Bundle,
    projection: Projection,
    templates: tuple[str, ...],
    out: Path,
    *,
    seed: int,
    progress: Progress,
) -> Unsure:
    """Learns templates on the pictures that calibration saw, exports both, and asks about the held-out styles.

    Args:
        checkpoint: The reference.
        bundled: The bundled pictures.
        projection: What calibration chose.
        templates: The hand-written prompts.
        out: `cdc.safetensors` and `unsure.icm` go here.
        seed: Of everything that is drawn.
        progress: `console.bar` or `console.silent`.
    """
    options = Options(templates=templates, steps=STEPS, seed=seed, augmentation_seed=seed)
    learnt = learn(checkpoint, bundled.fit, options, projection, cache=out / "cache", progress=progress)
    write_semantics(out / "cdc.safetensors", learnt.semantics)
    artifact = out / "unsure.icm"
    export_artifact(
        checkpoint,
        artifact,
        projection=projection,
        classes=bundled.classes,
        semantics=learnt.semantics,
        progress=progress,
    )
    held_out = [picture for picture in bundled.pictures if picture.environment in bundled.held_out_styles]
    answers = invariclip.load(artifact).answer([picture.path for picture in held_out])
    uncertainty: NDArray[np.float32] = np.asarray(answers.uncertainty)
    best = answers.probabilities.argmax(axis=1)
    told = [
        Told(picture, bundled.classes[place], float(u))
        for picture, place, u in zip(held_out, best, uncertainty, strict=True)
    ]
    return Unsure(artifact, tuple(sorted(told, key=lambda one: one.uncertainty)))
