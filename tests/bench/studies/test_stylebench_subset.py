"""The committed images are what their manifest says, licensed, split apart, and small."""

from __future__ import annotations

import dataclasses
import shutil
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from invariclip.bench.studies.stylebench.artwork import image_split, split_of
from invariclip.bench.studies.stylebench.images import (
    CONCEPTS,
    DRAWN,
    PHOTOGRAPHS,
    StyleImage,
    chosen_concepts,
    read_manifest,
    write_manifest,
    write_subset,
)
from invariclip.bench.studies.stylebench.sources import HELD_OUT_STYLES, STYLES, TRAINING_STYLES, licence_of
from invariclip.errors import InputError
from invariclip.export import reference
from invariclip.files import sha256_file

if TYPE_CHECKING:
    from pathlib import Path

IMAGES = read_manifest(reference.manifest_path())


def test_every_image_is_there_with_its_digest():
    root = reference.manifest_path().parent
    assert {sha256_file(root / p.file) == p.sha256 for p in IMAGES} == {True}
    listed = {root / p.file for p in IMAGES}
    assert set(reference.images_path().glob("*/*.webp")) == listed


def test_images_are_square_rgb_without_alpha():
    root = reference.manifest_path().parent
    for image in IMAGES[::16]:
        with Image.open(root / image.file) as opened:
            assert (opened.size, opened.mode) == ((256, 256), "RGB")


def test_every_concept_stands_in_every_drawn_style_and_every_photograph_is_here():
    styles = {concept: {p.style for p in IMAGES if p.concept == concept} for concept in {p.concept for p in IMAGES}}
    assert len(styles) == CONCEPTS
    assert all(found - {PHOTOGRAPHS} == set(DRAWN) for found in styles.values())
    photographs = [p for p in IMAGES if p.style == PHOTOGRAPHS]
    assert len(photographs) == 120
    assert len({p.concept for p in photographs}) == 120


def test_splits_are_disjoint_by_concept_and_held_out_styles_are_test():
    for image in IMAGES:
        assert image.concept_split == split_of(image.concept)
        assert image.split == image_split(image.style, split_of(image.concept))
        assert image.split == "test" or image.style in TRAINING_STYLES
    assert set(DRAWN) & set(TRAINING_STYLES) == {"noto", "fluent-flat", "fluent-3d"}


def drawn(concept: str, *styles: str) -> list[StyleImage]:
    one = IMAGES[0]
    return [dataclasses.replace(one, concept=concept, style=style) for style in styles]


def test_concepts_are_taken_by_rule_photographs_first_then_by_hash():
    everything = [
        *(image for name in "abcdef" for image in drawn(name, *DRAWN)),
        *drawn("c", PHOTOGRAPHS),
        *drawn("incomplete", *DRAWN[1:], PHOTOGRAPHS),
    ]
    chosen = chosen_concepts(everything, 4)
    assert chosen[0] == "c"
    assert len(set(chosen)) == 4
    assert chosen_concepts(everything[::-1], 4) == chosen
    assert chosen_concepts(everything, 3) == chosen[:3]
    with pytest.raises(InputError, match="only 6 of 7 concepts"):
        chosen_concepts(everything, 7)


def test_a_subset_is_cut_and_what_does_not_belong_is_removed(tmp_path: Path):
    data, out = tmp_path / "data", tmp_path / "out"
    root = reference.manifest_path().parent
    names = sorted({p.concept for p in IMAGES})[:3]
    some = [p for p in IMAGES if p.concept in names]
    for image in some:
        (data / image.file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / image.file, data / image.file)
    write_manifest(data / "manifest.jsonl", some)
    old = out / "images" / "gone" / "0.webp"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"")
    written = write_subset(data, out, count=2)
    assert not old.exists()
    assert [p.file for p in read_manifest(out / "images.jsonl")] == [p.file for p in written]
    assert {sha256_file(out / p.file) == p.sha256 for p in written} == {True}


def test_every_style_has_its_licence_and_the_photographs_their_text():
    notes = reference.manifest_path().with_name("LICENSES.md").read_text(encoding="utf-8")
    for style in {p.style for p in IMAGES}:
        assert f"`{style}/`" in notes
        assert licence_of(style).split("-")[0] in notes
    assert {p.licence for p in IMAGES} == {licence_of(p.style) for p in IMAGES}
    text = reference.manifest_path().with_name("GPL-2.txt").read_text(encoding="utf-8")
    assert "GNU GENERAL PUBLIC LICENSE" in text
    assert "Version 2, June 1991" in text
    assert set(HELD_OUT_STYLES) | set(TRAINING_STYLES) == set(STYLES)


def test_sizes_stay_within_what_a_repository_bears():
    images = sum(path.stat().st_size for path in reference.images_path().glob("*/*"))
    assert images + reference.manifest_path().stat().st_size <= 6_000_000


def test_a_damaged_manifest_is_named_with_its_line(tmp_path: Path):
    broken = tmp_path / "manifest.jsonl"
    broken.write_text('{"file": "a.webp"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="line 1"):
        read_manifest(broken)
    with pytest.raises(InputError, match="build the image set"):
        read_manifest(tmp_path / "absent.jsonl")
