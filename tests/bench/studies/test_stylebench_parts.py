"""Rendering, names, splits and the list of photographs: no network, no client."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from invariclip.bench.studies.stylebench.artwork import (
    Artwork,
    IconSet,
    hexcode_of,
    name_aliases,
    reviewed_photographs,
    slug_of,
    split_of,
)
from invariclip.bench.studies.stylebench.images import letterbox, render
from invariclip.bench.studies.stylebench.sources import PACKAGES, STYLES, TRAINING_STYLES
from invariclip.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("size", [(40, 80), (80, 40), (33, 64), (64, 64), (500, 3)])
def test_letterbox_keeps_the_aspect_the_whole_and_the_centre(size: tuple[int, int]):
    square = np.asarray(letterbox(Image.new("RGB", size, (200, 0, 0)), 64))
    assert square.shape == (64, 64, 3)
    inked = (square != 255).any(axis=2)
    rows, columns = np.flatnonzero(inked.any(axis=1)), np.flatnonzero(inked.any(axis=0))
    assert len(columns) == max(1, round(64 * size[0] / max(size)))
    assert len(rows) == max(1, round(64 * size[1] / max(size)))
    assert abs((63 - rows[-1]) - rows[0]) <= 1
    assert abs((63 - columns[-1]) - columns[0]) <= 1


def test_transparency_becomes_white_without_a_dark_edge():
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((255, 255, 255, 255), (2, 2, 6, 6))
    assert np.asarray(letterbox(image, 64)).min() >= 254


def test_an_svg_that_is_not_square_is_not_cut():
    pytest.importorskip("resvg_py")
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 20"><rect width="10" height="20" fill="#f00"/></svg>'
    inked = (np.asarray(render(Artwork(svg=svg), 64))[..., 1] < 128).sum()
    assert inked == pytest.approx(32 * 64, rel=0.05)


def test_artwork_that_cannot_be_read_is_one_line(tmp_path: Path):
    broken = tmp_path / "a.png"
    broken.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"a\.png"):
        render(Artwork(path=broken))


def test_packages_are_pinned_by_digest_and_every_style_has_one():
    assert all(re.fullmatch("[0-9a-f]{64}", p.sha256) for p in PACKAGES.values())
    assert all(style.package in PACKAGES for style in STYLES.values())
    assert all(STYLES[style].phrases for style in TRAINING_STYLES)


def test_photographs_are_well_formed():
    listed = reviewed_photographs()
    assert 90 <= len(listed) <= 140
    assert len(set(listed.values())) == len(listed)
    for file, code in listed.items():
        assert re.fullmatch(r"[0-9a-f]{4,5}(-[0-9a-f]{4,5})*", code)
        assert file.endswith(".png")
        assert ".." not in file
        assert not {"cartoon", "symbols", "toys"} & set(file.split("/"))


def test_splits_are_four_fifths_a_tenth_and_a_tenth_and_never_move():
    splits = [split_of(f"{0x1F300 + i:04x}") for i in range(2000)]
    assert splits.count("train") / 2000 == pytest.approx(0.8, abs=0.03)
    assert splits.count("calibrate") / 2000 == pytest.approx(0.1, abs=0.03)
    # pinned: a concept that changed sides would have been learnt from and tested on
    assert [split_of(code) for code in ("1f981", "1f428", "1f418")] == ["train", "calibrate", "test"]


def test_icons_are_found_by_code_point_name_and_older_name(tmp_path: Path):
    def icons(name: str, chars: dict[str, str], bodies: list[str], aliases: dict[str, str]) -> IconSet:
        folder = tmp_path / name
        folder.mkdir()
        table = {"icons": {b: {"body": "<g/>"} for b in bodies}, "width": 32, "height": 32}
        table["aliases"] = {a: {"parent": p} for a, p in aliases.items()}
        (folder / "icons.json").write_text(json.dumps(table), encoding="utf-8")
        (folder / "chars.json").write_text(json.dumps(chars), encoding="utf-8")
        return IconSet(folder)

    new = icons("new", {"1f3af": "bullseye"}, ["bullseye"], {"direct-hit": "bullseye"})
    assert name_aliases({"new": new}, {"1f3af": "bullseye"}) == {"bullseye": "1f3af", "direct-hit": "1f3af"}
    assert (hexcode_of("2600-FE0F"), slug_of("Piñata’s box")) == ("2600", "pinatas-box")
    assert 'viewBox="0 0 32 32"' in new.svg("bullseye")
