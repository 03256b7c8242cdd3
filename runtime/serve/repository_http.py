"""The Open Inference Protocol's model repository over HTTP, for those who have an admin key."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from starlette.routing import Route

from invariclip.errors import InputError
from invariclip.records import to_record
from invariclip.serve.guard import REPOSITORY, as_json
from invariclip.serve.limits import RefusedError
from invariclip.serve.requests import from_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request
    from starlette.responses import Response

    from invariclip.serve.exchange import Exchange
    from invariclip.serve.repository import ModelRepository

R = TypeVar("R")


@dataclass(frozen=True)
class RepositoryIndexRequest:
    """Which models are listed: those that are loaded, or all."""

    ready: bool = False


@dataclass(frozen=True)
class LoadParameters:
    """Of a load; an artifact has its own configuration, so there are none."""


@dataclass(frozen=True)
class RepositoryLoadRequest:
    """A request to load a model, or to load it again."""

    parameters: LoadParameters = LoadParameters()


@dataclass(frozen=True)
class UnloadParameters:
    """Of an unload. No model depends on another one."""

    unload_dependents: bool = False


@dataclass(frozen=True)
class RepositoryUnloadRequest:
    """A request to unload a model."""

    parameters: UnloadParameters = UnloadParameters()


@dataclass(frozen=True)
class UnloadedModel:
    """What was unloaded."""

    name: str
    state: Literal["UNAVAILABLE"] = "UNAVAILABLE"


class RepositoryHttp:
    """The endpoints; `Guard` lets nobody in without an admin key."""

    def __init__(self, exchange: Exchange, repository: ModelRepository | None, ready: Callable[[], bool]) -> None:
        self._exchange, self._repository, self._ready = exchange, repository, ready

    def routes(self) -> list[Route]:
        """All of them."""
        return [
            Route(f"{REPOSITORY}/index", self.index, methods=["POST"]),
            Route(f"{REPOSITORY}/models/{{name}}/load", self.load, methods=["POST"]),
            Route(f"{REPOSITORY}/models/{{name}}/unload", self.unload, methods=["POST"]),
        ]

    async def index(self, request: Request) -> Response:
        """What is loaded, and what could be."""
        asked = await self._read(request, RepositoryIndexRequest)
        listed = await self._models().listed()
        return as_json([asdict(one) for one in listed if one.state == "READY" or not asked.ready])

    async def load(self, request: Request) -> Response:
        """Loads a model, or exchanges it for what its artifact is now."""
        await self._read(request, RepositoryLoadRequest)
        return as_json(asdict(await self._models().load(request.path_params["name"])))

    async def unload(self, request: Request) -> Response:
        """Unloads a model; the answer comes when its last request is answered."""
        await self._read(request, RepositoryUnloadRequest)
        await self._models().unload(request.path_params["name"])
        return as_json(asdict(UnloadedModel(request.path_params["name"])))

    def _models(self) -> ModelRepository:
        if self._repository is None:  # a server within a program of somebody else's
            raise RefusedError(403, "models cannot be loaded here; `invariclip serve` can", reason="key")
        if not self._ready():
            raise RefusedError(503, "warming up; ask again", {"retry-after": "1"}, reason="warming_up")
        return self._repository

    async def _read(self, request: Request, kind: type[R]) -> R:
        """A small body: JSON, or none, which says nothing.

        Raises:
            RefusedError: It does not come in, or is no JSON.
            InputError: A field is unknown.
        """
        exchange = self._exchange
        try:
            async with asyncio.timeout(exchange.limits.seconds):
                content, held = await exchange.content(request)
        except TimeoutError as error:
            raise RefusedError(408, f"the request did not come in within {exchange.limits.seconds:g} s") from error
        try:
            if content.heavy:
                raise RefusedError(413, "the body is too large for this route; it holds a few fields of JSON")
            plain: dict[str, Any] = from_json(content.data, exchange.limits) if content.data.strip() else {}
        finally:
            exchange.held.give_back(held)
        known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
        strange = sorted(set(plain) - set(known))
        if strange:
            raise InputError(f"no field is called {strange[0]!r:.60}; available: {', '.join(known)}")
        return to_record(kind, plain, "the body")
