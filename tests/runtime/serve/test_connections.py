"""Connections: how many are kept, which are closed because nothing moves on them, and what a stop does to them."""

import http.client
import json
import logging
import resource
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import SimpleNamespace

import pytest

from invariclip.errors import FewConnectionsWarning, InputError
from invariclip.serve import connections, incoming, server
from invariclip.serve.connections import RESERVE, ConnectionLimits, affordable
from invariclip.serve.limits import Limits
from invariclip.serve.metrics import Metrics
from invariclip.serve.service import Batching, Service

HEAD = b"POST /v1/classify HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/png\r\n"


def opened(client, sent=b""):
    link = socket.create_connection(("127.0.0.1", client.port), timeout=20)
    link.sendall(sent)
    return link


def all_of(link):
    """Everything until the server closes, taken apart: status, headers, body; None where it says nothing."""
    said = b""
    while more := link.recv(65536):
        said += more
    if not said:
        return None
    head, _, body = said.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return int(first.split()[1]), dict(line.split(": ", 1) for line in lines), body


def dropped(metrics, reason):
    return metrics.registry.get_sample_value("invariclip_connections_dropped_total", {"reason": reason}) or 0


@pytest.fixture
def metrics():
    return Metrics()


def test_connections_on_which_nothing_moves_are_closed(model, serving, metrics):
    with serving(Service(model), metrics, limits=ConnectionLimits(idle=0.3, stall=0.2)) as ask:
        with opened(ask) as silent, opened(ask, b"GET /healthz HTTP/1.1\r\nhost: x\r\n") as half:
            status, headers, body = all_of(half)
            assert (status, headers["connection"]) == (408, "close")
            assert "head did not come in within 0.2 s" in json.loads(body)["error"]
            assert all_of(silent) is None
        with opened(ask, b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n") as asked:
            assert all_of(asked)[0] == 200  # and is closed when it asks no more
        with opened(ask, b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\nGET /heal") as more:
            assert b"200 OK" in b"".join(iter(lambda: more.recv(65536), b""))
    assert (dropped(metrics, "head"), dropped(metrics, "idle")) == (1, 1)


def test_a_body_that_stalls_is_given_up(model, serving, metrics):
    with serving(Service(model), metrics, limits=ConnectionLimits(stall=0.2)) as ask:
        with opened(ask, HEAD + b"content-length: 9\r\n\r\nab") as link:
            status, headers, body = all_of(link)
        assert (status, headers["connection"]) == (408, "close")
        assert "no more of the body came in within 0.2 s" in json.loads(body)["error"]
        assert ask.api.exchange.held.now == 0
    assert dropped(metrics, "stalled") == 1


def test_a_body_that_stalls_makes_room_for_others(model, serving, metrics, images, until, monkeypatch):
    monkeypatch.setattr(incoming, "PATIENCE", 0.02)
    limits = Limits(body=100_000, bodies=200_000)
    with serving(Service(model, limits), metrics) as ask:
        sent = HEAD + b"content-length: 100000\r\n\r\n" + bytes(99_900)
        with opened(ask, sent) as first, opened(ask, sent) as second:
            until(lambda: ask.api.exchange.held.now == 199_800)
            threading.Event().wait(0.05)
            assert ask.classify(images[0]).status == 200
            until(lambda: ask.api.exchange.held.now == 99_900)
            first.settimeout(0.2)
            try:
                status, _, body = all_of(first)
            except TimeoutError:
                status, _, body = all_of(second)
            assert status == 503
            assert "was needed for others" in json.loads(body)["error"]
        until(lambda: ask.api.exchange.held.now == 0)
    assert dropped(metrics, "room") == 1


def test_a_body_that_comes_in_is_not_given_up_for_others(model, serving, images, until):
    limits = Limits(body=100_000, bodies=100_000)
    with serving(Service(model, limits)) as ask, opened(ask, HEAD + b"content-length: 100000\r\n\r\n") as slow:
        slow.sendall(bytes(99_990))
        until(lambda: ask.api.exchange.held.now == 99_990)
        refused = ask.classify(images[0])
        assert refused.status == 503
        assert "are held; try again" in refused.error


def test_above_the_limit_a_connection_is_told_so(model, gated, serving, metrics, images):
    service = gated(model, batching=Batching(max_batch=1))
    with (
        serving(service, metrics, limits=ConnectionLimits(most=1)) as ask,
        ThreadPoolExecutor(1) as pool,
    ):
        asked = pool.submit(ask.classify, images[0])
        assert service.begun.acquire(timeout=20)
        with opened(ask, b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n") as link:
            status, headers, body = all_of(link)
        assert (status, headers["connection"], headers["retry-after"]) == (503, "close", "1")
        assert "1 connections are open, and no more are taken" in json.loads(body)["error"]
        service.gate.set()
        assert asked.result(20).status == 200
        assert metrics.registry.get_sample_value("invariclip_connections") <= 1
    assert dropped(metrics, "limit") == 1


def test_of_many_that_are_refused_most_are_cut(model, serving, metrics, until, monkeypatch):
    monkeypatch.setattr(connections, "_REFUSED_AT_A_TIME", 2)
    with serving(Service(model), metrics, limits=ConnectionLimits(most=1)) as ask, opened(ask):
        until(lambda: metrics.registry.get_sample_value("invariclip_connections") == 1)
        links = [opened(ask) for _ in range(5)]
        until(lambda: dropped(metrics, "limit") == 5)
        said = []
        for link in links:
            with link:
                try:
                    said.append(link.recv(100)[:12])
                except ConnectionResetError:
                    said.append(b"")
    assert sorted(said) == [b"", b"", b"", b"HTTP/1.1 503", b"HTTP/1.1 503"]


def test_a_connection_without_a_request_gives_way(model, serving, metrics, until, monkeypatch):
    monkeypatch.setattr(connections, "_SETTLED", 0.0)
    with serving(Service(model), metrics, limits=ConnectionLimits(most=2)) as ask:
        kept = ask.connection()
        kept.request("GET", "/healthz")
        assert kept.getresponse().read()
        with opened(ask) as silent:
            until(lambda: metrics.registry.get_sample_value("invariclip_connections") == 2)
            assert ask("GET", "/healthz").status == 200
            assert silent.recv(1) == b""  # it never asked anything, though it is the younger one
        kept.request("GET", "/healthz")
        assert kept.getresponse().status == 200
        kept.close()
    assert dropped(metrics, "room") == 1


def test_a_client_that_does_not_read_is_cut(model, serving, metrics, until):
    with serving(Service(model), metrics, limits=ConnectionLimits(stall=0.3)) as ask:
        link = socket.socket()
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.settimeout(20)
        link.connect(("127.0.0.1", ask.port))
        with link:
            link.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n" * 1_000)  # 10 MB of answers
            until(lambda: dropped(metrics, "unread") == 1)
        until(lambda: metrics.registry.get_sample_value("invariclip_connections") == 0)


@pytest.mark.parametrize(("path", "status"), [("/v1/classify", 413), ("/nowhere", 404), ("/healthz", 405)])
def test_an_endless_body_is_not_read_on(model, serving, monkeypatch, path, status):
    monkeypatch.setattr(connections, "LINGER_BYTES", 1 << 20)
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    with serving(Service(model, Limits(body=100_000))) as ask, opened(ask) as link:
        link.sendall(f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/png\r\n".encode())
        link.sendall(b"transfer-encoding: chunked\r\n\r\n" + chunk)
        said = b""
        for _ in range(2_000):  # 125 MiB, of which sockets hold a few
            try:
                link.sendall(chunk)
                link.setblocking(False)
                said += link.recv(65536)
            except BlockingIOError:
                pass
            except OSError:  # closed; what came before that is still there
                with suppress(OSError):
                    said += link.recv(65536)
                break
            link.settimeout(20)
        else:
            pytest.fail("all of it was read")
    assert said.startswith(f"HTTP/1.1 {status}".encode())
    assert b"\r\nconnection: close\r\n" in said


@pytest.mark.parametrize("path", ["/nothing", "/v1/classify", "/healthz"])
def test_a_malformed_chunk_is_refused_in_one_line(model, serving, metrics, caplog, path):
    with serving(Service(model), metrics) as ask, caplog.at_level(logging.INFO):
        before = len(caplog.records)
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/png\r\n".encode()
        with opened(ask, head + b"transfer-encoding: chunked\r\n\r\nno number\r\n") as link:
            status, headers, body = all_of(link)
        assert (status, headers["connection"]) == (400, "close")
        assert json.loads(body)["error"]
        assert ask("GET", "/healthz").status == 200
    records = [one for one in caplog.records[before:] if one.levelno >= logging.WARNING]
    assert [one.exc_info for one in records] == [None]
    assert dropped(metrics, "malformed") == 1


def test_answers_while_the_server_stops_say_that_the_connection_is_closed(model, gated, serving, images, until):
    service = gated(model, batching=Batching(max_batch=1))
    with serving(service) as ask, ThreadPoolExecutor(1) as pool:
        kept = ask.connection()
        kept.request("GET", "/healthz")
        answer = kept.getresponse()
        assert answer.read()
        assert answer.getheader("connection") is None
        asked = pool.submit(ask.classify, images[0])
        assert service.begun.acquire(timeout=20)
        ask.server.should_exit = True
        until(lambda: ask.server.connections.draining)
        kept.request("GET", "/healthz")  # on a connection that its client takes for open
        answer = kept.getresponse()
        assert (answer.status, answer.getheader("connection")) == (200, "close")
        kept.close()
        service.gate.set()
        told = asked.result(20)
        assert (told.status, told.headers["connection"]) == (200, "close")


def test_what_is_not_answered_in_the_grace_is_told_so(model, gated, serving, images, caplog):
    service = gated(model, batching=Batching(max_batch=1))
    with serving(service, grace=1) as ask, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask.classify, images[0])
        assert service.begun.acquire(timeout=20)
        ask.server.should_exit = True
        told = asked.result(20)
        assert told.status == 503
        assert "the server stops" in told.error
    assert not [one for one in caplog.records if one.exc_info]


def test_a_slash_at_the_end_leads_nowhere(model, serving):
    with serving(Service(model)) as ask:
        for path in ("/v1/model/", "/v1/classify/", "/healthz/"):
            answer = ask("GET", path)
            assert answer.status == 404
            assert "location" not in answer.headers


def test_of_two_servers_on_a_port_the_second_is_refused():
    with server.listening("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(InputError, match=f"{port}: cannot listen there"):
            server.listening("127.0.0.1", port)


def test_file_descriptors_bound_connections(monkeypatch, recwarn):
    allowed = [200, 300]

    def set_soft(_kind, limits):
        assert limits[0] <= allowed[1]
        allowed[0] = limits[0]

    monkeypatch.setattr(resource, "getrlimit", lambda _kind: tuple(allowed))
    monkeypatch.setattr(resource, "setrlimit", set_soft)
    assert affordable(100) == 100
    assert allowed == [100 + RESERVE, 300]  # as far as it is needed
    with pytest.warns(FewConnectionsWarning, match="up to 172 connections are kept instead of 1,000"):
        assert affordable(None) == 300 - RESERVE
    with pytest.raises(InputError, match=r"need 628 file descriptors, and this process may have 300; .* to 172$"):
        affordable(500)
    allowed[:] = [100, 100]
    with pytest.raises(InputError, match=r"or lower --max-connections$"):
        affordable(None)
    allowed[:] = [resource.RLIM_INFINITY, resource.RLIM_INFINITY]
    assert affordable(None) == ConnectionLimits.most


def test_no_descriptor_is_one_line_and_other_errors_of_the_loop_are_not(caplog):
    told = []
    loop = SimpleNamespace(default_exception_handler=told.append)
    error = OSError(24, "Too many open files")
    server._in_a_line(loop, {"message": "socket.accept() out of system resource", "exception": error})
    [record] = caplog.records
    assert record.exc_info is None
    assert "no connection can be taken" in record.getMessage()
    server._in_a_line(loop, {"message": "other"})
    assert told == [{"message": "other"}]


@pytest.mark.parametrize("name", ["most", "idle", "stall"])
def test_bounds_of_connections_are_above_0(name):
    with pytest.raises(InputError, match=f"the limit {name} must be above 0"):
        ConnectionLimits(**{name: 0})


def test_a_kept_connection_is_answered_again_and_again(model, serving, images):
    with serving(Service(model)) as ask:
        link = http.client.HTTPConnection("127.0.0.1", ask.port, timeout=20)
        for _ in range(3):
            link.request("POST", "/v1/classify", images[0], {"content-type": "image/png"})
            answer = link.getresponse()
            assert (answer.status, answer.getheader("connection")) == (200, None)
            answer.read()
        link.close()
