"""The one way of every request, whatever its protocol: read in bounds, answered by the batchers, written in bounds."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from invariclip.serve.answers import INLINE, LargeAnswer
from invariclip.serve.aside import Aside
from invariclip.serve.bodies import Content, read_body, read_content
from invariclip.serve.incoming import IncomingBodies
from invariclip.serve.limits import TIMEOUT_HEADER, Held, RefusedError, seconds_for
from invariclip.serve.partial import parted, warning_of
from invariclip.serve.record import current
from invariclip.serve.requests import Classify, Embed
from invariclip.serve.service import ImageScores

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
    from concurrent.futures import Future

    from numpy.typing import NDArray
    from starlette.requests import Request

    from invariclip.serve.batcher import Batcher
    from invariclip.serve.limits import Limits
    from invariclip.serve.metrics import Metrics
    from invariclip.serve.models import ServedModels
    from invariclip.serve.requests import Body
    from invariclip.serve.service import EncodedImage, Service
    from invariclip.serve.sites import SiteHandle
    from invariclip.serve.tickets import Ticket
    from invariclip.sites.site import Site

T = TypeVar("T")
R = TypeVar("R")
JSON = "application/json"


class Heavy(Protocol):
    """What a request brought, before it is understood."""

    @property
    def heavy(self) -> bool:
        """Whether understanding it would hold up everybody else."""


class Question(Protocol):
    """What a request asks."""

    @property
    def images(self) -> tuple[EncodedImage, ...]:
        """The images that it brings."""


B = TypeVar("B", bound=Heavy)
Q = TypeVar("Q", bound=Question)


class Embedded(NamedTuple):
    """Embeddings float32 [N, d], the site whose shift they have lost, what was said, and by place what failed."""

    vectors: NDArray[np.float32]
    site: Site | None
    warnings: list[str]
    failed: dict[int, str]


class Exchange:
    """Questions to the served models and their answers, for one event loop.

    Attributes:
        models: Who answers.
        limits: What a request may bring.
        held: Bytes of all bodies in memory.
        sent: Bytes of all large answers in memory.
        aside: Threads for what would hold up the event loop.
    """

    def __init__(self, models: ServedModels, metrics: Metrics, stall: float) -> None:
        """Holds nothing yet.

        Args:
            models: Who answers.
            metrics: Counts.
            stall: Seconds to wait for the next bytes of a body.
        """
        self.models, self.limits = models, models.limits
        self.held, self.sent = Held(self.limits.bodies), Held(self.limits.bodies, "answers")
        self.aside = Aside()
        self._incoming = IncomingBodies(self.held, stall, metrics)

    async def form(self, request: Request) -> tuple[Body, int]:
        """A request's body, taken apart by its content type; see `read_body`."""
        return await read_body(request, self.limits, self._incoming, self.aside)

    async def content(self, request: Request) -> tuple[Content, int]:
        """A request's body as it came; see `read_content`."""
        return await read_content(request, self.limits, self._incoming)

    @asynccontextmanager
    async def asked(
        self, request: Request, body: Callable[[Request], Awaitable[tuple[B, int]]], read: Callable[[B, Limits], Q],
        model: Callable[[Q], str | None],
    ) -> AsyncIterator[tuple[Q, Service, float]]:  # fmt: skip
        """A question, read within the bounds; who answers it; and until when that is waited for.

        The service is not closed before the block ends.

        Args:
            request: The request.
            body: `form` or `content`.
            read: Understands the body.
            model: The name of the model that a question asks; None for the default.

        Raises:
            RefusedError: There is too much of something, or it takes too long.
            InputError: What the request says cannot be asked.
        """
        limits = self.limits
        seconds = seconds_for(request.headers.getlist(TIMEOUT_HEADER), limits)
        began, deadline = asyncio.get_running_loop().time(), time.monotonic() + seconds
        try:
            with current().timed("read"):
                async with asyncio.timeout(seconds):
                    brought, held = await body(request)
        except TimeoutError as error:
            raise RefusedError(408, f"the request did not come in within {seconds:g} s") from error
        try:
            async with self.within(began, seconds):
                heavy = brought.heavy
                asked = (
                    await unless_gone(request, self.aside(read, brought, limits)) if heavy else read(brought, limits)
                )
                del brought
                skip = isinstance(asked, (Classify, Embed)) and asked.partial
                with self.models.find(model(asked)).lease() as service:
                    await unless_gone(request, self.require_bearable(service, asked.images, skip=skip))
                    yield asked, service, deadline
        finally:
            self.held.give_back(held)

    @asynccontextmanager
    async def within(self, began: float, seconds: float) -> AsyncIterator[None]:
        """A block that takes no longer than a request may.

        Args:
            began: When the request came, by the event loop's clock.
            seconds: How long it may take.

        Raises:
            RefusedError: It takes longer.
        """
        try:
            async with asyncio.timeout_at(began + seconds):
                yield
        except TimeoutError as error:
            raise RefusedError(504, f"no answer within {seconds:g} s; send less, or later") from error

    async def require_bearable(self, service: Service, images: Sequence[EncodedImage], *, skip: bool = False) -> None:
        """See `Service.require_bearable`; a single image is held against the same bounds when it is decoded."""
        if len(images) > 1:
            await self.aside(service.require_bearable, images, skip=skip)

    async def embedded(self, service: Service, asked: Embed, owner: int, deadline: float) -> Embedded:
        """Embeddings of images, less the shift of their site, or of texts.

        Args:
            service: Who answers.
            asked: Of what.
            owner: The number of the API key.
            deadline: When the answer is worth nothing any more, by `time.monotonic`.
        """
        if asked.texts:
            rows = await answered(service.texts, list(asked.texts), deadline)
            return Embedded(_stacked(rows), None, [row.warning for row in rows if row.warning], {})
        handle = await self.handle(service, asked.site, owner)
        seen, failed = await self.parted_rows(service, asked, deadline, classes=False)
        kept, site = await without_shift(handle, seen)
        vectors = _stacked(kept) if kept else np.empty((0, service.model.width), dtype=np.float32)
        return Embedded(vectors, site, warning_of(failed, len(asked.images)), failed)

    async def answer(
        self, written: Callable[[], bytes], numbers: int, kind: str = JSON, headers: dict[str, str] | None = None
    ) -> Response:
        """What a function writes; in a thread, and counted until it is sent, where it is made of many numbers."""
        return self.sending(await self.content_of(written, numbers), numbers, kind, headers)

    async def content_of(self, written: Callable[[], bytes], numbers: int) -> bytes:
        """What a function writes; in a thread where it is made of many numbers."""
        return written() if numbers <= INLINE else await self.aside(written)

    def sending(self, content: bytes, numbers: int, kind: str, headers: dict[str, str] | None = None) -> Response:
        """An answer; counted until it is sent, where it is made of many numbers."""
        if numbers <= INLINE:
            return Response(content, media_type=kind, headers=headers)
        return LargeAnswer(content, self.sent, kind, headers)

    async def handle(self, service: Service, name: str | None, owner: int) -> SiteHandle | None:
        """The site that a request names; see `SiteRegistry.find`."""
        sites = service.sites
        if name and sites.running is not None:  # a new site's log begins on a disk, which may be slow
            return await asyncio.to_thread(sites.find, name, owner)
        return sites.find(name, owner)

    def said(self, service: Service, site: Site | None) -> dict[str, Any]:
        """The site that an answer is of; said, also if there is none, where requests may have one."""
        if not service.sites:
            return {}
        facts = None if site is None else {"name": site.name, "sha256": site.digest, "images": site.images}
        return {"site": facts}

    async def rows(
        self, service: Service, images: Sequence[EncodedImage], deadline: float, *, classes: bool
    ) -> list[ImageScores]:
        """What the image tower says of images; `classes`: also the artifact's own."""
        return await answered(service.images, [(image, classes) for image in images], deadline)

    async def parted_rows(
        self, service: Service, asked: Classify | Embed, deadline: float, *, classes: bool
    ) -> tuple[list[ImageScores], dict[int, str]]:
        """As `rows`; where the request allows it, by place what is wrong with the images that have none."""
        items = [(image, classes) for image in asked.images]
        seen = await answered(service.images, items, deadline, partial=asked.partial)
        return parted([*seen], asked.images)


