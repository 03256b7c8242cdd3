"""The OpenAPI document is held against the routes, and schemathesis holds the server against the document."""

import base64
import json
import re

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi import checks

import invariclip
from invariclip.serve import schema
from invariclip.serve.app import application
from invariclip.serve.limits import Limits
from invariclip.serve.metrics import Metrics
from invariclip.serve.models import ServedModels
from invariclip.serve.repository import ModelRepository
from invariclip.serve.service import Service
from invariclip.serve.sites import SiteRegistry
from invariclip.sites.measuring import begun, training_mean

load_all_checks()
LIMITS = Limits(body=100_000, images=3, texts=4, classes=5, templates=3, prompts=8, seconds=20)


@pytest.fixture(scope="module")
def made(tiny_artifact):
    """Makes the service, also when the model is loaded again."""

    def of(name, folder):
        model = invariclip.load(folder, threads=1)
        yard = begun(model, "yard", training_mean(tiny_artifact, model.manifest), None)
        return Service(model, LIMITS, sites=SiteRegistry(model, known={"yard": yard}), name=name)

    return of


@pytest.fixture(scope="module")
def ask(made, tiny_artifact, serving):
    service = made("tiny", tiny_artifact)
    service.warm_up()
    models = ServedModels([service])
    repository = ModelRepository(models, made, {"tiny": tiny_artifact})
    with serving(models, repository=repository, admin_keys=("root",)) as client:
        client.repository = repository
        yield client


@pytest.fixture(scope="module")
def api(ask):
    refused = [400, 401, 403, 404, 413, 415, 422]  # 413 is not among what schemathesis takes for a refusal
    config = schemathesis.Config.from_dict({"checks": {"negative_data_rejection": {"expected-statuses": refused}}})
    return schemathesis.openapi.from_url(f"http://127.0.0.1:{ask.port}{schema.DOCUMENT}", config=config)


ADMIN = {"x-api-key": "root"}
CHECKS = [
    schemathesis.checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
    checks.response_schema_conformance, checks.negative_data_rejection,
]  # fmt: skip
MODES = [
    (operation, mode)
    for operation in schema.OPERATIONS
    for mode in GenerationMode
    if mode is GenerationMode.POSITIVE or operation.body
]


def as_known(case, operation, mode, image):
    """Names that no generator would find: the model's, a site's; and an image where one is meant."""
    if "name" in case.path_parameters:
        known = "gone" if operation.path.endswith("/unload") else "tiny"
        case.path_parameters["name"] = "yard" if "sites" in operation.path else known
    if "model" in (case.query or {}):
        case.query["model"] = "tiny"
    if "version" in case.path_parameters:
        case.path_parameters["version"] = "1"
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = "tiny"
    if mode is GenerationMode.POSITIVE and isinstance(case.body, dict) and case.media_type == "application/json":
        if isinstance(case.body.get("images"), str):
            case.body["images"] = image
        for tensor in case.body.get("inputs", ()):
            tensor.update(name="texts", datatype="BYTES", shape=[1], data=["a"], parameters={})


@pytest.mark.parametrize(
    ("operation", "mode"), MODES, ids=[f"{mode.value} {one.method} {one.path}" for one, mode in MODES]
)
def test_answers_are_what_the_document_says(api, ask, operation, mode, images, until):
    """No 5xx; status, content type and body as documented; what the document does not allow is refused."""

    @given(case=api[operation.path][operation.method.upper()].as_strategy(generation_mode=mode))
    @settings(
        max_examples=8, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )  # fmt: skip
    def asked(case):
        as_known(case, operation, mode, base64.b64encode(images[0]).decode())
        until(lambda: not ask.repository._changing.locked())  # a model that was loaded again is closed
        case.call_and_validate(checks=CHECKS, headers=ADMIN)

    asked()


TENSOR = {"name": "texts", "datatype": "BYTES", "shape": [1], "data": ["a"]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/classify", {"images": "IMAGE", "site": "yard"}),
        ("/v1/classify", {"images": [{"data": "IMAGE", "name": "a"}], "classes": ["a", "b"], "abstain_above": 0}),
        ("/v1/embed", {"images": ["IMAGE"]}),
        ("/v1/embed", {"texts": "a cat"}),
        ("/v1/embed", {"texts": "a cat", "model": "tiny"}),
        ("/v2/repository/index", {"ready": True}),
        ("/v2/repository/models/{name}/load", {}),
        ("/v1/embeddings", {"model": "tiny", "input": ["a cat"], "user": "me"}),
        ("/v1/embeddings", {"model": "tiny", "input": "data:image/png;base64,IMAGE", "encoding_format": "base64"}),
        ("/v1/embeddings", {"model": "tiny", "messages": [{"content": "a"}]}),
        ("/v2/models/{name}/infer", {"inputs": [TENSOR], "id": "mine"}),
        ("/v2/models/{name}/infer", {"inputs": [
            {"name": "images", "datatype": "BYTES", "shape": [1], "data": ["IMAGE"],
             "parameters": {"content_type": "base64"}},
        ], "outputs": [{"name": "label"}, {"name": "logits"}], "parameters": {"site": "yard"}}),
    ],
)  # fmt: skip
def test_answers_of_good_questions_are_as_documented(api, ask, path, body, images, until):
    text = json.dumps(body).replace("IMAGE", base64.b64encode(images[0]).decode())
    case = api[path]["POST"].Case(
        path_parameters={"name": "tiny"}, body=json.loads(text), media_type="application/json"
    )  # fmt: skip
    answer = case.call_and_validate(checks=CHECKS[:4], headers=ADMIN)
    until(lambda: not ask.repository._changing.locked())
    assert answer.status_code == 200
    broken = case.call(headers=ADMIN)
    broken.content = re.sub(rb"}(]?)$", rb', "more": 1}\1', broken.content)  # the check can fail
    with pytest.raises(FailureGroup, match="Additional properties are not allowed"):
        case.validate_response(broken, checks=CHECKS[:4])


def test_every_route_is_in_the_document(model):
    service = Service(model)
    try:
        app, _ = application(ServedModels([service]), Metrics())
    finally:
        service.close()
    routes = {(method.lower(), route.path) for route in app.routes for method in route.methods if method != "HEAD"}
    assert routes == {(one.method, one.path) for one in schema.OPERATIONS}


def test_bounds_are_those_of_the_server(ask):
    schemas = ask("GET", schema.DOCUMENT).json["components"]["schemas"]
    [images] = [one for one in schemas["ClassifyFields"]["properties"]["images"]["anyOf"] if one.get("type") == "array"]
    assert (images["minItems"], images["maxItems"]) == (1, 3)
    assert schemas["ClassifyFields"]["properties"]["top"]["description"] == "How many classes are ranked."


def test_keys_are_told(model, serving):
    with serving(Service(model), api_keys=("secret",)) as ask:
        told = ask("GET", schema.DOCUMENT).json
    assert set(told["components"]["securitySchemes"]) == {"bearer", "key"}
    assert told["paths"]["/v1/embed"]["post"]["security"] == [{"bearer": []}, {"key": []}]
    assert "401" in told["paths"]["/v1/embed"]["post"]["responses"]
    assert "security" not in told["paths"]["/healthz"]["get"]


def test_the_page_asks_for_nothing_from_elsewhere(ask):
    answer = ask("GET", schema.PAGE)
    text = answer.body.decode()
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"https?://|<script|src=", text)
    for operation in schema.OPERATIONS:
        assert f"{operation.method.upper()} {operation.path}</code>" in text
    for name in re.findall(r'href="#(\w+)"', text):
        assert f'id="{name}"' in text
