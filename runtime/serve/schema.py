"""What can be asked and what is answered, as an OpenAPI document and a page of it, from one table of operations."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from invariclip.serve.answer_models import (
    REF,
    ClassifyAnswer,
    EmbedAnswer,
    EmbeddingsAnswer,
    ErrorAnswer,
    FailedPrediction,
    ImagePrediction,
    InferAnswer,
    LiveAnswer,
    ModelMetadata,
    ModelReadyAnswer,
    OpenAiErrorAnswer,
    OpenAiModel,
    OpenAiModels,
    ReadyAnswer,
    ServerMetadata,
    SitesAnswer,
    StatusAnswer,
)
from invariclip.serve.guard import OPEN, REPOSITORY
from invariclip.serve.inference_http import HEADER_LENGTH, InferRequest
from invariclip.serve.openai_api import EmbeddingsRequest
from invariclip.serve.repository import ListedModel, LoadedModel
from invariclip.serve.repository_http import (
    RepositoryIndexRequest,
    RepositoryLoadRequest,
    RepositoryUnloadRequest,
    UnloadedModel,
)
from invariclip.serve.requests import ClassifyFields, EmbedFields
from invariclip.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator

    from invariclip.serve.limits import Limits

DOCUMENT, PAGE = "/openapi.json", "/docs"
JSON, BINARY, FORM = "application/json", "application/octet-stream", "multipart/form-data"
_BYTES = {"type": "string", "format": "binary"}


@dataclass(frozen=True)
class Operation:
    """What can be asked at one path by one method.

    Attributes:
        method: HTTP's, in lower case.
        path: With names in braces.
        summary: What it does.
        answer: By content type: a dataclass, or a schema as it is.
        body: Likewise, of the request.
        query: Fields that a query may hold as well.
        headers: Headers of a request, and what they say.
        refused: Statuses besides those that every operation has.
    """

    method: Literal["get", "post"]
    path: str
    summary: str
    answer: dict[str, Any]
    body: dict[str, Any] = field(default_factory=dict)
    query: tuple[str, ...] = ()
    headers: dict[str, str] = field(default_factory=dict)
    refused: tuple[int, ...] = ()


_TEXT = {"text/plain": {"type": "string"}}
_OBJECT = {JSON: {"type": "object"}}
_WORK = (400, 408, 413, 415, 422, 503, 504)
"""Statuses of what the engine answers."""
_ADMIN = (400, 408, 413, 415, 422, 503)
_LISTED = {"type": "array", "items": {"$ref": REF.format(name=ListedModel.__name__)}}
_NAMED = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"
STATUSES = {
    400: "The body cannot be taken apart.", 401: "A key is demanded, and the request has none of the server's.",
    403: "The request is of a page, or has a key, that may not ask.", 404: "There is nothing of this name.",
    408: "The body did not come in.", 413: "There is more of something than may be.",
    415: "The body is of another type.", 421: "The server is not called so.",
    422: "A field, image or text cannot be used.", 429: "The key has its share of sites.",
    500: "The server failed.", 503: "There is no room or no time for it now; retry-after says when to ask again.",
    504: "There was no answer in time.",
}  # fmt: skip
OPERATIONS = (
    Operation("post", "/v1/classify", "Images to their best classes", {JSON: ClassifyAnswer},
              {JSON: ClassifyFields, FORM: ClassifyFields, BINARY: _BYTES},
              ("classes", "templates", "abstain_above", "uncertainty", "top", "site", "partial", "model"),
              refused=(*_WORK, 404, 429)),
    Operation("post", "/v1/embed", "Images or texts to embeddings", {JSON: EmbedAnswer, BINARY: _BYTES},
              {JSON: EmbedFields, FORM: EmbedFields, BINARY: _BYTES}, ("site", "partial", "model"),
              refused=(*_WORK, 404, 429)),
    Operation("get", "/v1/model", "What the artifact is", _OBJECT, query=("model",), refused=(404, 422)),
    Operation("get", "/v1/sites", "The sites that the API key may name", {JSON: SitesAnswer}, query=("model",),
              refused=(404, 422)),
    Operation("get", "/v1/sites/{name}", "A site, as facts or as its file", {**_OBJECT, BINARY: _BYTES},
              query=("model",), refused=(404, 422)),
    Operation("post", "/v1/sites/{name}/{event}", "Freezes, thaws or resets a site that is measured", _OBJECT,
              query=("model",), refused=(404, 422)),
    Operation("post", "/v1/embeddings", "OpenAI: texts or images to embeddings", {JSON: EmbeddingsAnswer},
              {JSON: EmbeddingsRequest}, refused=(*_WORK, 404, 429)),
    Operation("get", "/v1/models", "OpenAI: the models that are loaded", {JSON: OpenAiModels}),
    Operation("get", "/v1/models/{name}", "OpenAI: the model", {JSON: OpenAiModel}, refused=(404,)),
    Operation("get", "/v2", "Open Inference Protocol: the server", {JSON: ServerMetadata}),
    Operation("get", "/v2/health/live", "Open Inference Protocol: alive", {JSON: LiveAnswer}),
    Operation("get", "/v2/health/ready", "Open Inference Protocol: warm", {JSON: ReadyAnswer}, refused=(503,)),
    *(Operation("get", path, "Open Inference Protocol: the model's inputs and outputs", {JSON: ModelMetadata},
                refused=(404,)) for path in _NAMED),
    *(Operation("get", f"{path}/ready", "Open Inference Protocol: the model takes work", {JSON: ModelReadyAnswer},
                refused=(404, 503)) for path in _NAMED),
    *(Operation("post", f"{path}/infer", "Open Inference Protocol: images or texts to tensors",
                {JSON: InferAnswer, BINARY: _BYTES}, {JSON: InferRequest, BINARY: _BYTES},
                headers={HEADER_LENGTH: "How long the JSON is that binary data is behind."}, refused=(*_WORK, 404, 429))
      for path in _NAMED),
    Operation("post", f"{REPOSITORY}/index", "Model repository: what is loaded, and what could be", {JSON: _LISTED},
              {JSON: RepositoryIndexRequest}, refused=_ADMIN),
    Operation("post", f"{REPOSITORY}/models/{{name}}/load", "Model repository: loads an artifact, or loads it again",
              {JSON: LoadedModel}, {JSON: RepositoryLoadRequest}, refused=(*_ADMIN, 404)),
    Operation("post", f"{REPOSITORY}/models/{{name}}/unload", "Model repository: unloads a model",
              {JSON: UnloadedModel}, {JSON: RepositoryUnloadRequest}, refused=(*_ADMIN, 404)),
    Operation("get", "/healthz", "Alive", {JSON: StatusAnswer}),
    Operation("get", "/readyz", "Warm and taking work", {JSON: StatusAnswer}, refused=(503,)),
    Operation("get", "/metrics", "Prometheus", _TEXT),
    Operation("get", "/", "A page to drop an image on", {"text/html": {"type": "string"}}),
    Operation("get", DOCUMENT, "This document", _OBJECT),
    Operation("get", PAGE, "This document as a page", {"text/html": {"type": "string"}}),
)  # fmt: skip
"""Everything that can be asked; a test holds it against the application's routes."""
_MODELS: tuple[type[Any], ...] = tuple(dict.fromkeys(
    one for operation in OPERATIONS for one in (*operation.answer.values(), *operation.body.values())
    if isinstance(one, type)
))  # fmt: skip


