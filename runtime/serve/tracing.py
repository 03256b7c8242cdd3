"""OpenTelemetry traces of requests, where the environment names a collector; nothing is imported otherwise.

A request's span begins and ends with it. What happened within it is told when it is over, from its record.
"""

from __future__ import annotations

import os
import threading
import warnings
from typing import TYPE_CHECKING, Any

from invariclip.errors import InputError, NoTracesWarning
from invariclip.serve.record import TraceParent
from invariclip.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.trace import Span

    from invariclip.serve.record import RequestRecord

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
UNTRACED = ("/healthz", "/readyz", "/metrics")
"""Routes that probes ask all the time."""
CLOSING = 2.0
"""Seconds that a server which ends waits for the last spans to be sent."""
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL = "http/protobuf"
_NANO = 1e9


def open_spans(environment: Mapping[str, str] = os.environ) -> Spans | None:
    """What sends spans; None, and a warning where one was asked for, if they are sent nowhere.

    Args:
        environment: Which collector there is; what else is set for OpenTelemetry it reads from the process.

    Raises:
        InputError: The environment's settings contradict each other.
    """
    named = next((name for name in ENDPOINTS if environment.get(name)), None)
    off = (
        environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or environment.get("OTEL_TRACES_EXPORTER") == "none"
    )
    if named is None or off:
        return None
    protocol = next((environment[name] for name in _PROTOCOLS if environment.get(name)), _PROTOCOL)
    if protocol != _PROTOCOL:
        _warn(named, f"they are sent as {_PROTOCOL} alone, not as {protocol!r:.40}: set {_PROTOCOLS[1]}={_PROTOCOL}")
        return None
    try:
        return Spans()
    except ImportError as error:
        _warn(named, f'{error.name} is missing: pip install "invariclip[otel]"')
        return None
    except ValueError as error:
        raise InputError(f"the settings OTEL_* of the environment cannot be had: {error}") from error


def _warn(named: str, why: str) -> None:
    warnings.warn(f"{named} is set, and no traces are sent: {why}", NoTracesWarning, stacklevel=3)


class Spans:
    """Begins and ends the spans of requests; sent from a thread, with a bounded queue; `close` ends it."""

    def __init__(self) -> None:
        """Starts the thread.

        Raises:
            ImportError: A package of OpenTelemetry is missing.
            ValueError: A setting of the environment cannot be had.
        """
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        facts = {"service.version": __version__}
        if not os.environ.get("OTEL_SERVICE_NAME") and "service.name" not in os.environ.get(
            "OTEL_RESOURCE_ATTRIBUTES", ""
        ):
            facts["service.name"] = "invariclip"
        self._trace = trace
        self._provider = TracerProvider(resource=Resource.create(facts), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("invariclip.serve", __version__)

    def begin(self, record: RequestRecord) -> None:
        """Begins the span of a request, in its caller's trace where it has one; the record then has its place."""
        if record.route in UNTRACED:
            return
        span = self._tracer.start_span(
            f"{record.method} {record.route}", self._context(record.parent), self._trace.SpanKind.SERVER,
            start_time=int(record.at * _NANO),
        )  # fmt: skip
        at = span.get_span_context()
        record.span = span
        record.trace = TraceParent(f"{at.trace_id:032x}", f"{at.span_id:016x}", int(at.trace_flags))

    def end(self, record: RequestRecord) -> None:
        """Ends it, and tells what happened within."""
        span: Span | None = record.span
        if span is None or not span.is_recording():
            return
        inside = self._trace.set_span_in_context(span)
        last = record.began
        for name, stage in record.stages.items():
            if stage.last >= stage.first:
                self._child(name, inside, record, stage.first, stage.last, {"invariclip.seconds": stage.seconds})
                last = max(last, stage.last)
        self._child("answer", inside, record, last, record.began + record.seconds, {})
        span.set_attributes({name: value for name, value in _attributes(record).items() if value is not None})
        if record.status >= 500:
            span.set_status(self._trace.StatusCode.ERROR, record.error or record.reason)
        span.end(_nanoseconds(record, record.began + record.seconds))

    def close(self) -> None:
        """Sends what is left, for a short while: a collector may be away."""
        thread = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        thread.start()
        thread.join(CLOSING)

    def _context(self, parent: TraceParent | None) -> Any:
        from opentelemetry.context import Context

        if parent is None:
            return Context()
        at = self._trace.SpanContext(
            int(parent.trace_id, 16), int(parent.span_id, 16), is_remote=True,
            trace_flags=self._trace.TraceFlags(parent.flags),
        )  # fmt: skip
        return self._trace.set_span_in_context(self._trace.NonRecordingSpan(at), Context())

    def _child(
        self, name: str, inside: Any, record: RequestRecord, began: float, ended: float, facts: dict[str, float]
    ) -> None:
        child = self._tracer.start_span(name, inside, start_time=_nanoseconds(record, began), attributes=facts)
        child.end(_nanoseconds(record, ended))


def _nanoseconds(record: RequestRecord, moment: float) -> int:
    """A moment of `time.monotonic` in nanoseconds since 1970."""
    return int((record.at + moment - record.began) * _NANO)


def _attributes(record: RequestRecord) -> dict[str, str | int | None]:
    """By the names of OpenTelemetry's conventions for HTTP, and ours."""
    return {
        "http.request.method": record.method,
        "http.route": record.route,
        "http.response.status_code": record.status,
        "error.type": record.reason or None,
        "invariclip.request_id": record.request_id,
        "invariclip.key": record.key or None,
        **{f"invariclip.{kind}": count for kind, count in record.items.items()},
        "invariclip.failed": record.failed,
    }
