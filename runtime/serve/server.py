"""From a service to a listening process that ends well: uvicorn, warm-up, signals."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import uvicorn

from invariclip.console import note
from invariclip.errors import InputError
from invariclip.serve.app import application
from invariclip.serve.connections import BoundedProtocol, ConnectionLimits, Connections
from invariclip.serve.floods import FloodFilter
from invariclip.serve.guard import ApiKeys

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import FrameType

    from starlette.types import ASGIApp

    from invariclip.serve.access_log import AccessLog
    from invariclip.serve.app import Api
    from invariclip.serve.metrics import Metrics
    from invariclip.serve.models import ServedModels
    from invariclip.serve.repository import ModelRepository
    from invariclip.serve.tracing import Spans

log = logging.getLogger("invariclip.serve")

BACKLOG = 2048
_ACCEPTED = 8  # connections taken in one turn of the event loop: the next turn closes those that are above the limit
_TICKS = 5  # uvicorn's ticks, of a tenth of a second, between two looks at all connections
_LAST_CHANCE = 1.0  # seconds that clients without a request have for one more, before a stop closes their connections
_BACKLOG_SECONDS = 0.05  # to take what the kernel has connected already, which closing the socket would reset
_OUT_OF_DESCRIPTORS = "socket.accept() out of system resource"
_STOPPED = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "stopped")}


def listening(host: str, port: int, option: str = "--port", *, remedy: str = "") -> socket.socket:
    """A socket that listens, so that a port in use is known before anything is loaded; clients wait meanwhile.

    Args:
        host: Where.
        port: 0 for one that is free.
        option: The option that named the port.
        remedy: What to do where it cannot be had; empty for another port by that option.

    Raises:
        InputError: The address cannot be had.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"a port is a number from 0 (any that is free) to 65535, not {port}")
    sock: socket.socket | None = None
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)  # until it does, another socket may be bound to the same port
    except OSError as error:
        if sock is not None:
            sock.close()
        remedy = remedy or f"{option} 0 takes a free port"
        raise InputError(f"{host}:{port}: cannot listen there ({error.strerror or error}); {remedy}") from error
    return sock


def address_of(sock: socket.socket) -> str:
    """Where a socket listens, as a URL."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class WebServer(uvicorn.Server):
    """uvicorn with connections in bounds, and a stop that loses no request.

    Attributes:
        early_stop: Is called with a signal's number, and does not return, while nothing is answered yet.
        beside: Stops what is served beside this server, within so many seconds.
    """

    def __init__(self, app: ASGIApp, connections: Connections, *, grace: int) -> None:
        """Does not serve yet.

        Args:
            app: The application.
            connections: Bounds the connections; of this server alone.
            grace: Seconds for what was taken before a stop.
        """
        self.connections = connections
        self.early_stop: Callable[[int], object] | None = None
        self.beside: Callable[[float], Awaitable[None]] | None = None
        self._grace = grace
        http: Any = partial(BoundedProtocol, connections)
        super().__init__(uvicorn.Config(
            app, http=http, log_config=None, access_log=False, lifespan="off", ws="none", server_header=False,
            backlog=_ACCEPTED, timeout_keep_alive=connections.limits.idle,  # type: ignore[arg-type]  # any number
            timeout_graceful_shutdown=grace,
        ))  # fmt: skip

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to take connections."""
        asyncio.get_running_loop().set_exception_handler(_in_a_line)
        await super().startup(sockets)
        for sock in sockets or ():
            sock.listen(BACKLOG)  # asyncio has set it to `_ACCEPTED`

    async def on_tick(self, counter: int) -> bool:
        """Looks after the connections."""
        if counter % _TICKS == 0:
            self.connections.check()
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal asks for a stop."""
        if self.early_stop is not None:
            self.early_stop(sig)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no more connections, and answers those that there are: each one last time, and says so."""
        self.connections.draining = True
        loop = asyncio.get_running_loop()
        beside = asyncio.ensure_future(self.beside(self._grace)) if self.beside is not None else None
        end = loop.time() + min(_LAST_CHANCE, self._grace)
        await asyncio.sleep(_BACKLOG_SECONDS)
        for server in self.servers:
            server.close()
        while self.connections.unasked() and loop.time() < end and not self.force_exit:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)
        if beside is not None:
            await beside


