"""A repository in a real Triton: that of the package nvidia-pytriton, in the virtual environment INVARICLIP_TRITON.

python3 -m venv triton
triton/bin/pip install nvidia-pytriton
triton/bin/pip install .
INVARICLIP_TRITON=triton python -m pytest tests/runtime/serve/test_triton_server.py
"""

import os
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

import invariclip
from invariclip.export.triton import TritonConfig, write_repository

WHERE = "INVARICLIP_TRITON"
STUB = "triton_python_backend_stub"
LIBRARY = """
import sys
import numpy as np
import invariclip
from invariclip.preprocessing.find import find_images

artifact, folder, pixels, out = sys.argv[1:]
model, paths = invariclip.load(artifact), find_images([folder])
together, alone = model.answer(paths, batch_size=len(paths)), [model.answer([path]) for path in paths]
np.savez(
    out, embedding=together.embeddings, logits=together.logits, probabilities=together.probabilities,
    label=np.array([one.label for one in model.classify(paths, batch_size=len(paths))]),
    alone=np.concatenate([one.embeddings for one in alone]), texts=model.embed_texts(["a cat", "größe"]),
    pixels=model.embed_images(list(np.load(pixels)), batch_size=2),
)
"""


def packages():
    """The environment's packages; the test is skipped where there is no Triton for this Python in it."""
    if WHERE not in os.environ:
        pytest.skip(f"no Triton: {WHERE} names no virtual environment with nvidia-pytriton")
    [folder] = Path(os.environ[WHERE]).resolve().glob("lib/python3*/site-packages")
    stub = folder / "pytriton" / "tritonserver" / "python_backend_stubs" / python_version(folder) / STUB
    if not stub.is_file():
        pytest.skip(f"no Triton: {stub} is not there")
    return folder


def python_version(folder):
    return folder.parent.name.removeprefix("python")


@pytest.fixture(scope="module")
def triton(tmp_path_factory):
    """Puts the parts of the package together as pytriton does: gives the server's program and a Python for models."""
    folder, root = packages(), tmp_path_factory.mktemp("triton")
    parts = folder / "pytriton" / "tritonserver"
    backend = root / "backends" / "python"
    backend.mkdir(parents=True)
    for path in (
        *(parts / "backends" / "python").glob("*.*"),
        parts / "python_backend_stubs" / python_version(folder) / STUB,
    ):
        (backend / path.name).symlink_to(path)
    python = Path(os.environ[WHERE]).resolve() / "bin" / "python"
    subprocess.run([python, "-m", "venv", "--without-pip", root / "env"], check=True)
    [own] = (root / "env").glob("lib/python3*/site-packages")
    this = Path(invariclip.__file__).parents[1]
    (own / "this.pth").write_text(f"{this}\n{folder}\n")  # Triton leaves PYTHONPATH out
    return parts / "bin" / "tritonserver", root / "backends", root / "env" / "bin"


def free_ports(count):
    socks = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in socks]
    for sock in socks:
        sock.close()
    return ports


class Server:
    """A Triton of a repository; `said` is its log."""

    def __init__(self, triton, repository, log):
        program, backends, python = triton
        self.http, self.grpc = free_ports(2)
        libraries = program.parents[3] / "nvidia_pytriton.libs"
        self._log = log
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [
                    program, "--model-repository", repository, "--backend-directory", backends, "--http-port",
                    str(self.http), "--grpc-port", str(self.grpc), "--http-address", "127.0.0.1", "--grpc-address",
                    "127.0.0.1", "--allow-metrics", "false",
                ],
                env={**os.environ, "LD_LIBRARY_PATH": str(libraries), "PATH": f"{python}:{os.environ['PATH']}"},
                stdout=stream, stderr=subprocess.STDOUT,
            )  # fmt: skip

    @property
    def said(self):
        return self._log.read_text(errors="replace")

    def wait(self):
        end = time.monotonic() + 120
        while "Started HTTPService" not in self.said:
            assert self.process.poll() is None, self.said[-3000:]
            assert time.monotonic() < end, self.said[-3000:]
            time.sleep(0.1)

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(2).integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def library(triton, tiny_artifact, tiny_images, pixels, tmp_path_factory):
    """What the library says in the same Python."""
    root = tmp_path_factory.mktemp("library")
    np.save(root / "pixels.npy", pixels)
    given = (tiny_artifact, tiny_images, root / "pixels.npy", root / "answers.npz")
    subprocess.run([triton[2] / "python", "-c", LIBRARY, *given], check=True)
    return dict(np.load(root / "answers.npz"))


