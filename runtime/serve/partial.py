"""Answers in part: where a request allows it, an image that cannot be read has its error in its place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from invariclip.errors import InvariclipError
from invariclip.serve.record import ERROR_CHARACTERS, current

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from invariclip.serve.service import EncodedImage

R = TypeVar("R")


def parted(rows: Sequence[R | InvariclipError], images: Sequence[EncodedImage]) -> tuple[list[R], dict[int, str]]:
    """What was answered, in order, and by its place what is wrong with each of the other images.

    Args:
        rows: One for each image: its answer, or its error.
        images: What they are of.
    """
    failed = {
        place: _line(row, image.name)
        for place, (row, image) in enumerate(zip(rows, images, strict=True))
        if isinstance(row, InvariclipError)
    }
    current().failed += len(failed)
    return [row for row in rows if not isinstance(row, InvariclipError)], failed


def in_places(count: int, made: Iterable[R], failed: Mapping[int, R]) -> Iterator[R]:
    """One item for each of so many images: those that were made, in order, and the others at their places."""
    rest = iter(made)
    return (failed[place] if place in failed else next(rest) for place in range(count))


def errors_json(failed: Mapping[int, str], images: Sequence[EncodedImage]) -> list[dict[str, Any]]:
    """What is wrong with which image, JSON-ready."""
    return [{"index": place, "image": images[place].name, "error": line} for place, line in failed.items()]


def warning_of(failed: Mapping[int, str], count: int) -> list[str]:
    """A warning if some of so many images failed."""
    return [f"{len(failed)} of {count} images could not be read; their errors are in their places"] if failed else []


def _line(error: Exception, name: str) -> str:
    line = " ".join(str(error).removeprefix(f"image {name}: ").split())
    return line if len(line) <= ERROR_CHARACTERS else f"{line[:ERROR_CHARACTERS]} ..."
