"""The server of `bench.load` with open_clip in the engine's place: the same queue, decoding and web application."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch

import invariclip
from invariclip.artifact.manifest import EMBEDDING, IMAGE_INPUT
from invariclip.cli.main import run_command
from invariclip.errors import InputError
from invariclip.export.checkpoints.checkpoint import load_checkpoint
from invariclip.preprocessing.pixels import normalise
from invariclip.serve.limits import Limits
from invariclip.serve.metrics import Metrics
from invariclip.serve.models import ServedModels
from invariclip.serve.server import listening, run
from invariclip.serve.service import Batching, Service
from invariclip.threads import chosen_threads

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from invariclip.export.checkpoints.checkpoint import Checkpoint

SAME = 1e-4
"""How far an embedding's components may be from the artifact's, or another model would be timed."""


class TorchBackend:
    """A `backends.Backend` for images: what a user of open_clip runs."""

    input_names: tuple[str, ...] = (IMAGE_INPUT,)
    output_names: tuple[str, ...] = (EMBEDDING,)
    input_shapes: dict[str, tuple[int | None, ...]] = {}  # noqa: RUF012 (the protocol's own type)

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._encode: Callable[..., torch.Tensor] = checkpoint.module.encode_image  # type: ignore[assignment]
        self._pixels = checkpoint.pixels

    def run(self, inputs: dict[str, NDArray[Any]], outputs: tuple[str, ...] | None = None) -> dict[str, NDArray[Any]]:
        """Unit-length embeddings of uint8 images."""
        del outputs
        with torch.inference_mode():
            batch = torch.from_numpy(normalise(inputs[IMAGE_INPUT], self._pixels))
            return {EMBEDDING: self._encode(batch, normalize=True).numpy()}

    def describe(self) -> dict[str, Any]:
        """What really runs."""
        return {"engine": "torch", "version": torch.__version__, "threads": torch.get_num_threads()}


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="The checkpoint that the artifact was exported from.")
@click.option("--random-weights", type=int, help="The seed, if it was exported so.")
@click.option("--threads", type=click.IntRange(min=1))
@click.option("--max-batch", type=click.IntRange(min=1), default=Batching.max_batch)
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), default=Limits.seconds)
def server(
    artifact: Path, model: str, random_weights: int | None, threads: int | None, max_batch: int, timeout: float
) -> int:  # fmt: skip
    """Serve a checkpoint through PyTorch on a free port."""
    torch.set_num_threads(chosen_threads(threads))
    checkpoint = load_checkpoint(model, allow_random=random_weights is not None, seed=random_weights or 0)
    ours = invariclip.load(artifact, threads=threads)
    theirs = ours.with_classes(ours.classes)._but(opened=replace(ours._view.opened, image=TorchBackend(checkpoint)))
    image = np.random.default_rng(0).integers(0, 256, (1, *ours.manifest.pixels.image_size, 3), dtype=np.uint8)
    own, other = ours.embed_images(image), theirs.embed_images(image)
    if own.shape != other.shape or not np.abs(own - other).max() <= SAME:
        raise InputError(f"{artifact} was not exported from {model}, or with a projection: embeddings differ")
    metrics = Metrics()
    service = Service(theirs, Limits(seconds=timeout), batching=Batching(max_batch), images=metrics.watcher("images"))
    return run(ServedModels([service]), metrics, listening("127.0.0.1", 0), what=f"{model} (PyTorch)", grace=1)


if __name__ == "__main__":
    run_command(server)
