"""The parity contract: an exported graph answers like its checkpoint, shown on real pictures, or it is not shipped.

Reference: the original PyTorch encoder in float32, unfolded; then A_inv and the L2 norm in float64. Candidate: the ONNX
files. Both see the same uint8 pictures and the same ids. The reference encodes every input once, however many
candidates (variants, projections) are held against it. `figures` says what is measured and bounded.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from invariclip.backends.onnxruntime import OnnxRuntimeBackend
from invariclip.console import silent
from invariclip.errors import ContractError
from invariclip.export import evidence
from invariclip.export.figures import FLOAT32, Comparison, Figures, Thresholds, failures, max_diff, measure
from invariclip.export.towers import EMBEDDING, PROBABILITIES
from invariclip.prompts import class_bank

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.backends import Backend
    from invariclip.console import Progress
    from invariclip.export.checkpoint import Checkpoint
    from invariclip.export.evidence import Pictures
    from invariclip.projection import Projection

BATCH = 16
"""Rows per run; the last batch is smaller, which is one more shape that is tried."""
_ALONE = 8
"""Rows of the first batch that are also run one by one."""


@dataclass(frozen=True)
class Job:
    """What one artifact is made from, and so what it must answer like.

    Attributes:
        checkpoint: The original model.
        projection: A_inv, or None.
        classes: Names that are baked in.
        templates: Prompt templates of the classes.
        bank: float64 [K, d] unit class embeddings of the reference, or None without classes.
    """

    checkpoint: Checkpoint
    projection: Projection | None
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    bank: NDArray[np.float64] | None


@dataclass(frozen=True)
class Candidate:
    """Two loaded graphs and the projection that they claim to hold."""

    image: Backend
    text: Backend
    job: Job

    @classmethod
    def open(cls, image: Path, text: Path, job: Job, *, threads: int | None = None) -> Candidate:
        """Loads two ONNX files into ONNX Runtime.

        Raises:
            ArtifactError: One of them cannot be loaded.
        """
        return cls(OnnxRuntimeBackend(image, threads=threads), OnnxRuntimeBackend(text, threads=threads), job)


@dataclass(frozen=True)
class Verdict:
    """What came out for one candidate.

    Attributes:
        image: Figures of the image tower.
        text: Figures of the text tower.
        broken: Every bound that is broken, in words; empty if it passed.
        parity: All of it as the manifest stores it.
    """

    image: Figures
    text: Figures
    broken: list[str]
    parity: dict[str, Any]

    def require(self, what: str) -> None:
        """Fails if any bound is broken.

        Raises:
            ContractError: Naming each figure that failed, and by how much.
        """
        if self.broken:
            raise ContractError(f"{what} does not answer like its checkpoint: {'; '.join(self.broken)}")


def prepare(
    checkpoint: Checkpoint, projection: Projection | None, classes: tuple[str, ...], templates: tuple[str, ...]
) -> Job:
    """A job whose class embeddings come from the reference: PyTorch in float32, projection and mean in float64.

    Raises:
        InputError: Bad classes or templates.
    """

    def embed(texts: list[str]) -> NDArray[np.float64]:
        return project(checkpoint.encode_texts(checkpoint.tokenizer(texts)), projection)

    bank = class_bank(embed, classes, templates) if classes else None
    return Job(checkpoint, projection, classes, templates, bank)


def check(
    candidates: Mapping[str, Candidate],
    pictures: Pictures,
    bounds: Thresholds = FLOAT32,
    *,
    progress: Progress = silent,
) -> dict[str, Verdict]:
    """Holds graphs of one checkpoint against it.

    Pictures are matched with the baked classes, or with a list of prompts; texts with those pictures. Both banks are
    the reference's own embeddings.

    Args:
        candidates: Graphs by name; all their jobs have the same checkpoint.
        pictures: What to look at.
        bounds: What they must keep.
        progress: `console.bar` or `console.silent`.

    Returns:
        A verdict for every candidate.

    Raises:
        InputError: No picture can be read.
    """
    checkpoint = next(iter(candidates.values())).job.checkpoint
    projections = {name: candidate.job.projection for name, candidate in candidates.items()}
    total = -(-len(pictures.paths) // BATCH)
    batches = progress(pictures.batches(BATCH), total=total, desc="verify image tower")
    backends = {name: candidate.image for name, candidate in candidates.items()}
    images = compare(batches, checkpoint.encode_images, backends, projections)

    ids = evidence.ids_of(evidence.TEXTS, checkpoint.tokenizer)
    starts = range(0, len(ids), BATCH)
    parts = progress((ids[start : start + BATCH] for start in starts), total=len(starts), desc="verify text tower")
    backends = {name: candidate.text for name, candidate in candidates.items()}
    texts = compare(parts, checkpoint.encode_texts, backends, projections)

    prompts = checkpoint.encode_texts(evidence.ids_of(evidence.PROMPTS, checkpoint.tokenizer))
    verdicts = {}
    for name, candidate in candidates.items():
        bank = candidate.job.bank if candidate.job.bank is not None else project(prompts, candidate.job.projection)
        image = measure(images[name], bank, logit_scale=checkpoint.logit_scale, logit_bias=checkpoint.logit_bias)
        text = measure(texts[name], np.concatenate(images[name].reference))
        broken = failures("image", image, bounds) + failures("text", text, bounds)
        parity = {
            "reference": f"torch {torch.__version__} float32, projection and norm in float64",
            "engine": candidate.image.describe(),
            "image": image.to_json(),
            "text": text.to_json(),
            "unreadable_pictures": len(pictures.unreadable),
            "thresholds": asdict(bounds),
            "passed": not broken,
        }
        verdicts[name] = Verdict(image, text, broken, parity)
    return verdicts


def compare(
    batches: Iterable[NDArray[Any]],
    encode: Callable[[NDArray[Any]], NDArray[np.float32]],
    backends: Mapping[str, Backend],
    projections: Mapping[str, Projection | None],
) -> dict[str, Comparison]:
    """Runs the reference once and every graph on every batch.

    Args:
        batches: uint8 [n, H, W, 3] or int64 [n, L].
        encode: The reference encoder, a batch to raw float32 [n, D].
        backends: Loaded graphs by name; each has one input.
        projections: What each graph holds, by the same names.
    """
    seen = {name: Comparison() for name in backends}
    for batch in batches:
        raw = encode(batch)
        for name, backend in backends.items():
            one = seen[name]
            answers = backend.run({backend.input_names[0]: batch})
            if not one.candidate:
                one.rerun_diff, one.batch_diff = _steadiness(backend, batch, answers[EMBEDDING])
            one.reference.append(project(raw, projections[name]))
            one.candidate.append(answers[EMBEDDING])
            if PROBABILITIES in answers:
                one.probabilities.append(answers[PROBABILITIES])
    return seen


def project(raw: NDArray[np.float32], projection: Projection | None) -> NDArray[np.float64]:
    """Raw embeddings [N, D] to unit embeddings [N, d] in float64, through A_inv where there is one."""
    if projection is not None:
        return projection.apply(raw)
    wide = raw.astype(np.float64)
    return np.asarray(wide / np.linalg.norm(wide, axis=1, keepdims=True))


def _steadiness(backend: Backend, batch: NDArray[Any], embedding: NDArray[np.float32]) -> tuple[float, float]:
    """Largest difference between two runs, and between rows alone and in a batch."""
    name = backend.input_names[0]
    again = backend.run({name: batch}, (EMBEDDING,))[EMBEDDING]
    alone = [backend.run({name: batch[i : i + 1]}, (EMBEDDING,))[EMBEDDING] for i in range(min(_ALONE, len(batch)))]
    return max_diff(embedding, again), max_diff(embedding[: len(alone)], np.concatenate(alone))
