"""Triton's own HTTP client asks a server; its answers are the library's, bit for bit."""

import base64
import json

import numpy as np
import pytest
import tritonclient.http as triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException

from invariclip.preprocessing.tokenizer import hearing_cuts
from invariclip.serve.inference import written_elements
from invariclip.serve.limits import Limits
from invariclip.serve.metrics import Metrics
from invariclip.serve.service import Batching, Service
from invariclip.serve.sites import SiteRegistry
from invariclip.sites.measuring import begun, training_mean
from invariclip.version import __version__

INFER = "/v2/models/tiny/infer"
LENGTH = "inference-header-content-length"


@pytest.fixture(scope="module")
def metrics():
    return Metrics()


@pytest.fixture(scope="module")
def ask(model, serving, metrics):
    """One image a run: the bits of a batch are the engine's own affair."""
    limits = Limits(body=200_000, images=4, texts=4, pixels=10_000, request_pixels=20_000, seconds=20)
    with serving(Service(model, limits, Batching(max_batch=1)), metrics) as client:
        yield client


@pytest.fixture(scope="module")
def client(ask):
    with triton.InferenceServerClient(f"127.0.0.1:{ask.port}") as client:
        yield client


@pytest.fixture(scope="module")
def alone(model, images):
    """What the library says of the first four images, one at a time."""
    every = [model.answer([image]) for image in images[:4]]
    return {
        "embedding": np.concatenate([one.embeddings for one in every]),
        "logits": np.concatenate([one.logits for one in every]),
        "probabilities": np.concatenate([one.probabilities for one in every]),
        "label": np.array([one.label.encode() for one in model.classify(images[:4], batch_size=1)], dtype=object),
    }


def of_bytes(name, values, *, binary=True):
    given = triton.InferInput(name, [len(values)], "BYTES")
    given.set_data_from_numpy(np.array(values, dtype=object), binary_data=binary)
    return given


def of_pixels(array, *, binary=True):
    given = triton.InferInput("pixels", list(array.shape), "UINT8")
    given.set_data_from_numpy(array, binary_data=binary)
    return given


def test_what_the_server_and_the_model_say(client, ask, model):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1")
    assert not client.is_model_ready("other")
    assert not client.is_model_ready("tiny", "2")
    assert client.get_server_metadata()["version"] == __version__
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data", "model_repository"]
    told = client.get_model_metadata("tiny")
    assert told == client.get_model_metadata("tiny", "1")
    assert {one["name"]: (one["datatype"], one["shape"]) for one in told["inputs"]} == {
        "images": ("BYTES", [-1]), "pixels": ("UINT8", [-1, -1, -1, 3]), "texts": ("BYTES", [-1]),
    }  # fmt: skip
    assert {one["name"]: (one["datatype"], one["shape"]) for one in told["outputs"]} == {
        "embedding": ("FP32", [-1, 8]), "logits": ("FP32", [-1, 3]), "probabilities": ("FP32", [-1, 3]),
        "label": ("BYTES", [-1]),
    }  # fmt: skip
    assert (told["versions"], told["platform"]) == (["1"], "invariclip_onnxruntime")


def test_it_is_ready_when_it_is_warm(client, ask):
    ask.api.ready = False
    try:
        assert client.is_server_live()
        assert not client.is_server_ready()
        assert not client.is_model_ready("tiny")
    finally:
        ask.api.ready = True


@pytest.mark.parametrize("binary", [True, False])
def test_images(client, images, alone, model, binary):
    """All outputs, as binary data where none is named, as the client asks for it."""
    outputs = None if binary else [triton.InferRequestedOutput(name, binary_data=False) for name in alone]
    answer = client.infer("tiny", [of_bytes("images", images[:4])], request_id="mine", outputs=outputs)
    for name, wanted in alone.items():
        told = answer.as_numpy(name)
        if name == "label" and not binary:
            told = np.array([text.encode() for text in told], dtype=object)
        np.testing.assert_array_equal(told, wanted)
        assert told.dtype == wanted.dtype
    response = answer.get_response()
    assert (response["id"], response["model_name"], response["model_version"]) == ("mine", "tiny", "1")
    assert response["parameters"] == {"space_id": model.space_id}


