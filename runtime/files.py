"""Digests, the cache folder, and atomic writes: a reader sees the old file or the whole new one, never a part."""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import os
import secrets
import shutil
import stat
import sys
import tempfile
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from invariclip.errors import InputError

try:
    locks: Any = import_module("fcntl")
except ImportError:  # Windows
    locks = None

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from typing import BinaryIO


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def path_kind(path: Path) -> Literal["folder", "file", ""]:
    """What stands at a path that a user or a file names, links followed; "" for nothing, and for what is no file.

    Raises:
        InputError: The system does not say: no permission, or a name that no file can have.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: cannot be read ({reason})") from error
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else ""


def user_cache() -> Path:
    """Where what can be made again is kept when no folder is named: `invariclip` in XDG_CACHE_HOME, else in ~/.cache.

    Raises:
        InputError: This user has no home folder, as in some containers.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    if root:
        return Path(root) / "invariclip"
    try:
        return Path.home() / ".cache" / "invariclip"
    except RuntimeError as error:
        raise InputError("this user has no home folder for a cache: set XDG_CACHE_HOME, or give --cache") from error


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes a file that has no name until it is whole and on disk, then puts it in the place of `path`.

    Raises:
        InputError: The folder cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _nameless(path, data) or _hidden(path, data)
        try:
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


@contextmanager
def new_directory(path: Path, *, owned: Callable[[Path], Collection[str]] | None = None) -> Iterator[Path]:
    """A folder to fill that takes the name `path` only when the block ends well, in one step where the system can.

    At every moment `path` is the old folder or the whole new one. What stood there is removed; folders that killed runs
    left beside it are too. Where `path` is a link, the folder that it leads to is replaced and the link stays.

    Args:
        path: The folder.
        owned: The names in the old folder that may go; everything else is taken over into the new one. None lets
            everything go.

    Raises:
        InputError: The parent cannot be written, or `path` is a file.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file, not a folder; name another output")
    target = path.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=_UNFINISHED))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
    try:
        with _locked(temporary):
            with _full_disk(path, temporary):
                yield temporary
            temporary.chmod(0o755)
            if target.exists():
                if owned is not None:
                    _take_over(target, temporary, owned(target))
                _exchange(temporary, target)
            else:
                temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # unfinished, or what stood there before


@contextmanager
def _full_disk(path: Path, temporary: Path) -> Iterator[None]:
    """Names `path` where a disk is full, rather than the hidden folder or, after a copy, the file that was read."""
    try:
        yield
    except OSError as error:
        names = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        ours = not names or any(name.is_relative_to(temporary) for name in names)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or not ours:
            raise
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error


_UNFINISHED = ".unfinished"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _nameless(path: Path, data: bytes) -> Path | None:
    """The content under a name of its own beside `path`; None where the file system needs a name from the start.

    A process that is killed while it writes leaves nothing behind: the file has no name before it is whole.
    """
    if not hasattr(os, "O_TMPFILE"):
        return None
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            handle = os.open(path.parent, os.O_TMPFILE | os.O_WRONLY, 0o644)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
                return None
            raise
        with os.fdopen(handle, "wb") as stream:
            _write_all(stream, data)
            os.fchmod(handle, 0o644)
            name = f".{path.name[:200]}.{secrets.token_hex(8)}"
            try:
                os.link(f"/proc/self/fd/{handle}", name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=True)
            except OSError:  # no /proc, or a file system that gives no second name
                return None
        return path.parent / name
    finally:
        os.close(folder)


def _hidden(path: Path, data: bytes) -> Path:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:200]}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            _write_all(stream, data)
        temporary.chmod(0o644)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _write_all(stream: BinaryIO, data: bytes) -> None:
    stream.write(data)
    stream.flush()
    os.fsync(stream.fileno())


def _exchange(new: Path, old: Path) -> None:
    """Lets two folders change names in one step; where the system has no such call, in two."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if call is not None and call(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
        return
    retired = new.with_name(f"{new.name.removesuffix(_UNFINISHED)}.old")  # never swept: it may be all that there is
    old.replace(retired)
    try:
        new.replace(old)
    except OSError:
        retired.replace(old)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def _take_over(old: Path, new: Path, owned: Collection[str]) -> None:
    """Puts what is not ours in the old folder into the new one as well, as further names of the same files."""
    for entry in old.iterdir():
        if entry.name in owned or (new / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_linked)
        else:
            _linked(entry, new / entry.name)


def _linked(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Marks a folder as being filled by a process that lives."""
    if locks is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            locks.flock(handle, locks.LOCK_EX | locks.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _sweep(target: Path) -> None:
    """Removes what killed runs left beside `target`; the folders of runs that live are locked."""
    if locks is None:
        return
    for left in target.parent.glob(f".{glob.escape(target.name)}.*{_UNFINISHED}"):
        with suppress(OSError):
            handle = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
            try:
                locks.flock(handle, locks.LOCK_EX | locks.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(handle)
