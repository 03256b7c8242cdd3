"""What a file was when the shards were listed: its size and time of change; another content is another shard."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def stamp(path: Path) -> list[int]:
    """Size in bytes and time of change in nanoseconds; empty for what is missing or no regular file."""
    try:
        facts = path.stat()
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return []
    return [facts.st_size, facts.st_mtime_ns] if stat.S_ISREG(facts.st_mode) else []


def require_file(path: Path) -> list[int]:
    """The stamp of a file that must be there.

    Raises:
        InputError: It is not.
    """
    found = stamp(path)
    if not found:
        raise InputError(f"{path}: no such file")
    return found


def require_unchanged(path: Path, listed: Sequence[int]) -> None:
    """Makes sure that a file is still what was listed: a shard's digest must tell what it holds.

    Raises:
        InputError: It is not.
    """
    if stamp(path) != list(listed):
        raise InputError(f"{path}: has changed since the shards were listed; start again, what is done is kept")
