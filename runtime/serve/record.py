"""What is known of one request while it is answered: its ids, how much it asked for, and where its time went."""

from __future__ import annotations

import re
import time
import uuid
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from invariclip.errors import InvariclipError
from invariclip.serve.limits import reason_of
from invariclip.serve.tickets import StageTime

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from invariclip.serve.tickets import TicketTimes

ERROR_CHARACTERS = 300
"""Of an error, as much as a log or one item of an answer repeats."""
STAGES = ("read", "queue", "decode", "class_set", "engine")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._~:/+=@-]{1,128}")
_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)
_KNOWN_FLAGS = 0b11  # sampled, random trace id; others are not ours to hand on


@dataclass(frozen=True)
class TraceParent:
    """A place in a trace, as the header `traceparent` of W3C Trace Context writes it.

    Attributes:
        trace_id: 32 hexadecimal digits, not all 0.
        span_id: 16 of them, likewise.
        flags: Bit 0: the caller records this trace.
    """

    trace_id: str
    span_id: str
    flags: int = 0

    @property
    def header(self) -> str:
        """As version 00 writes it."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"


def read_traceparent(values: Sequence[bytes]) -> TraceParent | None:
    """The place in a trace that a request names; None where it names none, two, or a malformed one."""
    found = _TRACEPARENT.fullmatch(values[0]) if len(values) == 1 else None
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    if version == b"ff" or (version == b"00" and more is not None) or not (int(trace_id, 16) and int(span_id, 16)):
        return None
    return TraceParent(trace_id.decode(), span_id.decode(), int(flags, 16) & _KNOWN_FLAGS)


def continued(parent: TraceParent | None) -> TraceParent:
    """A new span: in the caller's trace, or in a new one that nobody records."""
    span_id = uuid.uuid4().hex[:16]
    if parent is None:
        return TraceParent(uuid.uuid4().hex, span_id)
    return TraceParent(parent.trace_id, span_id, parent.flags)


def request_id_of(values: Sequence[bytes]) -> str:
    """The `x-request-id` that a request brings, if it is one token of up to 128 characters; otherwise a new one."""
    if len(values) == 1 and _REQUEST_ID.fullmatch(values[0]):
        return values[0].decode()
    return uuid.uuid4().hex


@dataclass(eq=False)
class RequestRecord:
    """One request. What answers it finds it by `current`, and adds what it knows.

    Attributes:
        request_id: Its name in answers and logs.
        trace: Its span's place in a trace.
        parent: Its caller's, where it named one.
        span: See `tracing.Spans`; None where no spans are sent.
        method: HTTP's, or `other`.
        route: See `guard.route_label`; None where no head was read.
        at: When it came, in seconds since 1970.
        began: Likewise, by `time.monotonic`.
        seconds: From then to the end of its answer.
        status: Of its answer; 0 before there is one.
        bytes_in: Of its body, as far as it was read.
        bytes_out: Of its answer's body.
        items: How many `images` and `texts` were put into a queue for it.
        failed: Of its images, those that have an error in their place.
        stages: Where its time went. read: its body came in. queue: its items waited, and none of them was worked on.
            decode: threads decoded its images. class_set: it waited for the classes that it brought. engine: runs that
            some of its items were part of.
        key: The number of its API key from 1 on; 0 where there is none.
        reason: Why it was refused, one of `limits.REASONS`; empty where it was not.
        error: What the client was told, cut.
    """

    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    trace: TraceParent = field(default_factory=lambda: continued(None))
    parent: TraceParent | None = None
    span: Any = None
    method: str | None = None
    route: str | None = None
    at: float = field(default_factory=time.time)
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    status: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    items: dict[str, int] = field(default_factory=lambda: {"images": 0, "texts": 0})
    failed: int = 0
    stages: dict[str, StageTime] = field(default_factory=lambda: {name: StageTime() for name in STAGES})
    key: int = 0
    reason: str = ""
    error: str = ""

    def submitted(self, kind: str, count: int) -> None:
        """Items of a kind are about to be put into a queue."""
        self.items[kind] = self.items.get(kind, 0) + count

    def spent(self, times: TicketTimes) -> None:
        """Its items left a queue."""
        self.stages["queue"].merge(times.queue)
        self.stages["decode"].merge(times.prepare)
        self.stages["engine"].merge(times.engine)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Counts what the block takes as a stage's."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.stages[stage].add(began, time.monotonic())

    def refused(self, error: Exception | str, status: int = 0) -> None:
        """It is not answered; an error's own reason holds, or else its status tells one. The first error counts."""
        if self.reason:
            return
        own = getattr(error, "reason", "") if isinstance(error, InvariclipError) else ""
        self.reason = own or reason_of(status)
        self.error = " ".join(str(error).split())[:ERROR_CHARACTERS]


_CURRENT: ContextVar[RequestRecord] = ContextVar("request_record")


def current() -> RequestRecord:
    """The record of the request that this task or thread answers; outside of any, one that nobody reads."""
    return _CURRENT.get(None) or RequestRecord()


def begin(record: RequestRecord) -> None:
    """Makes it the current one, for this task and those that it starts."""
    _CURRENT.set(record)
