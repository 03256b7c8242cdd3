"""The Open Inference Protocol v2 over HTTP: tensors in JSON, or behind it as binary data (docs/serve.md)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np
from starlette.routing import Route

from invariclip.errors import InputError
from invariclip.records import to_record
from invariclip.serve.answers import sliced_json
from invariclip.serve.exchange import JSON, unless_gone
from invariclip.serve.guard import KEY, as_json
from invariclip.serve.inference import (
    VERSION,
    InputTensor,
    found_model,
    infer,
    model_metadata,
    raw_values,
    read_question,
    server_metadata,
)
from invariclip.serve.limits import BadRequestError, RefusedError
from invariclip.serve.requests import from_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray
    from starlette.requests import Request
    from starlette.responses import Response

    from invariclip.serve.bodies import Content
    from invariclip.serve.exchange import Exchange
    from invariclip.serve.inference import InferenceAnswer, InferenceQuestion
    from invariclip.serve.limits import Limits
    from invariclip.serve.models import ServedModel
    from invariclip.serve.service import EncodedImage, Service
    from invariclip.serve.tensors import OutputTensor

HEADER_LENGTH = "inference-header-content-length"
"""The header that says how long the JSON is where binary data is behind it."""
JSON_NUMBERS = 1 << 19
"""Numbers of pixels that a body may hold in JSON: three images of 224 x 224."""
BINARY = "application/octet-stream"
_ROW = 1 << 12  # numbers that are written in JSON at a time
Size = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True)
class InferInputParameters:
    """Of an input: how many bytes of binary data it has, or what the texts of its JSON stand for."""

    binary_data_size: Size | None = None
    content_type: str | None = None


@dataclass(frozen=True)
class InferInput:
    """An input; its values are in `data`, or behind the JSON."""

    name: str
    shape: list[Size]
    datatype: str
    parameters: InferInputParameters = InferInputParameters()
    data: list[Any] | None = None


@dataclass(frozen=True)
class InferOutputParameters:
    """Of an output: whether it is answered as binary data."""

    binary_data: bool | None = None


@dataclass(frozen=True)
class InferOutput:
    """An output that is asked for."""

    name: str
    parameters: InferOutputParameters = InferOutputParameters()


@dataclass(frozen=True)
class InferParameters:
    """Of a request: whether outputs are binary data unless they say otherwise, and the images' site."""

    binary_data_output: bool = False
    site: str | None = None


@dataclass(frozen=True)
class InferRequest:
    """The JSON of a request."""

    inputs: list[InferInput]
    outputs: list[InferOutput] | None = None
    id: str = ""
    parameters: InferParameters = InferParameters()


FIELDS = tuple(field.name for field in fields(InferRequest))


@dataclass(frozen=True)
class AskedInference:
    """A question, and which of its outputs are answered as binary data."""

    question: InferenceQuestion
    binary: Callable[[str], bool]

    @property
    def images(self) -> tuple[EncodedImage, ...]:
        """The images that it brings."""
        return self.question.images


def read_infer_request(content: Content, limits: Limits) -> AskedInference:
    """Understands a body.

    Raises:
        InputError: A field or tensor is unknown, or not what it says.
        RefusedError: There is too much of something, or the body is not JSON with binary data behind it.
    """
    head, binary = _parts(content)
    plain = from_json(content.data if not binary else bytes(head), limits, JSON_NUMBERS)
    strange = sorted(set(plain) - set(FIELDS))
    if strange:
        raise InputError(f"no field is called {strange[0]!r:.60}; available: {', '.join(FIELDS)}")
    data = _taken_out(plain.get("inputs"))
    asked = to_record(InferRequest, plain, "the body")
    inputs = _tensors([replace(one, data=data.get(place)) for place, one in enumerate(asked.inputs)], binary)
    outputs = None if asked.outputs is None else [output.name for output in asked.outputs]
    question = read_question(inputs, outputs, asked.parameters.site, asked.id, limits)
    said = {output.name: output.parameters.binary_data for output in asked.outputs or ()}

    def as_binary(name: str) -> bool:
        own = said.get(name)
        return asked.parameters.binary_data_output if own is None else own

    return AskedInference(question, as_binary)


def _parts(content: Content) -> tuple[memoryview, memoryview]:
    """The JSON, and the binary data behind it."""
    body, length = memoryview(content.data), content.headers.get(HEADER_LENGTH)
    kind = content.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("", JSON, BINARY):
        raise RefusedError(415, f"a body of type {kind[:60]!r} is not taken; available: {JSON}, {BINARY}")
    if length is None:
        return body, memoryview(b"")
    if not (length.isascii() and length.isdecimal()) or len(length) > 20 or int(length) > len(body):
        raise BadRequestError(
            f"{HEADER_LENGTH} is {length[:30]!r}; it must be the length of the JSON, up to that of the body, "
            f"{len(body):,} bytes"
        )
    return body[: int(length)], body[int(length) :]


