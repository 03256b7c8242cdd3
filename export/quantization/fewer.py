"""The image graph with fewer tokens: the schedule that the contract allows on the calibration images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from invariclip.errors import ContractError
from invariclip.export.graphs.tokens import image_shape
from invariclip.export.quantization.token_search import fewest_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from invariclip.export.quantization.token_search import Found
    from invariclip.export.quantization.variants import VariantInputs
    from invariclip.export.verification.figures import TowerFigures

TRIALS = 14
"""Schedules that are tried: each is a trace and a run of the calibration images."""
FILE = "image.tokens.onnx"


def fewer_tokens(
    workshop: VariantInputs, *, folder: Path, trace: Callable[[Sequence[int], Path], None]
) -> tuple[Path, Found]:
    """Searches a schedule and writes the float32 graph that has it.

    Args:
        workshop: The contract to ask, and the engine that answers.
        folder: Where the graph goes.
        trace: Writes the image graph with a schedule.

    Returns:
        The file, and what was tried.

    Raises:
        InputError: The tower's tokens cannot be merged.
        ContractError: No schedule keeps the contract.
    """
    target = folder / FILE

    def ask(schedule: Sequence[int]) -> TowerFigures:
        trace(schedule, target)
        return workshop.trials.figures(target, backend=workshop.backend, threads=workshop.threads)

    found = fewest_tokens(image_shape(workshop.trials.job.checkpoint), ask, workshop.trials.bounds, trials=TRIALS)
    if found.best is None:
        raise ContractError(found.lines()[1] if found.nearest else "no schedule of tokens saves anything")
    trace(found.best.schedule, target)
    return target, found
