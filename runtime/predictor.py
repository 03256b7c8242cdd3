"""An artifact that answers: classify, embed, and swap classes, with numpy and an inference engine alone."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from invariclip.artifact import checked_path, read_manifest
from invariclip.backends.onnxruntime import OnnxRuntimeBackend
from invariclip.errors import ArtifactError, InputError
from invariclip.pixels import stack
from invariclip.prompts import DEFAULT_TEMPLATES, class_bank
from invariclip.tokenizer import Tokenizer

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from invariclip.artifact import Manifest
    from invariclip.backends import Backend
    from invariclip.pixels import Picture

DEFAULT_BATCH = 16

Pictures: TypeAlias = "Sequence[Picture] | NDArray[np.uint8]"
"""A list of pictures, or a batch uint8 [N, H, W, 3] that `invariclip.pixels.stack` has prepared."""


@dataclass(frozen=True)
class Prediction:
    """What a picture was taken for.

    Attributes:
        label: The most probable class.
        probability: Its probability, from 0 to 1 (softmax over all classes; per class for sigmoid models).
        ranking: The `top_k` classes with their probabilities, best first.
    """

    label: str
    probability: float
    ranking: tuple[tuple[str, float], ...]


class Model:
    """A loaded artifact; safe to share between threads. Use `load`."""

    def __init__(self, folder: Path, manifest: Manifest, *, variant: str, threads: int | None) -> None:
        """Opens the image tower now and the text tower when a text first needs it.

        Raises:
            ArtifactError: The variant does not exist, or a file is missing or changed.
        """
        if variant not in manifest.variants:
            raise ArtifactError(
                f"{folder}: no variant {variant!r}; available: {', '.join(manifest.variants) or 'none'}"
            )
        self.manifest = manifest
        self.classes: tuple[str, ...] = manifest.classes
        self.variant = variant
        self._folder = folder
        self._threads = threads
        self._image: Backend = OnnxRuntimeBackend(
            checked_path(folder, manifest.variants[variant].image), threads=threads
        )
        self._text = _TextTower(folder, manifest, variant, threads)
        self._bank: NDArray[np.float32] | None = None  # None: the classes baked into the graph

    @property
    def width(self) -> int:
        """d, the length of every embedding."""
        return self.manifest.width

    @property
    def space_id(self) -> str:
        """Names the embedding space; compare vectors only where it is equal."""
        return self.manifest.space_id

    def embed_images(self, pictures: Pictures, *, batch_size: int = DEFAULT_BATCH) -> NDArray[np.float32]:
        """Unit-length embeddings of pictures, float32 [N, d].

        Raises:
            InputError: A picture cannot be read, or `batch_size` is below 1.
        """
        blocks = [
            self._image.run({"pixels": batch}, ("embedding",))["embedding"]
            for batch in self._batches(pictures, batch_size)
        ]
        return np.concatenate(blocks) if blocks else np.empty((0, self.width), dtype=np.float32)

    def embed_texts(self, texts: Sequence[str], *, batch_size: int = 64) -> NDArray[np.float32]:
        """Unit-length embeddings of texts, float32 [N, d]; a text longer than the context is cut with a warning.

        Raises:
            InputError: Something is not a string, or `batch_size` is below 1.
        """
        return self._text.embed([texts] if isinstance(texts, str) else list(texts), batch_size)

    def answer(
        self, pictures: Pictures, *, batch_size: int = DEFAULT_BATCH
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Embeddings [N, d] and class probabilities [N, K] in one pass, float32.

        Raises:
            InputError: There are no classes, a picture cannot be read, or `batch_size` is below 1.
        """
        if not self.classes:
            raise InputError("the artifact has no classes; give some with with_classes([...])")
        blocks = [self._answer(batch) for batch in self._batches(pictures, batch_size)]
        if not blocks:
            return np.empty((0, self.width), dtype=np.float32), np.empty((0, len(self.classes)), dtype=np.float32)
        embeddings, probabilities = zip(*blocks, strict=True)
        return np.concatenate(embeddings), np.concatenate(probabilities)

    def probabilities(self, pictures: Pictures, *, batch_size: int = DEFAULT_BATCH) -> NDArray[np.float32]:
        """Class probabilities, float32 [N, K], in the order of `classes`.

        Raises:
            InputError: There are no classes, a picture cannot be read, or `batch_size` is below 1.
        """
        return self.answer(pictures, batch_size=batch_size)[1]

    def classify(self, pictures: Pictures, *, top_k: int = 5, batch_size: int = DEFAULT_BATCH) -> list[Prediction]:
        """The best classes of each picture, in order.

        Raises:
            InputError: There are no classes, a picture cannot be read, or a number is below 1.
        """
        if top_k < 1:
            raise InputError(f"top_k must be at least 1, not {top_k}")
        return [self._prediction(row, top_k) for row in self.probabilities(pictures, batch_size=batch_size)]

    def with_classes(self, classes: Sequence[str], templates: Sequence[str] | None = None) -> Model:
        """The same model answering with other classes; nothing is loaded again.

        Args:
            classes: Class names.
            templates: Prompts with one `{}`; None takes the artifact's own, or the default.

        Raises:
            InputError: No class, an empty or repeated one, or a template without `{}`.
        """
        names = tuple(classes)
        bank = class_bank(self.embed_texts, names, templates or self.manifest.templates or DEFAULT_TEMPLATES)
        other = object.__new__(Model)
        other.__dict__.update(self.__dict__)
        other.classes, other._bank = names, bank.astype(np.float32)
        return other

    def describe(self) -> dict[str, Any]:
        """What really runs: engine, execution provider, threads, precision."""
        return {**self._image.describe(), "precision": self.manifest.variants[self.variant].precision}

    def _batches(self, pictures: Pictures, batch_size: int) -> Iterator[NDArray[np.uint8]]:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}")
        if isinstance(pictures, np.ndarray) and pictures.ndim == 4:
            self._check_prepared(pictures)
            for start in range(0, len(pictures), batch_size):
                yield np.ascontiguousarray(pictures[start : start + batch_size])
            return
        if isinstance(pictures, (str, bytes, np.ndarray)) or not hasattr(pictures, "__len__"):
            raise InputError("pass a list of pictures, even for one: [picture]")
        for start in range(0, len(pictures), batch_size):
            yield stack(pictures[start : start + batch_size], self.manifest.pixels)

    def _check_prepared(self, batch: NDArray[Any]) -> None:
        if batch.dtype != np.uint8 or batch.shape[1:] != (*self.manifest.pixels.image_size, 3):
            size = "x".join(map(str, self.manifest.pixels.image_size))
            raise InputError(
                f"an array of {batch.dtype} {list(batch.shape)} is not a prepared batch of uint8 {size}x3; "
                "pass a list of pictures of any size instead"
            )

    def _answer(self, batch: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        if self._bank is None:
            outputs = self._image.run({"pixels": batch}, ("embedding", "probabilities"))
            return outputs["embedding"], outputs["probabilities"]
        embedding = self._image.run({"pixels": batch}, ("embedding",))["embedding"]
        logits = np.float32(self.manifest.model.logit_scale) * (embedding @ self._bank.T)
        if self.manifest.model.logit_bias is not None:
            # The sigmoid, in the form that cannot overflow
            return embedding, 0.5 + 0.5 * np.tanh(0.5 * (logits + np.float32(self.manifest.model.logit_bias)))
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return embedding, np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float32)

    def _prediction(self, row: NDArray[np.float32], top_k: int) -> Prediction:
        order = np.argsort(-row, kind="stable")[:top_k]
        ranking = tuple((self.classes[i], float(row[i])) for i in order)
        return Prediction(*ranking[0], ranking)


