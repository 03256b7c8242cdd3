"""Engines behind one interface: the same answers, wrong inputs refused, nothing shared between threads."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from invariclip.backends import BACKENDS, open_backend, require_backend
from invariclip.errors import ArtifactError, InputError
from invariclip.threads import calls_at_once

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
    assert said["processor"]
    assert (said["computes_in"], said["spinning"]) == ("float32", False)
    if name == "openvino":
        assert (said["execution_provider"], said["execution_mode"]) == ("CPU", "accuracy")
        assert said["products"]["float32"] == sum(said["products"].values()) > 5


@pytest.fixture
def arithmetic(monkeypatch):
    """A processor that says it can compute in this and nothing else; a fresh one each time it is asked."""
    from invariclip.backends import openvino

    def can(*words):
        class Core(openvino.openvino.Core):
            def get_property(self, device, name):
                return list(words)

        monkeypatch.setattr(openvino.openvino, "Core", Core)

    return can


@pytest.mark.parametrize(("compute", "word"), [("bfloat16", "BF16"), ("float16", "FP16")])
def test_an_arithmetic_runs_where_the_processor_has_it_and_is_refused_elsewhere(
    tiny_artifact, arithmetic, compute, word
):
    import openvino

    path = tiny_artifact / "image.onnx"
    if word in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        backend = open_backend("openvino", path, threads=1, compute=compute)
        said = backend.describe()
        assert said["computes_in"] == compute
        assert said["products"][compute] > 5
        off = np.abs(backend.run(batch("image.onnx", 4))["embedding"] - engine_answer(path)).max()
        assert 1e-5 < off < 0.1
    other = "FP16" if word == "BF16" else "BF16"
    arithmetic("FP32", other)
    with pytest.raises(InputError, match=f"no {compute} arithmetic; available: float32, "):
        open_backend("openvino", path, threads=1, compute=compute)
    with pytest.raises(InputError, match=f"float32 on the CPU, not {compute}; the backend openvino can"):
        open_backend("onnxruntime", path, compute=compute)


def engine_answer(path):
    return open_backend("onnxruntime", path, threads=1).run(batch("image.onnx", 4))["embedding"]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_share_one_session_and_no_answers(name, threads, tiny_artifact):
    backend = open_backend(name, tiny_artifact / "image.onnx", threads=threads)
    asked = [batch("image.onnx", 1 + seed % 3, seed) for seed in range(50)]
    alone = [backend.run(inputs) for inputs in asked]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda _: [backend.run(inputs) for inputs in asked], range(8)))
    for answers in together:
        for got, wanted in zip(answers, alone, strict=True):
            assert all(np.array_equal(got[name], wanted[name]) for name in wanted)


def test_openvino_has_no_more_requests_than_calls_at_once(tiny_artifact):
    backend = open_backend("openvino", tiny_artifact / "image.onnx", threads=1)
    inputs = batch("image.onnx", 16)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: backend.run(inputs), range(64)))
    assert 1 <= backend._idle.qsize() <= calls_at_once(1) == 2


@pytest.mark.parametrize("name", BACKENDS)
def test_a_refused_input_gives_its_turn_back(name, tiny_artifact):
    backend = open_backend(name, tiny_artifact / "text.onnx", threads=1)
    ids = batch("text.onnx", 2)["input_ids"]
    for _ in range(2 * calls_at_once(1) + 1):
        with pytest.raises(InputError, match="cannot answer this input"):
            backend.run({"input_ids": np.tile(ids, 3)})  # longer than the context
    assert backend.run({"input_ids": ids})["embedding"].shape == (2, 8)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("writable", [True, False])
def test_answers_stay_and_inputs_are_never_written(engine, name, writable):
    backend = engine(name)
    inputs = batch("image.onnx", 3, 1)
    kept = inputs["pixels"].copy()
    inputs["pixels"].flags.writeable = writable
    first = backend.run(inputs)
    answers = {name: value.copy() for name, value in first.items()}
    for seed in (2, 3):
        backend.run(batch("image.onnx", 3, seed))
    assert all(np.array_equal(first[name], answers[name]) for name in answers)
    assert np.array_equal(inputs["pixels"], kept)
    # what callers do to their arrays afterwards is their affair
    inputs["pixels"].flags.writeable = True
    inputs["pixels"][:] = 0
    assert all(np.array_equal(first[name], answers[name]) for name in answers)


@pytest.mark.parametrize("name", BACKENDS)
def test_an_input_need_not_be_contiguous(engine, name):
    whole = batch("image.onnx", 6)["pixels"]
    strided = engine(name).run({"pixels": whole[::2]})["embedding"]
    assert np.array_equal(strided, engine(name).run({"pixels": whole[::2].copy()})["embedding"])
    mirrored = engine(name).run({"pixels": whole[:, :, ::-1]})["embedding"]
    assert np.array_equal(mirrored, engine(name).run({"pixels": whole[:, :, ::-1].copy()})["embedding"])


def test_only_the_named_outputs(engine):
    for name in BACKENDS:
        assert list(engine(name).run(batch("image.onnx", 1), ("probabilities",))) == ["probabilities"]


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ({"pixels": np.zeros((1, 32, 33, 3), np.uint8)}, None, r"pixels is uint8 \[1, 32, 33, 3\]; it takes uint8"),
        ({"pixels": np.zeros((1, 32, 32, 3), np.float32)}, None, r"pixels is float32 \[1, 32, 32, 3\]"),
        ({"image": np.zeros((1, 32, 32, 3), np.uint8)}, None, "its inputs are pixels"),
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
