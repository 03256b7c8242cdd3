"""`serve --engine ray`: what cannot hold is refused; replicas answer as the library; one that dies loses nothing."""

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton

from invariclip.serve import ray_application
from invariclip.serve.opening import ServiceOptions
from invariclip.serve.ray_application import RayOptions, ReplicaApplication, ReplicaOptions, deployment
from invariclip.serve.ray_proxy import ALONE, CHECK, ProxyBounds, bounds

ON_RAY = ("--engine", "ray")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--grpc-port", "0"), "--grpc-port is not for --engine ray: Ray's proxies pass on HTTP alone"),
        (("--adapt",), "--adapt is not for --engine ray: sites are measured inside one process"),
        (("--adapt-log", "log"), "--adapt-log is not for --engine ray"),
        (("--max-sites", "2"), "--max-sites is not for --engine ray"),
        (("--max-connections", "9"), "--max-connections is not for --engine ray: Ray's proxies hold the connections"),
        (("--idle-timeout", "9"), "--idle-timeout is not for --engine ray"),
        (("--stall-timeout", "9"), "--stall-timeout is not for --engine ray"),
        (("--access-log", "log"), "--access-log - writes to each replica's log"),
        (("--port", "0"), "--port 0 is not for --engine ray"),
        (("--replicas", "3-2"), "give a number of replicas, such as 4, or from to, such as 2-8"),
        (("--replicas", "0"), "give a number of replicas"),
    ],
)
def test_options_that_cannot_hold_are_refused(run, tiny_artifact, given, said):
    code, _, err = run("serve", tiny_artifact, *ON_RAY, *given)
    assert (code, said in err, err.count("\n")) == (2, True, 1), err


@pytest.mark.parametrize("given", [("--replicas", "2"), ("--ray-address", "auto")])
def test_options_of_ray_are_for_ray(run, tiny_artifact, given):
    code, _, err = run("serve", tiny_artifact, *given)
    assert (code, f"{given[0]} is for --engine ray; name both" in err) == (2, True)


def test_without_ray_it_says_what_to_install(run, tiny_artifact, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = run("serve", tiny_artifact, *ON_RAY)
    assert (code, 'pip install "invariclip[ray-serve]"' in err, err.count("\n")) == (2, True, 1)


def test_a_bad_artifact_is_told_before_a_cluster_starts(run, tmp_path, monkeypatch):
    pytest.importorskip("ray.serve", reason='Ray Serve: pip install "invariclip[ray-serve]"')
    monkeypatch.setattr(ray_application, "_connect", None)
    code, _, err = run("serve", tmp_path / "none.icm", *ON_RAY)
    assert (code, "there is no such folder" in err) == (2, True)


@pytest.mark.parametrize(("address", "asked", "own"), [(None, "local", True), ("auto", "auto", False)])
def test_a_cluster_is_joined_only_where_it_is_named(monkeypatch, address, asked, own):
    """Ray itself would join one that it finds on the machine; ending it would end what others serve there."""
    ray = pytest.importorskip("ray", reason='Ray: pip install "invariclip[ray-serve]"')
    told = {}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **given: told.update(given))
    [variable] = ALONE
    monkeypatch.setenv(variable, "")
    assert ray_application._connect(ray, RayOptions(address=address)) == own
    assert (told["address"], os.environ[variable] == ALONE[variable]) == (asked, own)


def test_a_replica_s_threads_are_the_cpus_that_it_takes(tiny_artifact, monkeypatch):
    serve = pytest.importorskip("ray.serve", reason='Ray Serve: pip install "invariclip[ray-serve]"')
    monkeypatch.chdir(tiny_artifact.parent)
    own = ReplicaOptions("tiny", Path("tiny.icm"), ServiceOptions(require_signature="k.pem"), Path("keys")).settled()
    assert (own.service.threads, own.service.batching.decoders) == (1, 1)
    assert (own.artifact, own.api_key_file) == (tiny_artifact, tiny_artifact.parent / "keys")
    assert own.service.require_signature == str(tiny_artifact.parent / "k.pem")
    made = deployment(own, RayOptions(replicas=(1, 3)))
    [told] = [one for one in vars(made).values() if isinstance(one, serve.Deployment)]
    scaling = told._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 3)
    assert told.ray_actor_options["num_cpus"] == 1
    assert told.max_ongoing_requests == own.service.limits.queue


