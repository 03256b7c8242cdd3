"""OpenAI's `/v1/embeddings` and `/v1/models`, with images as vLLM and others take them; docs/serve.md says what for."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import numpy as np

from invariclip.errors import InputError
from invariclip.records import to_record
from invariclip.serve.answers import COMPONENT, require_embedded, sliced_json, vectors_json
from invariclip.serve.exchange import unless_gone
from invariclip.serve.guard import KEY, as_json
from invariclip.serve.limits import RefusedError
from invariclip.serve.requests import Embed, checked_texts, decoded_image, from_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from starlette.requests import Request
    from starlette.responses import Response

    from invariclip.serve.bodies import Content
    from invariclip.serve.exchange import Embedded, Exchange
    from invariclip.serve.limits import Limits
    from invariclip.serve.service import EncodedImage, Service

EncodingFormat = Literal["float", "base64"]
_BASE64_COMPONENT = 6  # bytes of a float32 in base64, at most
_AS_BASE64 = ", or set encoding_format to base64"
_DATA_URL = re.compile(r"data:([a-z0-9.+-]+/[a-z0-9.+-]+)?(;[^,;]{1,80}){0,8},", re.IGNORECASE)
_WEB_URL = re.compile(r"https?://\S+", re.IGNORECASE)


@dataclass(frozen=True)
class ImageUrl:
    """Where an image is: `data:image/...;base64,...`. `detail` has no effect but on models with several sizes."""

    url: str
    detail: Literal["auto"] = "auto"


@dataclass(frozen=True)
class ContentPart:
    """A part of a message: a text, or an image."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None


@dataclass(frozen=True)
class EmbeddedMessage:
    """A message whose only part is embedded."""

    content: str | list[ContentPart]
    role: Literal["user"] = "user"


@dataclass(frozen=True)
class EmbeddingsRequest:
    """A question to `/v1/embeddings`.

    Attributes:
        model: The name of the model that answers.
        input: Texts, or images as data URLs.
        messages: In its place, one text or one image.
        encoding_format: How vectors are written.
        dimensions: Their width, which cannot be chosen.
        user: Taken, not used, and warned about.
        site: The site that images are from; "" for none, None for the server's.
    """

    model: str
    input: str | Annotated[list[str], msgspec.Meta(min_length=1)] | None = None
    messages: Annotated[list[EmbeddedMessage], msgspec.Meta(min_length=1)] | None = None
    encoding_format: EncodingFormat = "float"
    dimensions: Annotated[int, msgspec.Meta(ge=1)] | None = None
    user: str | None = None
    site: str | None = None


FIELDS = tuple(field.name for field in fields(EmbeddingsRequest))


@dataclass(frozen=True)
class AskedEmbeddings(Embed):
    """What is to be embedded, and how it is answered.

    Attributes:
        encoding_format: How vectors are written.
        dimensions: The width that was asked for.
        warnings: What of the request has no effect.
    """

    encoding_format: EncodingFormat
    dimensions: int | None
    warnings: tuple[str, ...]


def read_embeddings_request(content: Content, limits: Limits) -> AskedEmbeddings:
    """Reads a question to `/v1/embeddings`.

    Raises:
        InputError: A field is unknown or of another type, or images and texts are mixed.
        RefusedError: There is too much of something, or the body is no JSON.
    """
    kind = content.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RefusedError(415, f"a body of type {kind[:60]!r} is not taken; available: application/json")
    plain = from_json(content.data, limits)
    strange = sorted(set(plain) - set(FIELDS))
    if strange:
        raise InputError(f"no field is called {strange[0]!r:.60}; available: {', '.join(FIELDS)}")
    _refuse_tokens(plain.get("input"))
    _plain_urls(plain.get("messages"))
    asked = to_record(EmbeddingsRequest, plain, "the body")
    if (asked.input is None) == (asked.messages is None):
        raise InputError("give either input or messages")
    warnings = [] if asked.user is None else ["the field user has no effect here"]
    items = _listed(asked.input) if asked.input is not None else [_only_part(asked.messages or [])]
    images = sum(isinstance(item, _DataUrl) for item in items)
    if 0 < images < len(items):
        raise InputError(
            f"input holds texts and images ({images} of {len(items)}); CLIP embeds each by a tower of its own: send "
            "them in two requests"
        )
    if images:
        limits.require(images, "images", limits.images)
        decoded = tuple(_image(place, str(url)) for place, url in enumerate(items))
        return _asked(asked, decoded, (), warnings)
    texts = checked_texts(items, "input", limits, limits.texts)
    warnings.extend(
        f"input {place} was embedded as a text: the server fetches no images; send an image as a data URL"
        for place, text in enumerate(texts)
        if _WEB_URL.fullmatch(text)
    )
    if asked.site:
        raise InputError("a site changes images' embeddings alone; leave the field site out for texts")
    return _asked(asked, (), texts, warnings)


def _asked(
    asked: EmbeddingsRequest, images: tuple[EncodedImage, ...], texts: tuple[str, ...], warnings: list[str]
) -> AskedEmbeddings:
    return AskedEmbeddings(
        images, texts, asked.site, asked.encoding_format, asked.dimensions, tuple(warnings), model=asked.model
    )


class _DataUrl(str):
    """A text that is an image."""

    __slots__ = ()


