"""An artifact that answers: classify, embed, swap classes and projection, with numpy and an inference engine alone."""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from invariclip.artifact import checked_path, read_manifest
from invariclip.backends import DEFAULT_BACKEND, open_backend, require_backend
from invariclip.console import silent
from invariclip.errors import ArtifactError, InputError, ProjectionError, UnprovedBackendWarning
from invariclip.manifest import EMBEDDING, IMAGE_INPUT, PROBABILITIES, PROJECTION_INPUT, space_id
from invariclip.pixels import stack
from invariclip.prompts import DEFAULT_TEMPLATES, check_prompts, class_bank
from invariclip.text_tower import TextTower

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from invariclip.console import Progress
    from invariclip.manifest import Manifest, Variant
    from invariclip.pixels import Picture
    from invariclip.projection import Projection

DEFAULT_BATCH = 16
EXCHANGING_BACKENDS = ("onnxruntime",)
"""Engines that let an initializer be overridden at a run; the others read it as a constant."""

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

    def __init__(
        self, folder: Path, manifest: Manifest, *, variant: str, backend: str = DEFAULT_BACKEND, threads: int | None
    ) -> None:
        """Opens the image tower now and the text tower when a text first needs it.

        Raises:
            ArtifactError: The variant does not exist, or a file is missing or changed.
            InputError: No engine is called `backend`.
            MissingExtraError: Its package is not installed.
        """
        if variant not in manifest.variants:
            raise ArtifactError(
                f"{folder}: no variant {variant!r}; available: {', '.join(manifest.variants) or 'none'}"
            )
        _require_right(folder, manifest.variants[variant], backend)
        self.manifest = manifest
        self.classes: tuple[str, ...] = manifest.classes
        self.templates: tuple[str, ...] = manifest.templates or DEFAULT_TEMPLATES
        self.variant = variant
        self.backend = backend
        self._folder = folder
        chosen = manifest.variants[variant]
        self._image = open_backend(backend, checked_path(folder, chosen.image), threads=threads, compute=chosen.compute)
        self._text = TextTower(folder, manifest, variant, backend=backend, threads=threads)
        self._space_id = manifest.space_id
        self._feeds: dict[str, NDArray[np.float32]] = {}  # what every run is fed beside pictures or ids
        self._baked = True  # the classes are those of the graph
        self._bank: NDArray[np.float32] | None = None  # of the others, embedded when first needed
        self._lock = threading.Lock()

    @property
    def width(self) -> int:
        """d, the length of every embedding."""
        return self.manifest.width

    @property
    def space_id(self) -> str:
        """Names the embedding space; compare vectors only where it is equal."""
        return self._space_id

    def embed_images(self, pictures: Pictures, *, batch_size: int = DEFAULT_BATCH) -> NDArray[np.float32]:
        """Unit-length embeddings of pictures, float32 [N, d].

        Raises:
            InputError: A picture cannot be read, or `batch_size` is below 1.
        """
        blocks = [
            self._image.run({IMAGE_INPUT: batch, **self._feeds}, (EMBEDDING,))[EMBEDDING]
            for batch in self._batches(pictures, batch_size)
        ]
        return np.concatenate(blocks) if blocks else np.empty((0, self.width), dtype=np.float32)

    def embed_texts(self, texts: Sequence[str], *, batch_size: int = 64) -> NDArray[np.float32]:
        """Unit-length embeddings of texts, float32 [N, d]; a text longer than the context is cut with a warning.

        Raises:
            InputError: Something is not a string, or `batch_size` is below 1.
        """
        return self._text.embed([texts] if isinstance(texts, str) else list(texts), batch_size, self._feeds)

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

    def with_classes(
        self, classes: Sequence[str], templates: Sequence[str] | None = None, *, progress: Progress = silent
    ) -> Model:
        """The same model answering with other classes; nothing is loaded again.

        Args:
            classes: Class names.
            templates: Prompts with one `{}`, see `prompts.template_set`; None takes the artifact's own, or the default.
            progress: `console.bar` or `console.silent`.

        Raises:
            InputError: No class, an empty or repeated one, or a template without `{}`.
        """
        chosen = tuple(templates or self.manifest.templates or DEFAULT_TEMPLATES)
        check_prompts(classes, chosen)
        names = tuple(classes)
        bank = class_bank(self.embed_texts, names, chosen, progress=progress).astype(np.float32)
        return self._but(classes=names, templates=chosen, _baked=False, _bank=bank)

    def with_projection(self, projection: Projection) -> Model:
        """The same model with another projection of the same shape; nothing is loaded or exported again.

        Pictures and texts are then embedded in the projection's own space, whose id `space_id` gives. The classes are
        embedded anew, through the text tower, when they are first asked for.

        Args:
            projection: A_inv of the checkpoint's width D and the artifact's width d.

        Raises:
            ArtifactError: The artifact was exported with its projection folded in, or without one.
            InputError: The engine cannot exchange it.
            ProjectionError: It is of another shape.
        """
        facts, model = self.manifest.projection, self.manifest.model
        how = "none" if facts is None else f"image {facts.image_fold}, text {facts.text_fold}"
        if facts is None or {facts.image_fold, facts.text_fold} != {"input"}:
            raise ArtifactError(
                f"{self._folder}: its projection cannot be exchanged ({how}); export it again with "
                "--projection FILE --projection-as-input-initializer"
            )
        if self.backend not in EXCHANGING_BACKENDS:
            raise InputError(
                f"backend {self.backend!r} cannot exchange the projection; available: {', '.join(EXCHANGING_BACKENDS)}"
            )
        if projection.A_inv.shape != (model.embed_dim, facts.rank):
            raise ProjectionError(
                f"the projection is {projection.embed_dim} → {projection.rank}, the artifact's towers take "
                f"{model.embed_dim} → {facts.rank}; calibrate with --rank {facts.rank}, or export again"
            )
        matrix = np.ascontiguousarray(projection.A_inv, dtype=np.float32)
        return self._but(
            _feeds={PROJECTION_INPUT: matrix},
            _space_id=space_id(model.checkpoint_sha256, projection.digest, self.manifest.pixels, self.manifest.text),
            _baked=False,
            _bank=None,
        )

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

    def _but(self, **changes: Any) -> Model:
        other = object.__new__(Model)
        other.__dict__.update(self.__dict__, _lock=threading.Lock(), **changes)
        return other

    def _answer(self, batch: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        if self._baked:
            outputs = self._image.run({IMAGE_INPUT: batch}, (EMBEDDING, PROBABILITIES))
            return outputs[EMBEDDING], outputs[PROBABILITIES]
        embedding = self._image.run({IMAGE_INPUT: batch, **self._feeds}, (EMBEDDING,))[EMBEDDING]
        logits = np.float32(self.manifest.model.logit_scale) * (embedding @ self._own_bank().T)
        if self.manifest.model.logit_bias is not None:
            # The sigmoid, in the form that cannot overflow
            return embedding, 0.5 + 0.5 * np.tanh(0.5 * (logits + np.float32(self.manifest.model.logit_bias)))
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return embedding, np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float32)

    def _own_bank(self) -> NDArray[np.float32]:
        with self._lock:
            if self._bank is None:
                self._bank = class_bank(self.embed_texts, self.classes, self.templates).astype(np.float32)
            return self._bank

    def _prediction(self, row: NDArray[np.float32], top_k: int) -> Prediction:
        order = np.argsort(-row, kind="stable")[:top_k]
        ranking = tuple((self.classes[i], float(row[i])) for i in order)
        return Prediction(*ranking[0], ranking)


