"""The committed pictures are what their manifest says, licensed, split apart, and small."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from invariclip.bench.stylebench.concepts import picture_split, split_of
from invariclip.bench.stylebench.manifest import read_manifest
from invariclip.bench.stylebench.sources import HELD_OUT_STYLES, STYLES, TRAINING_STYLES, licence_of
from invariclip.bench.stylebench.subset import NAMES
from invariclip.errors import InputError
from invariclip.export import reference
from invariclip.files import sha256_file

if TYPE_CHECKING:
    from pathlib import Path

PICTURES = read_manifest(reference.manifest_path())


def test_every_picture_is_there_with_its_digest():
    root = reference.manifest_path().parent
    assert {sha256_file(root / p.file) == p.sha256 for p in PICTURES} == {True}
    listed = {root / p.file for p in PICTURES}
    assert set(reference.pictures_path().glob("*/*.webp")) == listed


def test_pictures_are_square_rgb_without_alpha():
    root = reference.manifest_path().parent
    for picture in PICTURES[::16]:
        with Image.open(root / picture.file) as opened:
            assert (opened.size, opened.mode) == ((256, 256), "RGB")


def test_every_concept_stands_in_every_style():
    styles = {p.style for p in PICTURES}
    assert set(TRAINING_STYLES) < styles
    assert Counter(p.concept for p in PICTURES) == {p.concept: len(styles) for p in PICTURES}


def test_splits_are_disjoint_by_concept_and_held_out_styles_are_test():
    for picture in PICTURES:
        assert picture.concept_split == split_of(picture.concept)
        assert picture.split == picture_split(picture.style, split_of(picture.concept))
        assert picture.split == "test" or picture.style in TRAINING_STYLES
    shares = Counter(p.concept_split for p in PICTURES)
    assert shares["train"] == 2 * shares["calibrate"] == 2 * shares["test"]
    assert sum(len(names) for names in NAMES.values()) == len({p.concept for p in PICTURES})


def test_every_style_has_its_licence_and_no_photograph_is_bundled():
    text = reference.manifest_path().with_name("LICENSES.md").read_text(encoding="utf-8")
    for style in {p.style for p in PICTURES}:
        assert f"`{style}/`" in text
        assert licence_of(style).split("-")[0] in text
    assert {p.licence for p in PICTURES} == {licence_of(p.style) for p in PICTURES}
    assert "photograph" not in {p.style for p in PICTURES}
    assert set(HELD_OUT_STYLES) | set(TRAINING_STYLES) == set(STYLES)


def test_sizes_stay_within_what_a_repository_bears():
    pictures = sum(path.stat().st_size for path in reference.pictures_path().glob("*/*"))
    assert pictures <= 3_000_000
    everything = sum(p.stat().st_size for p in reference.checkpoint_folder().rglob("*") if p.is_file())
    assert everything <= 43_000_000
    assert reference.checkpoint_path().stat().st_size <= 40_000_000


def test_a_damaged_manifest_is_named_with_its_line(tmp_path: Path):
    broken = tmp_path / "manifest.jsonl"
    broken.write_text('{"file": "a.webp"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="line 1"):
        read_manifest(broken)
    with pytest.raises(InputError, match="build the picture set"):
        read_manifest(tmp_path / "absent.jsonl")
