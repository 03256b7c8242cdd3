"""What is read from an ONNX file without an engine: the facts that it carries, and the class embeddings that it holds.

Only the few fields of protobuf's wire format that lead there are looked at; everything else is skipped unread.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.artifact.manifest import METADATA_KEY
from invariclip.errors import ArtifactError
from invariclip.records import parse_json

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

NAMES = (b"class_bank", b"class_bank_float16")
"""Of the initializer, float32 or float16 [d, K]."""
_MODEL_GRAPH, _MODEL_METADATA, _GRAPH_INITIALIZER = 7, 14, 5
_DIMS, _TYPE, _NAME, _RAW, _EXTERNAL, _LOCATION = 1, 2, 8, 9, 13, 14
_TYPES: dict[int, np.dtype[Any]] = {1: np.dtype("<f4"), 10: np.dtype("<f2")}
_MOST_DIMS = 8
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass
class _Tensor:
    """Where a tensor's numbers lie."""

    name: bytes = b""
    dims: list[int] = field(default_factory=list)
    type: int = 0
    external: bool = False
    entries: dict[bytes, bytes] = field(default_factory=dict)
    begin: int = 0
    size: int = 0


def read_class_bank(path: Path, width: int, classes: int) -> NDArray[np.float32] | None:
    """Unit-length class embeddings, float32 [K, d], as a graph multiplies by them; None where it holds none of floats.

    Args:
        path: The graph's ONNX file; weights may lie in `path.data` beside it.
        width: D.
        classes: K.

    Raises:
        ArtifactError: The file is damaged, or holds class embeddings of another shape or that are not finite.
    """
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = _found(content)
            if found is None or found.type not in _TYPES:
                return None
            dtype = _TYPES[found.type]
            if found.dims != [width, classes] or found.size != width * classes * dtype.itemsize:
                raise ArtifactError(f"{path}: its class embeddings are not [{width}, {classes}]; export again")
            raw = _external(path, found) if found.external else content[found.begin : found.begin + found.size]
        bank: NDArray[np.float32] = np.frombuffer(raw, dtype=dtype).astype(np.float32)
    except (OSError, ValueError, IndexError) as error:
        raise ArtifactError(f"{path}: cannot be read as an ONNX file ({error}); export again") from error
    if len(bank) != width * classes or not np.isfinite(bank).all():
        raise ArtifactError(f"{path}: its class embeddings are cut off or not finite; export again")
    return np.ascontiguousarray(bank.reshape(width, classes).T)


def read_facts(path: Path) -> dict[str, Any] | None:
    """The facts in a graph's `metadata_props`, see `Manifest.facts`; None where it carries none.

    Raises:
        ArtifactError: The file is no ONNX file, or its facts are not one JSON object.
    """
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            texts = [text for _, _, text in _facts(content)]
    except (OSError, ValueError, IndexError) as error:
        raise ArtifactError(f"{path}: cannot be read as an ONNX file ({error}); export again") from error
    if not texts:
        return None
    facts = parse_json(texts[-1], f"{path}: its metadata", error=ArtifactError)
    if not isinstance(facts, dict):
        raise ArtifactError(f"{path}: its metadata hold no facts of an artifact; export again")
    return facts


def without_facts(path: Path) -> bytes:
    """An ONNX file's content without the facts of an artifact; every other byte is as it was.

    Raises:
        ValueError: It is no ONNX file.
    """
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        kept, place = [], 0
        for begin, end, _ in _facts(content):
            kept.append(content[place:begin])
            place = end
        return b"".join([*kept, content[place:]])


def _facts(content: mmap.mmap) -> Iterator[tuple[int, int, bytes]]:
    """Where each field begins and ends that holds an artifact's facts, and their text."""
    begin = 0
    for number, _, first, last in _fields(content, 0, len(content)):
        if number == _MODEL_METADATA:
            pair = {n: (a, b) for n, _, a, b in _fields(content, first, last)}
            name, text = pair.get(1, (0, 0)), pair.get(2, (0, 0))
            if content[name[0] : min(name[1], name[0] + 64)] == METADATA_KEY.encode():
                yield begin, last, content[text[0] : text[1]]
        begin = last


def _found(content: mmap.mmap) -> _Tensor | None:
    for number, _, begin, end in _fields(content, 0, len(content)):
        if number != _MODEL_GRAPH:
            continue
        for inner, _, first, last in _fields(content, begin, end):
            if inner == _GRAPH_INITIALIZER:
                tensor = _tensor(content, first, last)
                if tensor.name in NAMES:
                    return tensor
    return None


def _tensor(content: mmap.mmap, begin: int, end: int) -> _Tensor:
    tensor = _Tensor()
    for number, value, first, last in _fields(content, begin, end):
        if number == _NAME:
            tensor.name = content[first : min(last, first + 64)]
        elif number == _TYPE:
            tensor.type = value
        elif number == _LOCATION:
            tensor.external = value == 1
        elif number == _RAW:
            tensor.begin, tensor.size = first, last - first
        elif number == _DIMS:
            tensor.dims += [value] if first == last else _packed(content, first, last)
            if len(tensor.dims) > _MOST_DIMS:
                raise ValueError("a tensor has too many dimensions")
        elif number == _EXTERNAL and last - first < 4096:
            pair = {n: content[a:b] for n, _, a, b in _fields(content, first, last)}
            tensor.entries[pair.get(1, b"")] = pair.get(2, b"")
    if tensor.external and tensor.name in NAMES:
        tensor.begin, tensor.size = (int(tensor.entries.get(key, b"0")) for key in (b"offset", b"length"))
    return tensor


def _external(path: Path, found: _Tensor) -> bytes:
    """From the only file beside a graph whose digest an artifact knows."""
    data = path.with_name(f"{path.name}.data")
    if found.entries.get(b"location", b"").decode("utf-8", "replace") != data.name:
        raise ArtifactError(f"{path}: its class embeddings lie in another file than its weights; export again")
    with data.open("rb") as stream:
        stream.seek(found.begin)
        return stream.read(found.size)


def _packed(content: mmap.mmap, begin: int, end: int) -> list[int]:
    values: list[int] = []
    while begin < end and len(values) <= _MOST_DIMS:
        value, begin = _number(content, begin, end)
        values.append(value)
    return values


def _fields(content: mmap.mmap, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Fields between two places: number, value, and where its bytes begin and end, alike where it is a number.

    Raises:
        ValueError: They are none.
    """
    while begin < end:
        key, begin = _number(content, begin, end)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, begin = _number(content, begin, end)
            yield number, value, begin, begin
            continue
        if kind == _BYTES:
            size, begin = _number(content, begin, end)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError("a field is of an unknown kind")
        if size > end - begin:
            raise ValueError("a field ends outside the file")
        yield number, 0, begin, begin + size
        begin += size


def _number(content: mmap.mmap, begin: int, end: int) -> tuple[int, int]:
    value = 0
    for place in range(10):
        if begin + place >= end:
            raise ValueError("it ends inside a number")
        byte = content[begin + place]
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, begin + place + 1
    raise ValueError("a number has more than ten bytes")
