"""Around every request: keys, and errors as one line of JSON, never a traceback."""

from __future__ import annotations

import hmac
import json
import logging
from typing import TYPE_CHECKING, Any

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
OPEN = ("/", "/healthz", "/readyz")
"""What is answered without a key: health, and the page, which holds nothing of the artifact."""
SITES = "/v1/sites"
ROUTES = (*OPEN, "/metrics", "/v1/model", SITES, "/v1/classify", "/v1/embed")
"""Paths that metrics count by name."""
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
        return as_json({"error": f"{request.method} is not taken here; available: {allowed}"}, status, headers)
    return as_json({"error": f"nothing is at {request.url.path[:100]}; available: {_ROUTES}"}, status, headers)


_ROUTES = (
    "POST /v1/classify, POST /v1/embed, GET /v1/model, GET /v1/sites, GET /healthz, GET /readyz, GET /metrics, GET /"
)


def refusal(error: Exception) -> Response:
    """What an exception says to the client; of an unexpected one the request's id, under which the log has it."""
    status, headers = 422, {}
    if isinstance(error, RefusedError):
        status, headers = error.status, error.headers
    elif isinstance(error, QueueFullError):
        status, headers = 503, {"retry-after": str(error.retry_after)}
    elif isinstance(error, BatcherStoppedError):
        status, headers = 503, {"retry-after": "1"}
    elif not isinstance(error, InputError):
        line, number = "the server failed; its log says why under", current().request_id
        current().refused(line, 500)
        log.error("error %s", number, exc_info=error)
        return as_json({"error": f"{line} {number}"}, 500)
    current().refused(error, status)
    return as_json({"error": " ".join(str(error).split())}, status, headers)


def route_label(path: str) -> str:
    """What a path is counted as: one of `ROUTES`, or `other`."""
    if path.startswith(f"{SITES}/"):
        return SITES
    return path if path in ROUTES else "other"


class Guard:
    """An ASGI application around another."""

    def __init__(self, app: ASGIApp, api_keys: tuple[str, ...]) -> None:
        self._app = app
        self._keys = tuple(key.encode() for key in api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def noting(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            key = self._key(scope) if self._keys and scope["path"] not in OPEN else 0
            scope[KEY] = key
            current().key = key or 0
            if key is None:
                answer = as_json({"error": _WITHOUT_KEY}, 401, {"www-authenticate": "Bearer"})
                await answer(scope, receive, noting)
            else:
                await self._app(scope, receive, noting)
        except ClientDisconnect:
            current().refused("the client went away", GONE)
        except Exception as error:
            if started:
                raise  # half an answer is out, and cannot become another
            await refusal(error)(scope, receive, noting)

    def _key(self, scope: Scope) -> int | None:
        """The number of the key that a request brings, from 1 on."""
        headers = dict(scope["headers"])
        given = headers.get(b"authorization", b"")
        key = given[7:].strip() if given[:7].lower() == b"bearer " else headers.get(b"x-api-key", b"")
        # Every key is compared, in a time that does not depend on how much of it is right
        same = [hmac.compare_digest(key, known) for known in self._keys]
        return same.index(True) + 1 if any(same) else None


_WITHOUT_KEY = "this needs a key: send the header authorization: Bearer KEY, or x-api-key: KEY"
