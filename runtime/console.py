"""What every command shares: progress that libraries keep quiet about, JSON output, one-line errors."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import click
from tqdm import tqdm

T = TypeVar("T")
# what Python makes of bytes that are not UTF-8 (U+DC80 to U+DCFF), and other halves of surrogate pairs
_UNDECODED = re.compile("[\ud800-\udfff]")


def printable(text: str) -> str:
    """A text that any output can hold: a byte of a file name that is not UTF-8 is written as x and its two digits."""
    return _UNDECODED.sub(lambda sign: f"\\x{ord(sign[0]) & 0xFF:02x}" if sign[0] >= "\udc80" else "\ufffd", text)


def json_text(value: Any, *, indent: int | None = None) -> str:
    """JSON whose texts are as `printable` writes them."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    return _UNDECODED.sub(lambda sign: f"\\\\x{ord(sign[0]) & 0xFF:02x}" if sign[0] >= "\udc80" else "\ufffd", text)


class Progress(Protocol):
    """Wraps an iterable in a progress display; `silent` and `bar` are the two that exist."""

    def __call__(self, items: Iterable[T], *, total: int | None = None, desc: str = "") -> Iterable[T]:
        """Yields every item of `items` unchanged."""


def silent(items: Iterable[T], *, total: int | None = None, desc: str = "") -> Iterable[T]:
    """The library's default: no output at all."""
    return items


def bar(items: Iterable[T], *, total: int | None = None, desc: str = "") -> Iterable[T]:
    """A progress bar on standard error, so that standard output stays clean for results.

    Where standard error is a log and not a terminal, only work of over five seconds speaks, every ten seconds.
    """
    watched = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(
        items,
        total=total,
        desc=desc,
        file=sys.stderr,
        leave=False,
        dynamic_ncols=watched,
        mininterval=0.1 if watched else 10,
        delay=0 if watched else 5,
    )


def say(text: str = "") -> None:
    """Prints one line of a result to standard output."""
    click.echo(printable(text))


def note(text: str) -> None:
    """Prints one line about the work (not a result) to standard error."""
    click.echo(printable(text), err=True)


def emit_json(value: Any) -> None:
    """Prints a result as one JSON document on standard output."""
    click.echo(json_text(value, indent=2))


def table(header: list[str], rows: list[list[str]]) -> str:
    """A plain aligned text table; every row has as many cells as the header."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [header, *rows]
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


LARGEST_LIST = 1000
"""Unreadable images that are remembered by name; the others are counted."""


@dataclass
class UnreadableImages:
    """Images that could not be read: each is named when it is met, and up to `LARGEST_LIST` are remembered.

    Attributes:
        count: How many.
        listed: `image` and `error` of the first ones.
    """

    count: int = 0
    listed: list[dict[str, str]] = field(default_factory=list)

    def __call__(self, _place: int, image: object, error: Exception) -> None:
        """Counts one, and says so."""
        self.count += 1
        if len(self.listed) < LARGEST_LIST:
            self.listed.append({"image": str(image), "error": str(error)})
        note(f"invariclip: {error}")

    def facts(self) -> dict[str, Any]:
        """What a command's JSON says of them."""
        return {"unreadable": self.listed, "unreadable_count": self.count}
