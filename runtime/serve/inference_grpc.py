"""The Open Inference Protocol v2 over gRPC, in the server's own event loop and with its batchers (docs/serve.md)."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from invariclip.errors import InputError
from invariclip.serve.batcher import QueueFullError
from invariclip.serve.guard import WITHOUT_KEY, refusal
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
from invariclip.serve.limits import RefusedError
from invariclip.serve.open_inference import METHODS, SERVICE, message
from invariclip.serve.tracking import headers_of, new_record

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from invariclip.serve.exchange import Exchange
    from invariclip.serve.guard import ApiKeys
    from invariclip.serve.inference import InferenceQuestion
    from invariclip.serve.limits import Limits
    from invariclip.serve.tracking import Telemetry

OPEN = ("ServerLive", "ServerReady")
"""Methods that are answered without a key."""
CONTENTS = {"images": "bytes_contents", "texts": "bytes_contents", "pixels": "uint_contents"}
"""Where an input's values are that are not raw."""
_MANY = 1024  # calls at a time; each that has sent its message is held against the bytes of all bodies
_STREAMS, _IDLE_MS = 256, 300_000  # calls of a connection at a time; clients connect again by themselves
_CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED, 404: grpc.StatusCode.NOT_FOUND, 408: grpc.StatusCode.DEADLINE_EXCEEDED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED, 500: grpc.StatusCode.INTERNAL, 503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}  # fmt: skip
"""gRPC's codes for HTTP's statuses; others are INVALID_ARGUMENT."""


