"""Records on disk: strict JSON, typed by dataclasses, and files that carry a digest of themselves.

Everything that this library writes for itself goes through a `Record` or `sealed_json`, and everything that it reads
goes through here, so that no reader takes a damaged file. A digest detects corruption, not tampering: who can write the
file can write its digest too.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    BinaryIO,
    Generic,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from invariclip.console import json_text
from invariclip.errors import InputError, InvariclipError

if TYPE_CHECKING:
    from typing import BinaryIO

    from numpy.typing import NDArray

T = TypeVar("T")

SEAL = "file_sha256"
"""The first field of a sealed file: its sha256, taken with 64 zeros in place of the digest."""
_BLANK = "0" * 64
# in the metadata of safetensors the JSON is a string, so its quotes are escaped
_SEALED = re.compile(rb'file_sha256\\?": ?\\?"([0-9a-f]{64})\\?"')
_SEAL_WITHIN = 512
_CHUNK = 1 << 20
_LARGEST_HEADER = 100_000_000
"""The library's own bound."""
_NO_DIGEST = "carries no digest of itself; it is damaged, or of an earlier version: make it again"
_CHANGED = "is damaged: its content is not what its own digest says; make it again"


def parse_json(content: bytes | str, where: str, *, error: type[InvariclipError] = InputError) -> Any:
    """JSON as the standard has it: UTF-8, every name once in an object, and numbers that are finite.

    Args:
        content: The text; its size is bounded by the caller.
        where: What errors call it.
        error: What is raised.

    Raises:
        InvariclipError: `error`: it is not such a text, or is nested too deep to be read.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        plain = json.loads(text, object_pairs_hook=_once, parse_constant=_refuse_number, parse_float=_finite)
        if "\\u" in text:
            json.dumps(plain, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as reason:
        raise error(f"{where}: not readable as JSON ({' '.join(str(reason).split())[:200]})") from reason
    return plain


def read_json(path: Path, what: str, *, max_bytes: int, error: type[InvariclipError] = InputError) -> dict[str, Any]:
    """A JSON file that holds one object, see `parse_json`.

    Args:
        path: The file.
        what: What it should be, for errors: `a model's config`.
        max_bytes: Its size is refused above this.
        error: What is raised.

    Raises:
        InvariclipError: `error`: it is missing, larger, not JSON, or not one object.
    """
    return _object(read_bounded(path, what, max_bytes, error), path, what, error)


def to_record(kind: type[T], plain: Any, where: str, *, error: type[InvariclipError] = InputError) -> T:
    """A dataclass from JSON's types. A field that is missing, unknown or of another type is refused by its path.

    Args:
        kind: The dataclass; nested ones, tuples, literals and dictionaries are made likewise.
        plain: What `parse_json` gave.
        where: What errors call it.
        error: What is raised.

    Raises:
        InvariclipError: `error`, also in place of what the dataclass itself refuses.
    """
    import msgspec

    try:
        record = msgspec.convert(plain, kind)
    except msgspec.ValidationError as reason:
        raise error(f"{where}: {reason}{_options(kind, str(reason))}") from reason
    except InvariclipError as reason:
        raise error(f"{where}: {reason}") from reason
    unknown = _unknown(plain, msgspec.to_builtins(record))
    if unknown is not None:
        raise error(f"{where}: has a field that is not known: {unknown or repr(unknown)!s:.100}")
    return record


def seal(content: bytes) -> bytes:
    """The content with its digest in the place that it has for one: the field `file_sha256` near its begin.

    Raises:
        ValueError: It has no such field.
    """
    place = _SEALED.search(content, 0, _SEAL_WITHIN)
    if place is None:
        raise ValueError(f"the content has no field {SEAL} within its first {_SEAL_WITHIN} bytes")
    head, tail = content[: place.start(1)], content[place.end(1) :]
    return head + hashlib.sha256(head + _BLANK.encode() + tail).hexdigest().encode() + tail


def seal_footer(stream: BinaryIO, start: int, key: str) -> None:
    """Writes the digest of a file whose facts stand in a footer (parquet) into the place that they have for it.

    Args:
        stream: The file, open to be read and written.
        start: Where the footer begins.
        key: The facts' key in the metadata.

    Raises:
        ValueError: The footer has no such place.
    """
    place = _footer_seal(stream, start, key)
    if place is None:
        raise ValueError(f"the footer has no field {SEAL} below {key}")
    digest = _digest_around(stream, place[0])
    stream.seek(place[0])
    stream.write(digest.encode())


def require_whole_footer(stream: BinaryIO, start: int, record: Record[Any], where: str) -> None:
    """Refuses a file that is not what `seal_footer` said it is; it is read in pieces.

    Raises:
        InvariclipError: `record.error`: the file has no digest, or another one.
    """
    place = _footer_seal(stream, start, record.key)
    if place is None:
        raise record.error(f"{where}: {_NO_DIGEST}")
    if _digest_around(stream, place[0]) != place[1]:
        raise record.error(f"{where}: {_CHANGED}")


def _footer_seal(stream: BinaryIO, start: int, key: str) -> tuple[int, str] | None:
    """Where the digest stands in a footer, and what it is."""
    stream.seek(start)
    # between key and value stand a few bytes of their lengths
    found = re.search(re.escape(key.encode()) + rb'.{1,16}?\{"file_sha256": "([0-9a-f]{64})"', stream.read(), re.DOTALL)
    return None if found is None else (start + found.start(1), found[1].decode())


def _digest_around(stream: BinaryIO, place: int) -> str:
    """sha256 of a file, taken with 64 zeros in place of the digest."""
    stream.seek(0)
    digest, left = hashlib.sha256(), place
    while left and (chunk := stream.read(min(left, _CHUNK))):
        digest.update(chunk)
        left -= len(chunk)
    digest.update(_BLANK.encode())
    stream.seek(place + len(_BLANK))
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def sealed_json(plain: Mapping[str, Any]) -> bytes:
    """An object as indented JSON with its digest as the first field."""
    text = json_text({SEAL: _BLANK, **plain}, indent=2)
    return seal(text.encode())


def read_sealed_json(
    path: Path, what: str, *, schema: int, remedy: str, max_bytes: int, error: type[InvariclipError]
) -> dict[str, Any]:
    """What `sealed_json` wrote, without the digest.

    Args:
        path: The file.
        what: What it should be, for errors: `a manifest`.
        schema: The `schema_version` that it must have.
        remedy: What to do where it has another: `export again`.
        max_bytes: Its size is refused above this.
        error: What is raised.

    Raises:
        InvariclipError: `error`: as `read_json`, of another schema, or its content is not what its digest says.
    """
    return from_sealed_json(read_bounded(path, what, max_bytes, error), path, what, schema, remedy, error)


def from_sealed_json(
    content: bytes, path: Path, what: str, schema: int, remedy: str, error: type[InvariclipError]
) -> dict[str, Any]:
    """As `read_sealed_json`, of a file's content.

    Raises:
        InvariclipError: `error`, as `read_sealed_json`.
    """
    plain = _object(content, path, what, error)
    if not _is_version(plain.get("schema_version"), schema):
        raise error(
            f"{path}: schema_version {plain.get('schema_version')!r:.50} is not known; "
            f"this version reads {schema}: {remedy}"
        )
    _require_whole(content, str(path), error)
    del plain[SEAL]
    return plain


@dataclass(frozen=True)
class Record(Generic[T]):
    """A kind of file of ours: tensors in safetensors, facts as JSON in its metadata, and a digest over all of it.

    Attributes:
        key: Under which the metadata hold the facts.
        what: With its article, for errors: `a projection`.
        made_by: The command that writes one, for errors.
        schema: The version of the facts.
        max_bytes: Larger files are refused before they are read.
        error: What is raised.
        facts: The dataclass of its facts.
    """

    key: str
    what: str
    made_by: str
    schema: int
    max_bytes: int
    error: type[InvariclipError]
    facts: type[T]

    def to_bytes(self, tensors: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> bytes:
        """The file's content; the same for the same tensors and facts."""
        from safetensors.numpy import save

        content: bytes = save(dict(tensors), {self.key: self.text(facts)})
        return seal(content)

    def text(self, facts: Mapping[str, Any]) -> str:
        """The facts as JSON, with a blank in the place of the digest; see `seal` and `seal_footer`."""
        return json_text({SEAL: _BLANK, "schema": self.schema, **facts})

    def read(self, path: str | os.PathLike[str]) -> tuple[dict[str, NDArray[Any]], T]:
        """Tensors and facts of a file; the digest is taken in pieces, so memory holds the tensors once.

        Raises:
            InvariclipError: `error`: missing, too large, of another schema, or not what was written.
        """
        from safetensors import SafetensorError, safe_open

        where = Path(path)
        try:
            size = where.stat().st_size if where.is_file() else None
            if size is None:
                raise self.error(f"{where}: no such file; {self.made_by} writes {self.what}")
            if size > self.max_bytes:
                raise self.error(f"{where}: larger than {self.what} can be ({size:,} bytes)")
            with safe_open(where, framework="numpy") as file:
                with where.open("rb") as stream:
                    _, header = safetensors_header(stream, str(where), error=self.error)
                    facts = self.read_facts(header.get("__metadata__") or {}, str(where))
                    stream.seek(0)
                    _require_whole_stream(stream, str(where), self.error)
                return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 - no dict
        except (SafetensorError, ValueError, OSError) as reason:
            raise self.error(f"{where}: not {self.what} written by {self.made_by} ({reason})") from reason

    def from_bytes(self, content: bytes, where: str) -> tuple[dict[str, NDArray[Any]], T]:
        """As `read`, of a file's content.

        Raises:
            InvariclipError: `error`, as `read`.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            tensors: dict[str, NDArray[Any]] = load(content)
            _, header = safetensors_header(io.BytesIO(content), where, error=self.error)
        except (SafetensorError, ValueError) as reason:
            raise self.error(f"{where}: not {self.what} written by {self.made_by} ({reason})") from reason
        facts = self.read_facts(header.get("__metadata__") or {}, where)
        _require_whole(content, where, self.error)
        return tensors, facts

    def refuse(self, where: str | os.PathLike[str], reason: object) -> NoReturn:
        """Says that a file's facts or tensors are not those of this kind.

        Raises:
            InvariclipError: `error`, always.
        """
        raise self.error(f"{os.fspath(where)}: not {self.what} written by {self.made_by} ({reason})")

    def read_facts(self, metadata: Mapping[str, str], where: str) -> T:
        """The facts in a file's metadata, without the digest and the schema.

        Raises:
            InvariclipError: `error`: there are none, or of another schema.
        """
        if self.key not in metadata:
            self.refuse(where, f"its metadata have no {self.key!r}")
        facts = parse_json(metadata[self.key], where, error=self.error)
        if not isinstance(facts, dict):
            self.refuse(where, "its facts are no object")
        schema = facts.pop("schema", None)
        if not _is_version(schema, self.schema):
            raise self.error(
                f"{where}: schema {schema!r} is not known; this version reads {self.schema}: "
                f"make it again with {self.made_by}"
            )
        facts.pop(SEAL, None)
        return to_record(self.facts, facts, f"{where}: not {self.what} written by {self.made_by}", error=self.error)


def safetensors_header(
    stream: BinaryIO, where: str, *, error: type[InvariclipError] = InputError
) -> tuple[int, dict[str, Any]]:
    """The header of a file that the safetensors library accepts: it lets a name stand twice, and takes the second.

    Args:
        stream: The file, at its begin.
        where: What errors call it.
        error: What is raised.

    Returns:
        Where the tensors' bytes begin, and the header's object.

    Raises:
        InvariclipError: `error`: a name stands twice, or it is no header.
    """
    length = int.from_bytes(stream.read(8), "little")
    if length > _LARGEST_HEADER:
        raise error(f"{where}: a header of {length:,} bytes is more than safetensors has ({_LARGEST_HEADER:,})")
    header = parse_json(stream.read(length), where, error=error)
    if not isinstance(header, dict):
        raise error(f"{where}: not a safetensors file: its header is no object")
    return 8 + length, header


def read_bounded(path: Path, what: str, max_bytes: int, error: type[InvariclipError] = InputError) -> bytes:
    """A file's content, no more of it than `max_bytes`.

    Raises:
        InvariclipError: `error`: it cannot be read, or is larger than `what` (with its article) can be.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(max_bytes + 1)
    except OSError as reason:
        raise error(f"{path}: cannot be read ({reason.strerror or reason})") from reason
    if len(content) > max_bytes:
        raise error(f"{path}: larger than {what} can be ({max_bytes:,} bytes)")
    return content