def test_a_replica_is_warm_when_its_life_has_begun(tiny_artifact):
    async def lived():
        app, said = (
            ReplicaApplication(ReplicaOptions("tiny", tiny_artifact, ServiceOptions(threads=1))),
            asyncio.Queue(),
        )
        told = asyncio.Queue()
        life = asyncio.ensure_future(app({"type": "lifespan"}, told.get, said.put))
        answers = [await asked(app, "/readyz", method="GET")]
        await told.put({"type": "lifespan.startup"})
        assert await said.get() == {"type": "lifespan.startup.complete"}
        answers.append(await asked(app, "/readyz", method="GET"))
        await told.put({"type": "lifespan.shutdown"})
        assert await said.get() == {"type": "lifespan.shutdown.complete"}
        answers.append(await asked(app, "/readyz", method="GET"))
        await life
        return [messages[0]["status"] for messages in answers]

    assert asyncio.run(lived()) == [503, 200, 503]


async def asked(app, path, *bodies, method="POST"):
    """What an ASGI application sends for a request; it may take the bodies, then the client waits."""
    scope = {"type": "http", "method": method, "path": path, "headers": [], "query_string": b"", "http_version": "1.1"}
    waiting, sent = list(bodies), []

    async def receive():
        if waiting:
            return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}
        return await asyncio.get_running_loop().create_future()

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    return sent


def test_a_proxy_answers_503_where_no_replica_did():
    async def silent(_scope, receive, _send):
        await receive()

    bounded = ProxyBounds(silent)
    start, body = asyncio.run(asked(bounded, "/v1/classify", b"image"))
    headers = dict(start["headers"])
    assert (start["status"], headers[b"retry-after"], headers[b"connection"]) == (503, b"1", b"close")
    assert "send it again" in json.loads(body["body"])["error"]
    assert bounded._held == 0


@pytest.mark.parametrize(
    ("alone", "headers", "status"),
    [(True, [], 503), (False, [], 404), (True, [(b"traceparent", b"00-")], 404)],
    ids=["no application any more", "of somebody else's cluster", "the application's own"],
)
def test_a_proxy_of_one_application_says_when_it_is_gone(alone, headers, status):
    async def unknown(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 404, "headers": headers})
        await send({"type": "http.response.body", "body": b"Path '/' not found."})

    start, body = asyncio.run(asked(ProxyBounds(unknown, alone=alone), "/"))
    assert (start["status"], b"send it again" in body["body"]) == (status, status == 503)


