"""How the reference is learnt: words, directions, views, the regression and the head; tiny data, no network."""

from __future__ import annotations

import math
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from invariclip.bench.studies.reference import __main__ as command
from invariclip.bench.studies.reference import imagenet, images, learn, validation, views
from invariclip.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

NOUN = "{offset} 05 n {count:02x} {lemmas} {pointers:03d} {targets} | gloss\n"


def nouns(tmp_path: Path) -> Path:
    path = tmp_path / "data.noun"
    beagle = NOUN.format(offset="00000003", count=1, lemmas="beagle 0", pointers=1, targets="@ 00000002 n 0000")
    dog = NOUN.format(
        offset="00000002", count=2, lemmas="dog 0 domestic_dog 0", pointers=2,
        targets="@ 00000001 n 0000 ~ 00000003 n 0000",
    )  # fmt: skip
    animal = NOUN.format(offset="00000001", count=2, lemmas="animal 0 organism 0", pointers=0, targets="")
    path.write_text("  1 a licence line\n" + animal.replace("  |", " |") + dog + beagle)
    return path


def test_kinds_climb_from_near_to_far_without_abstract_words(tmp_path):
    assert imagenet.kinds_of("00000003", imagenet.read_nouns(nouns(tmp_path))) == ("dog", "domestic dog", "animal")


def test_a_missing_word_list_is_one_line(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        imagenet.read_nouns(tmp_path / "data.noun")


def test_the_mean_of_photographs_is_that_of_clipped_normals():
    scale, shift = torch.tensor([1.0, 0.5, 3.0, 0.2]), torch.tensor([0.0, 1.0, 5.0, -4.0])
    draws = np.random.default_rng(0).normal(size=(400_000, 4)) * scale.numpy() + shift.numpy()
    assert np.allclose(imagenet.photograph_mean(scale, shift), np.clip(draws, 0, 6).mean(axis=0), atol=0.02)


def test_directions_are_unit_and_centred():
    rows = imagenet.class_directions(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)))
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


def test_classes_of_clothing_show_people_and_others_their_usual_kind():
    coat = imagenet.ImageClass(("coat",), ("garment",), "", True)
    beagle = imagenet.ImageClass(("beagle",), ("hound dog", "dog", "animal"), "", False)
    assert learn.usual_kinds(coat, {"garment"}) == imagenet.PERSON
    assert learn.usual_kinds(beagle, {"dog", "animal", "hound dog"}) == ("dog", "animal")


SVG = (
    "<svg><metadata><rdf:RDF><dc:title>{title}</dc:title><dc:subject><rdf:Bag><rdf:li>{subject}</rdf:li>"
    "<rdf:li>hash</rdf:li></rdf:Bag></dc:subject></rdf:RDF></metadata></svg>"
)


def clip_art_packages(tmp_path: Path, files: dict[str, tuple[str, str]]) -> tuple[Path, Path]:
    for name, (title, subject) in files.items():
        svg = tmp_path / "svg" / images.SVG_ROOT / f"{name}.svg"
        png = tmp_path / "png" / images.PNG_ROOT / f"{name}.png"
        for path in (svg, png):
            path.parent.mkdir(parents=True, exist_ok=True)
        svg.write_text(SVG.format(title=title, subject=subject))
        Image.new("RGBA", (20, 10), (255, 0, 0, 255)).save(png)
    return tmp_path / "svg", tmp_path / "png"


def test_clip_art_is_what_can_be_seen_and_says_what_it_is(tmp_path):
    folders = clip_art_packages(
        tmp_path,
        {
            "animals/cat": ("A_Cat 02", "pet"),
            "people/boy": ("A happy boy", "child"),
            "transportation/stop": ("Road Signs", "roadsign"),
            "signs_and_symbols/flag": ("Flag", "flag"),
            "tools/saw": ("Various Cliparts", "saw"),
            "tools/nothing": ("Various Cliparts", "unsorted"),
        },
    )
    found = {item.png.stem: (item.title, item.subjects) for item in images.read_clip_art(*folders)}
    assert found == {"cat": ("a cat", ("pet",)), "boy": ("a happy boy", ("child", "person")), "saw": ("saw", ("saw",))}
    shown = images.clip_art(*folders, tmp_path / "out")
    assert {image.name for image in shown} == {"a cat", "a happy boy", "saw"}
    assert Image.open(shown[0].path).size == (256, 256)


def resources(path: Path, name: str, content: bytes, *, squeezed: bool) -> None:
    """A Qt resource archive of version 1 with one file."""
    data = struct.pack(">I", len(content)) + zlib.compress(content) if squeezed else content
    blobs = struct.pack(">I", len(data)) + data
    encoded = name.encode("utf-16-be")
    names = struct.pack(">HI", len(name), 0) + encoded
    tree = struct.pack(">IHII", 0, 2, 1, 1) + struct.pack(">IHHHI", 0, int(squeezed), 0, 0, 0)
    header = struct.pack(">4I", 1, 20, 20 + len(tree), 20 + len(tree) + len(blobs))
    path.write_bytes(b"qres" + header + tree + blobs + names)


