"""The encoder of the bench: any checkpoint, its image trunk in bfloat16 where that is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from invariclip.bench.studies.stylebench.encoders import Quick

if TYPE_CHECKING:
    from pathlib import Path

    from invariclip.calibrate.data.encoders import Encoder

Precision = Literal["float32", "bfloat16"]


def load_encoder(
    name: str, *, checkpoint: Path | None = None, precision: Precision = "float32", threads: int = 2
) -> Encoder:
    """A checkpoint as it is, or taken apart so that its trunk's features are what is computed and kept.

    Args:
        name: A model as `invariclip calibrate` takes it.
        checkpoint: The model's weights.
        precision: `bfloat16` needs an image tower that is a trunk with a linear head, and OpenVINO.
        threads: Of the engine.

    Raises:
        CheckpointError: The model is not known, lacks its weights, or has another image tower.
        MissingExtraError: OpenVINO is wanted and not installed.
    """
    from invariclip.export.checkpoints.checkpoint import load_checkpoint

    loaded = load_checkpoint(name, checkpoint, threads=threads)
    return loaded if precision == "float32" else Quick(loaded, precision)
