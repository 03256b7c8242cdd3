"""Around everything else: each request's ids, its numbers for the metrics, and its line in the access log."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from invariclip.serve.guard import GONE, route_label
from invariclip.serve.limits import reason_of
from invariclip.serve.record import RequestRecord, begin, continued, read_traceparent, request_id_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from invariclip.serve.access_log import AccessLog
    from invariclip.serve.metrics import Metrics
    from invariclip.serve.tracing import Spans

RECORD = "invariclip.record"
"""In a request's scope: its `RequestRecord`."""
ID_HEADERS = ("x-request-id", "traceparent")
"""Taken over where a request brings good ones, and said in every answer."""
_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")


class Telemetry:
    """Where requests are told of: counters, an access log and traces."""

    def __init__(self, metrics: Metrics, access_log: AccessLog | None = None, spans: Spans | None = None) -> None:
        """Tells nothing yet.

        Args:
            metrics: Counts.
            access_log: Gets a line of each request.
            spans: Get a span of each request.
        """
        self._metrics, self._log, self._spans = metrics, access_log, spans

    def begin(self, record: RequestRecord) -> None:
        """A request has come; what is called from here on finds its record."""
        begin(record)
        if self._spans is not None and not record.status:  # a connection may have been refused already
            self._spans.begin(record)
        self._metrics.in_flight.labels(record.route).inc()

    def finish(self, record: RequestRecord) -> None:
        """It is over: it is counted, its span ends, and it has its line in the access log."""
        self._metrics.in_flight.labels(record.route).dec()
        record.seconds = time.monotonic() - record.began
        record.status = record.status or GONE
        record.reason = record.reason or reason_of(record.status)
        self._metrics.over(record)
        if self._spans is not None:
            self._spans.end(record)
        if self._log is not None:
            self._log.write(record)


class Tracking:
    """An ASGI application around another."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self._app, self._telemetry = app, telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = record_of(scope)
        self._telemetry.begin(record)

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
            self._telemetry.finish(record)


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
    method = scope["method"]
    return new_record(scope["headers"], method if method in _METHODS else "other", route_label(scope["path"]))


def new_record(headers: Iterable[tuple[bytes, bytes]], method: str, route: str) -> RequestRecord:
    """The record of a request that brings these headers, names in lower case, or gRPC's metadata."""
    given: dict[bytes, list[bytes]] = {name.encode(): [] for name in ID_HEADERS}
    for name, value in headers:
        if name in given:
            given[name].append(value)
    identity, trace = (given[name.encode()] for name in ID_HEADERS)
    parent = read_traceparent(trace)
    return RequestRecord(request_id_of(identity), continued(parent), parent, method=method, route=route)
