"""Manifests and folders, what is wrong with them in one line; file names that mean objects, and those that do not."""

import json
import shutil
from collections import defaultdict
from pathlib import Path
from random import Random
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from invariclip.calibrate.data.images import (
    CoincidingNamesWarning,
    SkippedImageWarning,
    by_design,
    judge,
    keep,
    read_images,
    summarise,
)
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


PACS = Path(__file__).parents[4] / "shared" / "data" / "pacs"


def stems(files):
    """Of `environment/class/name`."""
    found = defaultdict(lambda: defaultdict(set))
    for file in files:
        environment, label, stem = file.split("/")
        found[label][stem].add(environment)
    return found


def drawn(root, files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / f"{file}.png")
    return root


def both(label, names):
    return [f"{environment}/{label}/{name}" for environment in ("noto", "sketch") for name in names]


@pytest.mark.parametrize(
    "names",
    [
        [f"pic_{n:03d}" for n in range(1, 9)], [f"IMG_{n:04d}" for n in range(40, 48)], [f"{n:05d}" for n in range(8)],
        ["pic_001"], ["1", "2"], ["056_0001", "056_0002", "056_0003"], ["dog (1)", "dog (2)", "dog (3)", "hound (4)"],
    ],
)  # fmt: skip
def test_numbers_of_files_are_not_objects(names):
    found = judge(stems(both("dog", names)))
    assert (found.coincidental, found.by_name) == ({"dog"}, set())


@pytest.mark.parametrize(
    "names", [["1f415", "1f429", "1f436"], ["2601", "2602", "26c5", "1f308"], ["rex", "fido"], ["rex2", "fido17"]]
)
def test_names_are_objects(names):
    found = judge(stems(both("dog", names)))
    assert (found.by_name, found.coincidental, found.unsure) == ({"dog"}, set(), set())


def test_a_number_with_the_class_is_an_object_where_all_environments_have_the_same_ones():
    found = judge(stems(both("hot_dog", [f"hot-dog-{n}" for n in range(20)])))
    assert (found.by_name, found.unsure) == ({"hot_dog"}, {"hot_dog"})
    fewer = both("hot_dog", [f"hot-dog-{n}" for n in range(20)])[:-1]
    assert judge(stems(fewer)).coincidental == {"hot_dog"}


@given(st.integers(3, 8), st.integers(250, 500), st.floats(0, 0.1), st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_objects_that_were_numbered_once_for_all_classes(classes, count, missing, seed):
    """Of 150 in 7 classes, what is missing looks by chance like files numbered in turn, once in some thousand draws."""
    random = Random(seed)  # noqa: S311
    labels = random.choices(range(classes), k=count)
    files = [
        f"{environment}/c{label}/{number}"
        for environment in ("a", "b")
        for number, label in enumerate(labels)
        if random.random() >= missing
    ]
    found = judge(stems(files))
    assert (len(found.by_name), found.coincidental) == (classes, set())


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=4),
    st.floats(0.3, 1),
    st.booleans(),
    st.integers(0, 999),
)
@settings(max_examples=80, deadline=None)
def test_files_that_were_numbered_in_turn_are_never_objects(counts, kept, through, seed):
    """In every class anew, or on through the classes; with some of the files missing."""
    files, first, random = [], [0, 0], Random(seed)  # noqa: S311
    for label, each in enumerate(counts):
        for place, count in enumerate(each):
            start, first[place] = (first[place], first[place] + count) if through else (0, 0)
            files += [f"e{place}/c{label}/{n}" for n in range(start, start + count) if random.random() < kept]
    assert not by_design(stems(files))
    assert judge(stems(files)).by_name == set()


def test_a_set_that_was_thinned_by_name_alone_is_not_taken_for_objects():
    kept = {label: {n for n in range(200) if crc32(b"%d/%d" % (label, n)) % 2} for label in range(6)}
    files = [f"{env}/c{label}/pic_{n}" for env in "ab" for label, numbers in kept.items() for n in numbers]
    assert not judge(stems(files)).by_name


