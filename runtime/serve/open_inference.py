"""The messages of the Open Inference Protocol's gRPC service, made at run time: protobuf's own compiler is not needed.

Names and numbers are those of KServe's open_inference_grpc.proto (Apache-2.0). The descriptors lie in a pool of their
own, so that a client library in the same process may register the same names.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "inference.GRPCInferenceService"
METHODS = ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer")
"""Each takes `NAMERequest` and gives `NAMEResponse`."""
_NAME_AND_VERSION = ("string name = 1", "string version = 2")
_TENSOR = ("string name = 1", "string datatype = 2", "repeated int64 shape = 3")
_WITH_CONTENTS = (*_TENSOR, "map InferParameter parameters = 4", "InferTensorContents contents = 5")
_MESSAGES = {
    "ServerLiveRequest": (),
    "ServerLiveResponse": ("bool live = 1",),
    "ServerReadyRequest": (),
    "ServerReadyResponse": ("bool ready = 1",),
    "ModelReadyRequest": _NAME_AND_VERSION,
    "ModelReadyResponse": ("bool ready = 1",),
    "ServerMetadataRequest": (),
    "ServerMetadataResponse": (*_NAME_AND_VERSION, "repeated string extensions = 3"),
    "ModelMetadataRequest": _NAME_AND_VERSION,
    "ModelMetadataResponse": (
        "string name = 1", "repeated string versions = 2", "string platform = 3",
        "repeated ModelMetadataResponse.TensorMetadata inputs = 4",
        "repeated ModelMetadataResponse.TensorMetadata outputs = 5",
    ),
    "ModelMetadataResponse.TensorMetadata": _TENSOR,
    "ModelInferRequest": (
        "string model_name = 1", "string model_version = 2", "string id = 3", "map InferParameter parameters = 4",
        "repeated ModelInferRequest.InferInputTensor inputs = 5",
        "repeated ModelInferRequest.InferRequestedOutputTensor outputs = 6", "repeated bytes raw_input_contents = 7",
    ),
    "ModelInferRequest.InferInputTensor": _WITH_CONTENTS,
    "ModelInferRequest.InferRequestedOutputTensor": ("string name = 1", "map InferParameter parameters = 2"),
    "ModelInferResponse": (
        "string model_name = 1", "string model_version = 2", "string id = 3", "map InferParameter parameters = 4",
        "repeated ModelInferResponse.InferOutputTensor outputs = 5", "repeated bytes raw_output_contents = 6",
    ),
    "ModelInferResponse.InferOutputTensor": _WITH_CONTENTS,
    "InferParameter": (
        "oneof bool bool_param = 1", "oneof int64 int64_param = 2", "oneof string string_param = 3",
        "oneof double double_param = 4", "oneof uint64 uint64_param = 5",
    ),
    "InferTensorContents": (
        "repeated bool bool_contents = 1", "repeated int32 int_contents = 2", "repeated int64 int64_contents = 3",
        "repeated uint32 uint_contents = 4", "repeated uint64 uint64_contents = 5", "repeated float fp32_contents = 6",
        "repeated double fp64_contents = 7", "repeated bytes bytes_contents = 8",
    ),
}  # fmt: skip
"""Messages with their fields; `map X` has strings as its keys, and the fields marked `oneof` are one of."""


def _pool() -> descriptor_pool.DescriptorPool:
    file = descriptor_pb2.FileDescriptorProto(name="invariclip/inference.proto", package="inference", syntax="proto3")
    made: dict[str, Any] = {}
    for name, lines in _MESSAGES.items():
        owner, _, own = name.rpartition(".")
        made[name] = (made[owner].nested_type if owner else file.message_type).add(name=own)
        for line in lines:
            _add_field(made[name], name, line)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool


def _add_field(message: Any, owner: str, line: str) -> None:
    *label, kind, name, _, number = line.split()
    field = message.field.add(name=name, number=int(number), label=3 if label in (["repeated"], ["map"]) else 1)
    if label == ["map"]:
        entry = message.nested_type.add(name=f"{name.title()}Entry")
        entry.options.map_entry = True
        _add_field(entry, "", "string key = 1")
        _add_field(entry, "", f"{kind} value = 2")
        kind = f"{owner}.{entry.name}"
    elif label == ["oneof"]:
        if not message.oneof_decl:
            message.oneof_decl.add(name="parameter_choice")
        field.oneof_index = 0
    scalar = getattr(descriptor_pb2.FieldDescriptorProto, f"TYPE_{kind.upper()}", None)
    if scalar is None:
        field.type, field.type_name = descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE, f".inference.{kind}"
    else:
        field.type = scalar


_POOL = _pool()


def message(name: str) -> Any:
    """A message's class, such as `ModelInferRequest`."""
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"inference.{name}"))
