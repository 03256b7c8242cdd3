"""Packages: fetched by digest, brought by hand, and unpacked without trust; no network, no client."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from invariclip.errors import InputError
from invariclip.export.reference import packages
from invariclip.export.reference.packages import Package

if TYPE_CHECKING:
    from pathlib import Path

NAMES = Package("npm", "unicode-emoji-json", "0.9.0", "ae" * 32, "MIT", "LICENSE", "Mu-An Chiou", "names")
PACKAGES = {"names": NAMES}


@pytest.mark.parametrize("name", ["../evil.txt", "package/../../evil.txt", "/evil.txt", "a\\..\\evil.txt"])
@pytest.mark.parametrize("kind", ["a.tgz", "a.whl"])
def test_no_archive_leaves_its_folder(tmp_path: Path, name: str, kind: str):
    archive = tmp_path / kind
    if kind == "a.whl":
        with zipfile.ZipFile(archive, "w") as opened:
            opened.writestr(name, b"x")
    else:
        with tarfile.open(archive, "w:gz") as opened_tar:
            entry = tarfile.TarInfo(name)
            entry.size = 1
            opened_tar.addfile(entry, io.BytesIO(b"x"))
    with pytest.raises(InputError, match="refused"):
        packages.unpack(archive, tmp_path / "out" / "in")
    assert not list(tmp_path.rglob("evil.txt"))


def test_links_in_archives_are_not_followed_nor_made(tmp_path: Path):
    archive = tmp_path / "a.tgz"
    with tarfile.open(archive, "w:gz") as opened:
        link = tarfile.TarInfo("package/out")
        link.type, link.linkname = tarfile.SYMTYPE, "/"
        opened.addfile(link)
    packages.unpack(archive, tmp_path / "in")
    assert list((tmp_path / "in").iterdir()) == []


def test_a_package_of_another_digest_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def download(package: object, folder: Path, downloads: Path) -> Path:
        del package, downloads
        (folder / "a.tgz").write_bytes(b"something else")
        return folder / "a.tgz"

    monkeypatch.setattr(packages, "_download", download)
    with pytest.raises(InputError, match="not the pinned"):
        packages.fetch(PACKAGES["names"], tmp_path / "names")
    assert not (tmp_path / "names").exists()


def test_a_missing_client_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packages.shutil, "which", lambda _: None)
    with pytest.raises(InputError, match="`npm`, which is not installed"):
        packages.fetch(PACKAGES["names"], tmp_path / "names")


def wheel(path: Path) -> str:
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("inside/a.txt", "hello")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["a-1.0-py3-none-any.whl", "renamed by a browser (1).whl"])
def test_an_archive_that_was_brought_is_taken_without_a_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    (tmp_path / packages.DOWNLOADS).mkdir()
    digest = wheel(tmp_path / packages.DOWNLOADS / name)
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: pytest.fail("a client was called"))
    package = Package("pip", "a", "1.0", digest, "MIT", "", "", "")
    folder = packages.fetch(package, tmp_path / "a")
    assert (folder / "inside" / "a.txt").read_text() == "hello"
    # and what is unpacked is not unpacked again
    (tmp_path / packages.DOWNLOADS / name).unlink()
    assert packages.fetch(package, tmp_path / "a") == folder


def test_offline_the_file_to_bring_is_named_with_its_digest_and_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Failed:
        returncode, stdout, stderr = 1, "", "ERROR: no connection"

    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: Failed)
    with pytest.raises(InputError) as raised:
        packages.fetch(replace(NAMES, client="pip"), tmp_path / "names")
    said = str(raised.value)
    assert "no connection" in said
    assert NAMES.sha256 in said
    assert str(tmp_path / packages.DOWNLOADS) in said
    assert "\n" not in said


def test_fetching_all_goes_on_where_it_stopped(tmp_path: Path):
    (tmp_path / packages.DOWNLOADS).mkdir()
    archives = {key: tmp_path / packages.DOWNLOADS / f"{key}.whl" for key in ("one", "two")}
    wanted = {key: Package("pip", key, "1.0", wheel(path), "MIT", "", "", "") for key, path in archives.items()}
    first = packages.fetch_all({"one": wanted["one"]}, tmp_path)["one"]
    before = (first / ".sha256").stat().st_mtime_ns
    assert set(packages.fetch_all(wanted, tmp_path)) == {"one", "two"}
    assert (first / ".sha256").stat().st_mtime_ns == before