@pytest.mark.parametrize("version", ["", "1"])
def test_outputs_that_are_asked_for(client, images, alone, version):
    outputs = [
        triton.InferRequestedOutput("label", binary_data=True),
        triton.InferRequestedOutput("embedding", binary_data=False),
    ]
    answer = client.infer("tiny", [of_bytes("images", images[:2])], outputs=outputs, model_version=version)
    assert [one["name"] for one in answer.get_response()["outputs"]] == ["label", "embedding"]
    np.testing.assert_array_equal(answer.as_numpy("label"), alone["label"][:2])
    np.testing.assert_array_equal(answer.as_numpy("embedding"), alone["embedding"][:2])
    assert answer.as_numpy("logits") is None


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("size", [(32, 32), (40, 50)])
def test_pixels(client, model, size, binary):
    """Prepared, and of another size."""
    array = np.random.default_rng(3).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    answer = client.infer("tiny", [of_pixels(array, binary=binary)])
    wanted = [model.answer([one]) for one in array]
    np.testing.assert_array_equal(answer.as_numpy("embedding"), np.concatenate([one.embeddings for one in wanted]))
    np.testing.assert_array_equal(answer.as_numpy("logits"), np.concatenate([one.logits for one in wanted]))


def test_pixels_in_nested_lists(ask, model):
    array = np.random.default_rng(4).integers(0, 256, (1, 9, 7, 3), dtype=np.uint8)
    question = {"inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [1, 9, 7, 3], "data": array.tolist()}]}
    [told, *_] = ask.json(INFER, question).json["outputs"]
    np.testing.assert_array_equal(np.float32(told["data"]).reshape(told["shape"]), model.embed_images([array[0]]))


@pytest.mark.parametrize("binary", [True, False])
def test_texts(client, model, binary):
    texts = ["a cat", "größe", "word " * 30]
    with hearing_cuts():
        wanted = model.embed_texts(texts)
    given = [text.encode() for text in texts] if binary else texts
    answer = client.infer("tiny", [of_bytes("texts", given, binary=binary)])
    np.testing.assert_array_equal(answer.as_numpy("embedding"), wanted)
    response = answer.get_response()
    assert [one["name"] for one in response["outputs"]] == ["embedding"]
    assert "cut to context_length 16" in response["parameters"]["warnings"]


def test_images_in_base64(ask, images, alone):
    given = {"name": "images", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(images[0]).decode()]}
    encoded = {**given, "parameters": {"content_type": "base64"}}
    answer = ask.json(INFER, {"inputs": [encoded], "outputs": [{"name": "label"}]}).json
    assert answer["outputs"] == [
        {"name": "label", "datatype": "BYTES", "shape": [1], "data": [alone["label"][0].decode()]}
    ]
    refused = ask.json(INFER, {"inputs": [given]})
    assert refused.status == 422
    assert 'in base64 with its parameters {"content_type": "base64"}' in refused.error


def test_abstaining_is_an_empty_label(serving, unsure_model, images):
    with (
        serving(Service(unsure_model, abstain_above="calibrated")) as ask,
        triton.InferenceServerClient(f"127.0.0.1:{ask.port}") as client,
    ):
        answer = client.infer("unsure", [of_bytes("images", images[:1])])
        assert list(answer.as_numpy("label")) == [b""]
        [alone] = unsure_model.classify(images[:1])
        assert answer.as_numpy("probabilities").max() == np.float32(alone.probability)


def test_sites(serving, model, tiny_artifact, images):
    yard = begun(model, "yard", training_mean(tiny_artifact, model.manifest), None)
    service = Service(model, sites=SiteRegistry(model, known={"yard": yard}))
    service.warm_up()
    with serving(service) as ask, triton.InferenceServerClient(f"127.0.0.1:{ask.port}") as client:
        answer = client.infer("tiny", [of_bytes("images", images[:1])], parameters={"site": "yard"})
        assert answer.get_response()["parameters"]["site"] == "yard"
        adapted = model.with_site(yard).answer(images[:1])
        for name, wanted in (("embedding", adapted.embeddings), ("logits", adapted.logits)):
            np.testing.assert_allclose(answer.as_numpy(name), wanted, atol=1e-5)
        plain = client.infer("tiny", [of_bytes("images", images[:1])])
        assert plain.get_response()["parameters"]["site"] == ""


