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

    What a run that was killed at that moment left beside `path` is removed by the next write.

    Raises:
        InputError: The folder cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _whole(path, data) as temporary:
            temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


def require_writable(path: Path, remedy: str = "") -> None:
    """Tries, before long work, whether a file or folder can be made at `path`; nothing is left of the trial.

    Args:
        path: What is to be written; folders above it may be missing.
        remedy: What the error says at its end.

    Raises:
        InputError: Its folder, or the first one above it that is there, cannot be written.
    """
    above = path.absolute().parent
    while not os.path.lexists(above):
        above = above.parent
    try:
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{above} is not a folder")
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}){remedy}") from error


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
        temporary, handle = _claimed(target.parent, f".{target.name}.")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
    try:
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
        _close(handle)


@contextmanager
def scratch_directory(parent: Path | None = None) -> Iterator[Path]:
    """A folder that is removed when the block ends, or by the next one in the same place if this process is killed.

    Args:
        parent: Where it is made; None takes the system's folder for temporary files.

    Raises:
        InputError: The parent cannot be written.
    """
    where = Path(tempfile.gettempdir()) if parent is None else parent
    try:
        made, handle = _claimed(where, "invariclip-")
    except OSError as error:
        raise InputError(f"{where}: cannot be written ({error.strerror or error})") from error
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
        _close(handle)


@contextmanager
def _full_disk(path: Path, temporary: Path) -> Iterator[None]:
    """Names `path` where a disk is full, rather than the hidden folder or, after a copy, the file that was read."""
    try:
        yield
    except (OSError, InputError) as error:
        of_system = error.__cause__ if isinstance(error, InputError) else error  # see `write_atomically`
        if not isinstance(of_system, OSError) or of_system.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        files = (of_system.filename, of_system.filename2)
        names = [Path(os.fsdecode(name)) for name in files if isinstance(name, str | bytes)]
        if names and not any(name.is_relative_to(temporary) for name in names):
            raise
        raise InputError(f"{path}: cannot be written ({of_system.strerror})") from error


_UNFINISHED = ".unfinished"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def _whole(path: Path, data: bytes) -> Iterator[Path]:
    """The content, whole and on disk, under a hidden name beside `path`; locked, where locks are, until the block ends.

    A process that is killed while it writes leaves nothing behind where the file system can: the file has no name
    before it is whole. Else it leaves its hidden name, which is always the same, and which nobody locks any more.
    """
    start = os.fsencode(path.name)[:200].decode("utf-8", "ignore")
    hidden = path.with_name(f".{start}{_UNFINISHED}")
    handle, named = _nameless(path.parent), None
    try:
        if handle is not None:
            _write_all(handle, data)
            named = _named(handle, hidden)
        if handle is None or named is None:
            _close(handle)
            handle, named = _created(hidden)
            _write_all(handle, data)
        if locks is None:  # Windows gives no other name to a file that is open
            _close(handle)
            handle = None
        yield named
    except BaseException:
        if named is not None:
            named.unlink(missing_ok=True)
        raise
    finally:
        _close(handle)


def _nameless(folder: Path) -> int | None:
    """A file to write that has no name, locked; None where the file system needs a name from the start."""
    if not hasattr(os, "O_TMPFILE") or locks is None:
        return None
    try:
        handle = os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o644)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
            return None
        raise
    _lock(handle)
    return handle


def _named(handle: int, hidden: Path) -> Path | None:
    """Gives a file without a name the hidden one, or one of its own where a process that lives has that one.

    None where the system has no /proc, or its file system gives no second name.
    """
    folder = os.open(hidden.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in (hidden.name, hidden.name, f"{hidden.name}.{secrets.token_hex(8)}"):
            try:
                os.link(f"/proc/self/fd/{handle}", name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=True)
            except FileExistsError:
                _remove_left(hidden)
            except OSError:
                return None
            else:
                return hidden.with_name(name)
        return None
    finally:
        os.close(folder)


def _created(hidden: Path) -> tuple[int, Path]:
    """An empty file of the hidden name, or of one of its own where a process that lives has that one; locked."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
    for _ in range(2 if locks is not None else 0):
        try:
            handle = os.open(hidden, flags, 0o600)
        except FileExistsError:
            _remove_left(hidden)
            continue
        _lock(handle)
        if _is_still(handle, hidden):
            return handle, hidden
        os.close(handle)  # another process took it for one that was left
    handle, name = tempfile.mkstemp(dir=hidden.parent, prefix=f"{hidden.name}.")
    _lock(handle)
    return handle, Path(name)


def _write_all(handle: int, data: bytes) -> None:
    with os.fdopen(handle, "wb", closefd=False) as stream:
        stream.write(data)
        stream.flush()
        os.fsync(handle)
    if hasattr(os, "fchmod"):
        os.fchmod(handle, 0o644)


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


def _claimed(parent: Path, prefix: str) -> tuple[Path, int | None]:
    """A new folder, locked by this process for as long as the handle is open; folders that killed runs left go first.

    Args:
        parent: Where it is made.
        prefix: Of its name, and of the names of those that were left.
    """
    _sweep(parent, prefix)
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=prefix, suffix=_UNFINISHED))
        if locks is None:
            return folder, None
        handle = os.open(folder, os.O_RDONLY)
        _lock(handle)
        if _is_still(handle, folder):
            return folder, handle
        os.close(handle)  # another process took it for one that was left, before it was locked


def _sweep(parent: Path, prefix: str) -> None:
    """Removes folders of this user that killed runs left; those of runs that live are locked."""
    if locks is None:
        return
    for left in parent.glob(f"{glob.escape(prefix)}*{_UNFINISHED}"):
        with suppress(OSError), _unlocked(left, os.O_DIRECTORY):
            shutil.rmtree(left, ignore_errors=True)


def remove_left(folder: Path) -> None:
    """Removes what killed runs left of files in a folder that is not written any more, see `write_atomically`."""
    if locks is not None:
        for file in folder.glob(f".*{_UNFINISHED}*"):
            _remove_left(file)


def _remove_left(file: Path) -> None:
    """Removes a file that a killed run left; that of a run that lives is locked."""
    with suppress(OSError), _unlocked(file, os.O_NONBLOCK):
        file.unlink()


@contextmanager
def _unlocked(path: Path, flags: int) -> Iterator[None]:
    """Holds the lock of what nobody else holds.

    Raises:
        OSError: A process that lives holds it, it is another user's or a link, or the file system has no locks.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | flags)
    try:
        locks.flock(handle, locks.LOCK_EX | locks.LOCK_NB)
        if os.fstat(handle).st_uid != os.geteuid() or not _is_still(handle, path):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        yield
    finally:
        os.close(handle)


def _lock(handle: int) -> None:
    """Marks a file or folder as that of a process that lives; does nothing on a file system without locks."""
    with suppress(OSError):
        locks.flock(handle, locks.LOCK_EX)


def _is_still(handle: int, path: Path) -> bool:
    """Whether the name leads to what is open."""
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except OSError:
        return False


def _close(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)
