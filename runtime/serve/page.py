"""The page at `/`: one file without anything from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files
from typing import TYPE_CHECKING

from starlette.responses import HTMLResponse

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request
    from starlette.responses import Response


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


def _digest(text: str, tag: str) -> str:
    [inside] = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"