class _Embedding(Protocol):
    @property
    def embedding(self) -> NDArray[np.float32]: ...


def _stacked(rows: Sequence[_Embedding]) -> NDArray[np.float32]:
    return np.stack([row.embedding for row in rows])


async def without_shift(
    handle: SiteHandle | None, rows: Sequence[ImageScores]
) -> tuple[list[ImageScores], Site | None]:
    """Rows less a site's shift, and that site; where it runs, they then count."""
    if handle is None or not rows:
        return list(rows), None
    vectors = _stacked(rows)
    live = handle.live is not None
    moved, site = await asyncio.to_thread(handle.take, vectors) if live else handle.take(vectors)
    return [ImageScores(row) for row in moved], site


async def answered(batcher: Batcher[T, Any, R], items: list[T], deadline: float, *, partial: bool = False) -> list[R]:
    """What a batcher answers; if nobody waits for it any more, it is taken back. `partial`: see `Batcher.submit`."""
    record = current()
    record.submitted(batcher.name, len(items))
    ticket: Ticket[R] = batcher.submit(items, deadline=deadline, partial=partial, owner=record.key)
    try:
        return await finished(ticket.future)
    finally:
        ticket.drop()
        record.spent(ticket.times)


async def finished(future: Future[T]) -> T:
    """Waits for another thread's result."""
    return await asyncio.wrap_future(future)


async def unless_gone(request: Request, answer: Coroutine[Any, Any, T]) -> T:
    """The answer; given up when the client goes away, so that what waits for it is not worked on.

    Raises:
        ClientDisconnect: It went away.
    """
    work, watch = asyncio.ensure_future(answer), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ClientDisconnect
    finally:
        for task in (work, watch):
            task.cancel()
        await asyncio.gather(work, watch, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