def _listed(given: str | list[str]) -> list[str]:
    items = [given] if isinstance(given, str) else given
    return [_DataUrl(item) if _DATA_URL.match(item) else item for item in items]


def _only_part(messages: list[EmbeddedMessage]) -> str:
    """The one text or image of a conversation; empty texts beside an image are none."""
    found: list[str] = []
    for message in messages:
        parts = [ContentPart("text", message.content)] if isinstance(message.content, str) else message.content
        found.extend(_part(part) for part in parts)
    images = [one for one in found if isinstance(one, _DataUrl)]
    if images:
        found = [one for one in found if one]
    if len(found) != 1:
        raise InputError(
            f"messages hold {len(images)} images and {len(found) - len(images)} texts; CLIP embeds one image or one "
            "text: send one for each request, or several in the field input"
        )
    return found[0]


def _part(part: ContentPart) -> str:
    if part.type == "text":
        if part.text is None or part.image_url is not None:
            raise InputError('a part of type text has the field text, such as {"type": "text", "text": "a cat"}')
        return part.text
    if part.image_url is None or part.text is not None:
        raise InputError('a part of type image_url has the field image_url, such as {"url": "data:image/png;base64,…"}')
    url = part.image_url.url
    if not _DATA_URL.match(url):
        raise InputError(
            f"image_url {url!r:.60} is not a data URL, and the server fetches nothing; send "
            "data:image/png;base64,… with the image itself"
        )
    return _DataUrl(url)


def _image(place: int, url: str) -> EncodedImage:
    head, _, data = url.partition(",")
    if not head.lower().startswith("data:image/") or not head.lower().endswith(";base64"):
        raise InputError(f"image {place}: {head!r:.60} must be data:image/…;base64")
    return decoded_image(place, str(place), data)


def _plain_urls(messages: Any) -> None:
    """Puts images that are given by their URL alone, as vLLM also takes them, into the form of OpenAI."""
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and isinstance(part.get("image_url"), str):
                part["image_url"] = {"url": part["image_url"]}


def _refuse_tokens(given: Any) -> None:
    first = given[0] if isinstance(given, list) and given else None
    if isinstance(first, (int, list)) and not isinstance(first, bool):
        raise InputError("input holds token ids, which are not taken; send the texts themselves")


class OpenAi:
    """The endpoints that OpenAI's clients ask."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange, self._models = exchange, exchange.models

    async def models(self, _request: Request) -> Response:
        """What there is to say of all models."""
        return as_json({"object": "list", "data": [_facts(one.service) for one in self._models.loaded]})

    async def model(self, request: Request) -> Response:
        """What there is to say of a model."""
        return as_json(_facts(self._models.find(request.path_params["name"]).service))

    async def embeddings(self, request: Request) -> Response:
        """Texts or images to embeddings."""
        exchange = self._exchange
        asking = exchange.asked(request, exchange.content, read_embeddings_request, lambda asked: asked.model)
        async with asking as (asked, service, deadline):
            return await unless_gone(request, self._embedded(service, asked, request.scope.get(KEY, 0), deadline))

    async def _embedded(self, service: Service, asked: AskedEmbeddings, owner: int, deadline: float) -> Response:
        width, limit = service.model.width, service.limits.answer
        if asked.dimensions not in (None, width):
            raise InputError(
                f"dimensions {asked.dimensions} cannot be had: the axes of an embedding are not ordered, so a part of "
                f"them means little; leave it out, or set it to {width}"
            )
        rows = len(asked.texts or asked.images)
        if asked.encoding_format == "base64":
            require_embedded(rows, width, limit, component=_BASE64_COMPONENT, remedy="")
        else:
            require_embedded(rows, width, limit, component=COMPONENT, remedy=_AS_BASE64)
        embedded = await self._exchange.embedded(service, asked, owner, deadline)
        tokens = 0
        if asked.texts:
            tokens = sum(await self._exchange.aside(service.model.count_tokens, asked.texts))
        return await self._exchange.answer(
            lambda: self._written(service, asked, embedded, tokens), embedded.vectors.size
        )

    def _written(self, service: Service, asked: AskedEmbeddings, embedded: Embedded, tokens: int) -> bytes:
        vectors = (
            _base64_json(embedded.vectors) if asked.encoding_format == "base64" else vectors_json(embedded.vectors)
        )
        data = (
            b'{"object": "embedding", "index": %d, "embedding": %s}' % (index, vector)
            for index, vector in enumerate(vectors)
        )
        return sliced_json({
            "object": "list", "data": data, "model": service.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens}, "space_id": service.model.space_id,
            "warnings": [*asked.warnings, *embedded.warnings], **self._exchange.said(service, embedded.site),
        })  # fmt: skip


def _facts(service: Service) -> dict[str, Any]:
    model = service.model
    return {
        "id": service.name, "object": "model", "created": service.created, "owned_by": "invariclip",
        "root": model.manifest.model.name, "space_id": model.space_id, "width": model.width,
    }  # fmt: skip


def _base64_json(vectors: NDArray[np.float32]) -> Iterator[bytes]:
    """Rows [N, d] as strings in JSON, of little-endian float32 in base64."""
    return (b'"%s"' % base64.b64encode(row.astype("<f4").tobytes()) for row in vectors)
