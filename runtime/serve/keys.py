"""API keys from a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from invariclip.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

MAX_KEYS_BYTES = 1 << 20


def read_keys(path: Path) -> tuple[str, ...]:
    """Keys from a text file, one a line; blank lines and lines that start with `#` are none.

    Raises:
        InputError: The file cannot be read as text, is larger than 1 MiB, or holds none.
    """
    try:
        if path.stat().st_size > MAX_KEYS_BYTES:
            raise InputError(f"{path}: {path.stat().st_size:,} bytes is more than any list of keys")
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise InputError(f"{path}: holds no key; write one a line")
    return keys
