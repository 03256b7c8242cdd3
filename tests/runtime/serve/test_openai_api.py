"""OpenAI's own client asks a server; its answers are the library's, bit for bit."""

import base64
import io
import json

import numpy as np
import openai
import pytest
from PIL import Image

from invariclip.serve.limits import Limits
from invariclip.serve.metrics import Metrics
from invariclip.serve.service import Batching, Service
from invariclip.serve.sites import SiteRegistry
from invariclip.sites.measuring import begun, training_mean

TEXTS = ["a cat", "two dogs at the sea", "a cat"]


@pytest.fixture(scope="module")
def metrics():
    return Metrics()


@pytest.fixture(scope="module")
def ask(model, serving, metrics):
    """One image a run: the bits of a batch are the engine's own affair."""
    limits = Limits(body=400_000, images=3, texts=4, seconds=20)
    with serving(Service(model, limits, Batching(max_batch=1)), metrics, api_keys=("secret",)) as client:
        yield client


@pytest.fixture(scope="module")
def client(ask):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{ask.port}/v1", api_key="secret", max_retries=0) as client:
        yield client


@pytest.fixture
def post(ask):
    """A question without OpenAI's client, which would not send some of them."""

    def of(fields, headers=None):
        body = json.dumps({"model": "tiny", **fields})
        key = {"authorization": "Bearer secret"}
        return ask("POST", "/v1/embeddings", body, "application/json", headers={**key, **(headers or {})})

    return of