def _require_right(folder: Path, variant: Variant, backend: str) -> None:
    """Refuses an engine that is known to answer a graph wrongly, and says so where one was never tried.

    Raises:
        InputError: The graph resizes by ONNX's Resize, which other engines than ONNX Runtime compute differently.
    """
    require_backend(backend)
    if variant.front == "resize" and backend != DEFAULT_BACKEND:
        raise InputError(
            f"{folder}: its image graph resizes by ONNX's Resize, which {backend} computes differently; "
            f"use {DEFAULT_BACKEND}, or export with --pixels-in-graph matmul"
        )
    if backend not in variant.parity:
        warnings.warn(
            f"{folder}: was proved on {', '.join(variant.parity) or 'no engine'}, not on {backend}; "
            f"`invariclip verify --backend {backend}` tells whether it answers alike",
            UnprovedBackendWarning,
            stacklevel=4,
        )


def load(
    folder: str | os.PathLike[str],
    *,
    variant: str = "float32",
    backend: str = DEFAULT_BACKEND,
    threads: int | None = None,
) -> Model:
    """Opens an artifact.

    Args:
        folder: The `name.icm` folder.
        variant: One of the precisions that the manifest lists.
        backend: The engine, one of `invariclip.backends.BACKENDS`.
        threads: Threads of the engine; None takes what affinity and cgroup allow.

    Raises:
        ArtifactError: Not an artifact, damaged, of another schema version, or without that variant.
        InputError: No engine is called `backend`.
        MissingExtraError: The engine's package is not installed.
    """
    return Model(Path(folder), read_manifest(folder), variant=variant, backend=backend, threads=threads)
