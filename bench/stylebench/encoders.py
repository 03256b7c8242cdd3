"""The two encoders of the table, from one forward pass: the ImageNet trunk's features, and the reference's embeddings.

The reference checkpoint is a frozen ImageNet ResNet-18 with a linear head and no bias, so its embeddings are a product
of the trunk's features: what is embedded and kept is the features alone.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from invariclip.bench.stylebench.features import fused
from invariclip.errors import CheckpointError
from invariclip.pixels import normalise

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from invariclip.export.models.checkpoint import Checkpoint
    from invariclip.pixels import PixelSpec

Precision = Literal["float32", "bfloat16"]
RESNET18, REFERENCE = "resnet18", "reference"
ENCODERS = (RESNET18, REFERENCE)


class Trunk:
    """Pooled features of a reference checkpoint's trunk, as an encoder; it takes no texts."""

    def __init__(self, checkpoint: Checkpoint, precision: Precision = "float32") -> None:
        """Takes the trunk out of a checkpoint and fuses its operations.

        Args:
            checkpoint: A reference checkpoint (`reference.CONFIG`).
            precision: bfloat16 is five times as fast on processors that multiply in it.

        Raises:
            CheckpointError: Its image tower is not a trunk with a linear head and no bias.
        """
        tower: Any = checkpoint.module.visual
        head = getattr(getattr(tower, "head", None), "proj", None)
        if not isinstance(head, torch.nn.Linear) or getattr(head, "bias", None) is not None:
            raise CheckpointError(
                f"{checkpoint.name}: its image tower is not a trunk with a linear head and no bias; the table is for "
                "checkpoints that `train` wrote"
            )
        self.pixels: PixelSpec = checkpoint.pixels
        self.embed_dim: int = head.in_features
        self.sha256 = hashlib.sha256(f"{checkpoint.sha256}\ntrunk\n{precision}".encode()).hexdigest()
        self.head: NDArray[np.float64] = head.weight.detach().double().numpy()
        """float64 [D, width of the trunk]."""
        self._dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self._run = fused(tower.trunk, self._dtype)

    def encode_images(self, batch: NDArray[np.uint8], /) -> NDArray[np.float32]:
        """uint8 [N, 224, 224, 3] to float32 [N, 512]."""
        images = torch.from_numpy(normalise(batch, self.pixels)).to(self._dtype)
        with torch.inference_mode():
            found = self._run(images.contiguous(memory_format=torch.channels_last))
        return np.asarray(found.float().numpy(), dtype=np.float32)
