"""The walk over folders of images: what is taken, what is left out, and that it says so."""

import os
import shutil
import warnings

import pytest
from PIL import Image, features

from invariclip.errors import InputError, SkippedFilesWarning
from invariclip.preprocessing.decode import looks_like, open_image
from invariclip.preprocessing.find import find_images

WITH_CODEC = [
    ("PNG", ".png"), ("JPEG", ".jfif"), ("JPEG", ".jpe"), ("BMP", ".bmp"), ("GIF", ".gif"), ("TIFF", ".tif"),
    ("PPM", ".pnm"), *([("WEBP", ".webp")] if features.check("webp") else []),
    *([("AVIF", ".avif")] if features.check("avif") else []),
    *([("JPEG2000", ".jp2")] if features.check("jpg_2000") else []),
]  # fmt: skip


@pytest.fixture
def image():
    return Image.radial_gradient("L").resize((40, 30)).convert("RGB")


@pytest.mark.parametrize(("kind", "suffix"), WITH_CODEC)
def test_every_format_is_found_by_its_suffix_and_by_its_content(image, tmp_path, kind, suffix):
    image.save(tmp_path / f"a{suffix}", kind)
    shutil.copy(tmp_path / f"a{suffix}", tmp_path / "without_suffix")
    shutil.copy(tmp_path / f"a{suffix}", tmp_path / "b.bin")
    wanted = [f"a{suffix}", "b.bin", "without_suffix"]
    if kind in ("BMP", "PPM"):  # two bytes are too few to tell
        wanted = wanted[:1]
    found = find_images([tmp_path])
    assert [path.name for path in found] == wanted
    assert {open_image(path).size for path in found} == {(40, 30)}


def test_what_is_no_image_is_left_without_a_word(image, tmp_path):
    image.save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("cats")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [path.name for path in find_images([tmp_path])] == ["a.png"]
    assert looks_like(b"") is None


@pytest.mark.parametrize("name", ["a.heic", "a.HEIF", "without_suffix"])
def test_heic_without_a_plug_in_is_named(image, tmp_path, name):
    image.save(tmp_path / "b.png")
    (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    with pytest.warns(SkippedFilesWarning, match=f"1 HEIC images, which need the package pillow-heif: .*{name}"):
        assert [path.name for path in find_images([tmp_path])] == ["b.png"]


def test_linked_folders_are_entered_once(image, tmp_path):
    (tmp_path / "real").mkdir()
    image.save(tmp_path / "real" / "a.png")
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "top" / "again").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "top")
    (tmp_path / "top" / "gone").symlink_to(tmp_path / "nowhere")
    assert find_images([tmp_path / "top"]) == [tmp_path / "top" / "again" / "a.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may enter every folder")
def test_closed_folders_are_named(image, tmp_path):
    image.save(tmp_path / "a.png")
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed").chmod(0)
    with pytest.warns(SkippedFilesWarning, match="1 folders that cannot be entered: .*closed"):
        assert len(find_images([tmp_path])) == 1
    (tmp_path / "closed").chmod(0o755)


def test_a_folder_that_cannot_be_listed_is_named(image, tmp_path, monkeypatch):
    image.save(tmp_path / "a.png")
    for number in range(5):
        (tmp_path / f"closed{number}").mkdir()
    scandir = os.scandir

    def closed(path):
        if "closed" in os.fspath(path):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.warns(SkippedFilesWarning, match=r"5 folders that cannot be entered: .*closed0, .*closed2, …$"):
        assert len(find_images([tmp_path])) == 1
    with pytest.raises(InputError, match="cannot be listed"):
        find_images([tmp_path / "closed0"])


def test_a_name_that_is_not_utf8_is_found_and_printable(image, tmp_path):
    image.save(os.fsencode(tmp_path) + b"/caf\xe9.png", "PNG")
    [found] = find_images([tmp_path])
    assert os.fsencode(found).endswith(b"caf\xe9.png")
    assert open_image(found).size == (40, 30)


def test_names_that_no_file_has_are_one_line(tmp_path):
    with pytest.raises(InputError, match=r"cannot be read|no such file"):
        find_images(["a" * 300])
    with pytest.raises(InputError, match="no such file or folder"):
        find_images([tmp_path / "absent"])
