"""Which browsers' pages may ask: the Host and the Origin of a request.

A page of another site can send a form here, and after it has pointed its own name at this address (DNS rebinding) it
can read the answers too. A browser tells both names truly.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import TYPE_CHECKING

from invariclip.errors import InputError
from invariclip.serve.guard import V2_PROBES, as_error
from invariclip.serve.record import current

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

ANY = "*"
PROBES = ("/healthz", "/readyz", *V2_PROBES)
"""Answered under any name: they tell nothing, and probes call a server by names of their own."""
_NAME = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+")


def names_of(host: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Names that a server is called by, besides addresses, which no page can point elsewhere.

    Args:
        host: Where it listens; this machine's name counts where that is every address.
        allowed: More of them; `*.example.org` stands for all below, `*` for any.

    Raises:
        InputError: One is no name.
    """
    for one in allowed:
        if one != ANY and not _address(one.strip("[]")) and not _NAME.fullmatch(one.lower()):
            raise InputError(
                f"--allowed-host {one!r:.60}: give a name without scheme and port, such as clip.example.org, "
                f"*.example.org for all names below it, or {ANY} for any"
            )
    own = (socket.gethostname(),) if host in ("", "0.0.0.0", "::") else (host,)  # noqa: S104 - compared, not bound
    return tuple(dict.fromkeys(one.lower().strip("[]") for one in ("localhost", *own, *allowed)))


def checked_origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    """Origins, each as browsers write it.

    Raises:
        InputError: One can never be what a browser says.
    """
    for one in origins:
        if one not in (ANY, "null") and not _ORIGIN.fullmatch(one):
            raise InputError(
                f"--cors-origin {one!r:.60}: give scheme, host and port as a browser writes them, such as "
                f"https://example.org, or {ANY} for any"
            )
    return origins


def host_name(host: str) -> str:
    """A Host header's name, without its port: lower case, without a last dot."""
    name = host.strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.rpartition(":")[0] if ":" in name else name
    return name.removesuffix(".")


def _address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Origins:
    """An ASGI application around another: refuses requests of foreign pages, and those that mean another server."""

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...], origins: tuple[str, ...]) -> None:
        self._app = app
        self._hosts, self._origins = hosts, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        said = self._refused(scope) if scope["type"] == "http" else None
        if said is None:
            await self._app(scope, receive, send)
            return
        status, message = said
        current().refused(message, status)
        await as_error(scope["path"], status, message)(scope, receive, send)

    def _refused(self, scope: Scope) -> tuple[int, str] | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")  # one at most: h11 refuses two, and HTTP/1.1 without any
        if host and scope["path"] not in PROBES and not self._known(host_name(host)):
            return 421, (
                f"this server is not called {host_name(host)!r:.100}; use its address, or start it with --allowed-host "
                "and this name"
            )
        origin = headers.get(b"origin")
        if origin is None or self._may_ask(origin, host, headers.get(b"sec-fetch-site", "")):
            return None
        return 403, f"pages of {origin!r:.100} may not ask this server; start it with --cors-origin and their origin"

    def _known(self, name: str) -> bool:
        if ANY in self._hosts or _address(name) or name in self._hosts:
            return True
        return any(one.startswith("*.") and name.endswith(one[1:]) for one in self._hosts)

    def _may_ask(self, origin: str, host: str, site: str) -> bool:
        if ANY in self._origins or origin in self._origins:
            return True
        # A proxy may have changed the Host; `sec-fetch-site` is the browser's own, and no page can set it
        return site == "same-origin" or origin.lower().partition("://")[2] == host.strip().lower() != ""
