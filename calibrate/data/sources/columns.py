"""Lists of explicit pairs: two members and a weight in every record of a JSONL, CSV or TSV file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from invariclip.calibrate.data.records import Span, read_records
from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

PATHS = {
    "first": ("first", "first_path", "image_1", "image1", "path_1", "path1", "a"),
    "second": ("second", "second_path", "image_2", "image2", "path_2", "path2", "b"),
}
"""What the columns of a list of image pairs may be called; the first that is there counts."""
TEXTS = {
    "first": ("first", "first_text", "text_1", "text1", "caption_1", "caption1", "a"),
    "second": ("second", "second_text", "text_2", "text2", "caption_2", "caption2", "b"),
}
"""Likewise for pairs of texts."""


@dataclass(frozen=True)
class Listed:
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


def read_pairs(path: Path, span: Span | None, columns: Mapping[str, tuple[str, ...]]) -> Iterator[Listed]:
    """The pairs of a file, or of a range of it.

    Args:
        path: The file.
        span: The range; all by default.
        columns: `PATHS` or `TEXTS`.

    Raises:
        InputError: A record cannot be parsed, lacks a member, or has a weight that is negative or no number.
    """
    for line, row in read_records(path, span):
        first, second = (_member(path, line, row, name, columns[name]) for name in ("first", "second"))
        yield Listed(line, first, second, _weight(path, line, row.get("weight")))


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
