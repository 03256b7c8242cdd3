"""Around every request: keys, and errors as one line of JSON, never a traceback."""

from __future__ import annotations

import hmac
import json
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from invariclip.errors import InputError
from invariclip.serve.batcher import BatcherStoppedError, QueueFullError
from invariclip.serve.limits import RefusedError
from invariclip.serve.record import current

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("invariclip.serve")
V2_PROBES = ("/v2/health/live", "/v2/health/ready")
OPEN = ("/", "/docs", "/openapi.json", "/healthz", "/readyz", *V2_PROBES)
"""What is answered without a key: health, and pages that hold nothing of the artifact."""
SITES = "/v1/sites"
EMBEDDINGS, MODELS = "/v1/embeddings", "/v1/models"
OPENAI = (EMBEDDINGS, MODELS)
V2_MODELS, V2_INFER = "/v2/models", "/v2/models/NAME/infer"
REPOSITORY = "/v2/repository"
"""What is below it needs an admin key."""
NAMED = (SITES, MODELS, V2_MODELS, REPOSITORY)
"""Paths with names below them, which metrics count as one."""
ROUTES = (*OPEN, "/metrics", "/v1/model", "/v1/classify", "/v1/embed", EMBEDDINGS, *NAMED, "/v2", V2_INFER)
"""Paths that metrics count by name."""
_OPENAI_KINDS = {
    401: ("authentication_error", "invalid_api_key"),
    404: ("invalid_request_error", "model_not_found"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
}
"""OpenAI's type and code of an error by status; others are the request's fault below 500, or the server's."""
KEY = "invariclip.key"
"""In a request's scope: the number of its API key from 1 on, or 0 where none is demanded."""
GONE = 499
"""Counted for a client that went away; nobody gets it."""


def as_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer in JSON.

    Raises:
        ValueError: A number is not finite.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return Response(text.encode("utf-8", "replace"), status, headers, media_type="application/json")


async def error_answer(request: Request, error: Exception) -> Response:
    """What Starlette refuses by itself, in our words."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if status == 405:
        allowed = ", ".join(sorted(headers.get("Allow", "").split(", ")))
        return as_error(request.url.path, status, f"{request.method} is not taken here; available: {allowed}", headers)
    path = request.url.path
    return as_error(path, status, f"nothing is at {path[:100]}; available: {_ROUTES}", headers)


_ROUTES = (
    "POST /v1/classify, POST /v1/embed, POST /v1/embeddings, GET /v1/models, GET /v1/model, GET /v1/sites, "
    "GET /v2, POST /v2/models/NAME/infer, POST /v2/repository/index, "
    "GET /healthz, GET /readyz, GET /metrics, GET /openapi.json, GET /docs, GET /"
)


class Refusal(NamedTuple):
    """Why a request is not answered: HTTP's status, one line, and headers of the answer."""

    status: int
    line: str
    headers: dict[str, str]


def refusal(error: Exception) -> Refusal:
    """What an exception says to the client; an unexpected one gets an id that stands in the log."""
    line = " ".join(str(error).split())
    if isinstance(error, RefusedError):
        return Refusal(error.status, line, error.headers)
    if isinstance(error, QueueFullError):
        return Refusal(503, line, {"retry-after": str(error.retry_after)})
    if isinstance(error, BatcherStoppedError):
        return Refusal(503, line, {"retry-after": "1"})
    if isinstance(error, InputError):
        return Refusal(422, line, {})
    number = current().request_id
    log.error("error %s", number, exc_info=error)
    return Refusal(500, f"the server failed; its log says why under {number}", {})


def as_error(path: str, status: int, line: str, headers: dict[str, str] | None = None) -> Response:
    """An error as clients of a route read it.

    Args:
        path: Of the request; OpenAI's routes have an object in the place of the line.
        status: HTTP's number.
        line: What went wrong.
        headers: Of the answer.
    """
    if not _below(path, OPENAI):
        return as_json({"error": line}, status, headers)
    kind, code = _OPENAI_KINDS.get(status, ("server_error" if status >= 500 else "invalid_request_error", None))
    return as_json(
        {"error": {"message": line, "type": kind, "param": "model" if status == 404 else None, "code": code}},
        status,
        headers,
    )


def _below(path: str, routes: tuple[str, ...]) -> str | None:
    """The one of `routes` that a path is, or is below."""
    return next((route for route in routes if path == route or path.startswith(f"{route}/")), None)


def route_label(path: str) -> str:
    """What a path is counted as: one of `ROUTES`, or `other`."""
    if path.startswith(f"{V2_MODELS}/") and path.endswith("/infer"):
        return V2_INFER
    return path if path in ROUTES else _below(path, NAMED) or "other"


class ApiKeys:
    """The keys that a server takes; none where it is open to all."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._keys = [key.encode() for key in keys]

    def number(self, authorization: bytes, key: bytes) -> int | None:
        """The number of the key that a request brings, from 1 on; 0 where none is demanded, None where it has none.

        Args:
            authorization: `Bearer KEY`, or empty.
            key: The key alone, in place of it.
        """
        if not self._keys:
            return 0
        given = authorization[7:].strip() if authorization[:7].lower() == b"bearer " else key
        # Every key is compared, in a time that does not depend on how much of it is right
        same = [hmac.compare_digest(given, known) for known in self._keys]
        return same.index(True) + 1 if any(same) else None


class Guard:
    """An ASGI application around another."""

    def __init__(self, app: ASGIApp, api_keys: tuple[str, ...], admin_keys: tuple[str, ...]) -> None:
        self._app = app
        self._keys, self._admin = ApiKeys(api_keys), ApiKeys(admin_keys)
        self._administered = bool(admin_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False
        key: int | None

        async def noting(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            key = 0
            if scope["path"] not in OPEN:
                key = self._number(scope)
            scope[KEY] = key
            current().key = key or 0
            if key is None:
                answer = as_error(scope["path"], 401, WITHOUT_KEY, {"www-authenticate": "Bearer"})
                await answer(scope, receive, noting)
            else:
                await self._app(scope, receive, noting)
        except ClientDisconnect:
            current().refused("the client went away", GONE)
        except Exception as error:
            if started:
                raise  # half an answer is out, and cannot become another
            said = refusal(error)
            current().refused(said.line if said.status == 500 else error, said.status)
            await as_error(scope["path"], *said)(scope, receive, noting)

    def _number(self, scope: Scope) -> int | None:
        """The number of a request's API key, see `ApiKeys.number`; an admin key has none.

        Raises:
            RefusedError: An admin key is needed, and this is another one, or the server has none.
        """
        headers = dict(scope["headers"])
        given = headers.get(b"authorization", b""), headers.get(b"x-api-key", b"")
        if not _below(scope["path"], (REPOSITORY,)):
            return self._keys.number(*given)
        if not self._administered:
            line = (
                "models are loaded and unloaded by those who have an admin key; start the server with --admin-key-file"
            )
            raise RefusedError(403, line, reason="key")
        if self._admin.number(*given) is not None:
            return 0
        if self._keys.number(*given):
            raise RefusedError(
                403, "this needs an admin key, of --admin-key-file; the key is another one", reason="key"
            )
        return None


WITHOUT_KEY = "this needs a key: send the header authorization: Bearer KEY, or x-api-key: KEY"
