"""`serve --engine ray`: the same application in replicas of Ray Serve, on as many machines as the cluster has.

Each replica is a process with an artifact of its own and everything that `serve` has between HTTP and the engine:
routes, keys, bounds, batches. Ray's proxies, one on each machine, take the connections and choose the replica. They get
what they lack from `ray_proxy`.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import signal
import threading
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invariclip.backends import GPU_BACKENDS
from invariclip.console import note
from invariclip.errors import InputError, MissingExtraError
from invariclip.serve.access_log import AccessLog
from invariclip.serve.app import application
from invariclip.serve.connections import ConnectionLimits
from invariclip.serve.keys import read_keys
from invariclip.serve.metrics import Metrics
from invariclip.serve.models import ServedModels
from invariclip.serve.opening import ServiceOptions, open_service
from invariclip.serve.ray_proxy import ALONE, CALLBACK, CHECK
from invariclip.serve.server import listening
from invariclip.serve.tracing import open_spans

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Receive, Scope, Send

log = logging.getLogger("invariclip.serve")
NEEDS = '--engine ray needs {}: pip install "invariclip[ray-serve]"'
_ANSWERING = 10.0  # seconds beyond those of a request, after which a proxy gives it up
_EVERYWHERE = ("0.0.0.0", "::", "")  # noqa: S104 - compared, not bound
_PROBE = 5.0  # seconds for a proxy's answer to a look at it


@dataclass(frozen=True)
class ReplicaOptions:
    """What each replica opens; files are read where it runs, so they must lie at the same path on every machine.

    Attributes:
        name: What requests call the model.
        artifact: Its folder.
        service: How it is opened and served.
        api_key_file: Keys, one of which is demanded; None demands none.
        cors_origins: See `app.application`, and so for the next two.
        hosts: What the server is called.
        stall: Seconds to wait for the next bytes of a body.
        access_log: Whether each request has its line in the replica's log, which Ray keeps.
    """

    name: str
    artifact: Path
    service: ServiceOptions = field(default_factory=ServiceOptions)
    api_key_file: Path | None = None
    cors_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ("localhost",)
    stall: float = ConnectionLimits.stall
    access_log: bool = False

    def settled(self) -> ReplicaOptions:
        """The same for a process of another working folder, whose threads are the CPUs that it takes."""
        service = self.service
        paths = {name: getattr(service, name) for name in ("projection", "site", "sites")}
        found = {name: path.resolve() for name, path in paths.items() if path is not None}
        signed = service.require_signature
        found_keys = None if signed is None else str(Path(signed).resolve())
        keys = None if self.api_key_file is None else self.api_key_file.resolve()
        threads = cpus(service)
        batching = replace(service.batching, decoders=service.batching.decoders or threads)
        own = replace(service, require_signature=found_keys, threads=threads, batching=batching, **found)
        return replace(self, artifact=self.artifact.resolve(), service=own, api_key_file=keys)


@dataclass(frozen=True)
class RayOptions:
    """Where replicas run, and how many.

    Attributes:
        host: Where every machine's proxy listens.
        port: Likewise.
        replicas: At least and at most; Ray adds and removes some by the requests that are under way.
        address: An existing cluster's, such as `auto`; None starts one on this machine, for as long as this runs.
        grace: Seconds for what a replica took before it stops.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    replicas: tuple[int, int] = (1, 1)
    address: str | None = None
    grace: int = 10


