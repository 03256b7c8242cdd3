"""Encoders of studies: an image tower that is a trunk with a linear head, taken apart; the trunk's features are kept.

The reference's trunk is frozen and published; what was learnt is the head. So features are computed once, and every
checkpoint with that trunk costs a product: `through` makes a table of its embeddings from a table of features.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from invariclip.calibrate.data.embed import Store
from invariclip.calibrate.projection.classifiers import unit
from invariclip.errors import CheckpointError, MissingExtraError
from invariclip.preprocessing.pixels import normalise

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.calibrate.data.pairs import EmbeddingTable
    from invariclip.export.checkpoints.checkpoint import Checkpoint
    from invariclip.preprocessing.pixels import PixelSpec
    from invariclip.preprocessing.tokenizer import Tokenizer

    Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]
    from invariclip.calibrate.data.encoders import Encoder


def load_encoder(
    name: str, *, checkpoint: Path | None = None, precision: Precision = "float32", threads: int = 2
) -> Encoder:
    """A checkpoint as it is, or taken apart so that its trunk's features are what is computed and kept.

    Args:
        name: A model as `invariclip calibrate` takes it.
        checkpoint: The model's weights.
        precision: `bfloat16` needs an image tower that is a trunk with a linear head, and OpenVINO.
        threads: Of the engine.

    Raises:
        CheckpointError: The model is not known, lacks its weights, or has another image tower.
        MissingExtraError: OpenVINO is wanted and not installed.
    """
    from invariclip.export.checkpoints.checkpoint import load_checkpoint

    loaded = load_checkpoint(name, checkpoint, threads=threads)
    return loaded if precision == "float32" else Quick(loaded, precision)


Precision = Literal["float32", "bfloat16"]
BATCH = 32


class TrunkEncoder:
    """Pooled features of a checkpoint's trunk and a 1 behind them, as an encoder; it takes no texts.

    Embeddings are kept at unit length, and a head with a bias needs the length: of features with a 1 behind them it is
    a matrix, whatever their length.
    """

    def __init__(self, checkpoint: Checkpoint, precision: Precision = "float32", threads: int = 2) -> None:
        """Takes the trunk out of a checkpoint.

        Args:
            checkpoint: Its image tower is a timm trunk with a linear head.
            precision: Torch's float32, or OpenVINO's bfloat16, which is several times as fast on processors that
                multiply in it.
            threads: Of OpenVINO; torch has those of the process.

        Raises:
            CheckpointError: Its image tower is something else.
            MissingExtraError: OpenVINO is wanted and not installed.
        """
        tower: Any = checkpoint.module.visual
        head = getattr(getattr(tower, "head", None), "proj", None)
        if not isinstance(head, torch.nn.Linear):
            raise CheckpointError(
                f"{checkpoint.name}: its image tower is not a trunk with a linear head; name another `--precision` or "
                "a checkpoint like the reference"
            )
        bias = torch.zeros(head.out_features) if head.bias is None else head.bias
        self.pixels: PixelSpec = checkpoint.pixels
        self.embed_dim: int = head.in_features + 1
        self.head: NDArray[np.float64] = torch.cat([head.weight, bias[:, None]], dim=1).detach().double().numpy()
        """float64 [D, width of the trunk + 1], the bias being its last column."""
        self.sha256 = hashlib.sha256(f"{_digest(tower.trunk)}\n{precision}\nfeatures, 1".encode()).hexdigest()
        """Of the trunk alone: another head has the same features."""
        size = self.pixels.image_size
        self._run = _openvino(tower.trunk, size, threads) if precision == "bfloat16" else fused(tower.trunk, size)

    def encode_images(self, batch: NDArray[np.uint8], /) -> NDArray[np.float32]:
        """uint8 [N, H, W, 3] to float32 [N, width of the trunk + 1]."""
        parts = []
        for start in range(0, len(batch), BATCH):
            images = normalise(batch[start : start + BATCH], self.pixels)
            count = len(images)
            # Both engines are made for one shape.
            full = np.concatenate([images, np.zeros((BATCH - count, *images.shape[1:]), dtype=np.float32)])
            parts.append(self._run(full)[:count])
        found = np.concatenate(parts)
        return np.concatenate([found, np.ones((len(found), 1), dtype=np.float32)], axis=1)


class Quick:
    """A checkpoint as an encoder whose images go through its trunk in another precision; texts stay in float32."""

    def __init__(self, checkpoint: Checkpoint, precision: Precision, kept: Path | None = None) -> None:
        """Takes the checkpoint apart, see `TrunkEncoder`.

        Args:
            checkpoint: Its image tower is a trunk with a linear head.
            precision: Of the trunk.
            kept: Keeps the features of what the trunk was shown, by its pixels, for other heads and texts.
        """
        self.checkpoint = checkpoint
        self.trunk = TrunkEncoder(checkpoint, precision)
        self.pixels: PixelSpec = checkpoint.pixels
        self.embed_dim: int = checkpoint.embed_dim
        own = hashlib.sha256(self.trunk.head.tobytes()).hexdigest()
        self.sha256 = hashlib.sha256(f"{self.trunk.sha256}\n{own}\n{checkpoint.sha256}".encode()).hexdigest()
        self._store = Store(kept, f"{self.trunk.sha256}\nby pixels", self.trunk.embed_dim) if kept else None

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's."""
        return self.checkpoint.tokenizer

    @property
    def module(self) -> torch.nn.Module:
        """The checkpoint's."""
        return self.checkpoint.module

    @property
    def name(self) -> str:
        """The checkpoint's."""
        return self.checkpoint.name

    def encode_images(self, batch: NDArray[np.uint8], /) -> NDArray[np.float32]:
        """uint8 [N, H, W, 3] to float32 [N, D]."""
        return np.asarray(self._features(batch) @ self.trunk.head.T, dtype=np.float32)

    def _features(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        if self._store is None or not len(batch):
            return self.trunk.encode_images(batch)
        keys = [hashlib.sha256(image.tobytes()).digest() for image in batch]
        new = [place for place, key in enumerate(keys) if key not in self._store.rows]
        if new:
            found = self.trunk.encode_images(batch[new])
            self._store.add({keys[place]: row for place, row in zip(new, found, strict=True)}, {})
        return np.stack([self._store.rows[key] for key in keys])

    def encode_texts(self, ids: NDArray[np.int64], /) -> NDArray[np.float32]:
        """As the checkpoint does."""
        return self.checkpoint.encode_texts(ids)


def through(trunk: TrunkEncoder, table: EmbeddingTable) -> EmbeddingTable:
    """A table of the trunk's features as one of the checkpoint's embeddings."""
    return replace(table, vectors=unit(table.vectors @ trunk.head.T))


def fused(trunk: torch.nn.Module, size: tuple[int, int]) -> Run:
    """A trunk with its operations fused for the CPU: three times as fast, equal to rounding.

    Args:
        trunk: In evaluation mode; it is copied.
        size: Height and width of its images.

    Returns:
        Normalised float32 [`BATCH`, 3, H, W] to float32 [`BATCH`, width].
    """
    example = torch.zeros(BATCH, 3, *size).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = copy.deepcopy(trunk).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        traced = torch.jit.trace(own, example, check_trace=False)  # type: ignore[no-untyped-call]
        graph: torch.nn.Module = torch.jit.optimize_for_inference(torch.jit.freeze(traced))

    def run(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            found = graph(torch.from_numpy(batch).contiguous(memory_format=torch.channels_last))
        return np.asarray(found.float().numpy(), dtype=np.float32)

    return run


def _openvino(trunk: torch.nn.Module, size: tuple[int, int], threads: int) -> Run:
    try:
        import openvino
    except ImportError:
        raise MissingExtraError('bfloat16 needs OpenVINO: pip install "invariclip[openvino]"') from None
    shape = (BATCH, 3, *size)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = openvino.convert_model(trunk, example_input=torch.zeros(shape), input=[list(shape)])
    hints = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(model, "CPU", hints)

    def run(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        # The engine reuses its output's memory.
        return np.array(compiled(batch)[0], dtype=np.float32)

    return run


def _digest(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()
