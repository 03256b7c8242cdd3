"""What happens when there is too much, when it takes too long, when clients go away, and when something breaks."""

import json
import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from invariclip.serve.limits import BadRequestError, Limits, seconds_for
from invariclip.serve.service import Batching, Service


def test_requests_of_many_clients_go_together(model, gated, serving, images, until):
    service = gated(model, batching=Batching(max_batch=8))
    with serving(service) as ask, ThreadPoolExecutor(9) as pool:
        first = pool.submit(ask.classify, images[0])
        assert service.begun.acquire(timeout=20)
        others = [pool.submit(ask.classify, data) for data in images[1:9]]
        until(lambda: service.images.ready == 8)
        service.gate.set()
        answers = [one.result(20) for one in (first, *others)]
    assert service.batches == [1, 8]
    for data, answer in zip(images, answers, strict=False):
        [alone] = model.classify([data])
        assert answer.json["predictions"][0]["label"] == alone.label
        assert answer.json["predictions"][0]["probability"] == pytest.approx(alone.probability, abs=1e-4)


def test_a_full_queue_says_when_to_come_again(model, gated, serving, images, until):
    service = gated(model, Limits(queue=2, images=2), Batching(max_batch=1))
    with serving(service) as ask, ThreadPoolExecutor(4) as pool:
        taken = [pool.submit(ask.classify, images[0])]
        assert service.begun.acquire(timeout=20)
        taken += [pool.submit(ask.classify, images[0]) for _ in range(2)]
        until(lambda: service.images.waiting == 2)
        refused = ask.classify(images[0])
        assert refused.status == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert "2 images are waiting" in refused.error
        assert ask("GET", "/healthz").status == 200
        service.gate.set()
        assert [one.result(20).status for one in taken] == [200, 200, 200]
        assert ask.classify(images[0]).status == 200


def test_what_would_take_too_long_is_refused_at_once(model, gated, serving, images, until):
    service = gated(model, Limits(seconds=10), Batching(max_batch=1))
    service.images.expect(3.0)  # seconds an image
    with serving(service) as ask, ThreadPoolExecutor(4) as pool:
        taken = [pool.submit(ask.classify, images[0])]
        assert service.begun.acquire(timeout=20)
        taken.append(pool.submit(ask.classify, images[0]))
        until(lambda: service.images.waiting == 1)
        refused = ask.classify(images[0])
        assert refused.status == 503
        assert "1 images are waiting: 1 more may take 11.2 s, and this request has " in refused.error
        assert refused.headers["retry-after"] == "2"
        service.gate.set()
        assert [one.result(20).status for one in taken] == [200, 200]
        assert ask.classify(images[0]).status == 200
    assert service.batches == [1, 1, 1]


def test_a_client_s_own_deadline_counts_where_it_is_the_smaller(model, gated, serving, images, until):
    service = gated(model, Limits(seconds=20), Batching(max_batch=1))
    service.images.expect(1.0)  # seconds an image
    with serving(service) as ask, ThreadPoolExecutor(4) as pool:
        late = pool.submit(ask.classify, images[0], headers={"x-request-timeout-ms": "300"})
        assert service.begun.acquire(timeout=20)
        told = late.result(20)  # the engine does not answer in time
        assert (told.status, told.error) == (504, "no answer within 0.3 s; send less, or later")
        taken = pool.submit(ask.classify, images[0], headers={"x-request-timeout-ms": "999999999"})
        until(lambda: service.images.waiting == 1)
        refused = ask.classify(images[0], headers={"x-request-timeout-ms": "1500"})  # it would take 3 s
        assert refused.status == 503
        assert "1 more may take" in refused.error
        service.gate.set()
        assert taken.result(20).status == 200
        assert ask.classify(images[0], headers={"x-request-timeout-ms": "20000"}).status == 200
    assert sum(service.batches) == 3