def test_the_client_hears_why(client, images):
    with pytest.raises(InferenceServerException, match="no model is called 'other'; available: tiny") as refused:
        client.infer("other", [of_bytes("images", images[:1])])
    assert refused.value.status() == "404"
    with pytest.raises(InferenceServerException, match="has no version '2'; available: 1"):
        client.infer("tiny", [of_bytes("images", images[:1])], model_version="2")
    with pytest.raises(InferenceServerException, match="texts have no classes; available: embedding"):
        client.infer("tiny", [of_bytes("texts", [b"a"])], outputs=[triton.InferRequestedOutput("label")])
    with pytest.raises(InferenceServerException, match="image 1: "):
        client.infer("tiny", [of_bytes("images", [images[0], b"no image"])])
    with pytest.raises(InferenceServerException, match=r"too many; up to 4"):
        client.infer("tiny", [of_bytes("images", [b"x"] * 5)])
    large = np.zeros((1, 101, 100, 3), np.uint8)
    with pytest.raises(InferenceServerException, match=r"100x101 pixels are too many; up to 10,000"):
        client.infer("tiny", [of_pixels(large)])
    with pytest.raises(InferenceServerException, match=r"the images of the request have [\d,]+ pixels"):
        client.infer("tiny", [of_pixels(np.zeros((4, 80, 80, 3), np.uint8))])


def tensor(name="texts", datatype="BYTES", shape=(1,), **more):
    return {"name": name, "datatype": datatype, "shape": list(shape), **({"data": ["a"]} | more)}


PIXELS = {"name": "pixels", "datatype": "UINT8"}


@pytest.mark.parametrize(
    ("question", "status", "reason"),
    [
        ({}, 422, "Object missing required field `inputs`"),
        ({"inputs": [], "model": "x"}, 422, "no field is called 'model'; available: inputs, outputs, id, parameters"),
        ({"inputs": []}, 422, "give one of the inputs images, pixels, texts, not 0 (none)"),
        ({"inputs": [tensor(), tensor()]}, 422, "not 2 (texts)"),
        ({"inputs": [tensor("sounds")]}, 422, "no input is called 'sounds'; available: images, pixels, texts"),
        ({"inputs": [tensor(datatype="FP32")]}, 422, "the input texts has the datatype BYTES, not 'FP32'"),
        ({"inputs": [tensor(shape=(1, 1))]}, 422, "the input texts has the shape [-1], each -1 being 1 or more"),
        ({"inputs": [tensor(shape=(0,), data=[])]}, 422, "each -1 being 1 or more, not [0]"),
        ({"inputs": [tensor(shape=(-1,))]}, 422, ">= 0"),
        ({"inputs": [tensor(shape=(2,))]}, 422, "of shape [2] has 1 values"),
        ({"inputs": [tensor(data=[1])]}, 422, "the input texts holds texts alone"),
        ({"inputs": [tensor(data="a")]}, 422, "Expected `array | null`, got `str` - at `$.inputs[0].data`"),
        ({"inputs": [tensor(data=None)]}, 422, "either in data or, with the parameter binary_data_size"),
        ({"inputs": [tensor(parameters={"binary_data_size": 1})]}, 422, "either in data or"),
        ({"inputs": [tensor(data=None, parameters={"binary_data_size": 1})]}, 422,
         "the inputs have 1 bytes of binary data, and the body has 0"),
        ({"inputs": [tensor(parameters={"content_type": "base64"})]}, 422, "parameter of the input images in JSON"),
        ({"inputs": [tensor("images", parameters={"content_type": "base64"})]}, 422, "image 0: not base64"),
        ({"inputs": [tensor(parameters={"codec": "x"})]}, 422, "inputs[0].parameters.codec"),
        ({"inputs": [{**PIXELS, "shape": [1, 1, 1, 4], "data": [1, 2, 3, 4]}]}, 422, "the shape [-1, -1, -1, 3]"),
        ({"inputs": [{**PIXELS, "shape": [1, 1, 1, 3], "data": [1, 2, 256]}]}, 422, "whole numbers from 0 to 255"),
        ({"inputs": [{**PIXELS, "shape": [1, 1, 1, 3], "data": [1, 2, 0.5]}]}, 422, "whole numbers from 0 to 255"),
        ({"inputs": [{**PIXELS, "shape": [1, 1, 1, 3], "data": [1, 2, True]}]}, 422, "whole numbers from 0 to 255"),
        ({"inputs": [{**PIXELS, "shape": [1, 1, 1, 3], "data": [1, 2]}]}, 422, "has 3 values, not 2"),
        ({"inputs": [{**PIXELS, "shape": [1, 1, 2, 3], "data": [[[[1, 2], [3, 4], [5, 6]]]]}]}, 422, "is not in lists"),
        ({"inputs": [{**PIXELS, "shape": [1, 1, 10**30, 3], "data": [1]}]}, 422, "shape"),
        ({"inputs": [tensor()], "outputs": []}, 422, "outputs is empty; leave it out for all"),
        ({"inputs": [tensor()], "outputs": [{"name": "x"}]}, 422, "no output is called 'x'; available: embedding"),
        ({"inputs": [tensor()], "outputs": [{"name": "embedding"}] * 2}, 422, "embedding is asked for twice"),
        ({"inputs": [tensor()], "outputs": [{"name": "embedding", "parameters": {"classification": 1}}]}, 422,
         "outputs[0].parameters.classification"),
        ({"inputs": [tensor()], "parameters": {"priority": 1}}, 422, "parameters.priority"),
        ({"inputs": [tensor()], "parameters": {"site": "yard"}}, 422, "leave the parameter site out for texts"),
        ({"inputs": [tensor()], "id": "x" * 3_000}, 413, "characters in an id are too many"),
        ({"inputs": [tensor(data=["x" * 3_000])]}, 413, "characters in one of texts"),
        ({"inputs": [tensor(shape=(5,), data=["a"] * 5)]}, 413, "5 texts are too many; up to 4"),
    ],
)  # fmt: skip
def test_refusals(ask, question, status, reason):
    answer = ask.json(INFER, question)
    assert answer.status == status, answer.body
    assert reason in answer.error