def document(limits: Limits, *, keys: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document.

    Args:
        limits: Of the server; they are the bounds of fields.
        keys: Whether the server demands one; the model repository always does.
    """
    _, schemas = msgspec.json.schema_components(
        (*_MODELS, ListedModel, ImagePrediction, FailedPrediction, ErrorAnswer, OpenAiErrorAnswer), ref_template=REF
    )
    for schema in schemas.values():
        if schema.get("type") == "object" and "properties" in schema:
            schema["additionalProperties"] = False
            _tell_attributes(schema)
    for name, what, most in (
        ("ClassifyFields", "images", limits.images), ("ClassifyFields", "classes", limits.classes),
        ("ClassifyFields", "templates", limits.templates), ("EmbedFields", "images", limits.images),
        ("EmbedFields", "texts", limits.texts), ("EmbeddingsRequest", "input", max(limits.texts, limits.images)),
    ):  # fmt: skip
        for choice in schemas[name]["properties"][what]["anyOf"]:
            if choice.get("type") == "array":
                choice.update(minItems=1, maxItems=most)
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation, limits, keys=keys)
    return {
        "openapi": "3.1.0",
        "info": {"title": "invariclip serve", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }},
    }  # fmt: skip


def _tell_attributes(schema: dict[str, Any]) -> None:
    """Moves what a docstring says of attributes to their properties."""
    text, _, attributes = schema.get("description", "").partition("\n\nAttributes:\n")
    schema["description"] = text
    for name, said in re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE):
        schema["properties"][name]["description"] = " ".join(said.split())


def _described(operation: Operation, limits: Limits, *, keys: bool) -> dict[str, Any]:
    error = OpenAiErrorAnswer if operation.path.startswith(("/v1/embeddings", "/v1/models")) else ErrorAnswer
    closed = operation.path.startswith(REPOSITORY) or (keys and operation.path not in OPEN)
    statuses = {403, 421, 500, *operation.refused, *([401] if closed else [])}
    answers: dict[str, Any] = {"200": {"description": "The answer.", "content": _content(operation.answer, limits)}}
    for status in sorted(statuses):
        answers[str(status)] = {"description": STATUSES[status], "content": _content({JSON: error}, limits)}
    parameters = [
        {"name": part[1:-1], "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for part in operation.path.split("/")
        if part.startswith("{")
    ]
    parameters += [{"name": name, "in": "query", "schema": {"type": "string"}} for name in operation.query]
    parameters += [
        {"name": name, "in": "header", "description": text, "schema": {"type": "string", "pattern": "^[0-9]{1,12}$"}}
        for name, text in operation.headers.items()
    ]
    described: dict[str, Any] = {"summary": operation.summary, "parameters": parameters, "responses": answers}
    if operation.body:
        described["requestBody"] = {"required": True, "content": _content(operation.body, limits)}
    if closed:
        described["security"] = [{"bearer": []}, {"key": []}]
    return described


def _content(models: dict[str, Any], limits: Limits) -> dict[str, Any]:
    return {
        kind: {"schema": _form(model, limits) if kind == FORM else _schema(model)} for kind, model in models.items()
    }


def _schema(model: Any) -> dict[str, Any]:
    return {"$ref": REF.format(name=model.__name__)} if isinstance(model, type) else dict(model)


def _form(model: Any, limits: Limits) -> dict[str, Any]:
    """A form's fields: images are files, all else is text."""
    properties = {one.name: {"type": "string"} for one in fields(model)}
    properties["images"] = {"type": "array", "items": _BYTES, "maxItems": limits.images}  # type: ignore[dict-item]
    return {"type": "object", "properties": properties, "additionalProperties": False}


def page(described: dict[str, Any]) -> str:
    """The document as one page of HTML, without script and without anything from elsewhere."""
    parts = [_HEAD]
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(operation['summary'])}.</p>")
            for what, content in (
                ("Body", operation.get("requestBody", {}).get("content", {})),
                ("Answer", operation["responses"]["200"]["content"]),
            ):
                for kind, media in content.items():
                    parts.append(f"<p>{what}, <code>{html.escape(kind)}</code>{_link(media['schema'])}</p>")
            statuses = ", ".join(status for status in operation["responses"] if status != "200")
            parts.append(f"<p>Errors: {statuses}</p>")
    parts.append("<h1>Types</h1>")
    for name, schema in described["components"]["schemas"].items():
        parts.append(f'<h2 id="{name}">{name}</h2><p>{html.escape(schema.get("description", ""))}</p>')
        rows = "".join(_row(name, one, schema) for name, one in schema.get("properties", {}).items())
        parts.append(f"<table><tr><th>field<th>type<th>required<th>{rows}</table>")
    return "\n".join([*parts, "</main>"])


