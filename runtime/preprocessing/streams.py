"""Images read ahead of the model: decoded in threads while it runs, in order, in bounded memory.

Pillow lets go of the interpreter while it decodes and resizes, and the engines do while they run, so threads are
enough. With one core there is nothing to win, and everything happens in the caller's thread.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from invariclip.errors import InputError
from invariclip.preprocessing.pixels import ImageInput, PixelMode, PixelSpec, pixels
from invariclip.threads import available_threads

T = TypeVar("T")
R = TypeVar("R")

ImageInputs: TypeAlias = Iterable[ImageInput] | NDArray[np.uint8]
"""Images one by one, or a batch uint8 [N, H, W, 3] that `invariclip.preprocessing.pixels.stack` has prepared."""
Unreadable: TypeAlias = Callable[[int, ImageInput, InputError], None]
"""Told of an image that cannot be read: its place in the stream, the image, and why."""

_Seen: TypeAlias = tuple[int, ImageInput, NDArray[np.uint8]]

DEFAULT_BATCH = 16
LOOK_AHEAD = 2
"""Batches that are read while the model runs: one to go on with, one for images that take longer."""
MAX_AHEAD = 256
"""Images that are read ahead at most, however large the batches: at 224x224 they take 38 MB."""


@dataclass(frozen=True)
class Batch:
    """What goes to the model at once.

    Attributes:
        places: Where its n images stand in the stream, from 0.
        images: They themselves, as they were given.
        pixels: uint8 [n, H, W, 3].
    """

    places: list[int]
    images: list[Any]
    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class ImageReader:
    """How images become batches.

    Attributes:
        spec: How the tower wants them.
        mode: See `pixels.pixels`.
        workers: Threads that decode; None takes what affinity and cgroup allow. With 1 nothing is read ahead.
    """

    spec: PixelSpec
    mode: PixelMode = "exact"
    workers: int | None = None

    def batches(
        self,
        images: ImageInputs,
        batch_size: int = DEFAULT_BATCH,
        *,
        look_ahead: int = LOOK_AHEAD,
        unreadable: Unreadable | None = None,
    ) -> Generator[Batch, None, None]:
        """Batches in the order of the images; close it, and its threads end.

        Before an error is raised, be it an image's or that of the iterable which gives them, all images before it
        come out, if need be in a smaller batch.

        Args:
            images: See `ImageInputs`.
            batch_size: Images to a batch; the last one may have fewer.
            look_ahead: Batches that are read while the caller works on one, `MAX_AHEAD` images at most. With 0 no
                image is asked for before it is needed, which suits a camera.
            unreadable: Is told of images that cannot be read, which are then left out; None raises the error.

        Raises:
            InputError: `batch_size` is below 1, `look_ahead` below 0, `images` is one image or an array of another
                shape or dtype; later, an image cannot be read.
        """
        if batch_size < 1 or look_ahead < 0:
            least, name, given = (1, "batch_size", batch_size) if batch_size < 1 else (0, "look_ahead", look_ahead)
            raise InputError(f"{name} must be at least {least}, not {given}")
        if isinstance(images, np.ndarray) and images.ndim == 4:
            self._check_prepared(images)
            return _slices(images, batch_size)
        one = isinstance(images, (str, bytes, np.ndarray, os.PathLike)) or not hasattr(images, "__iter__")
        if one:
            raise InputError("pass a list of images, even for one: [image]")
        return self._read(images, batch_size, min(look_ahead * batch_size, MAX_AHEAD), unreadable)

    def _read(
        self, images: Iterable[ImageInput], batch_size: int, ahead: int, unreadable: Unreadable | None
    ) -> Generator[Batch, None, None]:
        def read(image: ImageInput) -> NDArray[np.uint8] | InputError:
            try:
                return pixels(image, self.spec, self.mode)
            except InputError as error:
                return error

        workers = available_threads() if self.workers is None else self.workers
        if isinstance(images, Sized):
            workers = min(workers, len(images))
        waiting: list[_Seen] = []
        with closing(prefetch(images, read, workers=workers, ahead=ahead)) as stream:
            try:
                for seen in _readable(stream, unreadable):
                    waiting.append(seen)
                    if len(waiting) == batch_size:
                        full, waiting = waiting, []
                        yield _batch(full)
            except Exception:
                if waiting:
                    yield _batch(waiting)
                raise
        if waiting:
            yield _batch(waiting)

    def _check_prepared(self, batch: NDArray[Any]) -> None:
        if batch.dtype != np.uint8 or batch.shape[1:] != (*self.spec.image_size, 3):
            size = "x".join(map(str, self.spec.image_size))
            raise InputError(
                f"an array of {batch.dtype} {list(batch.shape)} is not a prepared batch of uint8 {size}x3; "
                "pass a list of images of any size instead"
            )


def prefetch(
    items: Iterable[T], work: Callable[[T], R], *, workers: int, ahead: int
) -> Generator[tuple[T, R], None, None]:
    """Every item with what `work` makes of it, in order; up to `ahead` further ones are worked on meanwhile.

    Items are asked for in the caller's thread. An error of `items` or of `work` is raised in its place: what lies
    before it comes out first. Closing the generator ends its threads.

    Args:
        items: Any number of items, also without end.
        work: Is called from several threads at once.
        workers: Threads; with 1 there is none, and nothing is asked for ahead.
        ahead: Items that are taken before they are needed; with 0 likewise.
    """
    if workers <= 1 or ahead < 1:
        for item in items:
            yield item, work(item)
        return
    source = iter(items)
    waiting: deque[tuple[T, Future[R]]] = deque()
    failure: Exception | None = None
    pool = ThreadPoolExecutor(workers, thread_name_prefix="invariclip-read")
    try:
        more = True
        while True:
            while more and len(waiting) <= ahead:
                try:
                    item = next(source)
                except StopIteration:
                    more = False
                except Exception as error:  # whatever it is, the items before it come first
                    more, failure = False, error
                else:
                    waiting.append((item, pool.submit(work, item)))
            if not waiting:
                break
            item, future = waiting.popleft()
            yield item, future.result()
        if failure is not None:
            raise failure
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _readable(
    stream: Iterable[tuple[ImageInput, NDArray[np.uint8] | InputError]], unreadable: Unreadable | None
) -> Iterator[_Seen]:
    for place, (image, seen) in enumerate(stream):
        if not isinstance(seen, InputError):
            yield place, image, seen
        elif unreadable is None:
            raise seen
        else:
            unreadable(place, image, seen)


def _batch(seen: list[_Seen]) -> Batch:
    places, images, rows = zip(*seen, strict=True)
    return Batch(list(places), list(images), np.stack(rows))


def _slices(prepared: NDArray[np.uint8], batch_size: int) -> Generator[Batch, None, None]:
    for start in range(0, len(prepared), batch_size):
        part = np.ascontiguousarray(prepared[start : start + batch_size])
        yield Batch(list(range(start, start + len(part))), list(part), part)
