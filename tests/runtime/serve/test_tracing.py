"""Traces: what a collector is sent of a request, and that nothing of OpenTelemetry is imported without one."""

import subprocess
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from invariclip.errors import InputError, NoTracesWarning
from invariclip.serve.service import Service
from invariclip.serve.tracing import open_spans

pytest.importorskip("opentelemetry.sdk")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def collector(monkeypatch):
    """A collector that keeps what it is sent, and the environment that names it."""
    resources, spans = [], []

    class Collects(BaseHTTPRequestHandler):
        def do_POST(self):
            sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
            for one in sent.resource_spans:
                resources.append({each.key: each.value.string_value for each in one.resource.attributes})
                spans.extend(span for scope in one.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collects)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for name in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_TRACES_SAMPLER", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield resources, spans
    server.shutdown()
    thread.join(20)
    server.server_close()


def attributes(span):
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def test_a_request_s_span_is_in_its_caller_s_trace_and_holds_its_stages(model, serving, images, collector):
    resources, spans = collector
    ours = open_spans()
    with serving(Service(model), spans=ours) as ask:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
        parts = [("images", "a.png", images[0]), ("images", "b.png", images[1])]
        answer = ask.form("/v1/classify?classes=sun,moon", parts, headers)
        ask("GET", "/healthz", headers=headers)
        refused = ask.classify(b"nothing", headers=headers)
    ours.close()
    assert resources[0]["service.name"] == "invariclip"
    roots = [span for span in spans if span.parent_span_id.hex() == PARENT]
    assert [span.name for span in roots] == ["POST /v1/classify"] * 2
    first, second = roots
    for span, told in ((first, answer), (second, refused)):
        assert span.trace_id.hex() == TRACE
        assert told.headers["traceparent"][:53] == f"00-{TRACE}-{span.span_id.hex()}-0"[:53]
        assert int(told.headers["traceparent"][-2:], 16) & 1
        assert span.kind == span.SPAN_KIND_SERVER
    said = attributes(first)
    assert (said["http.route"], said["http.response.status_code"]) == ("/v1/classify", 200)
    assert (said["invariclip.request_id"], said["invariclip.images"]) == ("mine", 2)
    assert attributes(second)["error.type"] == "input"
    inside = {span.name: span for span in spans if span.parent_span_id == first.span_id}
    assert set(inside) == {"read", "queue", "decode", "class_set", "engine", "answer"}
    for span in inside.values():
        assert span.trace_id.hex() == TRACE
        assert first.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= first.end_time_unix_nano + 1000  # rounded
    order = [inside[name].start_time_unix_nano for name in ("read", "class_set", "decode", "engine", "answer")]
    assert order == sorted(order)
    assert not any("healthz" in span.name for span in spans)


def test_a_trace_that_its_caller_does_not_record_is_not_sent(model, serving, collector):
    _, spans = collector
    ours = open_spans()
    with serving(Service(model), spans=ours) as ask:
        told = ask("GET", "/v1/model", headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
        own = ask("GET", "/v1/model")
    ours.close()
    assert told.headers["traceparent"].startswith(f"00-{TRACE}-")
    assert not int(told.headers["traceparent"][-2:], 16) & 1
    assert int(own.headers["traceparent"][-2:], 16) & 1
    assert {span.trace_id.hex() for span in spans} == {own.headers["traceparent"][3:35]}


def test_a_server_without_its_collector_answers_and_ends(model, serving, collector, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    ours = open_spans()
    with serving(Service(model), spans=ours) as ask:
        assert ask("GET", "/v1/model").status == 200
    ours.close()


def test_nothing_is_sent_where_it_is_not_asked_for():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for environment in (
            {}, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "x", "OTEL_SDK_DISABLED": "True"},
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "x", "OTEL_TRACES_EXPORTER": "none"},
        ):  # fmt: skip
            assert open_spans(environment) is None


def test_what_cannot_be_sent_is_a_warning():
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": "x", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    with pytest.warns(NoTracesWarning, match="as http/protobuf alone, not as 'grpc'"):
        assert open_spans(environment) is None
    code = (
        "import sys; sys.modules['opentelemetry'] = None; from invariclip.serve.tracing import open_spans; "
        "assert open_spans({'OTEL_EXPORTER_OTLP_ENDPOINT': 'x'}) is None"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 'opentelemetry is missing: pip install "invariclip[otel]"' in done.stderr


def test_settings_that_contradict_each_other_are_refused(collector, monkeypatch):
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "5")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "50")
    with pytest.raises(InputError, match="the settings OTEL_"):
        open_spans()


def test_nothing_is_imported_otherwise():
    code = (
        "import sys; from invariclip.serve.app import application; from invariclip.serve.tracing import open_spans; "
        "assert open_spans({}) is None; print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
