"""Around everything else: each request's ids, its numbers for the metrics, and its line in the access log."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from invariclip.serve.guard import GONE, route_label
from invariclip.serve.limits import reason_of
from invariclip.serve.record import RequestRecord, begin, continued, read_traceparent, request_id_of

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from invariclip.serve.access_log import AccessLog
    from invariclip.serve.metrics import Metrics
    from invariclip.serve.tracing import Spans

RECORD = "invariclip.record"
"""In a request's scope: its `RequestRecord`."""
ID_HEADERS = ("x-request-id", "traceparent")
"""Taken over where a request brings good ones, and said in every answer."""
_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")


class Tracking:
    """An ASGI application around another."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, access_log: AccessLog | None = None, spans: Spans | None = None
    ) -> None:
        self._app, self._metrics, self._log, self._spans = app, metrics, access_log, spans

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = record_of(scope)
        begin(record)
        if self._spans is not None and not record.status:  # a connection may have been refused already
            self._spans.begin(record)

        async def counting() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                record.bytes_in += len(message.get("body", b""))
            return message

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *headers_of(record)]}
            elif message["type"] == "http.response.body":
                record.bytes_out += len(message.get("body", b""))
            await send(message)

        in_flight = self._metrics.in_flight.labels(record.route)
        in_flight.inc()
        try:
            await self._app(scope, counting, noting)
        except asyncio.CancelledError:  # of a server that stops: see `connections`
            record.status = record.status or 503
            record.reason = record.reason or "stopping"
            raise
        except Exception:
            record.refused("an unexpected error", 500)
            raise
        finally:
            in_flight.dec()
            self._over(record)

    def _over(self, record: RequestRecord) -> None:
        record.seconds = time.monotonic() - record.began
        record.status = record.status or GONE
        record.reason = record.reason or reason_of(record.status)
        self._metrics.over(record)
        if self._spans is not None:
            self._spans.end(record)
        if self._log is not None:
            self._log.write(record)


def headers_of(record: RequestRecord) -> list[tuple[bytes, bytes]]:
    """The ids of a request, as headers of its answer."""
    values = record.request_id, record.trace.header
    return [(name.encode(), value.encode()) for name, value in zip(ID_HEADERS, values, strict=True)]


def record_of(scope: Scope) -> RequestRecord:
    """The record of a request; made by whoever asks first."""
    if RECORD not in scope:
        scope[RECORD] = _made(scope)
    found: RequestRecord = scope[RECORD]
    return found


def _made(scope: Scope) -> RequestRecord:
    given: dict[bytes, list[bytes]] = {name.encode(): [] for name in ID_HEADERS}
    for name, value in scope["headers"]:
        if name in given:
            given[name].append(value)
    identity, trace = (given[name.encode()] for name in ID_HEADERS)
    method, parent = scope["method"], read_traceparent(trace)
    return RequestRecord(
        request_id_of(identity), continued(parent), parent, method=method if method in _METHODS else "other",
        route=route_label(scope["path"]),
    )  # fmt: skip
