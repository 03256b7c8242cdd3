"""From a service to a listening process that ends well: uvicorn, warm-up, signals."""

from __future__ import annotations

import asyncio
import errno
import math
import signal
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import uvicorn

from invariclip.console import note
from invariclip.errors import InputError
from invariclip.serve.app import application

if TYPE_CHECKING:
    from types import FrameType

    from invariclip.serve.metrics import Metrics
    from invariclip.serve.service import Service

_BACKLOG = 2048
_KEEP_ALIVE = 75  # seconds an idle connection stays: longer than proxies keep theirs, or they would meet a closed one

_SAY_AGAIN = 60.0  # seconds


class FullTable:
    """asyncio's handler of errors, with one line a minute where connections find no free descriptor.

    asyncio's own writes a traceback for each of thousands of tries a second.
    """

    def __init__(self, sock: socket.socket) -> None:
        """Takes the socket that listens: once it is closed, asyncio's later tries to listen again mean nothing."""
        self._sock, self._said = sock, -math.inf

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Says what went wrong."""
        error = context.get("exception")
        if self._sock.fileno() < 0 and "_start_serving" in context["message"]:
            return
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS):
            loop.default_exception_handler(context)
        elif loop.time() - self._said >= _SAY_AGAIN:
            self._said = loop.time()
            note(
                f"invariclip: no further connection can be taken for now ({error.strerror}); "
                "allow more open files (ulimit -n), or fewer clients"
            )


def listening(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that a port in use is known before anything is warm.

    Raises:
        InputError: The address cannot be had.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"a port is a number from 0 (any that is free) to 65535, not {port}")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        raise InputError(
            f"{host}:{port}: cannot listen there ({error.strerror or error}); --port 0 takes a free port"
        ) from error
    return sock


def address_of(sock: socket.socket) -> str:
    """Where a socket listens, as a URL."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(
    service: Service, metrics: Metrics, sock: socket.socket, *, what: str, grace: int,
    api_keys: tuple[str, ...] = (), cors_origins: tuple[str, ...] = (),
) -> int:  # fmt: skip
    """Serves until a signal comes, then answers what it has taken.

    Args:
        service: Who answers; it is closed at the end.
        metrics: Counts.
        sock: See `listening`.
        what: What is served, for the line that says where.
        grace: Seconds, 1 or more, for what was taken before the signal.
        api_keys: See `app.application`.
        cors_origins: See `app.application`.

    Returns:
        The exit code: 0.

    Raises:
        InvariclipError: What warming up raises.
    """
    app, api = application(service, metrics, api_keys=api_keys, cors_origins=cors_origins)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", ws="none", server_header=False, backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=grace,
    )  # fmt: skip
    server = uvicorn.Server(config)

    async def serve() -> None:
        asyncio.get_running_loop().set_exception_handler(FullTable(sock))
        serving = asyncio.ensure_future(server.serve(sockets=[sock]))
        try:
            await asyncio.to_thread(service.warm_up)
            api.ready = not server.should_exit
            if api.ready:
                note(f"invariclip: {what} at {address_of(sock)}")
        finally:
            if not api.ready:
                server.should_exit = True
            await serving
            api.ready = False

    def stop(_number: int, _frame: FrameType | None) -> None:
        server.should_exit = True

    # uvicorn has handlers of its own while it serves, and then raises what it caught again: that ends here, with exit 0
    for one in (signal.SIGINT, signal.SIGTERM):
        with suppress(ValueError):  # not the main thread
            signal.signal(one, stop)
    try:
        asyncio.run(serve())
    finally:
        service.close()
    return 0