class InferenceGrpc:
    """The gRPC server; `start` and `stop` belong into the event loop of the exchange.

    Attributes:
        port: Where it listens; 0 before it started.
    """

    def __init__(
        self, exchange: Exchange, telemetry: Telemetry, keys: ApiKeys, ready: Callable[[], bool], stall: float
    ) -> None:
        """Does not listen yet.

        Args:
            exchange: The way of every request.
            telemetry: Is told of each call.
            keys: One of them is demanded, if there are any.
            ready: Whether the server takes work.
            stall: Seconds to wait for a message.
        """
        self.port = 0
        self._exchange, self._limits, self._telemetry = exchange, exchange.limits, telemetry
        self._keys, self._ready, self._stall = keys, ready, stall
        self._server: Any = None
        # messages that come in at a time
        self._coming = asyncio.Semaphore(max(1, self._limits.bodies // self._limits.body))

    async def start(self, host: str, port: int) -> None:
        """Listens.

        Args:
            host: At this address.
            port: 0 for one that is free.

        Raises:
            InputError: The address cannot be had.
        """
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=_MANY,
            options=[
                ("grpc.max_receive_message_length", self._limits.body),
                ("grpc.max_send_message_length", -1),  # answers have their own bound
                ("grpc.so_reuseport", 0),  # of two servers at one port, the second would take half of the calls
                ("grpc.compression_enabled_algorithms_bitset", 1),  # none: a small message could become a large one
                ("grpc.max_metadata_size", 1 << 14),
                ("grpc.max_concurrent_streams", _STREAMS),
                ("grpc.max_connection_idle_ms", _IDLE_MS),
            ],
        )
        handlers = {name: grpc.stream_unary_rpc_method_handler(self._method(name)) for name in METHODS}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        try:
            self.port = self._server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        except RuntimeError as error:
            raise InputError(f"{host}:{port}: gRPC cannot listen there; --grpc-port 0 takes a free port") from error
        await self._server.start()

    async def stop(self, grace: float) -> None:
        """Takes no more calls, and answers those that there are for so many seconds."""
        if self._server is not None:
            await self._server.stop(grace)

    def _method(self, name: str) -> Callable[[AsyncIterator[bytes], Any], Awaitable[bytes]]:
        """What answers a method. It is called before a message came in, as a stream's would be: it reads in bounds."""
        answer: Callable[[Any, int, float, float], Awaitable[Any]] = getattr(self, f"_{_snake(name)}")

        async def called(messages: AsyncIterator[bytes], context: Any) -> bytes:
            began, held = asyncio.get_running_loop().time(), 0
            metadata = tuple(context.invocation_metadata() or ())
            record = new_record(((key.encode(), _bytes(value)) for key, value in metadata), "grpc", f"grpc {name}")
            self._telemetry.begin(record)
            ids = [(key.decode(), value.decode()) for key, value in headers_of(record)]
            context.set_trailing_metadata(ids)
            seconds = self._limits.seconds
            deadline = time.monotonic() + min(seconds, context.time_remaining() or seconds)  # None: no deadline
            try:
                record.key = owner = self._owner(name, dict(metadata))
                content = await self._message(messages)
                record.bytes_in = held = len(content)
                asked = _parsed(message(f"{name}Request"), content)
                del content
                said: bytes = (await answer(asked, owner, began, deadline)).SerializeToString()
                self._count_until_sent(said, context)
                record.status, record.bytes_out = 200, len(said)
                return said
            except Exception as error:
                status, line, headers = refusal(error)
                record.status = status
                record.refused(line if status == 500 else error, status)
                code = _CODES.get(status, grpc.StatusCode.INVALID_ARGUMENT)
                if isinstance(error, QueueFullError):
                    code = grpc.StatusCode.RESOURCE_EXHAUSTED
                context.set_trailing_metadata([*ids, *headers.items()])
                context.set_code(code)
                context.set_details(line)
                return b""
            finally:  # a call that was cancelled has no status: its client went away
                self._exchange.held.give_back(held)
                self._telemetry.finish(record)

        return called

    def _owner(self, name: str, metadata: Mapping[str, Any]) -> int:
        """The number of a call's API key."""
        if name in OPEN:
            return 0
        given = [metadata.get(key, "") for key in ("authorization", "x-api-key")]
        owner = self._keys.number(*(str(one).encode() for one in given))
        if owner is None:
            raise RefusedError(401, WITHOUT_KEY)
        return owner

    async def _message(self, messages: AsyncIterator[bytes]) -> bytes:
        """The call's one message, counted; no more of them come in at a time than may be held."""
        try:
            async with asyncio.timeout(self._stall):
                await self._coming.acquire()
        except TimeoutError as error:
            raise RefusedError(
                503, "too many messages are coming in; try again in 1 s", {"retry-after": "1"}
            ) from error
        try:
            async with asyncio.timeout(self._stall):
                content = await anext(messages, None)
        except TimeoutError as error:
            raise RefusedError(408, f"no message came in within {self._stall:g} s; send it again") from error
        finally:
            self._coming.release()
        if content is None:
            raise InputError("the call has no message")
        self._exchange.held.take(len(content))
        return content

    def _count_until_sent(self, said: bytes, context: Any) -> None:
        self._exchange.sent.take(len(said))
        context.add_done_callback(lambda _: self._exchange.sent.give_back(len(said)))

    async def _server_live(self, _asked: Any, _owner: int, _began: float, _deadline: float) -> Any:
        return message("ServerLiveResponse")(live=True)

    async def _server_ready(self, _asked: Any, _owner: int, _began: float, _deadline: float) -> Any:
        return message("ServerReadyResponse")(ready=self._ready())

    async def _model_ready(self, asked: Any, _owner: int, _began: float, _deadline: float) -> Any:
        found_model(self._exchange.models, asked.name, asked.version)
        return message("ModelReadyResponse")(ready=self._ready())

    async def _server_metadata(self, _asked: Any, _owner: int, _began: float, _deadline: float) -> Any:
        return message("ServerMetadataResponse")(**{**server_metadata(), "extensions": []})

    async def _model_metadata(self, asked: Any, _owner: int, _began: float, _deadline: float) -> Any:
        found = found_model(self._exchange.models, asked.name, asked.version)
        return message("ModelMetadataResponse")(**model_metadata(found.service))

    async def _model_infer(self, asked: Any, owner: int, began: float, deadline: float) -> Any:
        exchange = self._exchange
        found_model(exchange.models, asked.model_name, asked.model_version)
        async with exchange.within(began, self._limits.seconds):
            question = await exchange.aside(_question, asked, self._limits)
            with exchange.models.find(asked.model_name).lease() as service:
                await exchange.require_bearable(service, question.images)
                answer = await infer(exchange, service, question, owner, deadline, lambda _: True)
            said = message("ModelInferResponse")(
                model_name=asked.model_name, model_version=VERSION, id=question.id,
                outputs=[{"name": one.name, "datatype": one.datatype, "shape": one.shape} for one in answer.outputs],
                raw_output_contents=[raw_values(one) for one in answer.outputs],
            )  # fmt: skip
            for name, text in answer.parameters.items():
                said.parameters[name].string_param = text
            return said


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()


def _snake(name: str) -> str:
    return "".join(f"_{one.lower()}" if one.isupper() else one for one in name).lstrip("_")


def _parsed(kind: Any, content: bytes) -> Any:
    try:
        asked = kind.FromString(content)
    except DecodeError as error:
        raise InputError("the message is not one of this method; use the protocol's own definitions") from error
    _require_known(asked)
    return asked


def _require_known(asked: Any) -> None:
    """Refuses fields that protobuf would pass over."""
    unknown = UnknownFieldSet(asked)
    if len(unknown):
        raise InputError(f"{asked.DESCRIPTOR.name} has no field of the number {unknown[0].field_number}")
    for name in ("inputs", "outputs"):
        for one in getattr(asked, name, ()):
            _require_known(one)
            if name == "inputs" and one.HasField("contents"):
                _require_known(one.contents)


def _question(asked: Any, limits: Limits) -> InferenceQuestion:
    """A request's tensors, understood."""
    site: str | None = None
    for name, value in asked.parameters.items():
        if name != "site" or value.WhichOneof("parameter_choice") != "string_param":
            raise InputError(
                f"no parameter of a request is called {name!r:.60} and of this type; available: site (text)"
            )
        site = value.string_param
    raw = asked.raw_input_contents
    if raw and len(raw) != len(asked.inputs):
        raise InputError(f"raw_input_contents has {len(raw)} values for {len(asked.inputs)} inputs")
    for one in (*asked.inputs, *asked.outputs):
        if one.parameters:
            raise InputError(f"{one.name[:60]} has parameters; none are taken")
    inputs = [_tensor(one, raw[place] if raw else None) for place, one in enumerate(asked.inputs)]
    outputs = [one.name for one in asked.outputs] or None
    return read_question(inputs, outputs, site, asked.id, limits)


def _tensor(given: Any, raw: bytes | None) -> InputTensor:
    filled = [field.name for field, _ in given.contents.ListFields()]
    wanted = CONTENTS.get(given.name, "bytes_contents")
    if raw is not None and filled:
        raise InputError(f"the input {given.name[:60]} has its values either in raw_input_contents or in contents")
    if raw is None and filled != [wanted]:
        raise InputError(f"the input {given.name[:60]} has its values in raw_input_contents, or in contents.{wanted}")
    shape = tuple(given.shape)
    if raw is not None:
        return InputTensor(given.name, given.datatype, shape, memoryview(raw))
    return InputTensor(given.name, given.datatype, shape, data=list(getattr(given.contents, wanted)))