def _in_a_line(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """The event loop's errors. That there is no file descriptor is no error of the program: no traceback."""
    if context.get("message") == _OUT_OF_DESCRIPTORS:
        log.warning("no connection can be taken (%s); raise `ulimit -n`", context.get("exception"))
    else:
        loop.default_exception_handler(context)


class Hangups:
    """What SIGHUP asks for: to load all models again; where it says that the terminal is gone, to stop."""

    def __init__(self) -> None:
        """Notes them from now on, so that one that comes before models are loaded does not end the process."""
        self._asked = False
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._number: int | None = getattr(signal, "SIGHUP", None)  # no such signal on Windows
        self._before: Any = None
        if self._number is not None:
            with suppress(ValueError):  # not the main thread
                self._before = signal.signal(self._number, self._note)

    def close(self) -> None:
        """Leaves the signal to whoever had it before."""
        if self._number is not None and self._before is not None:
            signal.signal(self._number, self._before)

    def call(self, reload: Callable[[], None], server: uvicorn.Server) -> None:
        """Hands them on from now on, in the running event loop.

        Args:
            reload: Is called once for those that came before, too.
            server: Is stopped where the terminal is gone.
        """

        def told() -> None:
            if self._terminal and not sys.stderr.isatty():
                server.handle_exit(signal.SIGTERM, None)
            else:
                reload()

        if self._number is None:
            return
        with suppress(RuntimeError, ValueError):  # not the main thread
            asyncio.get_running_loop().add_signal_handler(self._number, told)
        if self._asked:
            told()

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if self._terminal and not sys.stderr.isatty():
            os._exit(128 + signal.SIGHUP)
        self._asked = True


def run(
    models: ServedModels, metrics: Metrics, sock: socket.socket, *, what: str, grace: int,
    api_keys: tuple[str, ...] = (), cors_origins: tuple[str, ...] = (), hosts: tuple[str, ...] = ("localhost",),
    limits: ConnectionLimits | None = None, grpc: tuple[str, int] | None = None,
    access_log: AccessLog | None = None, spans: Spans | None = None,
    repository: ModelRepository | None = None, admin_keys: tuple[str, ...] = (), hangups: Hangups | None = None,
) -> int:  # fmt: skip
    """Serves until a signal comes, then answers what it has taken. A signal while it warms up ends the process.

    Args:
        models: Who answers; they are closed at the end.
        metrics: Counts.
        sock: See `listening`.
        what: What is served, for the line that says where.
        grace: Seconds, 1 or more, for what was taken before the signal.
        api_keys: See `app.application`.
        cors_origins: See `app.application`.
        hosts: See `app.application`.
        limits: Of connections.
        grpc: Host and port of the gRPC service; None for none.
        access_log: Gets a line of each request; it is closed at the end.
        spans: Get a span of each request; likewise.
        repository: Loads and unloads models.
        admin_keys: See `app.application`.
        hangups: Ask for all models to be loaded again.

    Returns:
        The exit code: 0.

    Raises:
        InputError: gRPC cannot listen where it should.
        InvariclipError: What warming up raises.
    """
    connections = Connections(limits or ConnectionLimits(), metrics, access_log)
    app, api = application(
        models, metrics, api_keys=api_keys, cors_origins=cors_origins, hosts=hosts, stall=connections.limits.stall,
        access_log=access_log, spans=spans, repository=repository, admin_keys=admin_keys,
    )  # fmt: skip
    server = WebServer(app, connections, grace=grace)
    flood = FloodFilter()
    for handler in logging.getLogger().handlers:
        handler.addFilter(flood)

    async def serve() -> None:
        also = "" if grpc is None else await grpc_beside(server, api, api_keys, connections.limits.stall, *grpc)
        serving = asyncio.ensure_future(server.serve(sockets=[sock]))
        try:
            await models.warm_up()
            server.early_stop = None
            api.ready = not server.should_exit
            if api.ready:
                if hangups is not None and repository is not None:
                    hangups.call(repository.reload, server)
                note(f"invariclip: {what} at {address_of(sock)}{also}")
        finally:
            if not api.ready:
                server.early_stop, server.should_exit = None, True
            await serving
            api.ready = False

    # uvicorn handles signals itself while it serves, and then raises what it caught again: that ends here, with exit 0
    server.early_stop = _exit_at_once
    for one in _STOPPED:
        with suppress(ValueError):  # not the main thread
            signal.signal(one, server.handle_exit)
    try:
        asyncio.run(serve())
    finally:
        models.close()
        if access_log is not None:
            access_log.close()
        if spans is not None:
            spans.close()
    return 0


async def grpc_beside(
    server: WebServer, api: Api, api_keys: tuple[str, ...], stall: float, host: str, port: int
) -> str:
    """Starts the gRPC service, to be stopped with a server.

    Args:
        server: The server.
        api: Its endpoints.
        api_keys: One of them is demanded, if there are any.
        stall: Seconds to wait for a message.
        host: Where it listens.
        port: 0 for one that is free.

    Returns:
        Where it listens, for the line that says so.

    Raises:
        InputError: It cannot listen there.
    """
    from invariclip.serve.inference_grpc import InferenceGrpc  # needs the extra `grpc`

    service = InferenceGrpc(api.exchange, api.telemetry, ApiKeys(api_keys), lambda: api.ready, stall)
    await service.start(host, port)
    server.beside = service.stop
    return f", gRPC at port {service.port}"


def _exit_at_once(number: int) -> NoReturn:
    """The thread that warms up cannot be stopped, and the interpreter would wait for it."""
    code, word = _STOPPED[signal.Signals(number)]
    note(f"invariclip: {word} while it was warming up; run the same command again")
    sys.stderr.flush()
    os._exit(code)