class ReplicaApplication:
    """The ASGI application of one replica: it is warm when its lifespan has begun, and closes with it."""

    def __init__(self, options: ReplicaOptions) -> None:
        """Opens the artifact; nothing is warm yet.

        Raises:
            InvariclipError: What `open_service` and `read_keys` raise.
        """
        logging.basicConfig(format="invariclip: %(asctime)s %(levelname)s %(message)s")
        keys = () if options.api_key_file is None else read_keys(options.api_key_file)
        metrics, self._spans = Metrics(), open_spans()
        self._log = AccessLog(None, metrics) if options.access_log else None
        service = replace(options.service, keys=max(1, len(keys)))
        self._service = open_service(service, options.name, options.artifact, metrics)
        self._app, self._api = application(
            ServedModels([self._service]), metrics, api_keys=keys, cors_origins=options.cors_origins,
            hosts=options.hosts, stall=options.stall, access_log=self._log, spans=self._spans,
        )  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, or goes through its life."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await self._app(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await asyncio.to_thread(self._service.warm_up)
                self._api.ready = True
                await send({"type": "lifespan.startup.complete"})
            else:
                self._api.ready = False
                await asyncio.to_thread(self._close)
                await send({"type": "lifespan.shutdown.complete"})
                return

    def _close(self) -> None:
        self._service.close()
        for one in (self._log, self._spans):
            if one is not None:
                one.close()


