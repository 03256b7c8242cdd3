"""The web application: routes, who waits for what, what `/v1/model` says, and the page at `/`."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from dataclasses import asdict
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from invariclip.artifact.embeddings import Embeddings, embeddings_bytes
from invariclip.errors import InputError
from invariclip.serve import requests, schema
from invariclip.serve.answers import (
    INLINE,
    require_classified,
    require_embedded,
    sliced_json,
    vectors_json,
)
from invariclip.serve.connections import ConnectionLimits
from invariclip.serve.exchange import Exchange, finished, unless_gone, without_shift
from invariclip.serve.guard import KEY, Guard, as_json, error_answer
from invariclip.serve.inference_http import HEADER_LENGTH, InferenceHttp
from invariclip.serve.limits import TIMEOUT_HEADER, RefusedError
from invariclip.serve.metrics import CONTENT_TYPE
from invariclip.serve.openai_api import OpenAi
from invariclip.serve.origins import Origins
from invariclip.serve.partial import errors_json, in_places, warning_of
from invariclip.serve.record import current
from invariclip.serve.repository_http import RepositoryHttp
from invariclip.serve.sites import site_facts
from invariclip.serve.tracking import ID_HEADERS, Telemetry, Tracking
from invariclip.sites.site import site_bytes
from invariclip.version import __version__

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request

    from invariclip.serve.access_log import AccessLog
    from invariclip.serve.metrics import Metrics
    from invariclip.serve.models import ServedModel, ServedModels
    from invariclip.serve.repository import ModelRepository
    from invariclip.serve.requests import Classify, Embed
    from invariclip.serve.service import Service
    from invariclip.serve.tracing import Spans


def described(service: Service) -> dict[str, Any]:
    """The facts as JSON; `parity` is of the variant and engine that run."""
    model = service.model
    manifest = model.manifest
    record = manifest.variants[model.variant].parity.get(model.backend)
    return {
        "version": __version__,
        "name": service.name,
        "model": manifest.model.name,
        "checkpoint_sha256": manifest.model.checkpoint_sha256,
        "projection": None if manifest.projection is None else asdict(manifest.projection),
        "space_id": model.space_id,
        "site_sha256": service.sites.default.digest if service.sites.default else model.site_sha256 or None,
        "sites": sorted(service.sites.known),
        "adapting": service.sites.running is not None,
        "width": model.width,
        "variant": model.variant,
        "engine": model.describe(),
        "classes": list(model.classes),
        "templates": list(model.templates),
        "parity": record,
        "semantics": None if manifest.cdc is None else asdict(manifest.cdc),
        "uncertainty": service.uncertainty,
        "abstain_above": service.abstain_above,
        "image_size": list(manifest.pixels.image_size),
        "context_length": manifest.text.context_length,
        "max_batch": service.images.max_batch,
        "limits": service.limits.to_json(),
    }


def page() -> Callable[[Request], Awaitable[Response]]:
    """The endpoint. The page may run its own script and look, and ask this server; nothing else."""
    text = files("invariclip.serve").joinpath("page.html").read_text(encoding="utf-8")
    script, style = (_digest(text, tag) for tag in ("script", "style"))
    headers = {
        "content-security-policy": (
            f"default-src 'none'; script-src {script}; style-src {style}; img-src blob: data:; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }

    async def shown(_request: Request) -> Response:
        return HTMLResponse(text, headers=headers)

    return shown


SCHEMA_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def constant(answer: Response) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that always answers the same."""

    async def said(_request: Request) -> Response:
        return answer

    return said


def _digest(text: str, tag: str) -> str:
    [inside] = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"


SAFETENSORS, JSON = "application/octet-stream", "application/json"


