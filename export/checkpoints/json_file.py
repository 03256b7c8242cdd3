"""JSON files that come with a model: bounded before they are read, one line where they are not what they should be."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from invariclip.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path


def read_object(path: Path, what: str, *, most: int) -> dict[str, Any]:
    """Reads a JSON file that holds one object.

    Args:
        path: The file.
        what: What it should be, for the error: `a model's config`.
        most: Bytes from which it is refused before it is read.

    Raises:
        CheckpointError: It is missing, larger, not JSON, nested too deep to be read, or holds no object.
    """
    try:
        if path.stat().st_size > most:
            raise CheckpointError(f"{path}: more than {most} bytes; not {what}")
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(plain, dict):
        raise CheckpointError(f"{path}: not {what}, it holds a {type(plain).__name__}")
    return plain
