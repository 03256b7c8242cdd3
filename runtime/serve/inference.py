"""The Open Inference Protocol v2 without its transport: tensors to a question, an answer to tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from invariclip.errors import InputError
from invariclip.serve.answers import COMPONENT, INLINE
from invariclip.serve.exchange import answered, without_shift
from invariclip.serve.limits import RefusedError
from invariclip.serve.requests import checked_texts, decoded_image
from invariclip.serve.service import EncodedImage, ImageScores
from invariclip.serve.tensors import (
    BYTES,
    CLASS_OUTPUTS,
    EMBEDDING,
    FP32,
    INPUTS,
    OUTPUTS,
    OutputTensor,
    available_outputs,
    image_output,
    number_output,
)
from invariclip.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from invariclip.host_head import HostHead
    from invariclip.serve.exchange import Exchange
    from invariclip.serve.limits import Limits
    from invariclip.serve.models import ServedModel, ServedModels
    from invariclip.serve.service import Service

VERSION = "1"
"""Of every model, also when it is loaded again: `space_id` tells what answered."""
BASE64 = "base64"
_FLOAT, _CHARACTER = 4, 6  # bytes of a float32, and of a character in JSON, at most
_SIZE = 4  # bytes before each element of a BYTES tensor, which say how long it is


@dataclass(frozen=True)
class InputTensor:
    """An input as it came.

    Attributes:
        name: One of `INPUTS`.
        datatype: The protocol's name of it.
        shape: Row by row.
        raw: Its bytes: numbers little-endian; before each element of BYTES its size in four bytes.
        data: In their place, JSON's values or a transport's own lists, nested or flat.
        content_type: `base64` where texts in `data` stand for bytes.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: memoryview | None = None
    data: list[Any] | None = None
    content_type: str | None = None


class InferenceQuestion(NamedTuple):
    """What a request asks: images or texts, with `site` as in `Classify`, and which outputs; None for all."""

    images: tuple[EncodedImage, ...]
    texts: tuple[str, ...]
    site: str | None
    outputs: tuple[str, ...] | None
    id: str


class InferenceAnswer(NamedTuple):
    """Outputs in the order that was asked for, and what is said beside them."""

    outputs: list[OutputTensor]
    parameters: dict[str, str]


def server_metadata() -> dict[str, Any]:
    """What the server is."""
    extensions = ["binary_tensor_data", "model_repository"]
    return {"name": "invariclip", "version": __version__, "extensions": extensions}


def model_metadata(service: Service) -> dict[str, Any]:
    """What the model takes and gives."""
    model = service.model
    widths = {EMBEDDING: model.width, "logits": len(model.classes), "probabilities": len(model.classes)}
    return {
        "name": service.name,
        "versions": [VERSION],
        "platform": f"invariclip_{model.backend}",
        "inputs": [
            {"name": name, "datatype": datatype, "shape": list(shape)} for name, (datatype, shape) in INPUTS.items()
        ],
        "outputs": [
            {"name": name, "datatype": FP32, "shape": [-1, widths[name]]}
            if name in widths
            else {"name": name, "datatype": BYTES, "shape": [-1]}
            for name in available_outputs(service.model.classes, of_texts=False)
        ],
    }


def found_model(models: ServedModels, name: str, version: str) -> ServedModel:
    """The model that a request names.

    Args:
        models: Who answers.
        name: The model's.
        version: Its version; "" for any.

    Raises:
        RefusedError: There is none.
    """
    found = models.find(name)
    if version not in ("", VERSION):
        raise RefusedError(404, f"the model {name} has no version {version!r:.60}; available: {VERSION}")
    return found


def read_question(
    inputs: Sequence[InputTensor], outputs: Sequence[str] | None, site: str | None, name: str, limits: Limits
) -> InferenceQuestion:
    """Understands a request's tensors.

    Args:
        inputs: The one input.
        outputs: Names of outputs; None for all.
        site: The site that the images are from.
        name: The request's id.
        limits: What it may bring.

    Raises:
        InputError: A tensor is unknown, or not what its shape and datatype say.
        RefusedError: There is too much of something.
    """
    limits.require(len(name), "characters in an id", limits.characters)
    if len(inputs) != 1:
        names = ", ".join(sorted({one.name[:60] for one in inputs[:10]})) or "none"
        raise InputError(f"give one of the inputs {', '.join(INPUTS)}, not {len(inputs)} ({names})")
    [given] = inputs
    _require_tensor(given)
    if outputs is not None:
        _require_outputs(outputs)
    wanted = None if outputs is None else tuple(outputs)
    if given.name == "texts":
        if site:
            raise InputError("a site changes images' embeddings alone; leave the parameter site out for texts")
        limits.require(given.shape[0], "texts", limits.texts)
        texts = checked_texts(_strings(given), "texts", limits, limits.texts)
        return InferenceQuestion((), texts, site, wanted, name)
    limits.require(given.shape[0], "images", limits.images)
    images = _pixels(given) if given.name == "pixels" else _images(given)
    return InferenceQuestion(images, (), site, wanted, name)


