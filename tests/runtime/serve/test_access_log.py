"""Ids of requests and their lines in the access log, which neither a client nor a disk can break."""

import json
import logging
import os
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from invariclip.errors import InputError
from invariclip.serve.access_log import PIECE, AccessLog, facts_of
from invariclip.serve.connections import ConnectionLimits
from invariclip.serve.limits import REASONS, Limits
from invariclip.serve.metrics import Metrics
from invariclip.serve.record import RequestRecord, TraceParent, continued, read_traceparent, request_id_of
from invariclip.serve.service import Batching, Service

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def dropped(metrics):
    return metrics.access_log_dropped._value.get()


@pytest.fixture
def logged(model, serving, tmp_path, until):
    """A server with an access log; `after` gives its lines when there are so many."""
    metrics, path = Metrics(), tmp_path / "access.jsonl"
    log = AccessLog(path, metrics)

    def after(count):
        until(lambda: path.read_bytes().count(b"\n") >= count)
        return lines(path)

    def of(service=None, **options):
        return serving(service or Service(model), metrics, access_log=log, **options)

    of.after, of.metrics = after, metrics
    yield of
    log.close()


def test_a_line_says_what_was_asked_and_where_the_time_went(logged, images):
    with logged() as ask:
        answer = ask.form(
            "/v1/classify?classes=sun,moon", [("images", "a.png", images[0]), ("images", "b.png", images[1])]
        )
        assert answer.status == 200
        ask.json("/v1/embed", {"texts": ["a", "b", "c"]})
        ask("GET", "/v1/sites/yard-of-somebody")
        first, second, third = logged.after(3)
    assert list(first) == [
        "time", "request_id", "trace_id", "span_id", "method", "route", "status", "bytes_in", "bytes_out", "images",
        "texts", "failed", "read_ms", "queue_ms", "decode_ms", "class_set_ms", "engine_ms", "total_ms", "key", "reason",
        "error",
    ]  # fmt: skip
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
    assert (first["method"], first["route"], first["status"]) == ("POST", "/v1/classify", 200)
    assert (first["images"], first["texts"], first["bytes_out"]) == (2, 0, len(answer.body))
    assert first["bytes_in"] > len(images[0]) + len(images[1])
    for name in ("decode_ms", "class_set_ms", "engine_ms"):
        assert first[name] > 0
    assert first["queue_ms"] + first["engine_ms"] + first["class_set_ms"] <= first["total_ms"]
    assert (first["key"], first["reason"], first["error"]) == (None, None, None)
    assert (second["images"], second["texts"], second["class_set_ms"]) == (0, 3, 0)
    assert second["engine_ms"] > 0
    assert (third["route"], third["status"], third["reason"]) == ("/v1/sites", 404, "route")
    assert "somebody" not in third["route"]


def test_ids_are_taken_over_and_answered_in_every_answer(logged, images):
    with logged(api_keys=("sesame",)) as ask:
        asked = {"x-request-id": "shop-7/a:1", "traceparent": PARENT}
        told = [
            ask.classify(images[0], headers={**asked, "x-api-key": "sesame"}),
            ask.classify(b"nothing", headers={**asked, "x-api-key": "sesame"}),
            ask.classify(images[0], headers=asked),
            ask("GET", "/nowhere", headers={**asked, "x-api-key": "sesame"}),
            ask("GET", "/v1/classify", headers={**asked, "x-api-key": "sesame"}),
            ask("GET", "/v1/model", headers={**asked, "host": "foreign.example.org"}),
            ask("GET", "/v1/model", headers={**asked, "origin": "https://foreign.example.org"}),
            ask("GET", "/", headers=asked),
        ]
        written = logged.after(len(told))
    assert [one.status for one in told] == [200, 422, 401, 404, 405, 421, 403, 200]
    assert [one["reason"] for one in written] == [None, "input", "key", "route", "method", "host", "origin", None]
    assert [one["key"] for one in written] == [1, 1, None, 1, 1, None, None, None]
    for answer, line in zip(told, written, strict=True):
        assert answer.headers["x-request-id"] == line["request_id"] == "shop-7/a:1"
        assert answer.headers["traceparent"] == f"00-{TRACE}-{line['span_id']}-01"
        assert line["trace_id"] == TRACE
        assert line["status"] == answer.status
    assert written[1]["error"] == told[1].error[:300]
    assert "sesame" not in json.dumps(written)


