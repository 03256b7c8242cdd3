"""A real server of a tiny real model, in a thread, and a client that speaks plain HTTP."""

import asyncio
import http.client
import io
import json
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

import invariclip
from invariclip.artifact.learned_prompts import LearnedPrompts
from invariclip.artifact.projection import Projection
from invariclip.export.build import export_artifact
from invariclip.export.checkpoints.checkpoint import load_checkpoint
from invariclip.export.config import ExportConfig
from invariclip.preprocessing.find import find_images
from invariclip.serve.app import application
from invariclip.serve.connections import ConnectionLimits, Connections
from invariclip.serve.metrics import Metrics
from invariclip.serve.models import ServedModels
from invariclip.serve.server import WebServer, grpc_beside, listening
from invariclip.serve.service import Service


@pytest.fixture(scope="session")
def model(tiny_artifact):
    return invariclip.load(tiny_artifact, threads=1)


@pytest.fixture(scope="session")
def unsure_artifact(tmp_path_factory, tiny_checkpoint, tiny_images, tiny_projection):
    """Three classes, two learned templates, calibrated to abstain above 0.3."""
    checkpoint = load_checkpoint(str(tiny_checkpoint))
    rng = np.random.default_rng(5)
    semantics = LearnedPrompts(
        (0.02 * rng.normal(size=(2, 3, 16))).astype(np.float32),
        np.array([0.2, 0.1, 0.3]), np.array([-1.0, 0.5, -3.0]), np.array([0.1, -0.2, 0.3]), ("a photo of a {}.",),
        checkpoint.sha256, tiny_projection.digest, abstain_above=0.3,
    )  # fmt: skip
    out = tmp_path_factory.mktemp("unsure") / "unsure.icm"
    export_artifact(
        checkpoint,
        out,
        ExportConfig(classes=("cat", "dog", "tree"), images=find_images([tiny_images]), threads=1),
        projection=tiny_projection,
        learned_prompts=semantics,
    )
    return out


@pytest.fixture(scope="session")
def unsure_model(unsure_artifact):
    return invariclip.load(unsure_artifact, threads=1)


@pytest.fixture(scope="session")
def images(tiny_images):
    """Encoded images."""
    return [path.read_bytes() for path in find_images([tiny_images])]


@pytest.fixture(scope="session")
def encoded():
    """Makes a grey image's bytes."""

    def of(size=(40, 30), kind="PNG", **more):
        stream = io.BytesIO()
        Image.new("RGB", size, (90, 90, 90)).save(stream, kind, **more)
        return stream.getvalue()

    return of


class Answer:
    """Status, headers and body of an answer."""

    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        """The one line that an error answers with, and nothing else."""
        [[name, line]] = self.json.items()
        assert name == "error"
        assert "\n" not in line
        assert "Traceback" not in line
        return line


class Client:
    """One connection for each question."""

    def __init__(self, port, api, server):
        self.port, self.api, self.server = port, api, server

    def connection(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def __call__(self, method, path, body=None, kind=None, headers=None):
        link = self.connection()
        try:
            link.request(method, path, body, {**({"content-type": kind} if kind else {}), **(headers or {})})
            answer = link.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            link.close()

    def classify(self, image, query="", **more):
        return self("POST", f"/v1/classify{query}", image, "image/png", **more)

    def json(self, path, value):
        return self("POST", path, json.dumps(value), "application/json")

    def form(self, path, parts, headers=None):
        """Parts are (name, text) or (name, file name, bytes)."""
        body = b""
        for name, *rest in parts:
            named = f'; filename="{rest[0]}"' if len(rest) == 2 else ""
            data = rest[-1] if isinstance(rest[-1], bytes) else rest[-1].encode()
            body += f'--b\r\ncontent-disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + data + b"\r\n"
        return self("POST", path, body + b"--b--\r\n", "multipart/form-data; boundary=b", headers)


@pytest.fixture(scope="session")
def serving():
    """Opens a service behind a server, and gives the client."""
    return _serving


@contextmanager
def _serving(models, metrics=None, **options):
    """A service or several behind a real server in a thread; `limits` are of connections, `grpc` asks for that too."""
    models = ServedModels([models]) if isinstance(models, Service) else models
    metrics, limits, grace = metrics or Metrics(), options.pop("limits", ConnectionLimits()), options.pop("grace", 10)
    grpc = options.pop("grpc", False)
    app, api = application(models, metrics, stall=limits.stall, **options)
    sock = listening("127.0.0.1", 0)
    server = WebServer(app, Connections(limits, metrics, options.get("access_log")), grace=grace)
    keys, beside = options.get("api_keys", ()), []

    async def serve():
        if grpc:
            beside.append(await grpc_beside(server, api, keys, limits.stall, "127.0.0.1", 0))
        await server.serve(sockets=[sock])

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        api.ready = True
        client = Client(sock.getsockname()[1], api, server)
        client.grpc = f"127.0.0.1:{beside[0].rpartition(' ')[2]}" if grpc else None
        yield client
    finally:
        models.close()
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="session")
def until():
    """Waits for what other threads do."""

    def of(condition, seconds=20):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come to that"
            time.sleep(0.002)

    return of


@pytest.fixture(scope="session")
def gated():
    """A service whose engine waits at a gate: `begun` is released when a batch has started."""

    class Gated(Service):
        def __init__(self, *given, **options):
            self.gate, self.begun, self.batches = threading.Event(), threading.Semaphore(0), []
            super().__init__(*given, **options)

        def _see(self, seen):
            self.batches.append(len(seen))
            self.begun.release()
            assert self.gate.wait(20)
            return super()._see(seen)

        def close(self, seconds=0.0):
            self.gate.set()
            return super().close(seconds)

    return Gated


@pytest.fixture(scope="session")
def other_artifact(tmp_path_factory, tiny_checkpoint, tiny_images):
    """The tiny artifact with another projection and other classes: another space, other answers."""
    out = tmp_path_factory.mktemp("others") / "other.icm"
    rng = np.random.default_rng(7)
    export_artifact(
        load_checkpoint(str(tiny_checkpoint)), out,
        ExportConfig(classes=("sun", "moon"), images=find_images([tiny_images]), threads=1),
        projection=Projection(rng.normal(size=(24, 8)), "icm", 3.0, training_mean=rng.normal(size=8) / 10),
    )  # fmt: skip
    return out


@pytest.fixture(scope="session")
def other_model(other_artifact):
    return invariclip.load(other_artifact, threads=1)
