"""Engines behind one interface: the same answers, wrong inputs refused, nothing shared between threads."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from invariclip.backends import BACKENDS, open_backend, require_backend
from invariclip.errors import ArtifactError, InputError

TOWERS = ("image.onnx", "text.onnx")


@pytest.fixture(scope="module")
def engine(tiny_artifact):
    opened = {}

    def of(name, tower="image.onnx"):
        if (name, tower) not in opened:
            opened[name, tower] = open_backend(name, tiny_artifact / tower, threads=1)
        return opened[name, tower]

    return of


def batch(tower, rows, seed=0):
    rng = np.random.default_rng(seed)
    if tower == "image.onnx":
        return {"pixels": rng.integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)}
    ids = rng.integers(1, 49405, (rows, 16))
    ids[:, 0], ids[:, 9:] = 49406, 0
    ids[:, 9] = 49407
    return {"input_ids": ids}


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("rows", [1, 2, 5, 17])
def test_openvino_answers_like_onnxruntime(engine, tower, rows):
    inputs = batch(tower, rows, seed=rows)
    theirs, ours = engine("onnxruntime", tower).run(inputs), engine("openvino", tower).run(inputs)
    assert list(ours) == list(theirs) == list(engine("openvino", tower).output_names)
    for name, value in ours.items():
        assert (value.dtype, value.shape) == (theirs[name].dtype, theirs[name].shape)
        # bfloat16 would be off by 1e-3
        assert np.abs(value - theirs[name]).max() <= (2e-6 if name == "embedding" else 1e-5)


def test_every_layer_of_openvino_runs_in_float32(engine):
    model = engine("openvino")._compiled.get_runtime_model()
    kinds = {node.get_rt_info()["runtimePrecision"].astype(str) for node in model.get_ops()}
    assert "f32" in kinds
    assert not kinds & {"bf16", "f16"}


@pytest.mark.parametrize("name", BACKENDS)
def test_an_engine_says_what_runs(engine, name):
    said = engine(name).describe()
    assert said["engine"] == name
    assert said["threads"] == 1
    assert said["version"]
    if name == "openvino":
        assert (said["computes in"], said["execution provider"], said["execution mode"]) == ("f32", "CPU", "accuracy")


@pytest.mark.parametrize("name", BACKENDS)
def test_threads_do_not_share_answers(engine, name):
    backend = engine(name)
    asked = [batch("image.onnx", 1 + seed % 3, seed) for seed in range(24)]
    alone = [backend.run(inputs)["embedding"] for inputs in asked]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda inputs: backend.run(inputs)["embedding"], asked * 4))
    for got, wanted in zip(together, alone * 4, strict=True):
        assert np.abs(got - wanted).max() <= 1e-6


def test_answers_are_copies(engine):
    backend = engine("openvino")
    first = backend.run(batch("image.onnx", 3, 1))["embedding"]
    kept = first.copy()
    backend.run(batch("image.onnx", 3, 2))
    assert np.array_equal(first, kept)


def test_only_the_named_outputs(engine):
    for name in BACKENDS:
        assert list(engine(name).run(batch("image.onnx", 1), ("probabilities",))) == ["probabilities"]


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ({"pixels": np.zeros((1, 32, 33, 3), np.uint8)}, None, r"pixels is uint8 \[1, 32, 33, 3\]; it takes uint8"),
        ({"pixels": np.zeros((1, 32, 32, 3), np.float32)}, None, r"pixels is float32 \[1, 32, 32, 3\]"),
        ({"picture": np.zeros((1, 32, 32, 3), np.uint8)}, None, "its inputs are pixels"),
        ({"pixels": np.zeros((1, 32, 32, 3), np.uint8)}, ("scores",), "outputs embedding, logits, probabilities"),
    ],
)
def test_openvino_refuses_what_is_not_the_graphs(engine, inputs, outputs, message):
    with pytest.raises(InputError, match=message) as caught:
        engine("openvino").run(inputs, outputs)
    assert "\n" not in str(caught.value)
    assert engine("openvino").run(batch("image.onnx", 1))["embedding"].shape == (1, 8)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_damaged_graph_is_refused(name, tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"nonsense")
    with pytest.raises(ArtifactError, match=r"a\.onnx: .* cannot load it"):
        open_backend(name, tmp_path / "a.onnx")
    with pytest.raises(InputError, match="threads must be at least 1"):
        open_backend(name, tmp_path / "a.onnx", threads=0)


def test_an_unknown_engine_is_named(tmp_path):
    with pytest.raises(InputError, match=r"'tensorflow'; available: onnxruntime, openvino"):
        require_backend("tensorflow")
    with pytest.raises(InputError, match="'tensorflow'"):
        open_backend("tensorflow", tmp_path / "a.onnx")


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_a_missing_engine_says_what_to_install():
    done = run(
        "import sys; sys.modules['openvino'] = None\n"
        "from invariclip.backends import open_backend\n"
        "from invariclip.errors import MissingExtraError\n"
        "try: open_backend('openvino', 'a.onnx')\n"
        "except MissingExtraError as error: print(error)"
    )
    assert done.stdout.strip() == "backend 'openvino' needs the package openvino: pip install \"invariclip[openvino]\""


def test_engines_load_when_asked_for_and_openvino_stays_off_the_network():
    done = run(
        "import sys, socket\n"
        "def refuse(*_, **__): raise SystemExit('went to the network')\n"
        "socket.getaddrinfo = socket.socket.connect = refuse\n"
        "import invariclip.backends; print([m for m in ('onnxruntime', 'openvino') if m in sys.modules])\n"
        "import invariclip.backends.openvino\n"
        "print([m for m in sys.modules if m.startswith('openvino_telemetry')])"
    )
    assert done.stdout.split("\n")[:2] == ["[]", "[]"], done.stderr
