"""Which pages may ask: Host, Origin, CORS."""

import pytest

from invariclip.errors import InputError
from invariclip.serve.origins import checked_origins, host_name, names_of
from invariclip.serve.service import Service


@pytest.fixture(scope="module")
def ask(model, serving):
    with serving(Service(model), hosts=names_of("127.0.0.1", ("clip.example.org", "*.lan"))) as client:
        yield client


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("localhost", True), ("localhost:8000", True), ("LocalHost.", True), ("127.0.0.1", True), ("[::1]:80", True),
        ("192.168.1.7:8000", True), ("clip.example.org:443", True), ("a.lan", True), ("a.b.lan", True),
        ("evil.example", False), ("evil.example:8000", False), ("lan", False), ("clip.example.org.evil.example", False),
        ("localhost.evil.example", False), ("127.0.0.1.evil.example", False), ("127.0.0.1@evil.example", False),
    ],
)  # fmt: skip
def test_only_names_of_this_server_are_answered(ask, host, known):
    answer = ask("GET", "/v1/model", headers={"host": host})
    assert answer.status == (200 if known else 421)
    if not known:
        assert f"not called {host_name(host)!r}; use its address, or start it with --allowed-host" in answer.error
    for probe in ("/healthz", "/readyz"):
        assert ask("GET", probe, headers={"host": host}).status == 200


@pytest.mark.parametrize(
    ("origin", "more", "status"),
    [
        ("https://evil.example", {}, 403),
        ("https://evil.example", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
        ("null", {}, 403),
        ("", {}, 403),
        ("http://localhost:1", {}, 403),  # another port is another origin
        ("http://localhost:8000", {"host": "localhost:8000"}, 200),
        ("https://clip.example.org", {"host": "clip.example.org"}, 200),
        ("https://behind.a.proxy", {"sec-fetch-site": "same-origin"}, 200),
        ("https://behind.a.proxy", {"sec-fetch-site": "same-site"}, 403),
    ],
)
def test_pages_of_other_sites_are_refused_before_any_work(ask, images, until, origin, more, status):
    before = ask.api.metrics.registry.get_sample_value("invariclip_requests_total", _refused()) or 0
    answer = ask.classify(images[0], headers={"origin": origin, **more})
    assert answer.status == status
    if status == 403:
        assert f"pages of {origin!r} may not ask this server; start it with --cors-origin" in answer.error
        registry = ask.api.metrics.registry
        until(lambda: registry.get_sample_value("invariclip_requests_total", _refused()) == before + 1)


def _refused():
    return {"route": "/v1/classify", "status": "403"}


def test_a_listed_origin_may_send_what_is_documented(model, serving, images):
    origin = "https://example.org"
    with serving(Service(model), cors_origins=(origin,), api_keys=("k",)) as ask:
        preflight = {
            "origin": origin, "access-control-request-method": "POST",
            "access-control-request-headers": "authorization, content-type, x-api-key",
        }  # fmt: skip
        allowed = ask("OPTIONS", "/v1/classify", headers=preflight)
        assert allowed.status == 200
        assert "x-api-key" in allowed.headers["access-control-allow-headers"].lower()
        assert ask.classify(images[0], headers={"origin": origin, "x-api-key": "k"}).status == 200
        assert ask.classify(images[0], headers={"origin": "https://example.com", "x-api-key": "k"}).status == 403
        stranger = ask("OPTIONS", "/v1/classify", headers={**preflight, "origin": "https://example.com"})
        assert stranger.status == 403
        assert ask("GET", "/v1/model", headers={"host": "evil.example", "x-api-key": "k"}).status == 421


def test_any_origin_and_any_host_can_be_allowed(model, serving, images):
    with serving(Service(model), cors_origins=("*",), hosts=("*",)) as ask:
        answer = ask.classify(images[0], headers={"origin": "https://example.com", "host": "what.ever"})
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, "*")


def test_names_and_origins_that_cannot_be_meant_are_refused(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "Box7")
    assert names_of("127.0.0.1", ()) == ("localhost", "127.0.0.1")
    assert names_of("::", ("Clip.Example.ORG", "[::1]")) == ("localhost", "box7", "clip.example.org", "::1")
    assert "*" in names_of("::", ("*",))
    for wrong in ("https://clip.example.org", "clip:8000", "a b", "", "**.x"):
        with pytest.raises(InputError, match="give a name without scheme and port"):
            names_of("127.0.0.1", (wrong,))
    assert checked_origins(("https://a.org", "http://localhost:3000", "*", "null"))
    for wrong in ("a.org", "https://a.org/", "https://a.org/x", "https://", ""):
        with pytest.raises(InputError, match="as a browser writes them"):
            checked_origins((wrong,))