def _object(content: bytes, path: Path, what: str, error: type[InvariclipError]) -> dict[str, Any]:
    plain = parse_json(content, str(path), error=error)
    if not isinstance(plain, dict):
        raise error(f"{path}: not {what}: must hold a JSON object, not {type(plain).__name__}")
    return plain


def _require_whole(content: bytes, where: str, error: type[InvariclipError]) -> None:
    _require_whole_stream(io.BytesIO(content), where, error)


def _require_whole_stream(stream: Any, where: str, error: type[InvariclipError]) -> None:
    head: bytes = stream.read(_SEAL_WITHIN)
    place = _SEALED.search(head)
    if place is None:
        raise error(f"{where}: {_NO_DIGEST}")
    digest = hashlib.sha256(head[: place.start(1)] + _BLANK.encode() + head[place.end(1) :])
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
    if digest.hexdigest().encode() != place[1]:
        raise error(f"{where}: {_CHANGED}")


def _is_version(given: Any, wanted: int) -> bool:
    """Whether a version is this number itself: `true` equals 1 in Python, and is no version."""
    return type(given) is int and given == wanted


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ValueError(f"{twice[:64]!r} stands twice in one object; the second would replace the first")
    return record


def _refuse_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:32]} is beyond what a number can hold")
    return number