def data_url(image, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def vectors_of(answer):
    return np.array([item.embedding for item in answer.data])


@pytest.mark.parametrize("encoding", ["float", "base64", openai.omit])
def test_texts(client, model, encoding):
    wanted = model.embed_texts(TEXTS)
    answer = client.embeddings.create(model="tiny", input=TEXTS, encoding_format=encoding)
    if encoding == "base64":
        rows = [np.frombuffer(base64.b64decode(item.embedding), "<f4") for item in answer.data]
        np.testing.assert_array_equal(np.stack(rows), wanted)
    else:  # numbers in JSON are those of the float32, exactly
        np.testing.assert_array_equal(vectors_of(answer), wanted.astype(np.float64))
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert (answer.model, answer.space_id, answer.warnings) == ("tiny", model.space_id, [])


def test_usage_is_what_the_tower_reads(client, model):
    from open_clip import tokenize

    texts = ["a cat", "two dogs at the sea", "word " * 40]
    answer = client.embeddings.create(model="tiny", input=texts)
    read = int((tokenize(texts, context_length=16) != 0).sum())
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (read, read)
    [warning] = answer.warnings
    assert "cut to context_length 16" in warning
    one = client.embeddings.create(model="tiny", input="a cat")
    assert one.usage.prompt_tokens == 4
    np.testing.assert_array_equal(vectors_of(one), model.embed_texts(["a cat"]))


def test_images(client, model, images):
    answer = client.embeddings.create(model="tiny", input=[data_url(image) for image in images[:3]])
    np.testing.assert_array_equal(np.float32(vectors_of(answer)), model.embed_images(images[:3], batch_size=1))
    assert answer.usage.prompt_tokens == 0
    single = client.embeddings.create(model="tiny", input=data_url(images[1]), dimensions=8)
    np.testing.assert_array_equal(np.float32(vectors_of(single)), model.embed_images(images[1:2]))


@pytest.mark.parametrize("form", ["object", "text", "with an empty text"])
def test_a_conversation_of_one_image(client, model, images, form):
    url = data_url(images[0])
    part = {"type": "image_url", "image_url": url if form == "text" else {"url": url}}
    content = [part, {"type": "text", "text": ""}] if form == "with an empty text" else [part]
    answer = client.post(
        "/embeddings", cast_to=openai.types.CreateEmbeddingResponse,
        body={"model": "tiny", "messages": [{"role": "user", "content": content}], "encoding_format": "float"},
    )  # fmt: skip
    np.testing.assert_array_equal(np.float32(vectors_of(answer)), model.embed_images(images[:1]))


@pytest.mark.parametrize("content", ["a cat", [{"type": "text", "text": "a cat"}]])
def test_a_conversation_of_one_text(post, model, content):
    answer = post({"messages": [{"role": "user", "content": content}]})
    [item] = answer.json["data"]
    np.testing.assert_array_equal(np.float32(item["embedding"]), model.embed_texts(["a cat"])[0])


def test_what_has_no_effect_is_said(client):
    answer = client.embeddings.create(model="tiny", input=["https://example.org/cat.png", "a cat"], user="me")
    assert answer.warnings == [
        "the field user has no effect here",
        "input 0 was embedded as a text: the server fetches no images; send an image as a data URL",
    ]


def test_models(client, model):
    [listed] = client.models.list().data
    assert (listed.id, listed.object, listed.owned_by, listed.space_id) == (
        "tiny",
        "model",
        "invariclip",
        model.space_id,
    )
    manifest = model.folder / "manifest.json"
    assert listed.created == int(manifest.stat().st_mtime)
    assert client.models.retrieve("tiny") == listed
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("text-embedding-3-small")
    assert (refused.value.code, refused.value.param, refused.value.type) == (
        "model_not_found", "model", "invalid_request_error",
    )  # fmt: skip
    assert "no model is called 'text-embedding-3-small'; available: tiny" in str(refused.value)


def small():
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    return data_url(stream.getvalue())


SMALL = small()


@pytest.mark.parametrize(
    ("fields", "status", "reason"),
    [
        ({"model": "other", "input": "a"}, 404, "no model is called 'other'; available: tiny"),
        ({"input": "a", "truncate": True}, 422, "no field is called 'truncate'; available: model, input, messages"),
        ({}, 422, "give either input or messages"),
        ({"input": "a", "messages": [{"content": "a"}]}, 422, "give either input or messages"),
        ({"input": []}, 422, "length >= 1"),
        ({"input": [1, 2, 3]}, 422, "token ids, which are not taken; send the texts"),
        ({"input": [[1, 2], [3]]}, 422, "token ids, which are not taken; send the texts"),
        ({"input": ["a", 1]}, 422, "Expected `str`, got `int` - at `$.input[1]`"),
        ({"input": ["a", SMALL]}, 422, "texts and images (1 of 2); CLIP embeds each by a tower of its own"),
        ({"input": "a", "dimensions": 4}, 422, "the axes of an embedding are not ordered"),
        ({"input": "a", "dimensions": 0}, 422, ">= 1"),
        ({"input": "a", "encoding_format": "int8"}, 422, "available: float, base64"),
        ({"input": ["a"] * 5}, 413, "5 input are too many; up to 4"),
        ({"input": [SMALL] * 4}, 413, "4 images are too many; up to 3"),
        ({"input": "a" * 3_000}, 413, "characters in one of input"),
        ({"input": "a", "site": "yard"}, 422, "leave the field site out for texts"),
        ({"input": SMALL, "site": "yard"}, 422, "site"),
        ({"input": "data:text/plain;base64,YWJj"}, 422, "'data:text/plain;base64' must be data:image/…"),
        ({"input": "data:image/png,abc"}, 422, "must be data:image/…;base64"),
        ({"input": "data:image/png;base64,@@"}, 422, "image 0: not base64"),
        ({"input": "data:image/png;base64,YWJj"}, 422, "image 0: "),
        ({"messages": [{"content": [{"type": "image_url", "image_url": {"url": "http://x/a.png"}}]}]}, 422,
         "'http://x/a.png' is not a data URL, and the server fetches nothing"),
        ({"messages": [{"content": [{"type": "image_url", "image_url": SMALL}, {"type": "text", "text": "a"}]}]}, 422,
         "messages hold 1 images and 1 texts; CLIP embeds one image or one text"),
        ({"messages": [{"content": "a"}, {"content": "b"}]}, 422, "messages hold 0 images and 2 texts"),
        ({"messages": [{"content": []}]}, 422, "messages hold 0 images and 0 texts"),
        ({"messages": [{"role": "system", "content": "a"}]}, 422, "available: user"),
        ({"messages": [{"content": "a", "name": "me"}]}, 422, "messages[0].name"),
        ({"messages": [{"content": [{"type": "text"}]}]}, 422, "a part of type text has the field text"),
        ({"messages": [{"content": [{"type": "image_url"}]}]}, 422, "a part of type image_url has the field image_url"),
        ({"messages": [{"content": [{"type": "input_audio"}]}]}, 422, "available: text, image_url"),
    ],
)  # fmt: skip
def test_refusals(post, fields, status, reason):
    answer = post(fields)
    error = answer.json["error"]
    assert answer.status == status, error
    assert list(error) == ["message", "type", "param", "code"]
    assert reason in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


def test_other_errors_are_in_openai_s_shape_too(ask, post, serving, model):
    assert post({}, {"authorization": "Bearer wrong"}).json["error"]["code"] == "invalid_api_key"
    key = {"x-api-key": "secret"}
    for method, path, kind, body, status in (
        ("GET", "/v1/embeddings", None, None, 405),
        ("POST", "/v1/embeddings", "text/plain", "{}", 415),
        ("POST", "/v1/embeddings", "application/json", "{", 400),
        ("POST", "/v1/embeddings?model=tiny", "application/json", "{}", 422),
        ("POST", "/v1/embeddings", "application/json", "{" + " " * 400_000 + "}", 413),
    ):
        answer = ask(method, path, body, kind, headers=key)
        assert answer.status == status
        assert answer.json["error"]["type"] == "invalid_request_error"
    foreign = ask("POST", "/v1/embeddings", "{}", "application/json", headers={**key, "origin": "https://example.org"})
    assert foreign.status == 403
    assert "may not ask this server" in foreign.json["error"]["message"]
    with serving(Service(model, Limits(seconds=1e-6))) as hurried:
        late = hurried("POST", "/v1/embeddings", '{"model": "tiny", "input": "a"}', "application/json")
        assert late.status in (408, 504)
    with serving(Service(model)) as stopping:
        stopping.api.models.find(None).service.texts.close()
        stopped = stopping("POST", "/v1/embeddings", '{"model": "tiny", "input": "a"}', "application/json")
        assert (stopped.status, stopped.json["error"]["type"]) == (503, "server_error")


def test_an_answer_is_bounded(serving, model):
    with serving(Service(model, Limits(answer=1_000, texts=30))) as ask:
        for encoding, most, remedy in (("float", 5, "set encoding_format to base64"), ("base64", 20, "send less")):
            question = {"model": "tiny", "encoding_format": encoding}
            for count, status in ((most, 200), (most + 1, 413)):
                answer = ask.json("/v1/embeddings", {**question, "input": ["a"] * count})
                assert answer.status == status
            assert remedy in answer.json["error"]["message"]


def test_sites(serving, model, tiny_artifact, images):
    yard = begun(model, "yard", training_mean(tiny_artifact, model.manifest), None)
    with serving(Service(model, sites=SiteRegistry(model, known={"yard": yard}))) as ask:
        answer = ask.json("/v1/embeddings", {"model": "tiny", "input": data_url(images[0]), "site": "yard"}).json
        assert answer["site"]["name"] == "yard"
        theirs = ask.json("/v1/embed", {"images": [data_url(images[0])], "site": "yard"}).json
        assert [item["embedding"] for item in answer["data"]] == theirs["embeddings"]


def test_metrics_do_not_grow_with_names(ask, client, metrics):
    client.models.list()
    for name in ("a", "b"):
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(name)
    text = metrics.text().decode()
    assert 'route="/v1/models",status="404"' in text
    assert "/v1/models/a" not in text