def _require_tensor(given: InputTensor) -> None:
    if given.name not in INPUTS:
        raise InputError(f"no input is called {given.name!r:.60}; available: {', '.join(INPUTS)}")
    datatype, shape = INPUTS[given.name]
    if given.datatype != datatype:
        raise InputError(f"the input {given.name} has the datatype {datatype}, not {given.datatype!r:.60}")
    if len(given.shape) != len(shape) or not all(
        size >= 1 and wanted in (-1, size) for size, wanted in zip(given.shape, shape, strict=True)
    ):
        raise InputError(
            f"the input {given.name} has the shape {list(shape)}, each -1 being 1 or more, "
            f"not {list(given.shape)!s:.60}"
        )
    encoded = given.name == "images" and given.data is not None
    if given.content_type is not None and not (encoded and given.content_type == BASE64):
        raise InputError(f"content_type is a parameter of the input images in JSON alone; available: {BASE64}")


def _require_outputs(outputs: Sequence[str]) -> None:
    if not outputs:
        raise InputError(f"outputs is empty; leave it out for all, or name some; available: {', '.join(OUTPUTS)}")
    for place, one in enumerate(outputs):
        if one not in OUTPUTS:
            raise InputError(f"no output is called {one!r:.60}; available: {', '.join(OUTPUTS)}")
        if one in outputs[:place]:
            raise InputError(f"the output {one} is asked for twice; name it once")


def _strings(given: InputTensor) -> list[str]:
    if given.data is not None:
        values = _of_length(given, given.data)
        if all(isinstance(value, str) for value in values):
            return values
        elements = [value for value in values if isinstance(value, bytes)]
        if len(elements) < len(values):
            raise InputError("the input texts holds texts alone")
    else:
        elements = [bytes(element) for element in _elements(given)]
    texts = []
    for place, element in enumerate(elements):
        try:
            texts.append(element.decode())
        except UnicodeDecodeError as error:
            raise InputError(f"text {place}: not UTF-8 ({error})") from error
    return texts


def _images(given: InputTensor) -> tuple[EncodedImage, ...]:
    if given.data is None:
        return tuple(EncodedImage(str(place), bytes(one)) for place, one in enumerate(_elements(given)))
    values = _of_length(given, given.data)
    if all(isinstance(value, bytes) for value in values):
        return tuple(EncodedImage(str(place), value) for place, value in enumerate(values))
    if given.content_type != BASE64:
        raise InputError(
            "a text in JSON cannot hold an image's bytes; send the input images as binary data, or in base64 with "
            'its parameters {"content_type": "base64"}'
        )
    for place, value in enumerate(values):
        if not isinstance(value, str):
            raise InputError(f"image {place}: give base64 as a text")
    return tuple(decoded_image(place, str(place), value) for place, value in enumerate(values))


def _pixels(given: InputTensor) -> tuple[EncodedImage, ...]:
    size = math.prod(given.shape)
    if given.raw is not None:
        flat: memoryview | bytes = given.raw
        if len(flat) != size:
            raise InputError(f"the input pixels of shape {list(given.shape)} has {size:,} bytes, not {len(flat):,}")
    else:
        values = _flat(given)
        try:
            if bool in set(map(type, values)):
                raise TypeError
            flat = bytes(values)
        except (TypeError, ValueError) as error:
            raise InputError("the input pixels holds whole numbers from 0 to 255") from error
    every = np.frombuffer(flat, np.uint8).reshape(given.shape)
    return tuple(EncodedImage(str(place), one) for place, one in enumerate(every))


def _of_length(given: InputTensor, data: list[Any]) -> list[Any]:
    if len(data) != given.shape[0]:
        raise InputError(f"the input {given.name} of shape {list(given.shape)} has {len(data):,} values")
    return data


def _flat(given: InputTensor) -> list[Any]:
    """The values of a tensor, row by row; they came so, or in lists as its shape says."""
    values, size = given.data or [], math.prod(given.shape)
    if values and isinstance(values[0], list):
        values = _of_length(given, values)
        for length in given.shape[1:]:
            if not all(isinstance(row, list) and len(row) == length for row in values):
                raise InputError(f"the input {given.name} is not in lists as its shape {list(given.shape)} says")
            values = [value for row in values for value in row]
    if len(values) != size:
        raise InputError(
            f"the input {given.name} of shape {list(given.shape)} has {size:,} values, not {len(values):,}"
        )
    return values