@pytest.mark.parametrize("bad", ["", "two words", "x" * 129, "caf\xe9", 'a"b', "a\tb"])
def test_other_ids_are_replaced(logged, bad):
    with logged() as ask:
        answer = ask("GET", "/healthz", headers={"x-request-id": bad, "traceparent": f"{PARENT}-more"})
        [line] = logged.after(1)
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    assert answer.headers["x-request-id"] == line["request_id"]
    assert re.fullmatch(f"00-{line['trace_id']}-[0-9a-f]{{16}}-00", answer.headers["traceparent"])
    assert line["trace_id"] != TRACE


def test_an_unexpected_error_is_in_the_log_under_the_request_s_id(logged, model, images, caplog):
    class Faulty(Service):
        def _rows(self, batch, seen):
            raise ZeroDivisionError("secret of the house")

    with logged(Faulty(model)) as ask, caplog.at_level(logging.ERROR, "invariclip.serve"):
        answer = ask.classify(images[0], headers={"x-request-id": "mine"})
        [line] = logged.after(1)
    assert answer.error.endswith("under mine")
    assert any("mine" in record.getMessage() and record.exc_info for record in caplog.records)
    assert (line["reason"], line["error"]) == ("error", "the server failed; its log says why under mine")


def test_reasons_of_refusals(logged, model, gated, images, until):
    service = gated(model, Limits(queue=2, images=2, seconds=10, body=100_000), Batching(max_batch=1))
    with logged(service) as ask, ThreadPoolExecutor(4) as pool:
        taken = [pool.submit(ask.classify, images[0])]
        assert service.begun.acquire(timeout=20)
        taken += [pool.submit(ask.classify, images[0]) for _ in range(2)]
        until(lambda: service.images.waiting == 2)
        assert ask.classify(images[0]).status == 503
        gone = ask.connection()
        gone.request("POST", "/v1/classify", b"", {"content-type": "image/png", "content-length": "9"})
        gone.sock.close()
        assert ask.classify(b"x" * 100_001).status == 413
        service.gate.set()
        assert [one.result(20).status for one in taken] == [200, 200, 200]
        told = {line["reason"]: line["status"] for line in logged.after(6)}
        text = ask("GET", "/metrics").body.decode()
    assert told == {"queue_full": 503, "client_gone": 499, "body_size": 413, None: 200}
    for reason in ("queue_full", "client_gone", "body_size"):
        assert f'invariclip_refused_total{{reason="{reason}"}} 1.0' in text
    assert text.count("invariclip_refused_total{") == len(REASONS)


def test_connections_without_a_request_have_a_line_too_but_few(logged):
    with logged(limits=ConnectionLimits(stall=10)) as ask:
        for _ in range(15):
            with socket.create_connection(("127.0.0.1", ask.port), timeout=20) as link:
                link.sendall(b"not http at all\r\n\r\n")
                told = b"".join(iter(lambda: link.recv(1000), b"")).decode()
        ask("GET", "/healthz")
        *refused, last = logged.after(11)
    assert last["route"] == "/healthz"
    assert len(refused) == 10
    for line in refused:
        assert (line["status"], line["route"], line["method"], line["reason"]) == (400, None, None, "malformed")
    assert re.search(r"x-request-id: [0-9a-f]{32}\r\n", told)
    assert re.search(r"traceparent: 00-[0-9a-f]{32}-[0-9a-f]{16}-00\r\n", told)


def test_a_body_that_is_no_http_is_the_request_s_own_error(logged):
    with logged() as ask:
        with socket.create_connection(("127.0.0.1", ask.port), timeout=20) as link:
            link.sendall(
                b"POST /v1/classify HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/png\r\nx-request-id: mine\r\n"
                b"transfer-encoding: chunked\r\n\r\nno size\r\n"
            )
            told = b"".join(iter(lambda: link.recv(1000), b"")).decode()
        [line] = logged.after(1)
    assert told.startswith("HTTP/1.1 400")
    assert "x-request-id: mine\r\n" in told
    assert (line["request_id"], line["status"], line["reason"]) == ("mine", 400, "malformed")


def test_lines_that_a_slow_disk_cannot_take_are_counted_and_said(tmp_path, caplog, until):
    path, metrics = tmp_path / "pipe", Metrics()
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    gate, write, log = threading.Event(), os.write, AccessLog(path, metrics, lines=5)
    held = threading.Event()
    log._write_piece = lambda piece: (held.set(), gate.wait(20), write(log._file, piece))
    with caplog.at_level(logging.WARNING, "invariclip.serve"):
        log.write(RequestRecord())
        assert held.wait(20)
        for _ in range(12):
            log.write(RequestRecord())  # does not wait
        assert dropped(metrics) == 7
        gate.set()
        log.close()
    assert os.read(reader, 1 << 16).count(b"\n") == 6
    os.close(reader)
    assert "left out (7, it is written too slowly)" in caplog.text