class Api:
    """The endpoints of the served models.

    Attributes:
        models: Who answers.
        ready: Whether it is warm and takes work.
        exchange: The way of every request.
        telemetry: Is told of every request.
    """

    def __init__(self, exchange: Exchange, metrics: Metrics, telemetry: Telemetry) -> None:
        self.models, self.metrics, self.exchange, self.telemetry = exchange.models, metrics, exchange, telemetry
        self.ready = False

    async def health(self, _request: Request) -> Response:
        """Alive."""
        return as_json({"status": "alive"})

    async def readiness(self, _request: Request) -> Response:
        """Warm and taking work."""
        if not self.ready:
            raise RefusedError(503, "warming up; ask again", {"retry-after": "1"}, reason="warming_up")
        return as_json({"status": "ready"})

    async def counted(self, _request: Request) -> Response:
        """Prometheus' numbers."""
        text = await asyncio.to_thread(self.metrics.text)
        return Response(text, headers={"content-type": CONTENT_TYPE})

    async def model(self, request: Request) -> Response:
        """What the artifact is."""
        return as_json(described(self._named(request).service))

    async def classify(self, request: Request) -> Response:
        """Images to their best classes."""
        asking = self.exchange.asked(request, self.exchange.form, requests.classify, lambda asked: asked.model)
        async with asking as (asked, service, deadline):
            return await unless_gone(request, self._classified(service, asked, request.scope.get(KEY, 0), deadline))

    async def embed(self, request: Request) -> Response:
        """Images or texts to embeddings."""
        asking = self.exchange.asked(request, self.exchange.form, requests.embed, lambda asked: asked.model)
        async with asking as (asked, service, deadline):
            wanted, owner = SAFETENSORS in request.headers.get("accept", ""), request.scope.get(KEY, 0)
            return await unless_gone(request, self._embedded(service, asked, owner, deadline, wanted))

    async def sites(self, request: Request) -> Response:
        """The sites that this key may name."""
        with self._named(request).lease() as service:
            sites = service.sites
            listed = await asyncio.to_thread(sites.listed, request.scope.get(KEY, 0))
            return as_json({"sites": listed, "adapting": sites.running is not None, "share": sites.share})

    async def site(self, request: Request) -> Response:
        """One site: its facts, or as a file that `adapt` could have written."""
        with self._named(request).lease() as service:
            handle = service.sites.existing(request.path_params["name"], request.scope.get(KEY, 0))
            if SAFETENSORS in request.headers.get("accept", ""):
                return Response(site_bytes(handle.site), media_type=SAFETENSORS)
            return as_json(await asyncio.to_thread(site_facts, handle))

    async def tell_site(self, request: Request) -> Response:
        """Freezes, thaws or resets a running site."""
        name, event = request.path_params["name"], request.path_params["event"]
        with self._named(request).lease() as service:
            live = await asyncio.to_thread(service.sites.tell, name, request.scope.get(KEY, 0), event)
            return as_json(await asyncio.to_thread(live.facts))

    def _named(self, request: Request) -> ServedModel:
        """The model that a query names.

        Raises:
            InputError: It names two.
            UnknownModelError: There is none.
        """
        named = request.query_params.getlist("model")
        if len(named) > 1:
            raise InputError("model is given twice in the query; give it once")
        return self.models.find(named[0] if named else None)

    async def _classified(self, service: Service, asked: Classify, owner: int, deadline: float) -> Response:
        said = asked.abstain_above is not requests.UNSAID
        kind, limit = service.abstaining(asked.uncertainty, asked.abstain_above, said=said)  # type: ignore[arg-type]
        key = service.class_key(asked.classes, asked.templates)
        names, limits = asked.classes or service.model.classes, service.limits
        many = len(asked.images) * min(asked.top, len(names)) > INLINE
        bound = (len(asked.images), names, asked.top, limits.characters, limits.answer)
        await self.exchange.aside(require_classified, *bound) if many else require_classified(*bound)
        handle = await self.exchange.handle(
            service, asked.site, owner
        )  # after what may be refused: a new site takes of the key's share
        model = service.hosted if handle is not None and key is None else service.model
        warnings: tuple[str, ...] = ()
        if key is not None:
            wait = service.class_sets.ask(*key, deadline=deadline, owner=owner)
            try:
                with current().timed("class_set"):
                    made = await finished(wait.future)
                model, warnings = made.model, made.warnings
            finally:
                wait.leave()
        own = key is None and handle is None
        seen, failed = await self.exchange.parted_rows(service, asked, deadline, classes=own)
        rows, site = await without_shift(handle, seen)

        def written() -> bytes:
            predictions = service.predictions(rows, model, asked.top, kind, limit) if rows else iter(())
            told = in_places(
                len(asked.images), (one.to_json() for one in predictions),
                {place: {"error": line} for place, line in failed.items()},
            )  # fmt: skip
            answers = ({"image": image.name, **one} for image, one in zip(asked.images, told, strict=True))
            said = [*warnings, *warning_of(failed, len(asked.images))]
            answer = {"space_id": service.model.space_id, "predictions": answers, "warnings": said}
            return sliced_json({**answer, **self.exchange.said(service, site)})

        return await self.exchange.answer(written, len(rows) * len(model.classes))

    async def _embedded(
        self, service: Service, asked: Embed, owner: int, deadline: float, safetensors: bool
    ) -> Response:
        exchange = self.exchange
        if not safetensors:
            require_embedded(len(asked.texts or asked.images), service.model.width, service.limits.answer)
        elif asked.partial:
            raise InputError("a file has no place for the errors that partial asks for; ask for JSON, or leave it out")
        embedded = await exchange.embedded(service, asked, owner, deadline)
        items = asked.texts or tuple(image.name for image in asked.images)
        vectors, site, warnings, space = embedded.vectors, embedded.site, embedded.warnings, service.model.space_id
        failed = embedded.failed

        def written() -> bytes:
            if safetensors:
                own = "" if asked.texts else service.model.site_sha256
                return embeddings_bytes(Embeddings(vectors, items, space, site.digest if site else own), warnings)
            answer: dict[str, Any] = {"space_id": space, "width": service.model.width, "items": list(items)}
            answer["embeddings"] = in_places(len(items), vectors_json(vectors), dict.fromkeys(failed, b"null"))
            if asked.partial:
                answer["errors"] = errors_json(failed, asked.images)
            return sliced_json({**answer, "warnings": warnings, **exchange.said(service, site)})

        kind = (SAFETENSORS, {"x-space-id": space}) if safetensors else ()
        return await exchange.answer(written, vectors.size, *kind)


