"""Images → unit-length embeddings, through the pixels that serving uses, with a cache on disk; and the table of them.

The cache consists of small files `CACHE/<space>/<digest>.safetensors`, each written atomically, so that a killed run
loses little. `<space>` names checkpoint, pixels and encoder version; a row's key names the file's content and what was
done to it. Interventions that do not apply to an image are kept likewise, with the reason, as
`<digest>.declined.json`. Files are never changed in place, so runs may share a cache, and a damaged file costs only its
own rows.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from invariclip.calibrate.data.encode import BATCH, Ready, encoded
from invariclip.calibrate.data.images import ImageRecord, SkippedImageWarning, summarise
from invariclip.calibrate.data.pairs import UNCHANGED, EmbeddingTable, codes
from invariclip.calibrate.data.problems import NO_EMBEDDING
from invariclip.calibrate.data.versions import EmbeddingJob, changed, changed_versions
from invariclip.console import Progress, silent
from invariclip.errors import InputError, NotApplicableError
from invariclip.files import sha256_file, user_cache, write_atomically
from invariclip.preprocessing.interventions import InterventionRequest, resolve
from invariclip.preprocessing.pixels import PixelSpec, pixels
from invariclip.records import parse_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.calibrate.data.encoders import Encoder

MAX_DECLINED_BYTES = 1 << 20
"""Of a file of declined interventions: ten times what one of as many as `PART` takes."""
PART = 256
"""Embeddings per cache file: what a kill can cost."""


class Declined(str):
    """Why an intervention was left out on an image that is good in itself."""

    __slots__ = ()


def _as_named(part: Path) -> bytes:
    """A cache file's content, which its name is the digest of.

    Raises:
        ValueError: It is another content.
    """
    content = part.read_bytes()
    if hashlib.sha256(content).hexdigest()[:32] != part.name.partition(".")[0]:
        raise ValueError(f"{part}: is damaged")
    return content


class Store:
    """Rows and declined interventions by key, and the files that keep them."""

    def __init__(self, cache: Path | None, space: str, width: int) -> None:
        """Reads what is kept.

        Args:
            cache: The folder that spaces lie in; None keeps nothing.
            space: All that an embedding depends on beside its key: checkpoint, pixels, version.
            width: D.
        """
        self.rows: dict[bytes, NDArray[np.float32]] = {}
        self.declined: dict[bytes, Declined] = {}
        self.folder = cache / hashlib.sha256(space.encode()).hexdigest()[:16] if cache else None
        if self.folder and self.folder.is_dir():
            for part in sorted(self.folder.glob("*.safetensors")):
                self._read(part, width)
            for part in sorted(self.folder.glob("*.declined.json")):
                self._read_declined(part)

    def _read(self, part: Path, width: int) -> None:
        try:
            tensors = load(_as_named(part))
            keys, vectors = tensors["keys"], tensors["vectors"]
        except (SafetensorError, KeyError, ValueError, OSError):
            return  # its rows are made again
        if keys.shape == (len(vectors), 32) and vectors.shape[1:] == (width,):
            self.rows.update(zip(map(bytes, keys), vectors, strict=True))

    def _read_declined(self, part: Path) -> None:
        try:
            if part.stat().st_size > MAX_DECLINED_BYTES:
                return
            entries = parse_json(_as_named(part), str(part))
            declined = {bytes.fromhex(key): Declined(reason) for key, reason in entries.items()}
        except (InputError, ValueError, AttributeError, TypeError, OSError):
            return  # they are tried again
        self.declined.update(declined)

    def add(self, rows: dict[bytes, NDArray[np.float32]], declined: dict[bytes, Declined]) -> None:
        """Keeps rows and reasons, on disk first."""
        if self.folder and rows:
            keys = np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, 32)
            content = save({"keys": keys, "vectors": np.stack(list(rows.values()))})
            write_atomically(self.folder / f"{hashlib.sha256(content).hexdigest()[:32]}.safetensors", content)
        if self.folder and declined:
            text = json.dumps({key.hex(): reason for key, reason in declined.items()}, ensure_ascii=False).encode()
            write_atomically(self.folder / f"{hashlib.sha256(text).hexdigest()[:32]}.declined.json", text)
        self.rows.update(rows)
        self.declined.update(declined)


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


@dataclass(frozen=True)
class RowOrigins:
    """What the rows of a table were made from.

    Attributes:
        images: Of every row, the image that it is or was made from.
        digests: Of every row, the sha256 of that image's file.
        jobs: Of every row, how its image was made.
    """

    images: tuple[ImageRecord, ...]
    digests: tuple[str, ...]
    jobs: tuple[EmbeddingJob, ...]


def embed(
    encoder: Encoder,
    jobs: Sequence[EmbeddingJob],
    *,
    cache: Path | None = None,
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
    _fill(encoder, store, jobs, digests, todo, reasons, progress)
    rows = [index for index, key in enumerate(keys) if key is not None and key in store.rows]
    for index, key in enumerate(keys):
        if key is not None and key not in store.rows:
            reasons.setdefault(index, store.declined.get(key) or reasons[todo[key]])
    declined = {index: reason for index, reason in reasons.items() if isinstance(reason, Declined)}
    skipped = {index: reason for index, reason in reasons.items() if index not in declined}
    for reason in dict.fromkeys(skipped.values()):
        warnings.warn(f"skipped: {reason}", SkippedImageWarning, stacklevel=2)
    for reason, count in sorted(Counter(declined.values()).items()):
        warnings.warn(f"left out on {count} images: {reason}", SkippedImageWarning, stacklevel=2)
    if not rows:
        first = next(iter(reasons.values()), "there are no images")
        raise InputError(f"no image could be embedded; the first: {first}")
    vectors = np.stack([store.rows[keys[index] or b""] for index in rows]).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Embedded(
        vectors=vectors,
        kept=np.asarray(rows),
        skipped=tuple(sorted(skipped.items())),
        declined=tuple(sorted(declined.items())),
        digests=tuple(digests.get(job.path, "") for job in jobs),
    )


def embed_table(
    encoder: Encoder,
    images: Sequence[ImageRecord],
    interventions: Sequence[InterventionRequest],
    *,
    draws: int,
    seed: int,
    cache: Path | None = None,
    progress: Progress = silent,
) -> tuple[EmbeddingTable, dict[str, Any], RowOrigins]:
    """Embeds images and their changed versions, and lists them as a table.

    Args:
        encoder: Takes the images.
        images: What to embed.
        interventions: Interventions to draw from.
        draws: Changed versions of every image.
        seed: Of the draws.
        cache: A folder that keeps embeddings across runs.
        progress: Progress display.

    Returns:
        The table, whose first rows are the images that could be used, in the order given; JSON-ready counts: `images`,
        `concepts`, `environments`, `unpaired_concepts`, `skipped`, `declined` (label → images that the intervention did
        not apply to), `images_sha256` (over content, concept and environment of every image used); and what every row
        was made from.

    Raises:
        InputError: No image could be used, or an intervention needs a second image and there is none.
    """
    plain = embed(encoder, [EmbeddingJob(image.path) for image in images], cache=cache, progress=progress)
    used = [images[index] for index in plain.kept]
    digests = [plain.digests[index] for index in plain.kept]
    versions = changed_versions(used, digests, interventions, draws=draws, seed=seed)
    vectors, kinds, sources = plain.vectors, [UNCHANGED] * len(used), list(range(len(used)))
    jobs = [EmbeddingJob(image.path) for image in used]
    declined: Counter[str] = Counter()
    if versions:
        changed = embed(encoder, [version.job for version in versions], cache=cache, progress=progress)
        vectors = np.concatenate([vectors, changed.vectors])
        kinds += [versions[index].kind for index in changed.kept]
        sources += [versions[index].origin for index in changed.kept]
        jobs += [versions[index].job for index in changed.kept]
        declined.update(interventions[versions[index].kind].label for index, _ in changed.declined)
    rows = tuple(used[row] for row in sources)
    concepts, concept_names = codes([image.concept for image in rows])
    labels, label_names = codes([image.name for image in rows])
    environments, environment_names = codes([image.environment for image in rows])
    table = EmbeddingTable(
        vectors=vectors,
        concepts=concepts,
        labels=labels,
        environments=environments,
        kinds=np.asarray(kinds, dtype=np.int64),
        origins=np.asarray(sources, dtype=np.int64),
        concept_names=concept_names,
        label_names=label_names,
        environment_names=environment_names,
        kind_names=tuple(kind.label for kind in interventions),
    )
    lines = sorted(f"{d}\t{p.concept}\t{p.environment}" for d, p in zip(digests, used, strict=True))
    facts = summarise(used) | {
        "skipped": [reason for _, reason in plain.skipped],
        "declined": dict(sorted(declined.items())),
        "images_sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
    }
    return table, facts, RowOrigins(rows, tuple(digests[row] for row in sources), tuple(jobs))


def encoder_input(job: EmbeddingJob, digest: str, spec: PixelSpec) -> NDArray[np.uint8]:
    """What the encoder is shown for a job, uint8 [H, W, 3].

    Args:
        job: An image, changed or as it is.
        digest: sha256 of the image's file.
        spec: How the encoder wants its images.

    Raises:
        InputError: The image or the donor cannot be read.
        NotApplicableError: The intervention does not apply to the image, or changes nothing in it.
    """
    image = pixels(job.path, spec)
    if job.kind is None:
        return image
    donor = pixels(job.donor, spec) if job.donor else None
    return changed(image, job.kind, digest, job.seed, donor)


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
        return encoder_input(job, digests[job.path], spec)
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
    progress: Progress,
) -> None:
    """Computes what the store lacks; the reasons of failures go to `reasons`."""

    def prepare(todo: tuple[bytes, int]) -> Ready[tuple[bytes, int]]:
        image = _prepare(jobs[todo[1]], encoder.pixels, digests)
        return Ready(todo, reason=image) if isinstance(image, str) else Ready(todo, [image])

    pending: dict[bytes, NDArray[np.float32]] = {}
    declined: dict[bytes, Declined] = {}
    results = encoded(encoder, todo.items(), prepare, batch=BATCH)
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


def default_cache() -> Path:
    """Where embeddings are kept when no folder is named, see `files.user_cache`."""
    return user_cache() / "embeddings"