@pytest.fixture(scope="module")
def serving(triton, tiny_artifact, tmp_path_factory):
    """Triton with the same artifact twice: with batches, and without."""
    out = tmp_path_factory.mktemp("repository")
    write_repository(tiny_artifact, out, TritonConfig(models=("python",)))
    write_repository(tiny_artifact, out, TritonConfig(models=("python",), name="single", max_batch=0))
    server = Server(triton, out, tmp_path_factory.mktemp("log") / "log")
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def asked(kind, client, model, name, values, **more):
    values = np.asarray(values, dtype=None if name == "pixels" else object)
    batched = model == "tiny" and name != "pixels"
    values = values.reshape(-1, 1) if batched else values
    given = kind.InferInput(name, list(values.shape), "UINT8" if name == "pixels" else "BYTES")
    given.set_data_from_numpy(values)
    return client.infer(model, [given], **more)


@pytest.mark.parametrize("model", ["tiny", "single"])
@pytest.mark.parametrize("kind", [tritonclient.grpc, tritonclient.http])
def test_triton_answers_as_the_library_does(serving, library, images, pixels, kind, model):
    port = serving.grpc if kind is tritonclient.grpc else serving.http
    with kind.InferenceServerClient(f"127.0.0.1:{port}") as client:
        answer = asked(kind, client, model, "images", images)
        for name in ("embedding", "logits", "probabilities"):
            np.testing.assert_array_equal(answer.as_numpy(name), library[name])
        labels = [text.decode() for text in answer.as_numpy("label").ravel()]
        assert labels == library["label"].tolist()
        texts = asked(kind, client, model, "texts", [b"a cat", "größe".encode()])
        np.testing.assert_array_equal(texts.as_numpy("embedding"), library["texts"])
        assert texts.as_numpy("logits") is None
        answer = asked(kind, client, model, "pixels", pixels)
        np.testing.assert_array_equal(answer.as_numpy("embedding"), library["pixels"])
        with pytest.raises(InferenceServerException, match="image 1: not an image of a known format"):
            asked(kind, client, model, "images", [images[0], b"junk"])
        with pytest.raises(InferenceServerException, match="the parameter site is not taken behind Triton"):
            asked(kind, client, model, "images", images[:1], parameters={"site": "hall"})


def test_labels_are_triton_s_too(serving, library, images):
    kind = tritonclient.grpc
    with kind.InferenceServerClient(f"127.0.0.1:{serving.grpc}") as client:
        wanted = [kind.InferRequestedOutput("probabilities", class_count=1)]
        answer = asked(kind, client, "tiny", "images", images[:3], outputs=wanted)
    best = [text.decode().rpartition(":")[2] for text in answer.as_numpy("probabilities").ravel()]
    assert best == library["label"].tolist()[:3]


def test_many_clients_share_batches_and_get_their_own_answers(serving, library, images):
    kind = tritonclient.grpc
    with kind.InferenceServerClient(f"127.0.0.1:{serving.grpc}") as client:

        def ask(number):
            place = number % len(images)
            if number % 5 == 0:
                with pytest.raises(InferenceServerException, match="not an image"):
                    asked(kind, client, "tiny", "images", [b"junk"])
                return
            answer = asked(kind, client, "tiny", "images", [images[place]])
            # in a batch of another size the engine may round otherwise
            np.testing.assert_allclose(answer.as_numpy("embedding")[0], library["alone"][place], atol=1e-6)

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(ask, range(200)))
        [told] = client.get_inference_statistics("tiny", as_json=True)["model_stats"]
    assert int(told["execution_count"]) < int(told["inference_count"])


def test_triton_knows_the_graphs_backend_only_where_it_has_one(triton, tiny_artifact, tmp_path):
    """The package has no ONNX Runtime backend: Triton reads the configuration, and says what it lacks."""
    write_repository(tiny_artifact, tmp_path / "models", TritonConfig(models=("onnxruntime",)))
    server = Server(triton, tmp_path / "models", tmp_path / "log")
    try:
        server.process.wait(60)
    finally:
        server.stop()
    for name in ("tiny_image", "tiny_text"):
        assert re.search(rf"{name} +\| 1 +\| UNAVAILABLE: Invalid argument: unable to find backend", server.said), (
            server.said
        )


def test_a_python_with_another_numpy_is_refused(triton, tiny_artifact, tmp_path):
    """The package's Python backend misreads arrays of numpy 2."""
    if (
        int(np.__version__.partition(".")[0]) < 2
        or python_version(packages()) != f"{sys.version_info[0]}.{sys.version_info[1]}"
    ):
        pytest.skip("this Python has no numpy 2 that Triton could start with")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    [own] = (tmp_path / "env").glob("lib/python3*/site-packages")
    (own / "this.pth").write_text(f"{Path(invariclip.__file__).parents[1]}\n{Path(np.__file__).parents[1]}\n")
    write_repository(tiny_artifact, tmp_path / "models", TritonConfig(models=("python",)))
    server = Server((*triton[:2], tmp_path / "env" / "bin"), tmp_path / "models", tmp_path / "log")
    try:
        server.process.wait(60)
    finally:
        server.stop()
    assert 'pip install "numpy<2" into the Python that it starts' in server.said