def test_a_folder_says_what_it_did_and_what_to_say(tmp_path):
    drawn(tmp_path, both("house", [f"pic_{n:03d}" for n in range(1, 5)]) + both("dog", ["1f415", "1f429"]))
    with pytest.warns(CoincidingNamesWarning, match="4 pairs of equal file names in 1 of 2 classes") as told:
        images = read_images(tmp_path)
    assert "such as house/pic_001 in noto and sketch" in str(told[0].message)
    assert "--pairs-by name" in str(told[0].message)
    assert "\n" not in str(told[0].message)
    assert {image.concept for image in images} == {"house", "dog/1f415", "dog/1f429"}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("by", "concepts"), [("name", {"dog/1", "dog/2"}), ("class", {"dog"})])
def test_what_is_asked_for_is_done_without_a_word(tmp_path, by, concepts):
    drawn(tmp_path, both("dog", ["1", "2"]))
    assert {image.concept for image in read_images(tmp_path, pairs_by=by)} == concepts


@pytest.mark.filterwarnings("error")
def test_shared_names_are_read_without_a_word(tmp_path):
    drawn(tmp_path, both("dog", ["1f415", "1f429"]))
    assert {image.concept for image in read_images(tmp_path)} == {"dog/1f415", "dog/1f429"}


def test_the_same_names_with_the_class_are_taken_and_told(tmp_path):
    drawn(tmp_path, both("cat", ["cat-1", "cat-17", "cat-18"]))
    with pytest.warns(CoincidingNamesWarning, match="3 pairs .*: they are taken for one object; say --pairs-by name"):
        assert len({image.concept for image in read_images(tmp_path)}) == 3


def test_a_manifest_says_it_itself(manifest, tmp_path):
    with pytest.raises(InputError, match="a manifest says in its column concept"):
        read_images(manifest, pairs_by="class")
    with pytest.raises(InputError, match="'colour'; available: auto, name, class"):
        read_images(tmp_path, pairs_by="colour")


def test_command_line(tmp_path, run, tiny_checkpoint):
    files = [f"{env}/{label}/pic_{n}" for env in ("a", "b") for label in ("dog", "cat") for n in range(3)]
    drawn(tmp_path / "set", files)
    for file in (tmp_path / "set").rglob("*.png"):
        Image.effect_noise((8, 8), 40).convert("RGB").save(file)
    common = ["--model", tiny_checkpoint, "--images", tmp_path / "set", "--cache", tmp_path / "cache", "--quiet"]
    common += ["--estimator", "shrinkage", "--strength", "1", "--objective", "prototypes", "-o", tmp_path / "p"]
    answers = {}
    for by in ("auto", "class", "name"):
        code, answers[by], said = run("calibrate", "--json", *common, "--pairs-by", by)
        assert code == 0
        assert ("say --pairs-by name if equal names mean one object" in said) == (by == "auto")
    assert answers["auto"] == answers["class"]
    assert answers["class"] != answers["name"]


@pytest.mark.skipif(not PACS.is_dir(), reason="needs the half of PACS beside the repository, ../shared/data/pacs")
def test_the_two_drawn_domains_of_pacs_count_their_files(tmp_path):
    """As the whole set comes: from 1 on in every class. The half at hand has gaps, other ones in each domain."""
    for folder in PACS.glob("*/*"):
        (tmp_path / folder.relative_to(PACS)).mkdir(parents=True)
        for number, file in enumerate(sorted(folder.iterdir()), 1):
            (tmp_path / folder.relative_to(PACS) / f"pic_{number:03d}{file.suffix}").symlink_to(file)
    with pytest.warns(CoincidingNamesWarning, match="house/pic_001 in art_painting and cartoon|look like numbers"):
        images = read_images(tmp_path)
    classes = {folder.name for folder in (PACS / "photo").iterdir()}
    assert {image.concept for image in images} == classes
    assert {image.concept for image in read_images(PACS)} == classes
    assert len({image.concept for image in read_images(tmp_path, pairs_by="name")}) > 1000