@pytest.mark.parametrize("squeezed", [False, True])
def test_resource_archives_are_read(tmp_path, squeezed):
    resources(tmp_path / "a.rcc", "toucan.webp", b"image", squeezed=squeezed)
    assert list(validation.read_resources(tmp_path / "a.rcc")) == [("toucan.webp", b"image")]


@given(st.data())
def test_damaged_resource_archives_are_one_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("rcc") / "a.rcc"
    resources(path, "toucan.webp", b"image", squeezed=True)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        list(validation.read_resources(path))
    except InputError as error:
        said = str(error)
    else:
        said = ""
    assert "\n" not in said


def test_views_are_drawn_by_seed_and_leave_the_drawing_in_place():
    image = Image.new("RGB", (256, 256), "white")
    image.paste((200, 30, 30), (80, 80, 176, 176))
    one, same, other = (views.alter(image, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert one.size == (views.SIDE, views.SIDE)
    assert np.array_equal(np.asarray(one), np.asarray(same))
    assert not np.array_equal(np.asarray(one), np.asarray(other))


def test_features_are_kept_and_a_stopped_run_resumes(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    calls = []

    def trunk(batch):
        calls.append(len(batch))
        return batch.mean(axis=(2, 3))

    def features(count):
        return views.features(lambda: trunk, [tmp_path / "a.png"], ["aa"], count, tmp_path / "kept")

    first = features(1)
    assert first.shape == (1, 1, 3)
    both = features(2)
    assert np.array_equal(both[0], first[0])
    assert calls == [1, 1]
    assert np.array_equal(features(2), both)
    assert calls == [1, 1]


def small_targets(texts: int, width: int) -> learn.Targets:
    rng = np.random.default_rng(0)
    means = rng.normal(size=(texts, width))
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    return learn.Targets(tuple(str(k) for k in range(texts)), means, np.ones(texts), np.zeros(width, dtype=np.float32))


def test_the_regression_is_the_closed_form_in_float64():
    targets = small_targets(12, 5)
    points = torch.randn(3, 12, 16, generator=torch.Generator().manual_seed(1))
    settings = learn.TrainingSettings(ridge=0.2, width=0.8)
    answers = learn.Regression(points, targets, settings)(points[0]).numpy()
    p = points.double().numpy()
    unit = lambda rows: rows / np.linalg.norm(rows, axis=-1, keepdims=True)  # noqa: E731
    centre = unit(p.mean(axis=(0, 1)))
    own = unit(sum(unit(unit(each) - centre) for each in p))
    kernel = lambda a, b: np.exp((a @ b.T - 1) / 0.64)  # noqa: E731
    expected = kernel(unit(unit(p[0]) - centre), own) @ np.linalg.solve(
        kernel(own, own) + 0.2 * np.eye(12), targets.means
    )
    assert np.allclose(answers, expected, atol=1e-4)


def test_the_head_learns_to_answer_as_the_regression_does_and_repeats():
    targets = small_targets(40, 6)
    embeddings = torch.randn(len(learn.TEMPLATES), 40, 16, generator=torch.Generator().manual_seed(2))
    settings = learn.TrainingSettings(steps=150, batch=64, rate=1e-2)
    teacher = learn.Regression(embeddings[: learn.PLAIN], targets, settings)
    head, log = learn.distil(teacher, embeddings, targets.weights, settings)
    again, _ = learn.distil(teacher, embeddings, targets.weights, settings)
    assert log[-1]["loss"] < 0.1
    assert torch.equal(head[0].weight, again[0].weight)
    assert head[0].weight.shape == ((16 + 6) // 2, 16)


def test_targets_take_each_sources_mean_away():
    def shown(source, name, k):
        return images.CaptionedImage(source, None, str(k), name, (), "", "train")

    some = [shown("emoji", "dog", 0), shown("emoji", "cat", 1), shown("clipart", "dog", 2), shown("clipart", "cat", 3)]
    style = np.array([[5.0, 0, 0], [5, 0, 0], [-5, 0, 0], [-5, 0, 0]])
    thing = np.array([[0, 1.0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1]])
    features = (style + thing)[None].astype(np.float32)
    found = learn.targets(some, features, [], np.zeros((0, 3)), np.zeros(3, dtype=np.float32), learn.TrainingSettings())
    means = dict(zip(found.texts, found.means, strict=True))
    assert means["dog"] @ means["cat"] == pytest.approx(-1)
    assert abs(means["dog"][0]) < 1e-9
    assert math.isclose(found.weights.sum(), 4)


def test_packages_are_pinned():
    assert all(len(package.sha256) == 64 for package in command.PACKAGES.values())
