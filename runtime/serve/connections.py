"""HTTP connections: how many are kept, and which are closed because nothing moves on them.

uvicorn keeps a connection that says nothing, or half a head, for ever; reads a body on that was refused; and closes
connections at a stop without telling their clients. `BoundedProtocol` is its protocol without these.
"""

from __future__ import annotations

import asyncio
import json
import logging
import warnings
from contextlib import suppress
from dataclasses import dataclass, fields
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

from invariclip.errors import FewConnectionsWarning, InputError
from invariclip.serve.record import RequestRecord
from invariclip.serve.tracking import headers_of, record_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Message, Receive, Scope, Send

    from invariclip.serve.access_log import AccessLog
    from invariclip.serve.metrics import Metrics

log = logging.getLogger("invariclip.serve")

RESERVE = 128
"""File descriptors that are not for connections: the model's files, threads, connections that are being refused."""
LINGER_SECONDS = 2.0
"""How long a client that is refused in the middle of its body may send on, so that it hears why; nothing is kept."""
LINGER_BYTES = 64 << 20
PROGRESS = 1 << 16
"""Bytes of an answer that must be read in `stall` seconds, or what is left of it."""
_REFUSED_AT_A_TIME = 32  # connections above the limit that are told so; more are cut
_SETTLED = 1.0  # seconds after which a connection without a request gives way to a new one
_CLOSE = (b"connection", b"close")


@dataclass(frozen=True)
class ConnectionLimits:
    """Bounds of connections.

    Attributes:
        most: Connections at a time.
        idle: Seconds that one without a request is kept: longer than proxies keep theirs, or they would meet a closed
            one.
        stall: Seconds for a request's head, for the next bytes of its body, and for a client to read on.
    """

    most: int = 1_000
    idle: float = 75.0
    stall: float = 10.0

    def __post_init__(self) -> None:
        """Refuses numbers that answer nobody.

        Raises:
            InputError: One is not above 0.
        """
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise InputError(f"the limit {field.name} must be above 0, not {getattr(self, field.name)}")


def affordable(wanted: int | None) -> int:
    """How many connections the file descriptors of this process allow; its soft limit is raised where it can be.

    Args:
        wanted: So many, or none of it; None takes the default, or fewer with a warning.

    Raises:
        InputError: There are too few file descriptors.
    """
    most = ConnectionLimits.most if wanted is None else wanted
    try:
        import resource
    except ImportError:  # not a Unix: nothing to ask
        return most
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = most + RESERVE
    if soft != resource.RLIM_INFINITY and soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return most
    if wanted is not None or soft <= RESERVE:
        raise InputError(
            f"{most:,} connections need {needed:,} file descriptors, and this process may have {soft:,}; raise "
            f"`ulimit -n`, or lower --max-connections{f' to {soft - RESERVE:,}' if soft > RESERVE else ''}"
        )
    warnings.warn(
        f"this process may have {soft:,} file descriptors (`ulimit -n`): up to {soft - RESERVE:,} connections are kept "
        f"instead of {most:,}",
        FewConnectionsWarning,
        stacklevel=2,
    )
    return soft - RESERVE


class Connections:
    """All connections of a server; only its event loop touches them.

    Attributes:
        draining: Whether the server stops: then every answer says that its connection is closed.
    """

    def __init__(self, limits: ConnectionLimits, metrics: Metrics, access_log: AccessLog | None = None) -> None:
        self.limits, self._metrics, self._log = limits, metrics, access_log
        self.draining = False
        self._open: set[BoundedProtocol] = set()
        self._refused: set[BoundedProtocol] = set()
        metrics.watch_connections(lambda: len(self._open))

    def admit(self, new: BoundedProtocol) -> None:
        """Takes a connection, if need be in the place of one that asks nothing, or refuses it."""
        if len(self._open) < self.limits.most or self._make_room():
            self._open.add(new)
            return
        self.count("limit")
        if len(self._refused) >= _REFUSED_AT_A_TIME:
            new.transport.abort()
            return
        self._refused.add(new)
        most = self.limits.most
        message = f"{most:,} connections are open, and no more are taken; try again"
        new.refuse(503, message, b"retry-after: 1\r\n", reason="connections")

    def leave(self, gone: BoundedProtocol) -> None:
        """A connection is closed."""
        self._open.discard(gone)
        self._refused.discard(gone)

    def check(self) -> None:
        """Closes connections on which nothing moves; to be called now and then."""
        now = asyncio.get_running_loop().time()
        for one in (*self._open, *self._refused):
            one.check(now)

    def unasked(self) -> bool:
        """Whether a client has a connection on which it may ask, and does not at the moment."""
        return any(one.waiting for one in self._open)

    def count(self, reason: str) -> None:
        """Counts a connection that was not closed by its client."""
        self._metrics.dropped.labels(reason).inc()

    def refused(self, record: RequestRecord) -> None:
        """A connection was refused before a request of it was read."""
        self._metrics.refused_unread(record)
        if self._log is not None:
            self._log.write_unread(record)

    def _make_room(self) -> bool:
        settled = asyncio.get_running_loop().time() - _SETTLED
        idle = [one for one in self._open if one.waiting and one.since < settled]
        if not idle:
            return False
        # Clients that have never asked anything go first: others are likely to ask again
        longest = min(idle, key=lambda one: (one.cycle is not None, one.since))
        self.count("room")
        self._open.discard(longest)
        longest.transport.abort()
        return True


