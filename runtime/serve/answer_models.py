"""What is answered, as types of JSON: the OpenAPI document is made from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

REF = "#/components/schemas/{name}"
"""How the document names one of them."""


@dataclass(frozen=True)
class ErrorAnswer:
    """What went wrong, in one line."""

    error: str


@dataclass(frozen=True)
class OpenAiErrorFacts:
    """What went wrong, as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None
    code: str | None


@dataclass(frozen=True)
class OpenAiErrorAnswer:
    """An error of OpenAI's routes."""

    error: OpenAiErrorFacts


@dataclass(frozen=True)
class StatusAnswer:
    """Whether the server is alive, or ready."""

    status: Literal["alive", "ready"]


@dataclass(frozen=True)
class AppliedSite:
    """The site whose shift an answer has lost."""

    name: str
    sha256: str
    images: int


@dataclass(frozen=True)
class ClassScore:
    """A class and its probability."""

    label: str
    probability: float


@dataclass(frozen=True)
class ImagePrediction:
    """The best classes of an image; the label is null where the model abstains."""

    image: str
    label: str | None
    probability: float
    ranking: list[ClassScore]
    uncertainty: float | None
    uncertainty_kind: Literal["evidence", "energy"] | None
    abstained: bool


@dataclass(frozen=True)
class FailedPrediction:
    """In the place of an image's prediction, with `partial`: why it could not be read."""

    image: str
    error: str


_PREDICTION = msgspec.Meta(extra_json_schema={
    "anyOf": [{"$ref": REF.format(name=model.__name__)} for model in (ImagePrediction, FailedPrediction)]
})  # fmt: skip
"""Said so, as msgspec knows no union of two dataclasses."""


@dataclass(frozen=True)
class ClassifyAnswer:
    """Predictions in the order of the images; `site` is there where requests may have one."""

    space_id: str
    predictions: list[Annotated[Any, _PREDICTION]]
    warnings: list[str]
    site: AppliedSite | None = None


@dataclass(frozen=True)
class FailedItem:
    """An image without an embedding."""

    index: int
    image: str
    error: str


@dataclass(frozen=True)
class EmbedAnswer:
    """Embeddings of the items, in their order; `site` is there where requests may have one.

    With `partial` an embedding may be null, and `errors` says why.
    """

    space_id: str
    width: int
    items: list[str]
    embeddings: list[list[float] | None]
    warnings: list[str]
    site: AppliedSite | None = None
    errors: list[FailedItem] | None = None


@dataclass(frozen=True)
class SitesAnswer:
    """The sites that the API key may name."""

    sites: list[Any]
    adapting: bool
    share: int


@dataclass(frozen=True)
class OpenAiModel:
    """The model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    space_id: str
    width: int


@dataclass(frozen=True)
class OpenAiModels:
    """The list of the one model."""

    object: Literal["list"]
    data: list[OpenAiModel]


@dataclass(frozen=True)
class EmbeddingItem:
    """An embedding: numbers, or little-endian float32 in base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


@dataclass(frozen=True)
class TokenUsage:
    """Tokens that the text tower read."""

    prompt_tokens: int
    total_tokens: int


@dataclass(frozen=True)
class EmbeddingsAnswer:
    """Embeddings in the order of the input."""

    object: Literal["list"]
    data: list[EmbeddingItem]
    model: str
    usage: TokenUsage
    space_id: str
    warnings: list[str]
    site: AppliedSite | None = None


@dataclass(frozen=True)
class TensorMetadata:
    """A tensor: -1 is any size."""

    name: str
    datatype: str
    shape: list[int]


@dataclass(frozen=True)
class ServerMetadata:
    """What the server is."""

    name: str
    version: str
    extensions: list[str]


@dataclass(frozen=True)
class ModelMetadata:
    """What the model takes and gives."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


@dataclass(frozen=True)
class LiveAnswer:
    """The server is alive."""

    live: bool


@dataclass(frozen=True)
class ReadyAnswer:
    """The server takes work."""

    ready: bool


@dataclass(frozen=True)
class ModelReadyAnswer:
    """The model takes work."""

    name: str
    ready: bool


@dataclass(frozen=True)
class BinaryDataSize:
    """How many bytes of the binary data are an output's."""

    binary_data_size: int


@dataclass(frozen=True)
class InferOutputAnswer:
    """An output, row by row in `data`, or behind the JSON."""

    name: str
    datatype: str
    shape: list[int]
    data: list[Any] | None = None
    parameters: BinaryDataSize | None = None


@dataclass(frozen=True)
class InferAnswer:
    """Outputs in the order that was asked for."""

    model_name: str
    model_version: str
    outputs: list[InferOutputAnswer]
    parameters: dict[str, str]
    id: str | None = None
