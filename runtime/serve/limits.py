"""How much a request may bring, and how much all requests together."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from invariclip.errors import InputError, InvariclipError

if TYPE_CHECKING:
    from collections.abc import Sequence

MIB = 1 << 20


REASONS = (
    "malformed", "key", "origin", "host", "route", "method", "slow_body", "stalled", "head", "body_size", "pixels",
    "answer_size", "too_many", "media_type", "input", "site_share", "client_gone", "queue_full", "too_late", "deadline",
    "memory", "loading", "load_failed", "warming_up", "stopping", "connections", "error", "other",
)  # fmt: skip
"""Why a request is not answered: values of the metric `invariclip_refused_total` and of the access log."""
_BY_STATUS = {
    400: "malformed", 401: "key", 403: "origin", 404: "route", 405: "method", 408: "slow_body", 413: "too_many",
    415: "media_type", 421: "host", 422: "input", 429: "site_share", 499: "client_gone", 500: "error", 504: "deadline",
}  # fmt: skip


def reason_of(status: int) -> str:
    """The reason that a status tells by itself; empty where it is no error."""
    return _BY_STATUS.get(status, "other") if status >= 400 else ""


class RefusedError(InvariclipError):
    """A request that is not answered.

    Attributes:
        status: HTTP's number for why.
        headers: Headers of the answer.
        reason: One of `REASONS`.
    """

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None, *, reason: str = "") -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.reason = reason or reason_of(status)


class UnknownModelError(RefusedError):
    """A request names a model that is not served."""

    def __init__(self, asked: str, available: str, more: str = "") -> None:
        super().__init__(404, f"no model is called {asked!r:.100}{more}; available: {available}")


class BadRequestError(RefusedError):
    """A request's body cannot be taken apart."""

    def __init__(self, message: str) -> None:
        super().__init__(400, message)


@dataclass(frozen=True)
class Limits:
    """Bounds; what goes beyond is refused with 413 before it is worked on.

    Attributes:
        body: Bytes of a request's body.
        bodies: Bytes of all bodies that are held at a time; more are refused with 503. Likewise of all large answers.
        answer: Bytes of an answer in JSON.
        images: Images of a request.
        pixels: Pixels of an image, by its own head, before it is decoded.
        request_pixels: Pixels of all images of a request, decoded and after the resize.
        texts: Texts of a request.
        characters: Of one text, class name or template, or of an image's name.
        classes: Class names of a request.
        templates: Prompt templates of a request.
        prompts: Classes times templates of a request.
        class_sets: Class sets that are kept.
        queue: Images that wait.
        seconds: From a request's head to its answer; what would wait longer is refused with 503.
    """

    body: int = 32 * MIB
    bodies: int = 512 * MIB
    answer: int = 32 * MIB
    images: int = 64
    pixels: int = 50_000_000
    request_pixels: int = 200_000_000
    texts: int = 1_000
    characters: int = 2_000
    classes: int = 1_000
    templates: int = 100
    prompts: int = 10_000
    class_sets: int = 32
    queue: int = 256
    seconds: float = 30.0

    def __post_init__(self) -> None:
        """Refuses numbers that answer nobody.

        Raises:
            InputError: One is not above 0, or a request may bring more than can wait or be held.
        """
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise InputError(f"the limit {field.name} must be above 0, not {getattr(self, field.name)}")
        if self.images > self.queue:
            raise InputError(
                f"a request may bring {self.images} images and only {self.queue} may wait; raise --queue or lower "
                "--max-images"
            )
        if self.body > self.bodies:
            raise InputError(f"a body of {self.body:,} bytes is more than the {self.bodies:,} that may be held in all")
        if self.pixels > self.request_pixels:
            raise InputError(
                f"an image may have {self.pixels:,} pixels and all images of a request {self.request_pixels:,}; raise "
                "--max-request-pixels or lower --max-pixels"
            )

    @property
    def json_values(self) -> int:
        """Names and values that a body in JSON may hold: far more than a request can mean."""
        return 10_000 + 10 * (self.images + self.texts + self.classes + self.templates)

    def to_json(self) -> dict[str, Any]:
        """What `/v1/model` says of them."""
        return asdict(self)

    def require(self, count: int, what: str, limit: int) -> None:
        """Refuses too many.

        Raises:
            RefusedError: There are.
        """
        if count > limit:
            raise RefusedError(413, f"{count:,} {what} are too many; up to {limit:,} are taken at once")


TIMEOUT_HEADER = "x-request-timeout-ms"
_MILLISECONDS = re.compile(r"[0-9]{1,9}")


def seconds_for(values: Sequence[str], limits: Limits) -> float:
    """Seconds for a request: the server's, or fewer where its client does not wait so long.

    Args:
        values: Of the header `TIMEOUT_HEADER`, none or one.
        limits: The server's.

    Raises:
        BadRequestError: It is not one whole number above 0.
    """
    if not values:
        return limits.seconds
    if len(values) > 1 or not _MILLISECONDS.fullmatch(values[0]) or not int(values[0]):
        raise BadRequestError(
            f"{TIMEOUT_HEADER} must be one whole number of milliseconds from 1 to 999,999,999, not "
            f"{', '.join(values)!r:.60}"
        )
    return min(limits.seconds, int(values[0]) / 1000)


class Held:
    """Bytes of all bodies, or of all answers, that are in memory; only the event loop touches it."""

    def __init__(self, limit: int, what: str = "requests") -> None:
        self.limit, self.now, self.what = limit, 0, what

    def take(self, count: int) -> None:
        """Counts bytes that have come in.

        Raises:
            RefusedError: With them there are too many.
        """
        if self.now + count > self.limit:
            raise RefusedError(
                503,
                f"{self.what} of {self.now:,} bytes are in memory, and up to {self.limit:,} are held; try again in 1 s",
                {"retry-after": "1"}, reason="memory",
            )  # fmt: skip
        self.now += count

    def give_back(self, count: int) -> None:
        """Counts bytes that were let go."""
        self.now -= count
