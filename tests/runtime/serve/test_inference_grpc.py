"""Triton's own gRPC client asks a server; its answers are the library's, bit for bit."""

import json

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from invariclip.serve import open_inference
from invariclip.serve.access_log import AccessLog
from invariclip.serve.limits import Limits
from invariclip.serve.metrics import Metrics
from invariclip.serve.service import Batching, Service
from invariclip.serve.sites import SiteRegistry
from invariclip.sites.measuring import begun, training_mean
from invariclip.version import __version__


@pytest.fixture(scope="module")
def metrics():
    return Metrics()


@pytest.fixture(scope="module")
def ask(model, serving, metrics):
    """One image a run: the bits of a batch are the engine's own affair."""
    limits = Limits(body=200_000, images=4, texts=4, pixels=10_000, request_pixels=20_000, seconds=20)
    with serving(Service(model, limits, Batching(max_batch=1)), metrics, grpc=True) as client:
        yield client


@pytest.fixture(scope="module")
def client(ask):
    with triton.InferenceServerClient(ask.grpc) as client:
        yield client


@pytest.fixture(scope="module")
def call(ask):
    """A call of a method with a message of Triton's own definitions, or of bytes."""
    with grpc.insecure_channel(ask.grpc) as channel:

        def of(method, request, **more):
            path = f"/{open_inference.SERVICE}/{method}"
            content = request if isinstance(request, bytes) else request.SerializeToString()
            return channel.unary_unary(path)(content, timeout=20, **more)

        yield of


def of_bytes(name, values):
    given = triton.InferInput(name, [len(values)], "BYTES")
    given.set_data_from_numpy(np.array(values, dtype=object))
    return given


def of_pixels(array):
    given = triton.InferInput("pixels", list(array.shape), "UINT8")
    given.set_data_from_numpy(array)
    return given


def test_the_definitions_are_those_of_the_protocol():
    """Every message and field has the number and type of Triton's copy of it."""
    for name in open_inference._MESSAGES:
        ours, theirs = open_inference._POOL.FindMessageTypeByName(f"inference.{name}"), service_pb2.DESCRIPTOR
        for part in name.split("."):
            container = (
                theirs.message_types_by_name if theirs is service_pb2.DESCRIPTOR else theirs.nested_types_by_name
            )
            theirs = container[part]
        fields = {field.name: field for field in theirs.fields}
        for field in ours.fields:
            other = fields[field.name]
            same = (other.number, other.type, other.is_repeated)
            assert (field.number, field.type, field.is_repeated) == same, (name, field.name)
        assert {one.name for one in ours.oneofs} == {one.name for one in theirs.oneofs}


def test_what_the_server_and_the_model_say(client, ask):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1")
    ask.api.ready = False
    try:
        assert not client.is_server_ready()
        assert not client.is_model_ready("tiny")
    finally:
        ask.api.ready = True
    assert client.get_server_metadata().version == __version__
    told = client.get_model_metadata("tiny", as_json=True)
    assert told == {
        "name": "tiny", "versions": ["1"], "platform": "invariclip_onnxruntime",
        "inputs": [
            {"name": "images", "datatype": "BYTES", "shape": ["-1"]},
            {"name": "pixels", "datatype": "UINT8", "shape": ["-1", "-1", "-1", "3"]},
            {"name": "texts", "datatype": "BYTES", "shape": ["-1"]},
        ],
        "outputs": [
            {"name": "embedding", "datatype": "FP32", "shape": ["-1", "8"]},
            {"name": "logits", "datatype": "FP32", "shape": ["-1", "3"]},
            {"name": "probabilities", "datatype": "FP32", "shape": ["-1", "3"]},
            {"name": "label", "datatype": "BYTES", "shape": ["-1"]},
        ],
    }  # fmt: skip


def test_images(client, model, images):
    answer = client.infer("tiny", [of_bytes("images", images[:4])], request_id="mine", model_version="1")
    every = [model.answer([image]) for image in images[:4]]
    for name, field in (("embedding", "embeddings"), ("logits", "logits"), ("probabilities", "probabilities")):
        wanted = np.concatenate([getattr(one, field) for one in every])
        np.testing.assert_array_equal(answer.as_numpy(name), wanted)
    labels = [one.label.encode() for one in model.classify(images[:4], batch_size=1)]
    assert answer.as_numpy("label").tolist() == labels
    response = answer.get_response()
    assert (response.id, response.model_name, response.model_version) == ("mine", "tiny", "1")
    assert response.parameters["space_id"].string_param == model.space_id
    outputs = [triton.InferRequestedOutput("label")]
    only = client.infer("tiny", [of_bytes("images", images[:1])], outputs=outputs).get_response()
    assert [one.name for one in only.outputs] == ["label"]


