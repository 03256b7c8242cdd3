"""Images and texts to unit-length rows in bounded memory: the next images decode while the encoder runs."""

from __future__ import annotations

import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar, cast

import numpy as np

from invariclip.calibrate.data.problems import UNREADABLE
from invariclip.calibrate.data.versions import NO_CHANGES, Changes, Versions
from invariclip.errors import InputError
from invariclip.files import sha256_file
from invariclip.preprocessing.pixels import pixels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.calibrate.data.encoders import Encoder, TextEncoder
    from invariclip.calibrate.data.problems import ProblemCounts

BATCH = 32
"""Images that the encoder takes at a time."""
WORKERS = 2
"""Threads that decode."""
TEXTS_AT_ONCE = 256
HELD_BYTES = 256 << 20
"""Most encoded bytes that wait for a thread: images from an archive are held as they are read."""

DECLINED = "changed versions that could not be made"

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Ready(Generic[T]):
    """Images that are decoded, or the reason why they cannot be.

    Attributes:
        item: What they are of.
        images: uint8 [H, W, 3] each, as the tower sees them; none where there is a reason.
        reason: Why there are none; empty where there are.
    """

    item: T
    images: Sequence[NDArray[np.uint8]] = ()
    reason: str = ""


@dataclass(frozen=True)
class Request:
    """One image to embed.

    Attributes:
        image: Its file, or its encoded bytes.
        name: What a person knows it by.
        place: A number by which the caller knows it.
        lenders: Other images at hand, for `Donor`.
    """

    image: Path | bytes
    name: str
    place: int = 0
    lenders: tuple[bytes, ...] = ()


class Donor(Protocol):
    """Chooses the second image for an intervention that needs one."""

    def __call__(self, request: Request, digest: str, label: str) -> Path | bytes | None:
        """Its file or bytes, by the content of the first and the intervention's label alone; None if there is none.

        Raises:
            InputError: There is none.
        """


@dataclass(frozen=True)
class EmbeddedVersions:
    """An image and its changed versions, embedded.

    Attributes:
        name: The request's.
        place: The request's.
        digest: sha256 of the content.
        row: float64 [D], unit length; not finite, or zero, where that is what the encoder answered.
        versions: float64 [k, D], likewise.
        labels: What made each version.
    """

    name: str
    place: int
    digest: str
    row: NDArray[np.float64]
    versions: NDArray[np.float64]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class _Decoded:
    """What is known of an image once it is decoded."""

    request: Request
    digest: str = ""
    versions: Versions = field(default_factory=Versions)


def encode_images(
    encoder: Encoder,
    requests: Iterable[Request],
    tally: ProblemCounts,
    *,
    changes: Changes = NO_CHANGES,
    donor: Donor = lambda request, digest, label: None,
) -> Iterator[EmbeddedVersions]:
    """Embeds images, and changed versions of each, in the order of the requests; each file is decoded once.

    Args:
        encoder: Takes the images.
        requests: Taken one by one, a batch ahead of what is given.
        tally: Counts images that cannot be read and versions that cannot be made.
        changes: Which versions of every image to make.
        donor: Chooses second images.
    """

    def prepare(request: Request) -> Ready[_Decoded]:
        try:
            digest = _digest(request.image)
            plain = pixels(request.image, encoder.pixels)
        except (InputError, OSError) as error:
            return Ready(_Decoded(request), reason=str(error))

        def lend(label: str) -> NDArray[np.uint8] | None:
            lender = donor(request, digest, label)
            return None if lender is None else pixels(lender, encoder.pixels)

        versions = changes.versions(plain, digest, lend)
        return Ready(_Decoded(request, digest, versions), [plain, *versions.images])

    def size(request: Request) -> int:
        return len(request.image) if isinstance(request.image, bytes) else 0

    for ready, rows in encoded(encoder, requests, prepare, size=size, batch=BATCH):
        request, versions = ready.item.request, ready.item.versions
        tally.add(DECLINED, [f"{request.name} ({declined})" for declined in versions.declined])
        if ready.reason:
            tally.add(UNREADABLE, [request.name])
        else:
            unit = unit_rows(rows)
            yield EmbeddedVersions(
                request.name, request.place, ready.item.digest, unit[0], unit[1:], tuple(versions.labels)
            )


