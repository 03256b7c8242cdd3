"""What holds for every intervention: form, reproducibility, limits; and the paper's seven, value by value."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from invariclip.errors import InputError, NotApplicableError
from invariclip.preprocessing.interventions import (
    CATALOGUE,
    GROUPS,
    PAPER,
    InterventionRequest,
    choose_kinds,
    intervene,
    resolve,
)
from invariclip.preprocessing.interventions.base import described

FIXED = {"greyscale", "invert", "posterize", "solarize", "equalize", "flip"}
"""Kinds that draw nothing."""


def thing(width=60, height=40, seed=0, around=255):
    """Noise on white, or on another grey: every kind applies to it."""
    levels = np.full((height, width, 3), around, np.uint8)
    inner = levels[height // 4 : -height // 4, width // 4 : -width // 4]
    inner[:] = np.random.default_rng(seed).integers(0, 200, inner.shape)
    return Image.fromarray(levels)


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", CATALOGUE)
def test_changes_the_image_and_nothing_of_its_form(kind):
    image, donor = thing(), thing(50, 40, 1, 90)
    before, lent = image.tobytes(), donor.tobytes()
    changed = intervene(image, kind, "a", 0, donor)
    assert (changed.size, changed.mode) == (image.size, "RGB")
    assert changed.tobytes() != before
    assert (image.tobytes(), donor.tobytes()) == (before, lent)


@pytest.mark.parametrize("kind", CATALOGUE)
def test_same_key_seed_and_label_same_result_and_no_other(kind):
    image, donor = thing(), thing(seed=1, around=90)
    first = intervene(image, kind, "a", 3, donor).tobytes()
    intervene(image, "colour-jitter", "b", 3)  # what was done before does not matter
    assert intervene(image, kind, "a", 3, donor).tobytes() == first
    named = InterventionRequest("another", resolve(kind).change)
    others = {intervene(image, each, key, seed, donor).tobytes() for each, key, seed in [
        (kind, "b", 3), (kind, "a", 4), (named, "a", 3)]}  # fmt: skip
    assert others == {first} if kind in FIXED else first not in others and len(others) == 3


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(CATALOGUE)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    other=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    look=st.sampled_from(["noise", "grey", "black", "white", "thing"]),
    seed=st.integers(0, 99),
)
def test_any_size_and_look(kind, size, other, look, seed):
    rng = np.random.default_rng(seed)
    levels = {
        "noise": lambda: rng.integers(0, 256, (*size, 3)),
        "grey": lambda: np.repeat(rng.integers(0, 256, (*size, 1)), 3, axis=2),
        "black": lambda: np.zeros((*size, 3)),
        "white": lambda: np.full((*size, 3), 255),
        "thing": lambda: np.where(np.pad(np.ones(size), 1)[..., None] > 0, rng.integers(0, 99, 3), 255),
    }[look]()
    image = Image.fromarray(levels.astype(np.uint8))
    donor = Image.fromarray(rng.integers(0, 256, (*other, 3), dtype=np.uint8))
    try:
        changed = intervene(image, kind, "a", seed, donor)
    except NotApplicableError:
        assert kind.startswith("background-")
        return
    assert (changed.size, changed.mode) == (image.size, "RGB")
    assert changed.tobytes() == intervene(image, kind, "a", seed, donor).tobytes()


@pytest.mark.parametrize("kind", CATALOGUE)
def test_palette_and_transparent_images_are_taken(kind):
    for mode in ("P", "RGBA", "L"):
        assert intervene(thing().convert(mode), kind, "a", 0, thing(seed=1).convert(mode)).mode == "RGB"


def test_random_kinds_differ_by_key_and_by_seed(image):
    results = {intervene(image, "colour-jitter", key, seed).tobytes() for key in "abc" for seed in range(3)}
    assert len(results) == 9


def test_a_donor_is_asked_for_by_those_that_need_one():
    needing = {name for name, kind in CATALOGUE.items() if kind.needs_donor}
    assert needing == {"background-swap", "style-exchange"} == set(GROUPS["everything"]) - set(GROUPS["extended"])
    for kind in needing:
        with pytest.raises(InputError, match=f"{kind} needs a second image"):
            intervene(thing(), kind, "a", 0)


def test_known_values(image):
    array = np.asarray(image)
    assert np.array_equal(np.asarray(intervene(image, "invert", "a", 0)), 255 - array)
    assert np.array_equal(np.asarray(intervene(image, "posterize", "a", 0)), array & 0b11000000)
    solarized = np.asarray(intervene(image, "solarize", "a", 0))
    assert np.array_equal(solarized, np.where(array < 192, array, 255 - array))
    grey = np.asarray(intervene(image, "greyscale", "a", 0))
    assert (grey[..., 0] == grey[..., 1]).all()
    assert (grey[..., 1] == grey[..., 2]).all()


def test_the_drawn_numbers_are_those_of_the_first_release(image):
    """Embeddings that caches hold were made with them, and the contract's images are."""
    digest = hashlib.sha256(b"gaussian-blur\nkey\n7").digest()
    deviation = np.random.default_rng(int.from_bytes(digest[:16], "little")).uniform(0.1, 5.0)
    blurred = image.filter(ImageFilter.GaussianBlur(deviation))
    assert intervene(image, "gaussian-blur", "key", 7).tobytes() == blurred.tobytes()
    assert choose_kinds(PAPER, "key", 7, 2) == ("solarize", "invert")


def test_choice_is_by_key_without_repetition_and_uses_all_kinds():
    drawn = [choose_kinds(PAPER, str(key), 0) for key in range(700)]
    assert drawn == [choose_kinds(PAPER, str(key), 0) for key in range(700)]
    counts = [sum(kind in chosen for chosen in drawn) for kind in PAPER]
    assert min(counts) > 60  # 100 expected of each; the published code's off-by-one would not show, a lost kind would
    assert sorted(choose_kinds(PAPER, "a", 0, 99)) == sorted(PAPER)
    assert choose_kinds((), "a", 0) == ()


@pytest.mark.parametrize("kind", CATALOGUE.values(), ids=lambda kind: kind.name)
def test_parameters_are_kept_within_their_limits(kind):
    for name, (lowest, highest), default in described(kind):
        for bad in (lowest - 1, highest + 1, float("nan"), float("inf"), "3", None, True, [1, 2, 3], {}):
            with pytest.raises(InputError, match=f"^{kind.name}: {name} "):
                kind(**{name: bad})
        if isinstance(default, tuple):
            assert getattr(kind(**{name: highest}), name) == (highest, highest)
            with pytest.raises(InputError, match="is above the highest"):
                kind(**{name: [highest, lowest]})
        else:
            assert getattr(kind(**{name: lowest}), name) == lowest


def test_whole_numbers_stay_whole():
    with pytest.raises(InputError, match=r"posterize: bits must be a whole number from 1 to 8, not 2\.5"):
        CATALOGUE["posterize"](bits=2.5)
    with pytest.raises(InputError, match=r"jpeg: quality must be a whole number from 1 to 95, not 7\.5"):
        CATALOGUE["jpeg"](quality=(7.5, 9))


@pytest.mark.parametrize("kind", CATALOGUE)
def test_a_chosen_intervention_can_be_made_again_from_its_json(kind):
    told = resolve(kind).to_json()
    assert told["label"] == told["kind"] == kind
    assert CATALOGUE[told["kind"]](**told["parameters"]) == resolve(kind).change


def test_unknown_names_get_the_nearest():
    with pytest.raises(InputError, match="'rotatoin'; nearest: rotation; available: colour-jitter, "):
        intervene(thing(), "rotatoin", "a", 0)