@pytest.mark.parametrize("bad", ["0", "-1", "1.5", "1e3", "", "soon", "1234567890", "5, 6", "٣"])
def test_a_deadline_that_is_none_is_refused(bad):
    with pytest.raises(BadRequestError, match="x-request-timeout-ms must be one whole number of milliseconds"):
        seconds_for([bad], Limits())
    with pytest.raises(BadRequestError):
        seconds_for(["5", "6"], Limits())
    assert seconds_for([], Limits()) == 30
    assert seconds_for(["30001"], Limits()) == 30
    assert seconds_for(["250"], Limits()) == 0.25


def test_a_malformed_deadline_is_answered_with_400(model, serving, images):
    with serving(Service(model)) as ask:
        told = ask.classify(images[0], headers={"x-request-timeout-ms": "soon"})
        assert told.status == 400
        assert "not 'soon'" in told.error


def test_a_request_of_many_images_does_not_stop_others(model, gated, serving, images, until):
    service = gated(model, batching=Batching(max_batch=1))
    service.images.expect(1.0)
    with serving(service) as ask, ThreadPoolExecutor(2) as pool:
        many = pool.submit(ask.form, "/v1/classify", [("images", f"{n}.png", images[n]) for n in range(6)])
        assert service.begun.acquire(timeout=20)
        until(lambda: service.images.ready == 5)
        one = pool.submit(ask.classify, images[0])
        until(lambda: service.images.waiting == 6)
        order = []
        see = service.images._settle
        service.images._settle = lambda item, result: (order.append(len(item.ticket._results)), see(item, result))
        service.gate.set()
        assert one.result(20).status == 200
        assert len(many.result(20).json["predictions"]) == 6
    assert order[:3] == [6, 1, 6]


def test_what_takes_too_long_is_given_up(model, gated, serving, images, until):
    service = gated(model, Limits(seconds=0.3), Batching(max_batch=1))
    with serving(service) as ask, ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(ask.classify, images[0]) for _ in range(2)]
        late = [one.result(20) for one in asked]
        assert [answer.status for answer in late] == [504, 504]
        assert "no answer within 0.3 s" in late[0].error
        until(lambda: service.images.waiting == 0)
        service.gate.set()
        until(lambda: ask.classify(images[0]).status == 200)
    assert service.batches[0] == 1
    assert ask.api.exchange.held.now == 0


def test_a_body_that_does_not_come_in_is_given_up(model, serving):
    with serving(Service(model, Limits(seconds=0.3))) as ask:
        with socket.create_connection(("127.0.0.1", ask.port), timeout=20) as link:
            link.sendall(
                b"POST /v1/classify HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/png\r\n"
                b"content-length: 9\r\n\r\nab"
            )
            assert link.recv(1000).startswith(b"HTTP/1.1 408")
        assert ask.api.exchange.held.now == 0


def test_work_of_a_client_that_went_away_is_dropped(model, gated, serving, images, until):
    service = gated(model, batching=Batching(max_batch=1))
    with serving(service) as ask, ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask.classify, images[0])
        assert service.begun.acquire(timeout=20)
        gone = ask.connection()
        gone.request("POST", "/v1/classify", images[1], {"content-type": "image/png"})
        until(lambda: service.images.waiting == 1)
        gone.close()
        until(lambda: service.images.waiting == 0)
        service.gate.set()
        assert first.result(20).status == 200
        metrics = ask("GET", "/metrics").body.decode()
    assert service.batches == [1]
    assert 'invariclip_requests_total{route="/v1/classify",status="499"} 1.0' in metrics


def test_bodies_of_all_clients_are_bounded_together(model, gated, serving, images, until):
    room = len(images[0]) + 10
    service = gated(model, Limits(body=room, bodies=room))
    with serving(service) as ask, ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask.classify, images[0])
        assert service.begun.acquire(timeout=20)
        refused = ask.classify(images[0])
        assert refused.status == 503
        assert "are held; try again in 1 s" in refused.error
        service.gate.set()
        assert first.result(20).status == 200
        until(lambda: ask.api.exchange.held.now == 0)
        assert ask.classify(images[0]).status == 200


