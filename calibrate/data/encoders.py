"""The encoders that calibration embeds with: a checkpoint in PyTorch, or an exported artifact without it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from invariclip.artifact.folder import checked_graph, checked_path, read_manifest
from invariclip.artifact.manifest import EMBEDDING, IMAGE_INPUT, TEXT_INPUT
from invariclip.backends import open_backend
from invariclip.backends.batching import run_in_buckets
from invariclip.errors import InputError, MissingExtraError
from invariclip.preprocessing.tokenizer import Tokenizer
from invariclip.selection import choose, require_openable
from invariclip.text_tower import cut_to_longest

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from numpy.typing import NDArray

    from invariclip.backends import Backend
    from invariclip.preprocessing.pixels import PixelSpec


class Encoder(Protocol):
    """What calibration needs of a checkpoint; `export.checkpoints.checkpoint.Checkpoint` is one.

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


@dataclass(frozen=True)
class EncoderOpening:
    """How an encoder is opened, here or in a worker elsewhere.

    Attributes:
        model: See `export.checkpoints.checkpoint.load_checkpoint`, as of the next two.
        checkpoint: The weights' file.
        tokenizer: The tokenizer's folder.
        artifact: An artifact to embed with; the others are then ignored.
    """

    model: str
    checkpoint: Path | None = None
    tokenizer: str | None = None
    artifact: Path | None = None

    def open(self) -> Encoder:
        """Opens it.

        Raises:
            CheckpointError: The checkpoint cannot be loaded.
            ArtifactError: The artifact cannot be opened.
            InputError: The artifact holds a projection.
            MissingExtraError: PyTorch is not installed.
        """
        if self.artifact is not None:
            return ArtifactEncoder(self.artifact)
        try:
            from invariclip.export.checkpoints.checkpoint import load_checkpoint
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                f'a checkpoint needs {error.name}: pip install "invariclip[export]"; or name an --artifact'
            ) from error
        return cast("Encoder", load_checkpoint(self.model, self.checkpoint, tokenizer=self.tokenizer))


class ArtifactEncoder:
    """The towers of an artifact that holds no projection: what it answers is the checkpoint's own embedding."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        variant: str | None = None,
        backend: str | None = None,
        threads: int | None = None,
    ) -> None:
        """Opens the image tower; the text tower follows at the first text. The arguments are those of `load`.

        Raises:
            InputError: The artifact holds a projection already, or see `load`.
            ArtifactError: See `load`.
        """
        where, manifest = Path(folder), read_manifest(folder)
        if manifest.projection is not None:
            raise InputError(
                f"{where}: has a projection in it ({manifest.projection.estimator}), so its embeddings are not the "
                "checkpoint's; export one without --projection and calibrate with that"
            )
        chosen = choose(where, manifest, variant=variant, backend=backend, threads=threads)
        self._folder, self._manifest = where, manifest
        self._backend, self._threads = chosen.backend, chosen.threads
        self._variant = require_openable(where, manifest, chosen.variant, chosen.backend, "exact")
        with checked_graph(where, self._variant.image, self._manifest) as graph:
            self._image = open_backend(chosen.backend, graph, threads=chosen.threads, compute=self._variant.compute)
        self._text: Backend | None = None
        self._tokenizer: Tokenizer | None = None

    @property
    def name(self) -> str:
        """The model's."""
        return self._manifest.model.name

    @property
    def pixels(self) -> PixelSpec:
        """How it wants its images."""
        return self._manifest.pixels

    @property
    def embed_dim(self) -> int:
        """D."""
        return self._manifest.model.embed_dim

    @property
    def sha256(self) -> str:
        """Digest of the checkpoint's weights: what is fitted here belongs to that checkpoint."""
        return self._manifest.model.checkpoint_sha256

    @property
    def tokenizer(self) -> Callable[[list[str]], NDArray[np.int64]]:
        """Texts to ids [N, context_length]."""
        if self._tokenizer is None:
            path = checked_path(self._folder, self._manifest.tokenizer)
            self._tokenizer = Tokenizer.from_file(path, self._manifest.text)
        return self._tokenizer

    def encode_images(self, batch: NDArray[np.uint8], /) -> NDArray[np.float32]:
        """uint8 [N, H, W, 3] to float32 [N, D], unit length."""
        return np.asarray(run_in_buckets(self._image, IMAGE_INPUT, batch, (EMBEDDING,))[EMBEDDING])

    def encode_texts(self, ids: NDArray[np.int64], /) -> NDArray[np.float32]:
        """int64 [N, L] to float32 [N, D], unit length."""
        if self._text is None:
            with checked_graph(self._folder, self._variant.text, self._manifest) as graph:
                compute = self._variant.text_compute
                self._text = open_backend(self._backend, graph, threads=self._threads, compute=compute)
        if self._variant.text_length == "dynamic":
            ids = cut_to_longest(ids, self._manifest.text)
        return np.asarray(run_in_buckets(self._text, TEXT_INPUT, ids, (EMBEDDING,))[EMBEDDING])