def _taken_out(inputs: Any) -> dict[int, list[Any]]:
    """The values of inputs, which a tensor's own reader holds against its shape."""
    found: dict[int, list[Any]] = {}
    for place, one in enumerate(inputs if isinstance(inputs, list) else ()):
        if isinstance(one, dict) and isinstance(one.get("data"), list):
            found[place] = one.pop("data")
    return found


def _tensors(inputs: Sequence[InferInput], binary: memoryview) -> list[InputTensor]:
    """Inputs with their share of the binary data.

    Raises:
        InputError: Not all of it is theirs, or there is less.
    """
    place, found = 0, []
    for one in inputs:
        size = one.parameters.binary_data_size
        if (size is None) == (one.data is None):
            raise InputError(
                f"the input {one.name[:60]} has its values either in data or, with the parameter binary_data_size, "
                "behind the JSON"
            )
        raw = None if size is None else binary[place : place + size]
        place += size or 0
        found.append(InputTensor(one.name, one.datatype, tuple(one.shape), raw, one.data, one.parameters.content_type))
    if place != len(binary):
        raise InputError(f"the inputs have {place:,} bytes of binary data, and the body has {len(binary):,}")
    return found


class InferenceHttp:
    """The endpoints of the protocol."""

    def __init__(self, exchange: Exchange, ready: Callable[[], bool]) -> None:
        self._exchange, self._ready = exchange, ready

    def routes(self) -> list[Route]:
        """All of them."""
        both = ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")
        return [
            Route("/v2", self.server),
            Route("/v2/health/live", self.live),
            Route("/v2/health/ready", self.server_ready),
            *(Route(path, self.model) for path in both),
            *(Route(f"{path}/ready", self.model_ready) for path in both),
            *(Route(f"{path}/infer", self.infer, methods=["POST"]) for path in both),
        ]

    async def server(self, _request: Request) -> Response:
        """What the server is."""
        return as_json(server_metadata())

    async def live(self, _request: Request) -> Response:
        """Alive."""
        return as_json({"live": True})

    async def server_ready(self, _request: Request) -> Response:
        """Warm and taking work."""
        self._require_ready()
        return as_json({"ready": True})

    async def model(self, request: Request) -> Response:
        """What the model takes and gives."""
        return as_json(model_metadata(self._found(request).service))

    async def model_ready(self, request: Request) -> Response:
        """Whether the model takes work."""
        found = self._found(request)
        self._require_ready()
        return as_json({"name": found.service.name, "ready": True})

    async def infer(self, request: Request) -> Response:
        """Images or texts to embeddings and class scores."""
        name, exchange = self._found(request).service.name, self._exchange
        asking = exchange.asked(request, exchange.content, read_infer_request, lambda _: name)
        async with asking as (asked, service, deadline):
            return await unless_gone(request, self._inferred(service, asked, request.scope.get(KEY, 0), deadline))

    async def _inferred(self, service: Service, asked: AskedInference, owner: int, deadline: float) -> Response:
        answer = await infer(self._exchange, service, asked.question, owner, deadline, asked.binary)
        numbers = sum(len(one.values) if isinstance(one.values, list) else one.values.size for one in answer.outputs)
        length = 0

        def written() -> bytes:
            nonlocal length
            head, tail = _written(service.name, answer, asked)
            length = len(head)
            return head + tail

        content = await self._exchange.content_of(written, numbers)
        if length == len(content):
            return self._exchange.sending(content, numbers, JSON)
        return self._exchange.sending(content, numbers, BINARY, {HEADER_LENGTH: str(length)})

    def _found(self, request: Request) -> ServedModel:
        return found_model(self._exchange.models, request.path_params["name"], request.path_params.get("version", ""))

    def _require_ready(self) -> None:
        if not self._ready():
            raise RefusedError(503, "warming up; ask again", {"retry-after": "1"})


def _written(name: str, answer: InferenceAnswer, asked: AskedInference) -> tuple[bytes, bytes]:
    """The JSON, and what is behind it."""
    outputs, behind = [], []
    for one in answer.outputs:
        facts = {"name": one.name, "datatype": one.datatype, "shape": list(one.shape)}
        if asked.binary(one.name):
            behind.append(raw_values(one))
            outputs.append(sliced_json({**facts, "parameters": {"binary_data_size": len(behind[-1])}}))
        else:
            outputs.append(sliced_json({**facts, "data": _json_values(one)}))
    named = {"id": asked.question.id} if asked.question.id else {}
    head = sliced_json({
        "model_name": name, "model_version": VERSION, **named, "parameters": answer.parameters,
        "outputs": iter(outputs),
    })  # fmt: skip
    return head, b"".join(behind)


def _json_values(output: OutputTensor) -> bytes:
    """All values in one list, row by row."""
    values = output.values
    if isinstance(values, list):
        return msgspec.json.encode([value.decode() for value in values])
    if not np.isfinite(values).all():
        raise ValueError(f"the output {output.name} is not finite")
    return b"[" + b", ".join(_slices(values.ravel())) + b"]"


def _slices(flat: NDArray[np.float32]) -> Iterator[bytes]:
    for start in range(0, len(flat), _ROW):
        yield msgspec.json.encode(flat[start : start + _ROW].tolist())[1:-1]
