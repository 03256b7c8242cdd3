"""Digests and atomic writes: a reader sees the old file or the whole new one, never a part."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes beside `path`, flushes to disk, then renames over it.

    Raises:
        InputError: The folder cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A folder to fill that takes the name `path` only when the block ends well; what stood there is replaced.

    Raises:
        InputError: The parent cannot be written, or `path` is a file.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file, not a folder; name another output")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        retired = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
        if path.exists():
            path.replace(retired / "old")
        temporary.replace(path)
        shutil.rmtree(retired)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
