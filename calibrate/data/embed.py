"""Images to unit-length embeddings, through the pixels that serving uses; what was computed before is read back."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from invariclip.calibrate.data.embed_cache import Declined, Store
from invariclip.calibrate.data.images import SkippedImageWarning
from invariclip.calibrate.data.changes import changed
from invariclip.calibrate.data.encode import BATCH, Ready, encoded
from invariclip.console import Progress, silent
from invariclip.errors import InputError, NotApplicableError
from invariclip.files import sha256_file
from invariclip.preprocessing.interventions import Kind, resolve
from invariclip.preprocessing.pixels import PixelSpec, pixels

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.calibrate.data.encoder import Encoder, TextEncoder

NO_EMBEDDING = "its embedding is zero or not finite"
PART = 256
"""Embeddings per cache file: what a kill can cost."""


@dataclass(frozen=True)
class EmbeddingJob:
    """One embedding to make.

    Attributes:
        path: The image's file.
        kind: The intervention to apply, or None for the image as it is.
        seed: Seed of the intervention; without meaning where there is none.
        donor: The second image's file, for interventions that need one.
    """

    path: Path
    kind: Kind | None = None
    seed: int = 0
    donor: Path | None = None


@dataclass(frozen=True)
class Embedded:
    """Embeddings of the jobs that could be done.

    Attributes:
        vectors: float64 [N, D], unit length.
        kept: int64 [N], which job each row is of, ascending.
        skipped: Job index and reason of every image that could not be used.
        declined: Job index and reason of every intervention that does not apply to its image.
        digests: For every job the sha256 of its file; empty where that could not be read.
    """

    vectors: NDArray[np.float64]
    kept: NDArray[np.int64]
    skipped: tuple[tuple[int, str], ...]
    declined: tuple[tuple[int, str], ...]
    digests: tuple[str, ...]


def embed(
    encoder: Encoder,
    jobs: Sequence[EmbeddingJob],
    *,
    cache: Path | None = None,
    workers: int = 2,
    progress: Progress = silent,
) -> Embedded:
    """Embeds images; what the cache already holds is not computed again.

    An image that cannot be read, or whose embedding is not finite or zero, is skipped with a warning and named in
    the result: it never reaches the moments. So is one that an intervention does not apply to, with one warning for
    all of the intervention's.

    Args:
        encoder: Takes the images.
        jobs: What to embed; equal jobs are computed once.
        cache: A folder that keeps embeddings across runs.
        workers: Threads that decode.
        progress: Progress display.

    Raises:
        InputError: No image at all could be used.
    """
    digests, reasons = _digests(jobs)
    keys = [None if index in reasons else _key(digests, job) for index, job in enumerate(jobs)]
    space = json.dumps([encoder.sha256, encoder.pixels.to_json(), "rows-1"], sort_keys=True)
    store = Store(cache, space, encoder.embed_dim)
    todo: dict[bytes, int] = {}
    for index, key in enumerate(keys):
        if key is not None and key not in store.rows and key not in store.declined:
            todo.setdefault(key, index)
    _fill(encoder, store, jobs, digests, todo, reasons, workers, progress)
    kept = [index for index, key in enumerate(keys) if key is not None and key in store.rows]
    for index, key in enumerate(keys):
        if key is not None and key not in store.rows:
            reasons.setdefault(index, store.declined.get(key) or reasons[todo[key]])
    declined = {index: reason for index, reason in reasons.items() if isinstance(reason, Declined)}
    skipped = {index: reason for index, reason in reasons.items() if index not in declined}
    for reason in dict.fromkeys(skipped.values()):
        warnings.warn(f"skipped: {reason}", SkippedImageWarning, stacklevel=2)
    for reason, count in sorted(Counter(declined.values()).items()):
        warnings.warn(f"left out on {count} images: {reason}", SkippedImageWarning, stacklevel=2)
    if not kept:
        first = next(iter(reasons.values()), "there are no images")
        raise InputError(f"no image could be embedded; the first: {first}")
    vectors = np.stack([store.rows[keys[index] or b""] for index in kept]).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Embedded(
        vectors=vectors,
        kept=np.asarray(kept),
        skipped=tuple(sorted(skipped.items())),
        declined=tuple(sorted(declined.items())),
        digests=tuple(digests.get(job.path, "") for job in jobs),
    )


def shown(job: EmbeddingJob, digest: str, spec: PixelSpec) -> NDArray[np.uint8]:
    """What the encoder is shown for a job, uint8 [H, W, 3].

    Args:
        job: An image, changed or as it is.
        digest: sha256 of the image's file.
        spec: How the encoder wants its images.

    Raises:
        InputError: The image or the donor cannot be read.
        NotApplicableError: The intervention does not apply to the image, or changes nothing in it.
    """
    seen = pixels(job.path, spec)
    if job.kind is None:
        return seen
    donor = pixels(job.donor, spec) if job.donor else None
    return changed(seen, job.kind, digest, job.seed, donor)


def embed_texts(encoder: TextEncoder, texts: list[str], *, batch: int = 256) -> NDArray[np.float64]:
    """Texts to unit-length embeddings, float64 [N, D]."""
    rows = [
        np.asarray(encoder.encode_texts(encoder.tokenizer(texts[start : start + batch])), dtype=np.float64)
        for start in range(0, len(texts), batch)
    ]
    vectors = np.concatenate(rows)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def _digests(jobs: Sequence[EmbeddingJob]) -> tuple[dict[Path, str], dict[int, str]]:
    """Every file's digest, each read once, and the reasons of jobs with a file that cannot be read."""
    known: dict[Path, str] = {}
    unreadable: dict[Path, str] = {}
    reasons: dict[int, str] = {}
    for index, job in enumerate(jobs):
        for path in (job.path, job.donor):
            if path is None:
                continue
            if path not in known and path not in unreadable:
                try:
                    known[path] = sha256_file(path)
                except OSError as error:
                    unreadable[path] = f"{path}: {error.strerror or error}"
            if path in unreadable:
                reasons.setdefault(index, unreadable[path])
    return known, reasons


