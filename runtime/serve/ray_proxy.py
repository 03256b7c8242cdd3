"""What Ray Serve's own proxies lack: bodies in bounds, and an answer of 503 where a replica died with a request.

A proxy takes a request's body as fast as it comes, and answers a plain 500 where the replica that worked on it is gone:
the client cannot tell that it may ask again. Ray calls `bounds` in every proxy where the environment names it before
the cluster starts, see `CALLBACK`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.middleware import Middleware

from invariclip.serve.guard import as_error, as_json
from invariclip.serve.limits import Limits
from invariclip.serve.tracking import ID_HEADERS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "invariclip.serve.ray_proxy.bounds"}
"""The environment of a cluster's processes that has every proxy call `bounds`."""
ALONE = {name: f"{where}_alone" for name, where in CALLBACK.items()}
"""The same for a cluster of one application."""
CHECK = "/-/invariclip"
"""Answered by a proxy that has these bounds, and by no other; `/-/` is Ray's own."""
TRACE = ID_HEADERS[1].encode()
"""A header of every answer of ours."""
NO_ANSWER = "no replica answered, or the one that had the request stopped; send it again"
NO_ROOM = "the proxy has no room for more bodies; try again"


def bounds() -> list[Middleware]:
    """What Ray puts around each of its proxies."""
    return [Middleware(ProxyBounds)]


def bounds_alone() -> list[Middleware]:
    """The same where nothing else is served: a path that Ray does not know is one that it does not know any more."""
    return [Middleware(ProxyBounds, alone=True)]


class ProxyBounds:
    """An ASGI application around a proxy's."""

    def __init__(self, app: ASGIApp, bodies: int = Limits.bodies, *, alone: bool = False) -> None:
        """Holds nothing yet.

        Args:
            app: The proxy's.
            bodies: Bytes of all requests' bodies at a time.
            alone: Whether Ray's own 404 becomes 503: the application has not begun, or ends.
        """
        self._app, self._bodies, self._held, self._alone = app, bodies, 0, alone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"] == CHECK:
            await as_json({"bodies": self._bodies})(scope, receive, send)
            return
        held, refused, started, lost = 0, False, False, False

        async def bounded() -> Message:
            nonlocal held, refused
            message = await receive()
            size = len(message.get("body", b"")) if message["type"] == "http.request" else 0
            if refused or self._held + size > self._bodies:
                refused = True
                return {"type": "http.disconnect"}  # so that the proxy gives it up
            self._held += size
            held += size
            return message

        async def noting(message: Message) -> None:
            nonlocal started, lost
            if message["type"] == "http.response.start":
                headers = message.get("headers", ())
                lost = self._alone and message["status"] == 404 and not any(name == TRACE for name, _ in headers)
                started = not lost
                message = {**message, "headers": _one_id(headers)}
            if not lost:
                await send(message)

        try:
            await self._app(scope, bounded, noting)
        finally:
            self._held -= held
        if not started:  # half an answer breaks off with its connection
            headers = {"retry-after": "1", "connection": "close"}
            await as_error(scope["path"], 503, NO_ROOM if refused else NO_ANSWER, headers)(scope, receive, send)


def _one_id(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """An answer's headers with the application's id of the request alone; Ray writes its own one behind it."""
    kept: list[tuple[bytes, bytes]] = []
    for name, value in headers:
        if name.lower() != b"x-request-id" or not any(known.lower() == b"x-request-id" for known, _ in kept):
            kept.append((name, value))
    return kept
