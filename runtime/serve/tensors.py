"""Tensors of the Open Inference Protocol v2, whoever carries them: names, datatypes, shapes, values of outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from invariclip.serve.service import ImageScores, Service

BYTES, UINT8, FP32 = "BYTES", "UINT8", "FP32"
INPUTS = {"images": (BYTES, (-1,)), "pixels": (UINT8, (-1, -1, -1, 3)), "texts": (BYTES, (-1,))}
"""Datatype and shape of each input; a request brings one of them, and -1 is any size."""
EMBEDDING, CLASS_OUTPUTS = "embedding", ("logits", "probabilities", "label")
OUTPUTS = (EMBEDDING, *CLASS_OUTPUTS)
"""All outputs; those of classes are had of images alone."""


class OutputTensor(NamedTuple):
    """An output: float32 [N, width], or N byte strings."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: NDArray[np.float32] | list[bytes]


def available_outputs(classes: Sequence[str], *, of_texts: bool) -> tuple[str, ...]:
    """Outputs that can be asked for.

    Args:
        classes: The model's classes.
        of_texts: Whether texts are asked about.
    """
    return OUTPUTS if classes and not of_texts else (EMBEDDING,)


def image_output(name: str, rows: Sequence[ImageScores], service: Service) -> OutputTensor:
    """An output of images.

    Args:
        name: One of `OUTPUTS`.
        rows: What the service says of each image.
        service: Who answers.
    """
    if name == EMBEDDING:
        return number_output(name, np.stack([row.embedding for row in rows]))
    if name == "label":
        kind, limit = service.uncertainty, service.abstain_above
        labels = [one.label or "" for one in service.predictions(rows, service.model, 1, kind, limit)]
        return OutputTensor(name, BYTES, (len(rows),), [label.encode() for label in labels])
    every = [row.logits if name == "logits" else row.probabilities for row in rows]
    return number_output(name, np.stack([one for one in every if one is not None]))


def number_output(name: str, values: NDArray[np.float32]) -> OutputTensor:
    """An output of numbers, float32 [N, width]."""
    return OutputTensor(name, FP32, values.shape, values)
