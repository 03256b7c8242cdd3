"""The model behind Triton's Python backend, with a stand-in for its module; `test_triton_server` has the real one."""

import json
import sys
import types

import numpy as np
import pytest
from google.protobuf import text_format as protobuf
from tritonclient.grpc import model_config_pb2

from invariclip.errors import ArtifactError, InputError
from invariclip.export.triton import TritonConfig, write_repository
from invariclip.serve.triton_backend import TritonPythonModel, require_numpy


class Tensor:
    def __init__(self, name, values):
        self.name, self.values = name, values

    def as_numpy(self):
        return self.values


class TritonError(Exception):
    INVALID_ARG, UNAVAILABLE, INTERNAL = "invalid", "unavailable", "internal"

    def __init__(self, said, kind):
        super().__init__(said)
        self.kind = kind


class Response:
    def __init__(self, tensors=(), error=None):
        self.tensors, self.error = {one.name: one.values for one in tensors}, error


class Request:
    def __init__(self, outputs=("embedding", "logits", "probabilities", "label"), parameters="", **inputs):
        self.inputs = {name: Tensor(name, values) for name, values in inputs.items()}
        self._outputs, self._parameters = list(outputs), parameters

    def requested_output_names(self):
        return self._outputs

    def parameters(self):
        return self._parameters


@pytest.fixture
def stand_in(monkeypatch):
    module = types.ModuleType("triton_python_backend_utils")
    module.Tensor, module.InferenceResponse, module.TritonError = Tensor, Response, TritonError
    module.get_input_tensor_by_name = lambda request, name: request.inputs.get(name)
    module.logged = []
    module.Logger = types.SimpleNamespace(log_error=module.logged.append)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    return module


@pytest.fixture(scope="module")
def repository(tiny_artifact, tmp_path_factory):
    out = tmp_path_factory.mktemp("repository")
    write_repository(tiny_artifact, out, TritonConfig(models=("python",), threads=1))
    return out


def arguments(repository, max_batch=16, **parameters):
    """What Triton gives to `initialize`, by the configuration that was written."""
    facts = json.loads((repository / "tiny" / "invariclip.json").read_text())["facts"]
    said = {name: {"string_value": value} for name, value in {**facts, **parameters}.items()}
    config = {"max_batch_size": max_batch, "parameters": said}
    return {
        "model_config": json.dumps(config), "model_repository": str(repository / "tiny"), "model_version": "1",
    }  # fmt: skip


@pytest.fixture
def opened(stand_in, repository):
    model = TritonPythonModel()
    model.initialize(arguments(repository))
    yield model
    model.finalize()


def of_bytes(*values):
    return np.array(values, dtype=object).reshape(-1, 1)


def test_a_batch_of_requests_is_answered_as_the_library_does(opened, model, images):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)
    answers = opened.execute([
        Request(images=of_bytes(*images[:3])), Request(pixels=pixels), Request(texts=of_bytes(b"a cat")),
        Request(["label", "embedding"], images=of_bytes(images[3])),
    ])  # fmt: skip
    together = model.answer([*images[:3], *pixels, images[3]], batch_size=16)
    np.testing.assert_allclose(answers[0].tensors["embedding"], together.embeddings[:3], atol=1e-6)
    np.testing.assert_allclose(answers[0].tensors["logits"], together.logits[:3], atol=1e-5)
    np.testing.assert_allclose(answers[1].tensors["probabilities"], together.probabilities[3:5], atol=1e-6)
    np.testing.assert_array_equal(answers[2].tensors["embedding"], model.embed_texts(["a cat"]))
    assert set(answers[2].tensors) == {"embedding"}
    assert set(answers[3].tensors) == {"label", "embedding"}
    assert answers[3].tensors["label"].tolist() == [[model.classify([images[3]])[0].label.encode()]]