def test_what_nobody_foresaw_is_in_the_log_under_an_id(model, serving, images, caplog):
    class Broken(Service):
        def _rows(self, batch, seen):
            raise ZeroDivisionError("secret of the house")

    with serving(Broken(model)) as ask, caplog.at_level(logging.ERROR, "invariclip.serve"):
        answer = ask.classify(images[0])
        assert answer.status == 500
        assert "secret" not in answer.error
        number = answer.error.split()[-1]
        assert any(number in record.getMessage() and record.exc_info for record in caplog.records)
        assert ask("GET", "/healthz").status == 200
        assert ask.json("/v1/embed", {"texts": ["a cat"]}).status == 200


def test_a_class_set_that_is_slow_holds_up_nobody_else(model, serving, images):
    gate, begun = threading.Event(), threading.Event()

    class Slow(Service):
        def __init__(self, *given):
            super().__init__(*given)
            embed = self.class_sets._model.with_classes

            def with_classes(classes, templates):
                begun.set()
                assert gate.wait(20)
                return embed(classes, templates)

            self.class_sets._model = type("Waits", (), {"with_classes": staticmethod(with_classes)})

    with serving(Slow(model)) as ask, ThreadPoolExecutor(1) as pool:
        slow = pool.submit(ask.classify, images[0], "?classes=sun,moon")
        assert begun.wait(20)
        assert ask.classify(images[0]).status == 200
        assert not slow.done()
        gate.set()
        assert slow.result(20).json["predictions"][0]["label"] in ("sun", "moon")


def test_keys(model, serving, images):
    with serving(Service(model), api_keys=("open sesame", "other")) as ask:
        for headers in (
            None,
            {"authorization": "Bearer wrong"},
            {"x-api-key": "open"},
            {"authorization": "open sesame"},
        ):
            refused = ask.classify(images[0], headers=headers)
            assert refused.status == 401
            assert refused.headers["www-authenticate"] == "Bearer"
            assert "authorization: Bearer KEY" in refused.error
        assert ask("GET", "/metrics").status == 401
        assert ask("GET", "/v1/model").status == 401
        for headers in ({"authorization": "Bearer open sesame"}, {"x-api-key": "other"}):
            assert ask.classify(images[0], headers=headers).status == 200
        for path in ("/", "/healthz", "/readyz"):
            assert ask("GET", path).status == 200


def test_other_sites_may_ask_only_where_they_are_named(model, serving, images):
    origin = {"origin": "https://example.org"}
    preflight = {**origin, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    with serving(Service(model)) as ask:
        for refused in (ask.classify(images[0], headers=origin), ask("OPTIONS", "/v1/classify", headers=preflight)):
            assert refused.status == 403
            assert (
                "pages of 'https://example.org' may not ask this server; start it with --cors-origin" in refused.error
            )
            assert "access-control-allow-origin" not in refused.headers
    with serving(Service(model), cors_origins=("https://example.org",), api_keys=("k",)) as ask:
        assert ask("OPTIONS", "/v1/classify", headers=preflight).status == 200
        answer = ask.classify(b"nothing", headers={**origin, "x-api-key": "k"})
        assert answer.headers["access-control-allow-origin"] == "https://example.org"
        assert answer.status == 422
        stranger = ask.classify(b"nothing", headers={"origin": "https://example.com", "x-api-key": "k"})
        assert "access-control-allow-origin" not in stranger.headers


def test_a_server_that_stops_takes_no_more(model, serving, images):
    service = Service(model)
    with serving(service) as ask:
        service.close(20)
        for answer in (
            ask.classify(images[0]),
            ask.classify(images[0], "?classes=sun,moon"),
            ask("POST", "/v1/embed", json.dumps({"texts": ["a"]}), "application/json"),
        ):
            assert answer.status == 503
            assert answer.headers["retry-after"] == "1"
            assert "takes no more work" in answer.error
