"""The process of one candidate: reads {"batch", "repetitions"} per line, answers a list of seconds."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from invariclip.errors import InvariclipError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from invariclip.bench.latency import Candidate


def _artifact(candidate: Candidate, threads: int) -> tuple[Callable[[NDArray[np.uint8]], Any], tuple[int, int]]:
    from invariclip.artifact import checked_path, read_manifest
    from invariclip.backends.onnxruntime import OnnxRuntimeBackend

    manifest = read_manifest(candidate.model)
    entry = manifest.variants["float32"].image
    backend = OnnxRuntimeBackend(checked_path(Path(candidate.model), entry), threads=threads)
    return (lambda batch: backend.run({"pixels": batch}, ("embedding",))), manifest.pixels.image_size


def _pytorch(candidate: Candidate, threads: int) -> tuple[Callable[[NDArray[np.uint8]], Any], tuple[int, int]]:
    import torch

    from invariclip.export.checkpoint import load_checkpoint

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

    return run, checkpoint.pixels.image_size


def main() -> None:
    """Serves measurements until standard input ends."""
    from invariclip.bench.latency import Candidate

    candidate = Candidate(**json.loads(sys.argv[1]))
    threads = int(sys.argv[2])
    run, (height, width) = (_pytorch if candidate.kind == "pytorch" else _artifact)(candidate, threads)
    rng = np.random.default_rng(0)
    for line in sys.stdin:
        question = json.loads(line)
        batch = rng.integers(0, 256, (question["batch"], height, width, 3), dtype=np.uint8)
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
