"""Checkpoints and graphs of the bench: random weights, seeded, because none can be fetched where it runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from invariclip.export.checkpoints import check_texts
from invariclip.export.checkpoints.checkpoint import Checkpoint, load_checkpoint
from invariclip.export.graphs.rewrites.plan import NAMES
from invariclip.export.graphs.tower_graph import tower_graph
from invariclip.export.graphs.writing import write_graph
from invariclip.export.quantization.float16 import to_float16

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.bench.gpu.cases import Case, GpuCandidate

PARITY_ROWS = 32
"""Images or texts that answers are compared on."""


@dataclass(frozen=True)
class GraphFiles:
    """Where graphs are made, once each.

    Attributes:
        folder: Where they are written.
        short: Take only the first and last blocks of each model: for trying the bench itself.
    """

    folder: Path
    short: bool = False

    def checkpoint(self, model: str) -> Checkpoint:
        """A model with seeded random weights."""
        return _checkpoint(model, self.short)

    def graph(self, case: Case, candidate: GpuCandidate) -> Path:
        """The ONNX file that a candidate runs.

        Raises:
            ContractError: It cannot be exported.
        """
        kind = f"{candidate.graph}-{candidate.precision}"
        path = self.folder / f"{case.model}{'-short' if self.short else ''}" / f"{case.tower}.{kind}.onnx"
        if path.is_file():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        rewrites = NAMES if candidate.graph == "ours" else ()
        whole = path.with_name(f"{case.tower}.{candidate.graph}-float32.onnx")
        if not whole.is_file():
            write_graph(tower_graph(self.checkpoint(case.model), case.tower, rewrites=rewrites).model, whole)
        if candidate.precision == "float16":
            model = ir.load(whole)
            to_float16(model)
            write_graph(model, path)
        return path

    def inputs(self, case: Case, rows: int) -> NDArray[np.uint8] | NDArray[np.int64]:
        """What the case's tower reads: bundled images and prompts, over again where more are asked for."""
        return rows_of(self.checkpoint(case.model), case.tower, rows)


@cache
def _checkpoint(model: str, short: bool) -> Checkpoint:
    return load_checkpoint(model, allow_random=True, short=short)


def rows_of(checkpoint: Checkpoint, tower: str, rows: int) -> NDArray[np.uint8] | NDArray[np.int64]:
    """uint8 [rows, side, side, 3] of bundled images, or int64 [rows, context] of prompts about what they show."""
    from invariclip.export.checkpoints.check_texts import spread
    from invariclip.export.reference import images_path
    from invariclip.export.verification.evidence import ImageBatches
    from invariclip.preprocessing.pixels import find_images

    if tower == "text":
        texts: Sequence[str] = check_texts.PROMPTS
        return np.asarray(checkpoint.tokenizer([texts[place % len(texts)] for place in range(rows)]))
    found = spread(find_images([images_path()]), min(rows, PARITY_ROWS))
    images = np.concatenate(list(ImageBatches(found, checkpoint.pixels).batches(len(found))))
    return np.ascontiguousarray(images[np.arange(rows) % len(images)])