def test_a_disk_that_fails_loses_lines_and_never_tears_one(tmp_path, caplog):
    path, metrics = tmp_path / "access.jsonl", Metrics()
    log, write = AccessLog(path, metrics), os.write
    records = [RequestRecord(route="/v1/embed", status=200) for _ in range(3)]

    def full(piece):
        log._torn = piece[write(log._file, piece[:9]) - 1 : 9] != b"\n"
        raise OSError(28, "No space left on device")

    own, log._write_piece = log._write_piece, full
    with caplog.at_level(logging.WARNING, "invariclip.serve"):
        log._write([json.dumps(facts_of(one)).encode() + b"\n" for one in records])
        log._write_piece = own
        log.write(records[0])
        log.close()
    assert dropped(metrics) == 3
    assert "left out (3, No space left on device)" in caplog.text
    torn, whole = path.read_bytes().splitlines()
    assert len(torn) == 9
    assert json.loads(whole)["request_id"] == records[0].request_id


def test_a_file_that_was_moved_away_is_begun_anew(tmp_path, until):
    path = tmp_path / "access.jsonl"
    log = AccessLog(path, Metrics())
    log.write(RequestRecord(request_id="one"))
    until(lambda: path.stat().st_size)
    path.rename(tmp_path / "access.1")
    log.write(RequestRecord(request_id="two"))
    log.close()
    assert [line["request_id"] for line in lines(tmp_path / "access.1")] == ["one"]
    assert [line["request_id"] for line in lines(path)] == ["two"]


def test_many_lines_are_written_whole_and_in_order(tmp_path):
    path, metrics = tmp_path / "access.jsonl", Metrics()
    log = AccessLog(path, metrics)
    for number in range(1000):
        log.write(RequestRecord(request_id=str(number), error="é\ud800\x00\n" * 20))
    log.close()
    assert [line["request_id"] for line in lines(path)] == [str(number) for number in range(1000)]
    assert lines(path)[0]["error"] == "é?\x00\n" * 20
    assert dropped(metrics) == 0
    assert max(map(len, path.read_bytes().splitlines())) < PIECE


def test_a_log_that_cannot_be_written_is_refused(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, why in ((tmp_path, "directory"), (tmp_path / "no" / "a", "No such file"), (pipe, "no program reads")):
        with pytest.raises(InputError, match=f"cannot be written there.*{why}.*or - for standard error"):
            AccessLog(path, Metrics())


HEX = st.text("0123456789abcdef", min_size=1, max_size=40)


@given(version=HEX, trace=HEX, span=HEX, flags=HEX, more=st.sampled_from(["", "-x", "x"]))
def test_traceparents_are_taken_as_the_standard_says(version, trace, span, flags, more):
    read = read_traceparent([f"{version}-{trace}-{span}-{flags}{more}".encode()])
    good = (
        (len(version), len(trace), len(span), len(flags)) == (2, 32, 16, 2) and version != "ff"
        and int(trace, 16) and int(span, 16) and more != "x" and (version != "00" or not more)
    )  # fmt: skip
    assert (read is not None) == bool(good)


@given(
    trace=st.integers(1, 2**128 - 1), span=st.integers(1, 2**64 - 1), flags=st.integers(0, 255),
    version=st.integers(0, 254),
)  # fmt: skip
def test_a_traceparent_is_continued_in_a_span_of_ours(trace, span, flags, version):
    parent = read_traceparent([f"{version:02x}-{trace:032x}-{span:016x}-{flags:02x}".encode()])
    assert parent == TraceParent(f"{trace:032x}", f"{span:016x}", flags & 3)
    ours = continued(parent)
    assert (ours.trace_id, ours.flags) == (parent.trace_id, flags & 3)
    assert ours.span_id != parent.span_id
    assert read_traceparent([ours.header.encode()]) == ours


def test_two_headers_are_none():
    assert read_traceparent([PARENT.encode()] * 2) is None
    assert request_id_of([b"a", b"b"]) not in ("a", "b")
    assert request_id_of([b"a" * 128]) == "a" * 128
