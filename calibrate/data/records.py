"""Records of JSONL, CSV and TSV files, and the pairs that such files list; read in ranges, never held whole."""

from __future__ import annotations

import csv
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from invariclip.errors import InputError
from invariclip.records import parse_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

IMAGE_COLUMNS = {
    "first": ("first", "first_path", "image_1", "image1", "path_1", "path1", "a"),
    "second": ("second", "second_path", "image_2", "image2", "path_2", "path2", "b"),
}
"""What the columns of a list of image pairs may be called; the first that is there counts."""
TEXT_COLUMNS = {
    "first": ("first", "first_text", "text_1", "text1", "caption_1", "caption1", "a"),
    "second": ("second", "second_text", "text_2", "text2", "caption_2", "caption2", "b"),
}
"""Likewise for pairs of texts."""
MAX_RECORD = 1 << 20
"""Bytes of a record at most."""
DELIMITERS = {".csv": ",", ".tsv": "\t"}
"""Endings of files with a header; all others are JSONL."""
_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class ListedPair:
    """A pair as the file has it.

    Attributes:
        line: Where it stands.
        first: A path or a text.
        second: Likewise.
        weight: What it counts beside the others.
    """

    line: int
    first: str
    second: str
    weight: float = 1.0


def read_pairs(path: Path, span: Span | None, columns: Mapping[str, tuple[str, ...]]) -> Iterator[ListedPair]:
    """The pairs of a file, or of a range of it.

    Args:
        path: The file.
        span: The range; all by default.
        columns: `IMAGE_COLUMNS` or `TEXT_COLUMNS`.

    Raises:
        InputError: A record cannot be parsed, lacks a member, or has a weight that is negative or no number.
    """
    for line, row in read_records(path, span):
        first, second = (_member(path, line, row, name, columns[name]) for name in ("first", "second"))
        yield ListedPair(line, first, second, _weight(path, line, row.get("weight")))


def _member(path: Path, line: int, row: dict[str, Any], name: str, aliases: tuple[str, ...]) -> str:
    column = next((alias for alias in aliases if alias in row), None)
    if column is None:
        have = ", ".join(map(str, row))[:200]
        raise InputError(f"{path}: line {line} has no column {name!r} (or {', '.join(aliases[1:])}); it has: {have}")
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{path}: line {line} has no {column!r}")
    return value


def _weight(path: Path, line: int, value: Any) -> float:
    if value is None or value == "":
        return 1.0
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise InputError(f"{path}: line {line} has weight {str(value)[:40]!r}; it must be a number of zero or more")
    return weight


@dataclass(frozen=True)
class Span:
    """A range of whole records.

    Attributes:
        start: Its first byte.
        end: The byte after its last.
        line: The number of its first line, from 1.
        records: How many it holds.
    """

    start: int
    end: int
    line: int
    records: int


@dataclass(frozen=True)
class _Raw:
    """One record as it stands in the file: where it begins and ends, and its first line's number."""

    start: int
    end: int
    line: int
    content: bytes


def spans(path: Path, records: int) -> list[Span]:
    """Cuts a file into ranges of `records` records, in one pass; a header belongs to none.

    Raises:
        InputError: It cannot be read, or a record is longer than `MAX_RECORD`.
    """
    ranges: list[Span] = []
    started: _Raw | None = None
    count = 0
    last = 0
    with _opened(path) as stream:
        for raw in _body(path, stream, None):
            if started is None:
                started = raw
            count, last = count + 1, raw.end
            if count == records:
                ranges.append(Span(started.start, last, started.line, count))
                started, count = None, 0
    if started is not None:
        ranges.append(Span(started.start, last, started.line, count))
    return ranges


def read_records(path: Path, span: Span | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Records with their lines' numbers: a JSON object each, or the cells by the header's names.

    Args:
        path: The file; its ending tells what it is, see `DELIMITERS`.
        span: A range of it; all by default.

    Raises:
        InputError: It cannot be read, is not UTF-8, or a record cannot be parsed.
    """
    delimiter = DELIMITERS.get(path.suffix.lower())
    with _opened(path) as stream:
        header: list[str] | None = None
        if delimiter is not None:
            first = next(_raw(path, stream, Span(0, 0, 1, 1)), None)
            header = _cells(path, first, delimiter) if first else None
            twice = next((name for name, count in Counter(header or ()).items() if count > 1), None)
            if twice is not None:
                raise InputError(f"{path}: two columns are called {twice[:64]!r}; give each a name of its own")
        for raw in _body(path, stream, span):
            if header is None or delimiter is None:
                yield raw.line, _object(path, raw)
                continue
            cells = _cells(path, raw, delimiter)
            if any(cells[len(header) :]):
                raise InputError(f"{path}: line {raw.line} has {len(cells)} cells, the header {len(header)}")
            yield raw.line, dict(zip(header, cells, strict=False))


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def _body(path: Path, stream: BinaryIO, span: Span | None) -> Iterator[_Raw]:
    """The records of a range, or all but the header."""
    whole = _raw(path, stream, span)
    if span is None and path.suffix.lower() in DELIMITERS:
        next(whole, None)
    yield from whole


def _raw(path: Path, stream: BinaryIO, span: Span | None) -> Iterator[_Raw]:
    """Records as bytes, empty lines left out.

    A cell in quotes may hold line breaks; a quote in it is doubled, so that a record ends where the quotes are even.
    """
    quoted = path.suffix.lower() in DELIMITERS
    remaining = span.records if span else -1
    position, line = (span.start, span.line) if span else (0, 1)
    stream.seek(position)
    while remaining:
        start, first = position, line
        content = b""
        while True:
            part = stream.readline(MAX_RECORD + 1)
            content += part
            position, line = position + len(part), line + 1
            if len(content) > MAX_RECORD:
                raise InputError(f"{path}: line {first} is longer than {MAX_RECORD:,} bytes; is the file JSONL or CSV?")
            if not part or not (quoted and content.count(b'"') % 2):
                break
        if not content:
            return
        content = content.removeprefix(_MARK) if start == 0 else content
        if content.strip():
            remaining -= 1
            yield _Raw(start, position, first, content)


def _text(path: Path, raw: _Raw) -> str:
    try:
        return raw.content.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: line {raw.line} cannot be read as UTF-8 text ({error})") from error


def _cells(path: Path, raw: _Raw, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([_text(path, raw)], delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        raise InputError(f"{path}: line {raw.line} is not CSV ({error})") from error


def _object(path: Path, raw: _Raw) -> dict[str, Any]:
    text = _text(path, raw)
    try:
        row = parse_json(text, str(path))
    except InputError as error:
        raise InputError(
            f"{path}: line {raw.line} is not JSON ({error.__cause__}); a manifest or a list of pairs is .jsonl, .csv "
            "or .tsv"
        ) from error
    if not isinstance(row, dict):
        raise InputError(f"{path}: line {raw.line} is not a JSON object")
    return row