def test_pixels_and_texts(client, model):
    array = np.random.default_rng(3).integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)
    answer = client.infer("tiny", [of_pixels(array)])
    np.testing.assert_array_equal(answer.as_numpy("embedding"), model.embed_images(list(array), batch_size=1))
    texts = ["a cat", "größe"]
    answer = client.infer("tiny", [of_bytes("texts", [text.encode() for text in texts])])
    np.testing.assert_array_equal(answer.as_numpy("embedding"), model.embed_texts(texts))


def question(name, shape, datatype="BYTES", **contents):
    request = service_pb2.ModelInferRequest(model_name="tiny")
    tensor = request.inputs.add(name=name, datatype=datatype, shape=shape)
    for field, values in contents.items():
        getattr(tensor.contents, field).extend(values)
    return request


def test_values_that_are_not_raw(call, model, images):
    array = np.random.default_rng(3).integers(0, 256, (1, 9, 7, 3), dtype=np.uint8)
    for request, wanted in (
        (question("texts", [1], bytes_contents=[b"a cat"]), model.embed_texts(["a cat"])),
        (question("images", [1], bytes_contents=images[:1]), model.embed_images(images[:1])),
        (question("pixels", array.shape, "UINT8", uint_contents=array.ravel().tolist()),
         model.embed_images([array[0]])),
    ):  # fmt: skip
        answer = service_pb2.ModelInferResponse.FromString(call("ModelInfer", request))
        told = np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(answer.outputs[0].shape)
        np.testing.assert_array_equal(told, wanted)


def test_sites(serving, model, tiny_artifact, images):
    yard = begun(model, "yard", training_mean(tiny_artifact, model.manifest), None)
    service = Service(model, sites=SiteRegistry(model, known={"yard": yard}))
    service.warm_up()
    with serving(service, grpc=True) as ask, triton.InferenceServerClient(ask.grpc) as client:
        answer = client.infer("tiny", [of_bytes("images", images[:1])], parameters={"site": "yard"})
        assert answer.get_response().parameters["site"].string_param == "yard"
        wanted = model.with_site(yard).embed_images(images[:1])
        np.testing.assert_allclose(answer.as_numpy("embedding"), wanted, atol=1e-6)


def with_parameter(request, name, **value):
    getattr(request.parameters[name], "string_param")  # noqa: B009 - makes it
    for field, given in value.items():
        setattr(request.parameters[name], field, given)
    return request


def raw(request, *contents):
    request.raw_input_contents.extend(contents)
    return request


TEXT = {"name": "texts", "shape": [1], "bytes_contents": [b"a"]}


@pytest.mark.parametrize(
    ("request_", "code", "reason"),
    [
        (service_pb2.ModelInferRequest(model_name="x"), "NOT_FOUND", "no model is called 'x'; available: tiny"),
        (service_pb2.ModelInferRequest(model_name="tiny", model_version="2"), "NOT_FOUND", "has no version '2'"),
        (service_pb2.ModelInferRequest(model_name="tiny"), "INVALID_ARGUMENT", "give one of the inputs images, pixels"),
        (question("texts", [1]), "INVALID_ARGUMENT", "in raw_input_contents, or in contents.bytes_contents"),
        (question("texts", [1], int_contents=[1]), "INVALID_ARGUMENT", "or in contents.bytes_contents"),
        (question("texts", [2], bytes_contents=[b"a"]), "INVALID_ARGUMENT", "of shape [2] has 1 values"),
        (question("texts", [1], bytes_contents=[b"\xff"]), "INVALID_ARGUMENT", "text 0: not UTF-8"),
        (question("texts", [-1], bytes_contents=[b"a"]), "INVALID_ARGUMENT", "each -1 being 1 or more, not [-1]"),
        (question("images", [5], bytes_contents=[b"a"] * 5), "INVALID_ARGUMENT", "5 images are too many; up to 4"),
        (question("images", [1], bytes_contents=[b"a"]), "INVALID_ARGUMENT", "image 0: "),
        (question("pixels", [1, 1, 1, 3], "UINT8", uint_contents=[1, 2, 256]), "INVALID_ARGUMENT", "from 0 to 255"),
        (raw(question("texts", [1], bytes_contents=[b"a"]), b"\1\0\0\0a"), "INVALID_ARGUMENT", "or in contents"),
        (raw(question("texts", [1]), b"", b""), "INVALID_ARGUMENT", "has 2 values for 1 inputs"),
        (raw(question("texts", [1]), b"\xff\xff\xff\xffa"), "INVALID_ARGUMENT", "ends within its element 0"),
        (with_parameter(question("texts", [1], bytes_contents=[b"a"]), "priority", int64_param=1), "INVALID_ARGUMENT",
         "no parameter of a request is called 'priority'"),
        (b"\xff\xff\xff", "INVALID_ARGUMENT", "the message is not one of this method"),
        (question("texts", [1], bytes_contents=[b"a"]).SerializeToString() + b"\xf8\x06\x01", "INVALID_ARGUMENT",
         "ModelInferRequest has no field of the number 111"),
        (question("images", [1], bytes_contents=[b"x" * 300_000]), "RESOURCE_EXHAUSTED", "larger"),
    ],
)  # fmt: skip
def test_refusals(call, request_, code, reason):
    with pytest.raises(grpc.RpcError) as refused:
        call("ModelInfer", request_)
    assert refused.value.code().name == code, refused.value.details()
    assert reason in refused.value.details()
    assert "\n" not in refused.value.details()