def require_ray() -> Any:
    """Ray Serve's module.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise MissingExtraError(NEEDS.format(error.name or "ray")) from error
    return serve


def deployment(replica: ReplicaOptions, options: RayOptions) -> Any:
    """The Ray Serve application, for `ray.serve.run`."""
    serve = require_ray()
    service, (fewest, most) = replica.service, options.replicas

    def build() -> ASGIApp:
        """Is called where a replica starts."""
        return ReplicaApplication(replica)

    scaled: dict[str, Any] = {"num_replicas": fewest}
    if fewest != most:
        scaled = {
            "autoscaling_config": {
                "min_replicas": fewest, "max_replicas": most, "initial_replicas": fewest,
                "target_ongoing_requests": service.batching.max_batch,
            }
        }  # fmt: skip
    gpus = {"num_gpus": 1} if service.backend in GPU_BACKENDS else {}
    made = serve.deployment(
        serve.ingress(build)(),
        name="invariclip",
        # what would wait too long is refused by a replica itself, which knows its pace
        max_ongoing_requests=service.limits.queue,
        max_queued_requests=service.limits.queue,
        graceful_shutdown_timeout_s=options.grace,
        ray_actor_options={"num_cpus": cpus(service), **gpus},
        **scaled,
    )
    return made.bind()


def cpus(service: ServiceOptions) -> int:
    """Processors that a replica takes of its machine."""
    return service.threads or 1


def run_on_ray(replica: ReplicaOptions, options: RayOptions, *, what: str) -> int:
    """Serves until a signal comes, then takes the replicas away; they answer what they have taken.

    Args:
        replica: What each replica opens.
        options: Where, and how many.
        what: What is served, for the line that says where.

    Returns:
        The exit code: 0.

    Raises:
        InputError: The cluster cannot be reached or is too small, or its Ray Serve listens elsewhere.
        MissingExtraError: Ray Serve is not installed.
    """
    serve, name = require_ray(), replica.name
    import ray

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if replica.service.backend not in GPU_BACKENDS:  # this machine may have none
        open_service(
            replica.service, replica.name, replica.artifact, Metrics()
        ).close()  # what is wrong is said now, in one line
    if options.address is None:
        listening(options.host, options.port, remedy="name another --port").close()
    started, known = _connect(ray, options), False
    try:
        if started:
            _require_room(ray, replica, options)
        serve.start(
            proxy_location="EveryNode",
            http_options={
                "host": options.host, "port": options.port,
                "request_timeout_s": replica.service.limits.seconds + _ANSWERING,
            },
        )  # fmt: skip
        known = name in serve.status().applications
        try:
            serve.run(deployment(replica, options), name=name, route_prefix="/")
        except (RuntimeError, ValueError, ray.exceptions.RayError, serve.exceptions.RayServeException) as error:
            raise InputError(f"Ray could not start {name}: {_words(error)}") from error
        _look_at_proxy(options, name)
        known = False
        fewest, most = options.replicas
        count = str(fewest) if fewest == most else f"{fewest} to {most}"
        where = f"http://[{options.host}]" if ":" in options.host else f"http://{options.host}"
        note(f"invariclip: {what} at {where}:{options.port}, replicas on Ray: {count}")
        _until_a_signal()
    finally:
        if not known:  # what was served under this name before goes on where it could not be replaced
            _end(serve, ray, name, alone=started)
    return 0


def _words(error: BaseException) -> str:
    """What an error says, without the traceback of the process that it comes from."""
    lines = str(getattr(error, "cause", None) or error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def _connect(ray: Any, options: RayOptions) -> bool:
    """Joins the cluster; True where it was started here, and so has to be stopped here."""
    if ray.is_initialized():
        return False
    if options.address is None:
        os.environ.update(ALONE)  # of the processes that Ray starts here
    try:
        ray.init(
            # "local": without an address Ray would join a cluster that it finds here
            address=options.address or "local", log_to_driver=False, include_dashboard=False,
            logging_level=logging.ERROR, configure_logging=False,
        )  # fmt: skip
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"no Ray cluster at {options.address or 'this machine'}: {error}") from error
    return options.address is None


def _require_room(ray: Any, replica: ReplicaOptions, options: RayOptions) -> None:
    """Refuses more replicas than this machine has processors for: Ray would wait for more for ever.

    Raises:
        InputError: There are more.
    """
    resources, most, each = ray.cluster_resources(), options.replicas[1], cpus(replica.service)
    if most * each > resources.get("CPU", 0):
        raise InputError(
            f"{most} replicas of {each} engine threads need {most * each} CPUs, and Ray sees "
            f"{resources.get('CPU', 0):g} on this machine; lower --replicas or --threads, or name a cluster with "
            "--ray-address"
        )
    if replica.service.backend in GPU_BACKENDS and most > resources.get("GPU", 0):
        raise InputError(
            f"{most} replicas on {replica.service.backend} need a GPU each, and Ray sees "
            f"{resources.get('GPU', 0):g}; lower --replicas"
        )


def _look_at_proxy(options: RayOptions, name: str) -> None:
    """Makes sure that this machine's proxy listens where it should, and warns where it lacks its bounds.

    Raises:
        InputError: It listens elsewhere.
    """
    host = "127.0.0.1" if options.host in _EVERYWHERE else options.host
    where = f"{options.host}:{options.port}"
    try:
        routes = _asked(host, options.port, "/-/routes")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise InputError(
            f"no proxy of Ray Serve answers at {where} ({error}); where Ray Serve ran before, it listens where it was "
            "told to then: name that --host and --port, and start this on a machine of the cluster"
        ) from error
    if routes.get("/") != name:
        raise InputError(f"the proxy at {where} does not know {name}: {routes}; name another --port")
    with suppress(OSError, http.client.HTTPException, ValueError):
        if "bodies" in _asked(host, options.port, CHECK):
            return
    [(variable, value)] = CALLBACK.items()
    note(
        "invariclip: warning: Ray's proxies answer 500 where a replica stops with a request, and hold bodies of any "
        f"size; start the cluster's machines with {variable}={value} in their environment"
    )


def _asked(host: str, port: int, path: str) -> dict[str, Any]:
    link = http.client.HTTPConnection(host, port, timeout=_PROBE)
    try:
        link.request("GET", path)
        answer = link.getresponse()
        told = json.loads(answer.read(1 << 20))
    finally:
        link.close()
    return told if answer.status == 200 and isinstance(told, dict) else {}


def _until_a_signal() -> None:
    came = threading.Event()
    for one in (signal.SIGTERM, signal.SIGINT):
        with suppress(ValueError):  # not the main thread
            signal.signal(one, lambda *_: came.set())
    while not came.wait(1):  # a wait without an end would not hear a signal on every system
        pass


def _end(serve: Any, ray: Any, name: str, *, alone: bool) -> None:
    """Takes the replicas away, and what was started for them."""
    doing: list[Callable[[], Any]] = [lambda: serve.delete(name)]  # its replicas answer what they took
    if alone:
        doing += [serve.shutdown, ray.shutdown]
    for one in doing:
        try:
            one()
        except Exception as error:  # Ray is gone already, or half started; what is left of it ends with its processes
            log.warning("Ray did not end as it should: %s", error)
