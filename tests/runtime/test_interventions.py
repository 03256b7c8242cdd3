"""The seven interventions: each does its own thing, to the same picture always the same."""

import numpy as np
import pytest
from PIL import Image

from invariclip.errors import InputError
from invariclip.interventions import PAPER, choose_kinds, intervene, parse_kinds


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", PAPER)
def test_changes_the_picture_and_nothing_of_its_form(picture, kind):
    before = picture.tobytes()
    changed = intervene(picture, kind, "a", 0)
    assert (changed.size, changed.mode) == (picture.size, "RGB")
    assert changed.tobytes() != before
    assert picture.tobytes() == before


@pytest.mark.parametrize("kind", PAPER)
def test_same_key_and_seed_same_result(picture, kind):
    first = intervene(picture, kind, "a", 3).tobytes()
    intervene(picture, "colour-jitter", "b", 3)  # what was done before does not matter
    assert intervene(picture, kind, "a", 3).tobytes() == first


def test_random_kinds_differ_by_key_and_by_seed(picture):
    results = {intervene(picture, "colour-jitter", key, seed).tobytes() for key in "abc" for seed in range(3)}
    assert len(results) == 9


def test_known_values(picture):
    array = np.asarray(picture)
    assert np.array_equal(np.asarray(intervene(picture, "invert", "a", 0)), 255 - array)
    assert np.array_equal(np.asarray(intervene(picture, "posterize", "a", 0)), array & 0b11000000)
    solarized = np.asarray(intervene(picture, "solarize", "a", 0))
    assert np.array_equal(solarized, np.where(array < 192, array, 255 - array))
    grey = np.asarray(intervene(picture, "greyscale", "a", 0))
    assert (grey[..., 0] == grey[..., 1]).all()
    assert (grey[..., 1] == grey[..., 2]).all()


def test_palette_and_transparent_pictures_are_taken(picture):
    for mode in ("P", "RGBA", "L"):
        assert intervene(picture.convert(mode), "equalize", "a", 0).mode == "RGB"


def test_choice_is_by_key_without_repetition_and_uses_all_kinds():
    kinds = tuple(PAPER)
    drawn = [choose_kinds(kinds, str(key), 0) for key in range(700)]
    assert drawn == [choose_kinds(kinds, str(key), 0) for key in range(700)]
    counts = [sum(kind in chosen for chosen in drawn) for kind in kinds]
    assert min(counts) > 60  # 100 expected of each; the published code's off-by-one would not show, a lost kind would
    assert sorted(choose_kinds(kinds, "a", 0, 99)) == sorted(kinds)
    assert choose_kinds((), "a", 0) == ()


def test_names():
    assert parse_kinds("all") == tuple(PAPER)
    assert parse_kinds("none") == ()
    assert parse_kinds("invert, greyscale,invert") == ("invert", "greyscale")
    with pytest.raises(InputError, match=r"'blurr'; available: all, none, colour-jitter"):
        parse_kinds("invert,blurr")
    with pytest.raises(InputError, match="'blurr'"):
        intervene(Image.new("RGB", (2, 2)), "blurr", "a", 0)
