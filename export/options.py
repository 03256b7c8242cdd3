"""The options that `export` and `verify` have in common, and what they stand for."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from invariclip.commands import JSON, QUIET, THREADS
from invariclip.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    from invariclip.export.checkpoint import Checkpoint
    from invariclip.export.figures import Thresholds

# Torch is imported when a command runs, so that --help is quick; that it is there is asked now, while the command line
# can still answer with the extra to install.
for _package in ("torch", "open_clip", "onnx", "onnxscript"):
    if find_spec(_package) is None:
        raise ModuleNotFoundError(f"No module named {_package!r}", name=_package)


def shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `export` and `verify` have in common."""
    options = (
        click.option(
            "--checkpoint", type=click.Path(path_type=Path), help="Weights: .safetensors or a tensors-only .pt."
        ),
        click.option("--random-weights", type=int, metavar="SEED", help="Random weights, to look at structure."),
        click.option(
            "--images", multiple=True, type=click.Path(path_type=Path), help="Pictures and folders to verify on."
        ),
        click.option("--min-cosine", type=click.FloatRange(-1, 1), help="Bound of the contract [default: 0.999999]."),
        click.option("--max-abs-diff", type=click.FloatRange(0), help="Bound of the contract [default: 1e-5]."),
        THREADS,
        JSON,
        QUIET,
    )
    for option in reversed(options):
        command = option(command)
    return command


def load(model: str, checkpoint: Path | None, random_weights: int | None, threads: int | None) -> Checkpoint:
    """Loads the checkpoint that the options name.

    Raises:
        CheckpointError: A seed is given beside weights, or what `load_checkpoint` raises.
    """
    from invariclip.export.checkpoint import load_checkpoint

    if checkpoint is not None and random_weights is not None:
        raise CheckpointError("give --checkpoint or --random-weights, not both")
    if random_weights is None:
        return load_checkpoint(model, checkpoint, threads=threads)
    loaded = load_checkpoint(model, threads=threads, allow_random=True, seed=random_weights)
    if not loaded.source.startswith("random weights"):
        raise CheckpointError(f"{model}: has weights of its own ({loaded.source}); leave --random-weights out")
    return loaded


def bounds_of(min_cosine: float | None, max_abs_diff: float | None) -> Thresholds:
    """Float32's bounds with the user's own in their place; no option loosens the others."""
    from invariclip.export.figures import FLOAT32

    bounds = FLOAT32 if min_cosine is None else replace(FLOAT32, min_cosine=min_cosine)
    return bounds if max_abs_diff is None else replace(bounds, max_abs_diff=max_abs_diff)
