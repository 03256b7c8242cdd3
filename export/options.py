"""The options that `export` and `verify` have in common, and what they stand for."""

from __future__ import annotations

from dataclasses import replace
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from invariclip.cli.options import JSON, QUIET, THREADS
from invariclip.console import bar
from invariclip.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    from invariclip.artifact.fidelity import Fidelity
    from invariclip.export.checkpoints.checkpoint import Checkpoint
    from invariclip.export.verification.figures import Thresholds

Limits: TypeAlias = "dict[str, float | None]"
_LIMITS = ("min_cosine", "max_abs_diff", "min_top1", "min_top5", "max_invariance_gap")

# Torch is imported when a command runs, so that --help is quick; that it is there is asked now, while the command line
# can still answer with the extra to install.
for _package in ("torch", "open_clip", "onnx", "onnxscript"):
    if find_spec(_package) is None:
        raise ModuleNotFoundError(f"No module named {_package!r}", name=_package)


def shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `export` and `verify` have in common; those of the contract come as one: `limits`."""
    options = (
        click.option(
            "--checkpoint", type=click.Path(path_type=Path), help="Weights: .safetensors or a tensors-only .pt."
        ),
        click.option(
            "--tokenizer",
            metavar="DIR",
            help="A folder with tokenizer.json, or hf-hub:OWNER/NAME, for models with another vocabulary than CLIP's.",
        ),
        click.option("--random-weights", type=int, metavar="SEED", help="Random weights, to look at structure."),
        click.option(
            "--images", multiple=True, type=click.Path(path_type=Path), help="Images and folders to verify on."
        ),
        click.option("--min-cosine", type=click.FloatRange(-1, 1), help="Bound of the contract [exact: 0.999999]."),
        click.option("--max-abs-diff", type=click.FloatRange(0), help="Bound of the contract [exact: 1e-5]."),
        click.option("--min-top1", type=click.FloatRange(0, 1), help="Bound of the contract [exact: 1]."),
        click.option("--min-top5", type=click.FloatRange(0, 1), help="Bound of the contract [exact: 1]."),
        click.option("--max-invariance-gap", type=click.FloatRange(0), help="Bound of its increase [exact: 1e-5]."),
        THREADS,
        JSON,
        QUIET,
    )

    @wraps(command)
    def packed(**given: Any) -> Any:
        limits = {name: given.pop(name) for name in _LIMITS}
        return command(limits=limits, **given)

    for option in reversed(options):
        packed = option(packed)
    return packed


def load(
    model: str,
    checkpoint: Path | None,
    random_weights: int | None,
    threads: int | None,
    tokenizer: str | None = None,
) -> Checkpoint:
    """Loads the checkpoint that the options name.

    Raises:
        CheckpointError: A seed is given beside weights, or what `load_checkpoint` raises.
    """
    from invariclip.export.checkpoints.checkpoint import load_checkpoint

    if checkpoint is not None and random_weights is not None:
        raise CheckpointError("give --checkpoint or --random-weights, not both")
    if random_weights is None:
        return load_checkpoint(model, checkpoint, tokenizer=tokenizer, threads=threads, progress=bar)
    loaded = load_checkpoint(model, tokenizer=tokenizer, threads=threads, allow_random=True, seed=random_weights)
    if not loaded.source.startswith("random weights"):
        raise CheckpointError(f"{model}: has weights of its own ({loaded.source}); leave --random-weights out")
    return loaded


def bounds_of(limits: Limits, level: Fidelity = "exact") -> Thresholds:
    """A level's bounds with the user's own in their place; no option loosens the others.

    Args:
        limits: Fields of `Thresholds` to the user's numbers, None where there is none.
        level: Gives the rest, see `figures.THRESHOLDS`.
    """
    from invariclip.export.verification.figures import THRESHOLDS

    given = {name: value for name, value in limits.items() if value is not None}
    return replace(THRESHOLDS[level], **given)