class BoundedProtocol(H11Protocol):
    """One connection.

    Attributes:
        since: When it began to wait for a request, or when a request's head began to come.
    """

    def __init__(self, connections: Connections, **given: Any) -> None:
        super().__init__(**given)
        self._all = connections
        self._application, self.app = self.app, self._answer
        self._head_begun = self._told = False
        self._mark: tuple[float, int] | None = None  # when so much of the answers must have been read
        self.since = self.loop.time()

    @property
    def waiting(self) -> bool:
        """Whether it is open, and no request is being answered on it."""
        return (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Admits it, or not."""
        super().connection_made(_Lingering(transport, self._unread))  # type: ignore[arg-type]  # in place of one
        self._all.admit(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets it."""
        self._all.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Takes what came in, unless it is refused already."""
        transport: Any = self.transport
        if transport.is_closing():
            transport.passed_over(len(data))
            return
        if self.waiting and not self._head_begun:
            self._head_begun, self.since = True, self.loop.time()
        super().data_received(data)
        if not self.waiting:
            self._head_begun = False

    def check(self, now: float) -> None:
        """Closes it if a head has not come in, or an answer is not read."""
        transport: Any = self.transport
        left = transport.get_write_buffer_size()
        read = transport.written - left
        if not left:
            self._mark = None
        elif self._mark is None or read >= self._mark[1]:
            self._mark = now + self._all.limits.stall, min(transport.written, read + PROGRESS)
        elif now > self._mark[0]:
            self._all.count("unread")
            transport.abort()
            return
        if not self.waiting or self.timeout_keep_alive_task is not None:  # uvicorn's own timer counts idle seconds
            return
        if now - self.since > (self._all.limits.stall if self._head_begun else self._all.limits.idle):
            self._all.count("head" if self._head_begun else "idle")
            if self._head_begun:
                message = f"the request's head did not come in within {self._all.limits.stall:g} s"
                self.refuse(408, message, reason="head")
            else:
                transport.close()

    def refuse(
        self, status: int, message: str, headers: bytes = b"", *, reason: str = "", record: RequestRecord | None = None
    ) -> None:
        """Says why, and closes the connection.

        Args:
            status: HTTP's number for why.
            message: In a line.
            headers: More of them.
            reason: See `RequestRecord`.
            record: Of the request that it is the answer to, if one was read.
        """
        self._told = True
        if record is None:
            record = RequestRecord(status=status)
            record.refused(message, status)
            record.reason = reason or record.reason
            self._all.refused(record)
        headers += b"".join(b"%s: %s\r\n" % pair for pair in headers_of(record))
        body = json.dumps({"error": message}).encode()
        self.transport.write(
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n".encode()
            + headers
            + b"\r\n"
            + body
        )
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Refuses bytes that are not HTTP. A request of which they are the body gets no other answer."""
        self._all.count("malformed")
        record: RequestRecord | None = None
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            record = record_of(cast("Scope", self.cycle.scope))
            record.refused(msg, 400)
            record.status = record.status or 400
            if self.cycle.response_started:
                self.transport.abort()
                return
        self.refuse(400, msg, record=record)

    def on_response_complete(self) -> None:
        """Waits for the next request."""
        self.since = self.loop.time()
        super().on_response_complete()

    def _unread(self) -> bool:
        """Whether the client is likely to send more than it was heard of."""
        return self._told or (self.cycle is not None and self.cycle.more_body) or bool(self.conn.trailing_data[0])

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application, whose answers say when their connection will be closed."""
        cycle = self.cycle

        async def saying(message: Message) -> None:
            if message["type"] == "http.response.start" and (self._all.draining or cycle.more_body):
                message = {**message, "headers": [*message.get("headers", ()), _CLOSE]}
            await send(message)

        try:
            await self._application(scope, receive, saying)
        except asyncio.CancelledError:
            if not self._all.draining:
                raise
            # uvicorn cancels what is not answered in time, and would write a traceback
            cycle.disconnected = True
            if not cycle.response_started:
                message = "the server stops; try again"
                self.refuse(503, message, b"retry-after: 1\r\n", record=record_of(scope))
            else:
                self.transport.abort()


class _Lingering:
    """A transport that closes in order where its client still sends.

    A socket that is closed before everything was read resets the connection, and the client loses the answer.
    """

    def __init__(self, transport: asyncio.Transport, unread: Callable[[], bool]) -> None:
        self._transport, self._unread = transport, unread
        self._lingers, self._left = False, LINGER_BYTES
        self.written = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        self.written += len(data)
        self._transport.write(data)

    def is_closing(self) -> bool:
        return self._lingers or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing() or not self._unread():
            self._transport.close()
            return
        self._lingers = True
        self._transport.write_eof()
        self._transport.resume_reading()
        asyncio.get_running_loop().call_later(LINGER_SECONDS, self._transport.close)

    def passed_over(self, count: int) -> None:
        """So many bytes came in after all."""
        self._left -= count
        if self._left < 0:
            self._transport.close()