def _elements(given: InputTensor) -> list[memoryview]:
    """The elements of a BYTES tensor; each has its size before it."""
    raw, place, found = given.raw or memoryview(b""), 0, []
    for number in range(given.shape[0]):
        size = int.from_bytes(raw[place : place + _SIZE], "little")
        end = place + _SIZE + size
        if place + _SIZE > len(raw) or end > len(raw):
            raise InputError(f"the input {given.name} ends within its element {number} of {given.shape[0]}")
        found.append(raw[place + _SIZE : end])
        place = end
    if place != len(raw):
        raise InputError(f"the input {given.name} has {len(raw) - place:,} bytes behind its {given.shape[0]} elements")
    return found


def written_elements(values: Sequence[bytes]) -> bytes:
    """A BYTES tensor's raw form."""
    return b"".join(len(value).to_bytes(_SIZE, "little") + value for value in values)


def raw_values(output: OutputTensor) -> bytes:
    """An output's raw form: numbers little-endian."""
    values = output.values
    return written_elements(values) if isinstance(values, list) else values.astype("<f4").tobytes()


async def infer(
    exchange: Exchange, service: Service, asked: InferenceQuestion, owner: int, deadline: float,
    binary: Callable[[str], bool],
) -> InferenceAnswer:  # fmt: skip
    """Answers a question.

    Args:
        exchange: The way of every request.
        service: Who answers.
        asked: The question.
        owner: The number of the API key.
        deadline: When the answer is worth nothing any more, by `time.monotonic`.
        binary: Whether an output is answered in its bytes, not in JSON.

    Raises:
        InputError: An output cannot be had of what was sent.
        RefusedError: The answer would be too large.
    """
    available = available_outputs(service.model.classes, of_texts=bool(asked.texts))
    outputs = available if asked.outputs is None else asked.outputs
    missing = [name for name in outputs if name not in available]
    if missing:
        why = "texts have no classes" if asked.texts else "the artifact has no classes"
        raise InputError(f"there is no output {missing[0]}: {why}; available: {', '.join(available)}")
    _require_small(service, len(asked.texts or asked.images), outputs, binary)
    parameters = {"space_id": service.model.space_id}
    if asked.texts:
        read = await answered(service.texts, list(asked.texts), deadline)
        if heard := [row.warning for row in read if row.warning]:
            parameters["warnings"] = "\n".join(heard)
        return InferenceAnswer([number_output(EMBEDDING, np.stack([row.embedding for row in read]))], parameters)
    handle = await exchange.handle(service, asked.site, owner)
    of_classes = any(name in CLASS_OUTPUTS for name in outputs)
    head = service.hosted.head if of_classes and handle is not None else None  # refused before a site counts images
    rows, site = await without_shift(
        handle, await exchange.rows(service, asked.images, deadline, classes=of_classes and handle is None)
    )
    if service.sites:
        parameters["site"] = "" if site is None else site.name

    def made() -> list[OutputTensor]:
        scored = rows if head is None else _scored(rows, head)
        return [image_output(name, scored, service) for name in outputs]

    many = len(rows) * len(service.model.classes) > INLINE
    return InferenceAnswer(await exchange.aside(made) if many else made(), parameters)


def _scored(rows: Sequence[ImageScores], head: HostHead) -> list[ImageScores]:
    """Rows with what a head says of their embeddings."""
    said = head.answers(np.stack([row.embedding for row in rows]))
    return [
        ImageScores(
            row.embedding, said.probabilities[place], said.logits[place],
            {kind: float(each[place]) for kind, each in said.uncertainties.items()},
        )
        for place, row in enumerate(rows)
    ]  # fmt: skip


def _require_small(service: Service, rows: int, outputs: Sequence[str], binary: Callable[[str], bool]) -> None:
    classes, limit = service.model.classes, service.limits.answer
    numbers = {EMBEDDING: service.model.width, "logits": len(classes), "probabilities": len(classes)}
    label = _CHARACTER * max(map(len, classes), default=0) + _SIZE
    size = rows * sum(
        numbers[name] * (_FLOAT if binary(name) else COMPONENT) if name in numbers else label for name in outputs
    )
    if size > limit:
        raise RefusedError(
            413,
            f"{', '.join(outputs)} of {rows:,} items may take {size:,} bytes; up to {limit:,} are sent: send less, ask "
            "for fewer outputs, or for binary data",
        )