def application(
    models: ServedModels, metrics: Metrics, *, api_keys: tuple[str, ...] = (), cors_origins: tuple[str, ...] = (),
    hosts: tuple[str, ...] = ("localhost",), stall: float = ConnectionLimits.stall,
    access_log: AccessLog | None = None, spans: Spans | None = None,
    repository: ModelRepository | None = None, admin_keys: tuple[str, ...] = (),
) -> tuple[Starlette, Api]:  # fmt: skip
    """The application, and its endpoints, which know whether it is ready.

    Args:
        models: Who answers.
        metrics: Counts.
        api_keys: One of them is demanded, if there are any.
        cors_origins: Other sites whose pages may ask.
        hosts: What the server is called, besides its addresses; see `origins.names_of`.
        stall: Seconds to wait for the next bytes of a body.
        access_log: Gets a line of each request.
        spans: Get a span of each request.
        repository: Loads and unloads models; None for a server that cannot.
        admin_keys: One of them is demanded for that; without any nobody may.
    """
    exchange = Exchange(models, metrics, stall)
    telemetry = Telemetry(metrics, access_log, spans)
    api, openai = Api(exchange, metrics, telemetry), OpenAi(exchange)
    v2 = InferenceHttp(exchange, lambda: api.ready)
    metrics.watch(models)
    middleware = [Middleware(Guard, api_keys=api_keys, admin_keys=admin_keys)]
    if cors_origins:
        headers = ["authorization", "content-type", "x-api-key", HEADER_LENGTH, TIMEOUT_HEADER, *ID_HEADERS]
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=headers,
            expose_headers=["x-space-id", "retry-after", HEADER_LENGTH, *ID_HEADERS],
        )
        middleware.insert(0, cors)
    middleware.insert(0, Middleware(Origins, hosts=hosts, origins=cors_origins))
    described = schema.document(models.limits, keys=bool(api_keys))
    middleware.insert(0, Middleware(Tracking, telemetry=telemetry))
    routes = [
        Route("/", page()),
        Route(schema.DOCUMENT, constant(as_json(described))),
        Route(schema.PAGE, constant(HTMLResponse(schema.page(described), headers=SCHEMA_HEADERS))),
        Route("/healthz", api.health),
        Route("/readyz", api.readiness),
        Route("/metrics", api.counted),
        Route("/v1/model", api.model),
        Route("/v1/sites", api.sites),
        Route("/v1/sites/{name}", api.site),
        Route("/v1/sites/{name}/{event}", api.tell_site, methods=["POST"]),
        Route("/v1/classify", api.classify, methods=["POST"]),
        Route("/v1/embed", api.embed, methods=["POST"]),
        Route("/v1/embeddings", openai.embeddings, methods=["POST"]),
        Route("/v1/models", openai.models),
        Route("/v1/models/{name}", openai.model),
        *v2.routes(),
        *RepositoryHttp(exchange, repository, lambda: api.ready).routes(),
    ]
    app = Starlette(routes=routes, middleware=middleware, exception_handlers={404: error_answer, 405: error_answer})
    app.router.redirect_slashes = False  # it would send a client wherever the Host header says
    return app, api