def test_a_proxy_leaves_half_an_answer_as_it_is():
    async def half(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    assert [one["type"] for one in asyncio.run(asked(ProxyBounds(half), "/"))] == ["http.response.start"]


def test_a_proxy_holds_bodies_in_bounds():
    heard = []

    async def greedy(_scope, receive, _send):
        while True:
            message = await receive()
            heard.append(len(message.get("body", b"")) if message["type"] == "http.request" else message["type"])
            if message["type"] == "http.disconnect":
                return

    bounded = ProxyBounds(greedy, bodies=10)
    start, body = asyncio.run(asked(bounded, "/", b"x" * 6, b"x" * 6, b"x" * 6))
    assert (start["status"], "no room" in json.loads(body["body"])["error"]) == (503, True)
    assert heard == [6, "http.disconnect"]
    assert bounded._held == 0


def test_a_proxy_says_that_it_has_bounds_and_one_id_of_the_request():
    async def answering(_scope, _receive, send):
        ids = [(b"x-request-id", b"ours"), (b"X-Request-ID", b"rays")]
        await send({"type": "http.response.start", "status": 200, "headers": ids})
        await send({"type": "http.response.body", "body": b""})

    [middleware] = bounds()
    app = middleware.cls(answering, *middleware.args, **middleware.kwargs)
    assert asyncio.run(asked(app, CHECK))[0]["status"] == 200
    assert asyncio.run(asked(app, "/v1/model"))[0]["headers"] == [(b"x-request-id", b"ours")]


@pytest.mark.parametrize("wrong", ["a port in use", "too many replicas"])
def test_what_would_wait_for_ever_is_refused(tiny_artifact, wrong):
    pytest.importorskip("ray.serve", reason='Ray Serve: pip install "invariclip[ray-serve]"')
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        if wrong == "too many replicas":
            sock.close()
        done = subprocess.run(
            [
                sys.executable, "-m", "invariclip", "serve", str(tiny_artifact), *ON_RAY, "--port", str(port),
                "--replicas", "9000",
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    said = "cannot listen there" if wrong == "a port in use" else "9000 replicas of 1 engine threads need 9000 CPUs"
    assert (done.returncode, said in done.stderr.splitlines()[-1]) == (2, True), done.stderr


class Cluster:
    """The command in a process of its own."""

    def __init__(self, artifact, log, *arguments):
        with socket.create_server(("127.0.0.1", 0)) as sock:
            self.port = sock.getsockname()[1]
        self._log = log
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "invariclip", "serve", str(artifact), *ON_RAY, "--port", str(self.port),
                    *arguments,
                ],
                stderr=stream, stdout=stream,
            )  # fmt: skip

    @property
    def said(self):
        return self._log.read_text(errors="replace")

    def replicas(self):
        """Process ids of its replicas."""
        parents, names = {}, {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(folder.name)] = (folder / "cmdline").read_bytes()
            except OSError:  # it has ended
                continue

        def ours(number):
            while number in parents and number != self.process.pid:
                number = parents[number]
            return number == self.process.pid

        return [number for number, name in names.items() if name.startswith(b"ray::ServeReplica:") and ours(number)]

    def ask(self, body, link=None):
        link = link or http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        link.request("POST", "/v1/classify", body, {"content-type": "image/png"})
        answer = link.getresponse()
        return answer.status, answer.read()


@pytest.fixture(scope="module")
def cluster(tiny_artifact, tmp_path_factory):
    pytest.importorskip("ray.serve", reason='Ray Serve: pip install "invariclip[ray-serve]"')
    if not Path("/proc/self/stat").exists() or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two replicas need two processors, and the test finds them in /proc")
    started = Cluster(tiny_artifact, tmp_path_factory.mktemp("ray") / "log", "--replicas", "2", "--max-batch", "1")
    try:
        end = time.monotonic() + 120
        while "replicas on Ray: 2" not in started.said:
            assert started.process.poll() is None, started.said
            assert time.monotonic() < end, started.said
            time.sleep(0.1)
        yield started
    finally:
        started.process.send_signal(signal.SIGTERM)
        try:
            assert started.process.wait(90) == 0, started.said
        finally:
            started.process.kill()
            started.process.wait()


def test_replicas_answer_as_the_library_does(cluster, model, images):
    assert "warning" not in cluster.said
    alone = [model.answer([image]) for image in images]
    with triton.InferenceServerClient(f"127.0.0.1:{cluster.port}") as client:
        given = triton.InferInput("images", [len(images)], "BYTES")
        given.set_data_from_numpy(np.array(images, dtype=object))
        for _ in range(8):  # to either of them
            answer = client.infer("tiny", [given])
            np.testing.assert_array_equal(
                answer.as_numpy("embedding"), np.concatenate([one.embeddings for one in alone])
            )
            np.testing.assert_array_equal(answer.as_numpy("logits"), np.concatenate([one.logits for one in alone]))


def test_the_routes_are_those_of_serve(cluster):
    for path in ("/", "/docs", "/openapi.json", "/healthz", "/readyz", "/metrics", "/v1/model", "/v1/models", "/v2"):
        link = http.client.HTTPConnection("127.0.0.1", cluster.port, timeout=60)
        link.request("GET", path)
        assert link.getresponse().status == 200, path
        link.close()
    assert cluster.ask(b"junk")[0] == 422


class Load:
    """Clients that ask one after another until the block ends, and hold each answer against the library's.

    Attributes:
        told: How often each status was answered; `connection` where there was no answer.
        wrong: Answers that are neither the library's nor say that the request may be sent again.
    """

    def __init__(self, cluster, model, images, clients=8):
        self.told, self.wrong, self._over = Counter(), [], threading.Event()
        self._cluster, self._images = cluster, images
        self._wanted = [float(model.answer([image]).probabilities[0].max()) for image in images]
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(clients)]

    def __enter__(self):
        for one in self._threads:
            one.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        for one in self._threads:
            one.join(60)

    def _ask(self, number):
        link = http.client.HTTPConnection("127.0.0.1", self._cluster.port, timeout=60)
        while not self._over.is_set():
            number += 1
            place = number % len(self._images)
            try:
                status, body = self._cluster.ask(self._images[place], link)
            except (OSError, http.client.HTTPException):
                link.close()
                status, body = "connection", b""
                time.sleep(0.01)
            self.told[status] += 1
            if status == 200:
                if json.loads(body)["predictions"][0]["probability"] != self._wanted[place]:
                    self.wrong.append((place, body))
            elif status not in (503, "connection"):
                self.wrong.append((status, body))


def test_a_replica_that_dies_under_load_loses_no_request(cluster, model, images, until):
    before = cluster.replicas()
    assert len(before) == 2
    with Load(cluster, model, images) as load:
        until(lambda: load.told[200] > 100)
        assert set(load.told) == {200}
        os.kill(before[0], signal.SIGKILL)
        answered = load.told[200]
        until(lambda: load.told[200] > answered + 200)
        until(lambda: len(set(cluster.replicas()) - {before[0]}) == 2, 90)  # another one takes its place
    assert not load.wrong


def test_a_stop_under_load_loses_no_request(cluster, model, images, until):
    """The last test: the cluster ends."""
    with Load(cluster, model, images) as load:
        until(lambda: load.told[200] > 50)
        cluster.process.send_signal(signal.SIGTERM)
        assert cluster.process.wait(90) == 0, cluster.said
    assert not load.wrong
    assert cluster.replicas() == []