def encode_texts(encoder: Encoder, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Embeds texts.

    Returns:
        Their ids, int64 [N, L], and float64 [N, D], unit length where they are finite and not zero.

    Raises:
        InputError: The encoder has no text tower.
    """
    if not hasattr(encoder, "encode_texts"):
        raise InputError("this checkpoint takes no texts; leave the sources of texts out")
    tower = cast("TextEncoder", encoder)
    ids = tower.tokenizer(list(texts))
    rows = [tower.encode_texts(ids[start : start + TEXTS_AT_ONCE]) for start in range(0, len(ids), TEXTS_AT_ONCE)]
    return ids, unit_rows(np.concatenate(rows))


def embed_texts(encoder: TextEncoder, texts: Sequence[str]) -> NDArray[np.float64]:
    """Texts to unit-length embeddings, float64 [N, D]."""
    return encode_texts(encoder, texts)[1]


def encoded(
    encoder: Encoder,
    items: Iterable[S],
    prepare: Callable[[S], Ready[T]],
    *,
    size: Callable[[S], int] = lambda _: 0,
    batch: int = BATCH,
    workers: int = WORKERS,
) -> Iterator[tuple[Ready[T], NDArray[np.float32]]]:
    """Decodes in threads and encodes in batches, in the order of the items.

    Args:
        encoder: Takes the images.
        items: Taken one by one, `batch` ahead of what is given.
        prepare: Decodes an item's images.
        size: Bytes that an item holds while it waits.
        batch: Images in a batch; an item's stay together unless they are more.
        workers: Threads.

    Yields:
        What was made ready, and float32 [images, D] as the encoder gave it.
    """
    waiting: list[Ready[T]] = []
    filled = 0
    for ready in _prepared(items, prepare, size, batch, workers):
        if waiting and (filled + len(ready.images) > batch or len(waiting) == batch):
            yield from _through(encoder, waiting, batch)
            waiting, filled = [], 0
        waiting.append(ready)
        filled += len(ready.images)
    yield from _through(encoder, waiting, batch)


def unit_rows(rows: NDArray[np.floating]) -> NDArray[np.float64]:
    """Rows scaled to length 1, float64 [N, D]; what is not finite or zero stays as it is, for who counts it."""
    rows = np.asarray(rows, dtype=np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    lengths[~np.isfinite(lengths) | (lengths == 0)] = 1
    return np.asarray(rows / lengths)


def usable(rows: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which rows are finite and not zero, bool [N]."""
    return np.asarray(np.isfinite(rows).all(axis=-1) & rows.any(axis=-1))


def _digest(image: Path | bytes) -> str:
    """Hexadecimal sha256 of an image's content.

    Raises:
        OSError: The file cannot be read.
    """
    return hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else sha256_file(image)


def _prepared(
    items: Iterable[S], prepare: Callable[[S], Ready[T]], size: Callable[[S], int], ahead: int, workers: int
) -> Iterator[Ready[T]]:
    """What `prepare` makes of every item, in order; at most `ahead` items and `HELD_BYTES` are under way."""
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        pending: deque[tuple[Future[Ready[T]], int]] = deque()
        held = 0
        for item in items:
            pending.append((pool.submit(prepare, item), size(item)))
            held += size(item)
            while len(pending) > ahead or (held > HELD_BYTES and len(pending) > 1):
                future, freed = pending.popleft()
                held -= freed
                yield future.result()
        while pending:
            yield pending.popleft()[0].result()
    finally:
        pool.shutdown(cancel_futures=True)


def _through(
    encoder: Encoder, waiting: Sequence[Ready[T]], batch: int
) -> Iterator[tuple[Ready[T], NDArray[np.float32]]]:
    images = [image for ready in waiting for image in ready.images]
    rows = np.empty((len(images), encoder.embed_dim), dtype=np.float32)
    for start in range(0, len(images), batch):
        rows[start : start + batch] = encoder.encode_images(np.stack(images[start : start + batch]))
    ends = np.cumsum([len(ready.images) for ready in waiting], dtype=np.int64)
    for ready, end in zip(waiting, ends, strict=True):
        yield ready, rows[end - len(ready.images) : end]
