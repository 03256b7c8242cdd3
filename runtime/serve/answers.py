"""Answers in JSON: how large one may become, and large ones written piece by piece."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from starlette.responses import Response

from invariclip.serve.limits import RefusedError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from starlette.types import Receive, Scope, Send

    from invariclip.serve.limits import Held

INLINE = 10_000
"""Numbers of an answer that are written in the event loop; more would hold up others."""
_SLICE = 1 << 18
COMPONENT = 24
"""Bytes of a component of an embedding in JSON, at most."""
AS_A_FILE = ", or ask for a file with the header accept: application/octet-stream"
# Bytes beside a class's name, and of an image beside its classes
_ENTRY, _IMAGE = 64, 512
_ESCAPED = 6  # bytes that a character takes at most


def require_classified(images: int, classes: Sequence[str], top: int, characters: int, limit: int) -> None:
    """Refuses a ranking that would be too large.

    Args:
        images: How many there are.
        classes: All class names.
        top: How many of them are told of each image.
        characters: The most that a name of the request may have.
        limit: Bytes of an answer.

    Raises:
        RefusedError: The longest names that could be told are too long.
    """
    told = min(top, len(classes))
    if images * (told * (_ESCAPED * characters + _ENTRY) + _IMAGE) <= limit:
        return
    sizes = np.sort([len(msgspec.json.encode(name)) + _ENTRY for name in classes])[::-1]
    by_top = images * (np.cumsum(sizes) + _IMAGE)
    if by_top[told - 1] > limit:
        most = int(np.searchsorted(by_top, limit, side="right"))
        remedy = f"lower top to {most:,}" if most else "send fewer images"
        raise RefusedError(
            413,
            f"top {told:,} of {len(classes):,} classes for each image may take {int(by_top[told - 1]):,} bytes "
            f"(images: {images:,}); up to {limit:,} are sent: {remedy}",
            reason="answer_size",
        )


def require_embedded(rows: int, width: int, limit: int, *, component: int = COMPONENT, remedy: str = AS_A_FILE) -> None:
    """Refuses embeddings that would be too large in JSON.

    Args:
        rows: How many there are.
        width: Of each.
        limit: Bytes of an answer.
        component: Bytes of a component, at most.
        remedy: What to ask for instead.

    Raises:
        RefusedError: They would be.
    """
    size = rows * width * component
    if size > limit:
        raise RefusedError(
            413,
            f"{rows:,} embeddings of width {width:,} may take {size:,} bytes in JSON; up to {limit:,} are sent: send "
            f"less{remedy}",
            reason="answer_size",
        )


def vectors_json(vectors: NDArray[np.float32]) -> Iterator[bytes]:
    """Rows [N, d] in JSON, one by one.

    Raises:
        ValueError: A number is not finite.
    """
    if not np.isfinite(vectors).all():
        raise ValueError("an embedding is not finite")
    return (msgspec.json.encode(row.tolist()) for row in vectors)


def sliced_json(fields: Mapping[str, Any]) -> bytes:
    """A JSON object. A field that is an iterator becomes a list, written item by item: other threads run between two.

    Args:
        fields: Plain values, or iterators of them; `bytes` are JSON already.

    Raises:
        ValueError: A number is not finite.
    """
    parts: list[bytes] = []
    for name, value in fields.items():
        parts.append(b"%s%s: " % (b", " if parts else b"{", _json(name)))
        if isinstance(value, Iterator):
            first = len(parts)
            for item in value:
                parts.append(b"[" if len(parts) == first else b", ")
                parts.append(_json(item))
            parts.append(b"]" if len(parts) > first else b"[]")
        else:
            parts.append(_json(value))
    parts.append(b"}")
    return b"".join(parts)


def _json(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


class LargeAnswer(Response):
    """Sent in slices, each when the client has taken most of what came before; counted until the last one is out."""

    def __init__(self, content: bytes, held: Held, media_type: str, headers: dict[str, str] | None = None) -> None:
        """Remembers who counts the bytes."""
        super().__init__(content, headers=headers, media_type=media_type)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it.

        Raises:
            RefusedError: Too many bytes of answers are held already.
        """
        del scope, receive
        body = bytes(self.body)
        self._held.take(len(body))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            for start in range(0, max(len(body), 1), _SLICE):
                part, more = body[start : start + _SLICE], start + _SLICE < len(body)
                await send({"type": "http.response.body", "body": part, "more_body": more})
        finally:
            self._held.give_back(len(body))