def test_one_bad_request_costs_the_others_nothing(opened, images):
    bad = {
        "image 0: not an image": Request(images=of_bytes(b"junk")),
        "not 0 (none)": Request(),
        "not 2 (images, texts)": Request(images=of_bytes(images[0]), texts=of_bytes(b"a")),
        "text 0: not UTF-8": Request(texts=of_bytes(b"\xff")),
        "there is no output logits of texts; available: embedding": Request(["logits"], texts=of_bytes(b"a")),
        "the input images is empty": Request(images=of_bytes()),
        "bake the site into the artifact": Request(images=of_bytes(images[0]), parameters='{"site": "hall"}'),
        "image 0: 9000x9000 pixels are too many": Request(pixels=np.zeros((1, 9000, 9000, 3), np.uint8)),
        "texts is empty": Request(texts=of_bytes()),
    }
    good, *answers = opened.execute([Request(images=of_bytes(images[0])), *bad.values()])
    assert good.error is None
    for said, answer in zip(bad, answers, strict=True):
        assert said in str(answer.error)
        assert answer.error.kind == TritonError.INVALID_ARG


def test_what_fails_unexpectedly_is_logged(opened, images, stand_in, monkeypatch):
    monkeypatch.setattr(opened._service, "require_bearable", lambda _images: 1 / 0)
    [answer] = opened.execute([Request(images=of_bytes(images[0]))])
    assert (str(answer.error), answer.error.kind) == ("the server failed; its log says why", TritonError.INTERNAL)
    assert "ZeroDivisionError" in stand_in.logged[0]
    monkeypatch.undo()
    opened.finalize()
    [answer] = opened.execute([Request(texts=of_bytes(b"a"))])
    assert answer.error.kind == TritonError.UNAVAILABLE


def test_without_batching_labels_have_one_dimension(stand_in, repository, images):
    model = TritonPythonModel()
    model.initialize(arguments(repository, max_batch=0))
    [answer] = model.execute([Request(images=np.array(images[:2], dtype=object))])
    model.finalize()
    assert answer.tensors["label"].shape == (2,)


def test_a_configuration_of_another_artifact_is_refused(stand_in, repository):
    with pytest.raises(ArtifactError, match="of 0000; write the repository again"):
        TritonPythonModel().initialize(arguments(repository, space_id="0000"))


@pytest.mark.parametrize(
    ("content", "known"), [(b"numpy.core", False), (b"numpy.core numpy._core", True), (b"elf", True)]
)
def test_a_python_backend_for_numpy_1_is_known(tmp_path, monkeypatch, content, known):
    program = tmp_path / "stub"
    program.write_bytes(content)
    monkeypatch.setattr(np, "__version__", "2.4.6")
    if known:
        require_numpy(program)
    else:
        with pytest.raises(InputError, match='pip install "numpy<2"'):
            require_numpy(program)
    monkeypatch.setattr(np, "__version__", "1.26.4")
    require_numpy(program)
    require_numpy(tmp_path / "none")


def test_learned_templates(stand_in, unsure_artifact, unsure_model, images, tmp_path):
    """The image graph has one output more then, and labels come from fused evidence."""
    assert write_repository(unsure_artifact, tmp_path / "models") == ["unsure", "unsure_image", "unsure_text"]
    configs = {
        name: protobuf.Parse((tmp_path / "models" / name / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
        for name in ("unsure", "unsure_image", "unsure_text")
    }
    outputs = {one.name: list(one.dims) for one in configs["unsure_image"].output}
    assert outputs == {"embedding": [8], "logits": [3], "probabilities": [3], "uncertainty": [1]}
    said = {name: {"string_value": one.string_value} for name, one in configs["unsure"].parameters.items()}
    opened = TritonPythonModel()
    opened.initialize({
        "model_config": json.dumps({"max_batch_size": 16, "parameters": said}),
        "model_repository": str(tmp_path / "models" / "unsure"), "model_version": "1",
    })  # fmt: skip
    [answer] = opened.execute([Request(images=of_bytes(*images[:2]))])
    opened.finalize()
    together = unsure_model.classify(images[:2], batch_size=2)
    assert answer.tensors["label"].ravel().tolist() == [one.label.encode() for one in together]
    assert [(one.name, list(one.dims)) for one in configs["unsure_text"].input] == [("input_ids", [-1])]
