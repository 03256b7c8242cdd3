"""What calibration needs of an encoder, whatever it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from invariclip.preprocessing.pixels import PixelSpec


class Encoder(Protocol):
    """What calibration needs of a checkpoint; `export.models.checkpoint.Checkpoint` is one.

    Attributes:
        pixels: How it wants its images.
        embed_dim: D.
        sha256: Digest of the weights.
    """

    @property
    def pixels(self) -> PixelSpec:
        """How it wants its images."""

    @property
    def embed_dim(self) -> int:
        """D, the width of the embeddings."""

    @property
    def sha256(self) -> str:
        """Digest of the weights."""

    def encode_images(self, batch: NDArray[np.uint8], /) -> NDArray[np.float32]:
        """uint8 [N, H, W, 3] to float32 [N, D]; the length does not matter."""


class TextEncoder(Encoder, Protocol):
    """An encoder that also takes texts."""

    @property
    def tokenizer(self) -> Callable[[list[str]], NDArray[np.int64]]:
        """Texts to ids [N, L]."""

    def encode_texts(self, ids: NDArray[np.int64], /) -> NDArray[np.float32]:
        """int64 [N, L] to float32 [N, D]; the length does not matter."""