def test_the_client_hears_why(client, images):
    with pytest.raises(InferenceServerException, match="image 1: "):
        client.infer("tiny", [of_bytes("images", [images[0], b"no image"])])
    with pytest.raises(InferenceServerException, match="the images of the request have"):
        client.infer("tiny", [of_pixels(np.zeros((4, 80, 80, 3), np.uint8))])
    with pytest.raises(InferenceServerException):  # compressed messages are not taken
        client.infer("tiny", [of_bytes("images", images[:1])], compression_algorithm="gzip")


def test_nothing_stays_counted(ask, client, images, until):
    client.infer("tiny", [of_bytes("images", images[:1])])
    until(lambda: ask.api.exchange.held.now == ask.api.exchange.sent.now == 0)


def test_keys(serving, model, images):
    with (
        serving(Service(model), grpc=True, api_keys=("secret",)) as ask,
        triton.InferenceServerClient(ask.grpc) as client,
    ):
        assert client.is_server_live()
        assert client.is_server_ready()
        for headers in (None, {"authorization": "Bearer wrong"}):
            with pytest.raises(InferenceServerException, match="this needs a key") as refused:
                client.get_model_metadata("tiny", headers=headers)
            assert refused.value.status() == "StatusCode.UNAUTHENTICATED"
        for headers in ({"authorization": "Bearer secret"}, {"x-api-key": "secret"}):
            given = [of_bytes("images", images[:1])]
            assert client.infer("tiny", given, headers=headers).as_numpy("embedding").shape == (1, 8)


def test_a_full_queue_and_a_client_that_goes(gated, model, serving, images, until):
    service = gated(model, Limits(images=1, queue=1, seconds=20), Batching(max_batch=1))
    with serving(service, grpc=True) as ask, triton.InferenceServerClient(ask.grpc) as client:
        given = [of_bytes("images", images[:1])]
        outcomes = []

        def heard(result, error):
            outcomes.append((result, error))

        client.async_infer("tiny", given, heard)
        assert service.begun.acquire(timeout=20)
        second = client.async_infer("tiny", given, heard)
        until(lambda: service.images.waiting == 1)
        with pytest.raises(InferenceServerException, match="there is room for 1") as refused:
            client.infer("tiny", given)
        assert refused.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
        second.cancel()
        until(lambda: service.images.waiting == 0)
        service.gate.set()
        until(lambda: len(outcomes) == 2)
        assert sorted(error is None for _, error in outcomes) == [False, True]


def test_a_deadline_is_the_client_s(gated, model, serving, images):
    service = gated(model, Limits(seconds=20), Batching(max_batch=1))
    with serving(service, grpc=True) as ask, triton.InferenceServerClient(ask.grpc) as client:
        with pytest.raises(InferenceServerException) as refused:
            client.infer("tiny", [of_bytes("images", images[:1])], client_timeout=0.2)
        assert refused.value.status() == "StatusCode.DEADLINE_EXCEEDED"


def test_metrics(client, metrics):
    client.is_server_live()
    with pytest.raises(InferenceServerException):
        client.get_model_metadata("other")
    text = metrics.text().decode()
    assert 'route="grpc ServerLive",status="200"' in text
    assert 'route="grpc ModelMetadata",status="404"' in text
    assert 'invariclip_refused_total{reason="route"}' in text


def test_calls_are_in_the_access_log_under_their_ids(model, serving, images, tmp_path, until):
    metrics, path = Metrics(), tmp_path / "access.jsonl"
    log = AccessLog(path, metrics)
    with serving(Service(model), metrics, grpc=True, access_log=log) as server:
        with triton.InferenceServerClient(server.grpc) as client:
            client.infer("tiny", [of_bytes("images", images[:1])], headers={"x-request-id": "mine"})
            with pytest.raises(InferenceServerException):
                client.infer("other", [of_bytes("images", images[:1])])
        until(lambda: path.read_bytes().count(b"\n") >= 2)
    log.close()
    good, bad = (json.loads(line) for line in path.read_text().splitlines())
    assert (good["request_id"], good["method"], good["route"], good["status"]) == (
        "mine",
        "grpc",
        "grpc ModelInfer",
        200,
    )
    assert (good["images"], good["engine_ms"] > 0, good["bytes_in"] > 0, good["bytes_out"] > 0) == (1, True, True, True)
    assert (bad["status"], bad["images"], bad["error"]) == (404, 0, "no model is called 'other'; available: tiny")