def _key(digests: Mapping[Path, str], job: EmbeddingJob) -> bytes:
    """Names one embedding within a space: content, intervention, seed, donor.

    The version changes with what an intervention does; parameters and label are in its identity.
    """
    what = f"{digests[job.path]}\n-"
    if job.kind is not None:
        identity = resolve(job.kind).identity
        named = identity if isinstance(identity, str) else json.dumps(identity, sort_keys=True)
        donor = f"\n{digests[job.donor]}" if job.donor else ""
        what = f"{digests[job.path]}\n{named}-2\n{job.seed}{donor}"
    return hashlib.sha256(what.encode()).digest()


def _prepare(job: EmbeddingJob, spec: PixelSpec, digests: Mapping[Path, str]) -> NDArray[np.uint8] | str:
    """What the encoder is shown for a job, or why there is nothing."""
    try:
        return shown(job, digests[job.path], spec)
    except NotApplicableError as error:
        return Declined(f"{resolve(job.kind or '').label}: {error}")
    except InputError as error:
        return str(error)


def _fill(
    encoder: Encoder,
    store: Store,
    jobs: Sequence[EmbeddingJob],
    digests: Mapping[Path, str],
    todo: dict[bytes, int],
    reasons: dict[int, str],
    workers: int,
    progress: Progress,
) -> None:
    """Computes what the store lacks; the reasons of failures go to `reasons`."""

    def prepare(todo: tuple[bytes, int]) -> Ready[tuple[bytes, int]]:
        seen = _prepare(jobs[todo[1]], encoder.pixels, digests)
        return Ready(todo, reason=seen) if isinstance(seen, str) else Ready(todo, [seen])

    pending: dict[bytes, NDArray[np.float32]] = {}
    declined: dict[bytes, Declined] = {}
    results = encoded(encoder, todo.items(), prepare, batch=BATCH, workers=workers)
    for ready, rows in progress(results, total=len(todo), desc="embedding"):
        key, index = ready.item
        if isinstance(ready.reason, Declined):
            declined[key] = ready.reason
        elif ready.reason:
            reasons[index] = ready.reason
        elif np.isfinite(rows).all() and rows.any():
            pending[key] = rows[0]
        else:
            reasons[index] = f"{jobs[index].path}: {NO_EMBEDDING}"
        if len(pending) + len(declined) >= PART:
            store.add(pending, declined)
            pending, declined = {}, {}
    store.add(pending, declined)
