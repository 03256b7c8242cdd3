"""The process of one candidate: reads {"batch", "repetitions"} per line, answers a list of seconds."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from invariclip.errors import InvariclipError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from invariclip.bench.latency import Candidate


Batch: TypeAlias = "Callable[[int], NDArray[Any]]"
"""Rows to a batch of that many."""


def _artifact(candidate: Candidate, threads: int) -> tuple[Callable[[NDArray[Any]], Any], Batch]:
    from invariclip.artifact import checked_path, read_manifest
    from invariclip.backends import open_backend
    from invariclip.manifest import EMBEDDING, IMAGE_INPUT

    manifest = read_manifest(candidate.model)
    entry = manifest.variants["float32"].image
    backend = open_backend(candidate.backend, checked_path(Path(candidate.model), entry), threads=threads)
    return (lambda batch: backend.run({IMAGE_INPUT: batch}, (EMBEDDING,))), _pictures(manifest.pixels.image_size)


def _graph(candidate: Candidate, threads: int) -> tuple[Callable[[NDArray[Any]], Any], Batch]:
    import onnx

    from invariclip.backends import open_backend
    from invariclip.manifest import EMBEDDING

    given = onnx.load(candidate.model, load_external_data=False).graph.input[0]
    sizes = [int(size.dim_value) for size in given.type.tensor_type.shape.dim]
    backend = open_backend(candidate.backend, Path(candidate.model), threads=threads)
    make = _pictures((sizes[1], sizes[2])) if candidate.ids is None else _texts(candidate.ids)
    return (lambda batch: backend.run({given.name: batch}, (EMBEDDING,))), make


def _pytorch(candidate: Candidate, threads: int) -> tuple[Callable[[NDArray[Any]], Any], Batch]:
    import torch

    from invariclip.export.models.checkpoint import load_checkpoint

    torch.set_num_threads(threads)
    checkpoint = load_checkpoint(candidate.model, candidate.checkpoint)
    encode = cast("Callable[..., torch.Tensor]", checkpoint.module.encode_image)
    mean = torch.tensor(checkpoint.pixels.image_mean)[:, None, None]
    std = torch.tensor(checkpoint.pixels.image_std)[:, None, None]

    def run(batch: NDArray[np.uint8]) -> Any:
        # What a user of open_clip runs: normalise, encode, unit length; no gradients.
        with torch.inference_mode():
            pixels = (torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255 - mean) / std
            return encode(pixels, normalize=True)

    return run, _pictures(checkpoint.pixels.image_size)


def _pictures(size: tuple[int, int]) -> Batch:
    rng = np.random.default_rng(0)
    return lambda rows: rng.integers(0, 256, (rows, *size, 3), dtype=np.uint8)


def _texts(length: int) -> Batch:
    """Random words and an end; what they are does not change how long a tower takes."""
    rng = np.random.default_rng(0)

    def make(rows: int) -> NDArray[np.int64]:
        ids = rng.integers(1, 40000, (rows, length), dtype=np.int64)
        ids[:, -1] = 49407
        return ids

    return make


KINDS = {"artifact": _artifact, "graph": _graph, "pytorch": _pytorch}


def main() -> None:
    """Serves measurements until standard input ends."""
    from invariclip.bench.latency import Candidate

    candidate = Candidate(**json.loads(sys.argv[1]))
    run, make = KINDS[candidate.kind](candidate, int(sys.argv[2]))
    for line in sys.stdin:
        question = json.loads(line)
        batch = make(question["batch"])
        times = []
        for _ in range(question["repetitions"]):
            start = time.perf_counter()
            run(batch)
            times.append(time.perf_counter() - start)
        sys.stdout.write(json.dumps(times) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    try:
        main()
    except InvariclipError as error:  # one line; the parent reports that this process stopped
        sys.exit(f"invariclip: {error}")