def _row(name: str, schema: dict[str, Any], owner: dict[str, Any]) -> str:
    needed = "yes" if name in owner.get("required", ()) else ""
    text = html.escape(schema.get("description", ""))
    return f"<tr><td><code>{name}</code><td>{' or '.join(_types(schema))}<td>{needed}<td>{text}"


def _link(schema: dict[str, Any]) -> str:
    return f": {' or '.join(_types(schema))}"


def _types(schema: dict[str, Any]) -> Iterator[str]:
    """What a value may be, in HTML."""
    if "$ref" in schema:
        name = html.escape(schema["$ref"].rpartition("/")[2])
        yield f'<a href="#{name}">{name}</a>'
    elif "anyOf" in schema:
        for one in schema["anyOf"]:
            yield from _types(one)
    elif "enum" in schema:
        yield ", ".join(html.escape(repr(one)) for one in schema["enum"])
    elif schema.get("type") == "array":
        bounds = f", {schema.get('minItems', 0)} to {schema['maxItems']:,}" if "maxItems" in schema else ""
        yield f"list of ({' or '.join(_types(schema['items'])) if schema.get('items') else 'any'}{bounds})"
    else:
        bounds = "".join(
            f" {sign} {schema[key]}" for key, sign in (("minimum", "≥"), ("maximum", "≤")) if key in schema
        )
        yield f"{html.escape(str(schema.get('format', schema.get('type', 'any'))))}{bounds}"


_HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>invariclip serve: what can be asked</title><link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; }
body { margin: 0; padding: 2rem 1rem; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; overflow-wrap: anywhere; }
h2 { margin: 2rem 0 .25rem; font-size: 1.05rem; } p { margin: .15rem 0; }
table { width: 100%; border-collapse: collapse; }
th, td {
  padding: .25rem .5rem .25rem 0; text-align: left; vertical-align: top;
}
tr + tr { border-top: 1px solid color-mix(in srgb, currentcolor 20%, transparent); }
</style>
<main><h1>What can be asked</h1><p>As a document: <a href="openapi.json">openapi.json</a></p>"""
