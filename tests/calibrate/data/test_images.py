"""Manifests and folders, and what is wrong with them in one line."""

import json
import shutil

import pytest
from PIL import Image

from invariclip.calibrate.data.images import SkippedImageWarning, keep, read_images, summarise
from invariclip.errors import InputError


def write(folder, files):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / file)


def test_jsonl(manifest):
    images = read_images(manifest)
    assert len(images) == 30
    first = images[0]
    assert (first.concept, first.name, first.environment, first.split) == ("c0", "thing 0", "red", "test")
    assert first.path == manifest.parent / "red" / "0.png"


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("path,concept,name,environment", "a.png,1,cat,x"),
        ("file,id,class,domain", "a.png,1,cat,x"),
        ("image,id,label,style", "a.png,1,cat,x"),
    ],
)
def test_csv_aliases(tmp_path, header, row):
    (tmp_path / "m.csv").write_text(f"{header}\n{row}\n")
    (image,) = read_images(tmp_path / "m.csv")
    assert (image.concept, image.name, image.environment, image.split) == ("1", "cat", "x", None)


def test_concept_and_name_stand_in_for_each_other(tmp_path):
    (tmp_path / "m.csv").write_text("path,class,env\na.png,cat,x\n")
    (tmp_path / "n.csv").write_text("path,concept,env\na.png,cat,x\n")
    for name in ("m.csv", "n.csv"):
        (image,) = read_images(tmp_path / name)
        assert (image.concept, image.name) == ("cat", "cat")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "lists no image"),
        ('{"file": "a.png"}', "no column for the environment .*it has: file"),
        ('{"style": "x", "concept": "a"}', "no column for the path"),
        ('{"file": "a.png", "style": "x"}', "no column for the concept .*or name or class"),
        ("{not json", "line 1 is not JSON"),
        ("[1]", "line 1 is not a JSON object"),
        ('{"file": "", "style": "x", "concept": "a"}', "line 1 has no 'file'"),
        ('{"file": "../a.png", "style": "x", "concept": "a"}', "outside its folder"),
        ('{"file": "/etc/passwd", "style": "x", "concept": "a"}', "outside its folder"),
    ],
)
def test_bad_manifests(tmp_path, content, said):
    (tmp_path / "m.jsonl").write_text(content)
    with pytest.raises(InputError, match=said) as caught:
        read_images(tmp_path / "m.jsonl")
    assert "\n" not in str(caught.value)


def test_links_do_not_leave_the_folder(tmp_path):
    write(tmp_path, ["secret.png"])
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "set" / "m.jsonl").write_text('{"file": "a.png", "style": "x", "concept": "a"}')
    with pytest.raises(InputError, match="outside its folder"):
        read_images(tmp_path / "set" / "m.jsonl")
    assert len(read_images(tmp_path / "set" / "m.jsonl", allow_outside=True)) == 1


def test_missing_and_empty(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        read_images(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no image in this folder"):
        read_images(tmp_path)
    write(tmp_path, ["flat.png"])
    with pytest.raises(InputError, match="environment/class/file"):
        read_images(tmp_path)


def test_not_text(tmp_path):
    write(tmp_path, ["a.png"])
    shutil.copy(tmp_path / "a.png", tmp_path / "m.jsonl")
    with pytest.raises(InputError, match="UTF-8"):
        read_images(tmp_path / "m.jsonl")


def test_folder_shared_stems_are_objects(tmp_path):
    write(tmp_path, ["photo/hot_dog/a.png", "photo/hot_dog/b.png", "sketch/hot_dog/a.png", "sketch/hot_dog/b.png"])
    images = read_images(tmp_path)
    assert {image.concept for image in images} == {"hot_dog/a", "hot_dog/b"}
    assert {image.name for image in images} == {"hot dog"}
    assert {image.environment for image in images} == {"photo", "sketch"}


def test_folder_accidental_stems_are_not(tmp_path):
    write(tmp_path, [f"photo/dog/p{i}.png" for i in range(9)] + [f"sketch/dog/s{i}.png" for i in range(9)])
    write(tmp_path, ["photo/dog/same.png", "sketch/dog/same.png"])
    assert {image.concept for image in read_images(tmp_path)} == {"dog"}


def test_stray_images_are_said(tmp_path):
    write(tmp_path, ["photo/dog/1.png", "photo/thumbnail.png"])
    with pytest.warns(SkippedImageWarning, match="1 images outside environment/class/"):
        assert len(read_images(tmp_path)) == 1


def test_filters(manifest):
    images = read_images(manifest)
    assert len(keep(images, environments=["red", "blue"])) == 20
    assert len(keep(images, splits=["train"])) == 27
    with pytest.raises(InputError, match="environment 'rde'; available: blue, green, red"):
        keep(images, environments=["rde"])
    with pytest.raises(InputError, match="split 'val'; available: test, train"):
        keep(images, splits=["val"])


def test_filter_without_the_column(tmp_path):
    (tmp_path / "m.jsonl").write_text(json.dumps({"file": "a.png", "style": "x", "concept": "a"}))
    with pytest.raises(InputError, match="none, the images carry no split"):
        keep(read_images(tmp_path / "m.jsonl"), splits=["train"])


def test_summary_counts_what_cannot_be_paired(manifest):
    images = [p for p in read_images(manifest) if p.environment == "red" or p.concept != "c3"]
    summary = summarise(images)
    assert summary["unpaired_concepts"] == 1
    assert summary["environments"] == {"blue": 9, "green": 9, "red": 10}
