"""The fast pixel mode is measured on JPEGs with fine detail, and a careless one shows."""

import io

import numpy as np
import pytest
from PIL import Image

from invariclip.errors import InputError
from invariclip.export.verification.pixel_checks import JPEG_SIZES, as_jpeg, fast_figures, fast_levels, fast_pairs
from invariclip.preprocessing.find import find_images
from invariclip.preprocessing.pixels import PixelSpec

SPEC = PixelSpec((64, 64), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def paths(tiny_images):
    return find_images([tiny_images])[:3]


def encode(batch):
    """Coarse means of four by four parts: what a tower sees at the least."""
    parts = batch.reshape(len(batch), 4, 16, 4, 16, 3).mean(axis=(2, 4)).reshape(len(batch), -1)
    return parts - parts.mean(axis=1, keepdims=True)


def test_images_are_repeated_and_not_enlarged(paths):
    image = Image.open(paths[0])
    data = as_jpeg(image, (300, 200), quality=95)
    large = np.asarray(Image.open(io.BytesIO(data))).astype(int)
    assert large.shape == (200, 300, 3)
    whole = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(large[: whole.shape[0], : whole.shape[1]] - whole).mean() < 8
    mirrored = large[whole.shape[0] : 2 * whole.shape[0], : whole.shape[1]][::-1]
    assert np.abs(mirrored - whole).mean() < 8
    assert Image.open(io.BytesIO(as_jpeg(image, (9, 5)))).size == (9, 5)
    with pytest.raises(InputError, match="0x5 is not made; sides go from 1 to 8192"):
        as_jpeg(image, (0, 5))


def test_figures_of_the_mode_as_it_is(paths):
    pairs = list(fast_pairs(paths, SPEC))
    assert len(pairs) == len(paths) * len(JPEG_SIZES)
    figures = fast_figures(pairs, encode)
    assert 0 < figures.max_levels <= 16
    assert 0 < figures.mean_levels < 1
    assert 0.999 < figures.cosine_min <= figures.cosine_mean <= 1
    assert figures.to_json()["items"] == len(pairs)
    assert (figures.max_levels, figures.mean_levels) == fast_levels(pairs)


def test_a_careless_mode_shows(paths, monkeypatch):
    held = fast_levels(fast_pairs(paths, SPEC))
    monkeypatch.setattr("invariclip.preprocessing.pixels.FAST_MARGIN", 1)
    careless = fast_levels(fast_pairs(paths, SPEC))
    assert careless[1] > 1.5 * held[1]


def test_by_hand():
    one, other = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)
    other[0, 0, 0] = 200
    assert fast_levels([(one, one), (one, other)]) == (200.0, 200 / (2 * 64 * 64 * 3))
    assert fast_levels([(other, one)])[0] == 200  # bytes must not wrap around
    assert fast_levels([]) == (0.0, 0.0)
    figures = fast_figures([(one, one), (one, other)], lambda batch: np.stack([1 + batch[:, 0, 0, 0], np.ones(2)], 1))
    assert figures.cosine_min == pytest.approx(202 / np.hypot(201, 1) / np.sqrt(2))
    assert figures.cosine_mean == pytest.approx((1 + figures.cosine_min) / 2)
    assert figures.top1_agreement is None
    # the second is best matched by the second axis exactly, and by the first one fast
    bank = np.array([[1, 0], [0.7, 0.714]])
    plain = fast_figures(
        [(one, one), (one, other)], lambda batch: np.stack([1 + batch[:, 0, 0, 0], np.ones(2)], 1), bank
    )
    assert plain.top1_agreement == 0.5
    with pytest.raises(InputError, match="no image"):
        fast_figures([], encode)