@pytest.mark.parametrize(
    ("length", "status", "reason"),
    [("x", 400, "it must be the length of the JSON"), ("-1", 400, "it must be"), ("9" * 30, 400, "it must be"),
     ("5", 400, "not readable as JSON"), ("²", 400, "it must be")],
)  # fmt: skip
def test_a_wrong_header_length(ask, length, status, reason):
    answer = ask("POST", INFER, b'{"inputs": []}', "application/octet-stream", headers={LENGTH: length})
    assert answer.status == status
    assert reason in answer.error


def binary_question(name, count, raw, size=None):
    head = json.dumps({"inputs": [
        {"name": name, "datatype": "BYTES", "shape": [count],
         "parameters": {"binary_data_size": len(raw) if size is None else size}},
    ]}).encode()  # fmt: skip
    return head + raw, {LENGTH: str(len(head))}


@pytest.mark.parametrize(
    ("count", "raw", "reason"),
    [
        (1, b"\x05\0\0\0abc", "the input texts ends within its element 0 of 1"),
        (1, b"\xff\xff\xff\xffabc", "the input texts ends within its element 0 of 1"),
        (1, b"\0\0", "the input texts ends within its element 0 of 1"),
        (1, b"", "the input texts ends within its element 0 of 1"),
        (2, b"\x01\0\0\0a", "the input texts ends within its element 1 of 2"),
        (1, b"\x01\0\0\0abc", "has 2 bytes behind its 1 elements"),
        (1, b"\x01\0\0\0\xff", "text 0: not UTF-8"),
    ],
)  # fmt: skip
def test_binary_data_that_is_not_what_it_says(ask, count, raw, reason):
    body, headers = binary_question("texts", count, raw)
    answer = ask("POST", INFER, body, "application/octet-stream", headers=headers)
    assert (answer.status, reason in answer.error) == (422, True), answer.body


@given(raw=st.binary(max_size=40), count=st.integers(1, 4), size=st.integers(0, 60))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_binary_data_is_answered_or_refused_in_a_line(ask, raw, count, size):
    body, headers = binary_question("texts", count, raw, size)
    answer = ask("POST", INFER, body, "application/octet-stream", headers=headers)
    assert answer.status in (200, 422)
    if answer.status == 422:
        assert answer.error


def test_an_answer_is_bounded(serving, model, images):
    with serving(Service(model, Limits(answer=1_000))) as ask:
        elements = written_elements([images[0]] * 6)
        body, headers = binary_question("images", 6, elements)
        refused = ask("POST", INFER, body, "application/octet-stream", headers=headers)
        assert refused.status == 413
        assert "ask for fewer outputs, or for binary data" in refused.error
        with triton.InferenceServerClient(f"127.0.0.1:{ask.port}") as client:
            told = client.infer("tiny", [of_bytes("images", images[:6])]).as_numpy("embedding")
        assert told.shape == (6, 8)


def test_metrics_do_not_grow_with_names(ask, metrics):
    for name in ("a", "b"):
        ask("GET", f"/v2/models/{name}")
        ask.json(f"/v2/models/{name}/infer", {})
    text = metrics.text().decode()
    assert 'route="/v2/models/NAME/infer",status="404"' in text
    assert "/v2/models/a" not in text


def test_probes_need_no_key(serving, model):
    with serving(Service(model), api_keys=("secret",)) as ask:
        assert ask("GET", "/v2/health/ready", headers={"host": "pod-7.cluster"}).status == 200
        assert ask("GET", "/v2/health/live").status == 200
        assert ask("GET", "/v2/models/tiny").status == 401
        assert ask.json(INFER, {}).status == 401