def _options(kind: Any, message: str) -> str:
    """What a field may be that is none of its literals; "" where the message is about something else."""
    if not message.startswith("Invalid enum value"):
        return ""
    kinds = _alternatives(kind)
    for name in re.findall(r"\.(\w+)|\[", message.rpartition("$")[2]):
        if name:
            below = [get_type_hints(one).get(name) for one in kinds if is_dataclass(one)]
        else:
            below = [[inner for inner in get_args(one) if inner is not Ellipsis][-1] for one in kinds if get_args(one)]
        kinds = [one for inner in below for one in _alternatives(inner)]
    options = next((get_args(one) for one in kinds if get_origin(one) is Literal), ())
    return f"; available: {', '.join(map(str, options))}" if options else ""


def _alternatives(kind: Any) -> list[Any]:
    """The types that a union is of; another type alone."""
    if get_origin(kind) in (Union, UnionType):
        return [one for inner in get_args(kind) for one in _alternatives(inner)]
    return [kind]


def _unknown(plain: Any, known: Any, path: str = "") -> str | None:
    """The path of the first field of `plain` that a record made of it does not have."""
    if isinstance(plain, dict) and isinstance(known, dict):
        for name, value in plain.items():
            here = f"{path}.{name}" if path else str(name)
            below = _unknown(value, known[name], here) if name in known else here
            if below is not None:
                return below
    elif isinstance(plain, list) and isinstance(known, (list, tuple)):
        for place, (one, other) in enumerate(zip(plain, known, strict=False)):
            below = _unknown(one, other, f"{path}[{place}]")
            if below is not None:
                return below
    return None
