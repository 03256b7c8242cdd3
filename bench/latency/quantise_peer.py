"""The peer that is quantised: an ONNX file through NNCF's post-training quantisation, in a process of its own.

`python -m invariclip.bench.latency.quantise_peer MODEL.onnx IMAGES.npy OUT.xml` does what NNCF's documentation says
for a transformer: `nncf.quantize` on the OpenVINO model with `ModelType.TRANSFORMER`, every other setting its default.
"""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.bench.latency.machine import versions
from invariclip.errors import MissingExtraError
from invariclip.files import new_directory
from invariclip.measure.worker import WorkerError

if TYPE_CHECKING:
    from collections.abc import Callable

SUBSET = 300
"""Images that NNCF's default takes."""
LONGEST = 7200
"""Seconds after which quantising counts as stuck."""


def quantised_peer(model: Path, images: Path, target: Path, tell: Callable[[str], None]) -> Path:
    """The .xml of the quantised model in the folder `target`, made in a process of its own if it is not there.

    Args:
        model: See `quantise`.
        images: See `quantise`.
        target: The folder; it appears when it is complete.
        tell: Takes a line if there is work to do.

    Raises:
        MissingExtraError: NNCF or OpenVINO is not installed.
        WorkerError: NNCF failed.
    """
    lacking = [name for name in ("nncf", "openvino") if name not in versions()]
    if lacking:
        raise MissingExtraError(f"needs {' and '.join(lacking)}: pip install {' '.join(lacking)}")
    if not (target / "model.xml").is_file():
        tell("prepare: NNCF quantises the export without rewrites (minutes)")
        with new_directory(target) as new:
            files = [model, images, new / "model.xml"]
            command = [sys.executable, "-m", "invariclip.bench.latency.quantise_peer", *map(str, files)]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=LONGEST)
            except subprocess.CalledProcessError as error:
                last = (error.stderr.strip().splitlines() or [f"exit {error.returncode}"])[-1]
                raise WorkerError("NNCF", "failed", last[:300]) from error
            except subprocess.TimeoutExpired as error:
                raise WorkerError("NNCF", f"was not done in {LONGEST} s", "") from error
    return target / "model.xml"


def quantise(model: Path, images: Path, out: Path) -> None:
    """Writes OpenVINO's OUT.xml and OUT.bin.

    Args:
        model: The ONNX file, uint8 [N, H, W, 3] in.
        images: A .npy of uint8 [n, H, W, 3] to calibrate on; the first `SUBSET` are taken.
        out: The .xml to write. What is not int8 stays in float32.
    """
    # OpenVINO and NNCF report themselves over the network if they can: in this process they cannot
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    openvino: Any = importlib.import_module("openvino")
    nncf: Any = importlib.import_module("nncf")
    nncf.set_log_level(logging.ERROR)
    shown = np.load(images, mmap_mode="r", allow_pickle=False)[:SUBSET]
    dataset = nncf.Dataset([np.array(image)[None] for image in shown])
    quantised = nncf.quantize(openvino.Core().read_model(model), dataset, model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(quantised, out, compress_to_fp16=False)


if __name__ == "__main__":
    quantise(*map(Path, sys.argv[1:4]))