class _TextTower:
    """Tokenizer and text graph, opened at the first text: classifying with baked classes never needs them."""

    def __init__(self, folder: Path, manifest: Manifest, variant: str, threads: int | None) -> None:
        self._folder, self._manifest, self._variant, self._threads = folder, manifest, variant, threads
        self._lock = threading.Lock()
        self._opened: tuple[Tokenizer, Backend] | None = None

    def embed(self, texts: list[str], batch_size: int) -> NDArray[np.float32]:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}")
        tokenizer, backend = self._open()
        blocks = [
            backend.run({"input_ids": tokenizer(texts[start : start + batch_size])})["embedding"]
            for start in range(0, len(texts), batch_size)
        ]
        return np.concatenate(blocks) if blocks else np.empty((0, self._manifest.width), dtype=np.float32)

    def _open(self) -> tuple[Tokenizer, Backend]:
        with self._lock:
            if self._opened is None:
                facts = self._manifest.variants[self._variant].text
                self._opened = (
                    Tokenizer.from_file(checked_path(self._folder, self._manifest.tokenizer), self._manifest.text),
                    OnnxRuntimeBackend(checked_path(self._folder, facts), threads=self._threads),
                )
            return self._opened


def load(folder: str | os.PathLike[str], *, variant: str = "float32", threads: int | None = None) -> Model:
    """Opens an artifact.

    Args:
        folder: The `name.icm` folder.
        variant: One of the precisions that the manifest lists.
        threads: Threads of the engine; None takes what affinity and cgroup allow.

    Raises:
        ArtifactError: Not an artifact, damaged, of another schema version, or without that variant.
    """
    return Model(Path(folder), read_manifest(folder), variant=variant, threads=threads)
