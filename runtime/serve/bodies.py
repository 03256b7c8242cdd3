"""A request's body into memory: counted while it comes in, then taken apart by its content type."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from starlette.formparsers import MultiPartException, MultiPartParser

from invariclip.errors import InputError
from invariclip.serve.limits import BadRequestError, RefusedError
from invariclip.serve.requests import Body, from_json, from_pairs, merged
from invariclip.serve.service import EncodedImage

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.datastructures import Headers
    from starlette.requests import Request

    from invariclip.serve.aside import Aside
    from invariclip.serve.incoming import IncomingBodies, IncomingBody
    from invariclip.serve.limits import Limits

LARGE = 1 << 16
"""Bytes above which JSON is read in a thread, not in the event loop."""
KINDS = "image/*, application/octet-stream (one image), multipart/form-data, application/json"
_FIELD_BYTES = 1 << 20


class _WholeForm(MultiPartParser):
    """Starlette's parser, in memory, that says whether a form's end came: without it a file may be cut or missing."""

    spool_max_size = 1 << 62  # a body is bounded, and no image is written to a disk
    ended = False

    def on_end(self) -> None:
        """The closing boundary."""
        self.ended = True


class Content(NamedTuple):
    """A request's body as it came, and the request's headers."""

    data: bytes
    headers: Headers

    @property
    def heavy(self) -> bool:
        """Whether it is so long that understanding it would hold up everybody else."""
        return len(self.data) > LARGE


async def read_content(request: Request, limits: Limits, incoming: IncomingBodies) -> tuple[Content, int]:
    """Reads a body, for protocols whose requests are all in it.

    Args:
        request: The request.
        limits: What it may bring.
        incoming: Counts its bytes; they are taken back if this raises.

    Returns:
        The body, and how many bytes it took, for the caller to give back.

    Raises:
        RefusedError: It is too large, compressed, or does not come in.
        InputError: There is a query as well.
        ClientDisconnect: The client went away.
    """
    if request.query_params:
        name = next(iter(request.query_params))
        raise InputError(f"{request.url.path[:100]} takes no query, and {name!r:.60} is in one; put all into the body")
    async with incoming.body() as body:
        _require_plain(request)
        data = b"".join([chunk async for chunk in _Chunks(request, limits, body)])
        return Content(data, request.headers), body.taken


async def read_body(request: Request, limits: Limits, incoming: IncomingBodies, aside: Aside) -> tuple[Body, int]:
    """Reads and takes apart a body.

    Args:
        request: The request.
        limits: What it may bring.
        incoming: Counts its bytes; they are taken back if this raises.
        aside: Where large JSON is read.

    Returns:
        The body, and how many bytes it took, for the caller to give back.

    Raises:
        RefusedError: It is too large, malformed, of no known type, or does not come in.
        InputError: A field is given twice.
        ClientDisconnect: The client went away.
    """
    async with incoming.body() as body:
        return await _apart(request, limits, _Chunks(request, limits, body), aside), body.taken


class _Chunks:
    """A body's bytes, counted as they come."""

    def __init__(self, request: Request, limits: Limits, body: IncomingBody) -> None:
        self._request, self._limits, self._body = request, limits, body

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        """The body in pieces.

        Raises:
            RefusedError: It is larger than a body may be, or than all may be together.
        """
        too_large = RefusedError(
            413, f"the body is too large; up to {self._limits.body:,} bytes are taken at once", reason="body_size"
        )
        stated = self._request.headers.get("content-length", "")
        if stated.isdecimal() and int(stated[:20]) > self._limits.body:
            raise too_large
        async for chunk in self._request.stream():
            if self._body.taken + len(chunk) > self._limits.body:
                raise too_large
            self._body.take(len(chunk))
            yield chunk
        self._body.complete()


async def _apart(request: Request, limits: Limits, chunks: _Chunks, aside: Aside) -> Body:
    query = from_pairs(request.query_params.multi_items(), limits)
    _require_plain(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind.startswith("image/") or kind == "application/octet-stream":
        data = b"".join([chunk async for chunk in chunks])
        return Body(query, (EncodedImage("0", data),) if data else ())
    if kind == "application/json":
        data = b"".join([chunk async for chunk in chunks])
        fields = await aside(from_json, data, limits) if len(data) > LARGE else from_json(data, limits)
        return Body(merged(query, fields))
    if kind == "multipart/form-data":
        return await _multipart(request, limits, chunks, query)
    raise RefusedError(
        415, f"a body of type {kind[:60]!r} is not taken; available: {KINDS}; the header is content-type"
    )


def _require_plain(request: Request) -> None:
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise RefusedError(415, f"a body with content-encoding {coding[:60]!r} is not taken; send it as it is")


async def _multipart(request: Request, limits: Limits, chunks: _Chunks, query: dict[str, object]) -> Body:
    parser = _WholeForm(
        request.headers, aiter(chunks), max_files=limits.images,
        max_fields=limits.classes + limits.templates + limits.texts, max_part_size=_FIELD_BYTES,
    )  # fmt: skip
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise RefusedError(413, f"too many images; up to {limits.images} are taken at once") from error
        raise BadRequestError(f"the body cannot be read as multipart/form-data: {error.message}") from error
    except (KeyError, ValueError, LookupError) as error:  # no boundary, an unknown charset
        raise BadRequestError(f"the body cannot be read as multipart/form-data: {error!r}") from error
    if not parser.ended:
        await form.close()
        raise BadRequestError(
            "the body ends before its closing boundary: what came may be cut; send all of it, and as its last line the "
            "boundary with -- before and after it"
        )
    images: list[EncodedImage] = []
    pairs: list[tuple[str, str]] = []
    for name, value in form.multi_items():
        if isinstance(value, str):
            pairs.append((name, value))
        elif name != "images":
            raise InputError(f"a file belongs in the field images, not in {name!r:.60}")
        else:
            images.append(EncodedImage(value.filename or str(len(images)), await value.read()))
    await form.close()
    return Body(merged(query, from_pairs(pairs, limits)), tuple(images))
