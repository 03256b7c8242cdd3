"""Each intervention does what it says, against closed forms, published code and scipy."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from invariclip.errors import NotApplicableError
from invariclip.preprocessing.interventions import CATALOGUE, InterventionRequest, intervene
from invariclip.preprocessing.interventions.exchange import mix_amplitudes
from invariclip.preprocessing.interventions.geometric import _homography
from invariclip.preprocessing.interventions.scene import background
from invariclip.preprocessing.interventions.texture import LARGEST, plasma

SIZES = st.tuples(st.integers(1, 24), st.integers(1, 24))


def changed(levels, kind, key="a", donor=None, **parameters):
    """The levels under a kind with parameters, as int [H, W, 3]."""
    chosen = InterventionRequest(kind, CATALOGUE[kind](**parameters))
    given = None if donor is None else Image.fromarray(donor)
    return np.asarray(intervene(Image.fromarray(levels), chosen, key, 0, given)).astype(int)


def noise(height=24, width=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height=32, width=48, seed=0):
    blurred = ndimage.gaussian_filter(noise(height, width, seed).astype(float), (4, 4, 0))
    return np.clip((blurred - 128) * 6 + 128, 0, 255).astype(np.uint8)


# geometric


@given(size=SIZES, seed=st.integers(0, 9))
def test_flip_twice_is_nothing(size, seed):
    levels = noise(*size, seed)
    once = changed(levels, "flip")
    assert np.array_equal(once, levels[:, ::-1])
    assert np.array_equal(changed(once.astype(np.uint8), "flip"), levels)


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [("crop", {"area": 1, "aspect": 1}), ("rotation", {"degrees": 0}), ("perspective", {"distortion": 0})],
)
def test_the_least_movement_is_none(kind, parameters):
    levels = noise()
    assert np.array_equal(changed(levels, kind, **parameters), levels)


@settings(deadline=None, max_examples=40)
@given(kind=st.sampled_from(["crop", "rotation", "perspective"]), size=SIZES, key=st.text(max_size=3))
def test_no_border_comes_in(kind, size, key):
    """A plain image stays what it is, wherever the camera goes."""
    levels = np.full((*size, 3), (9, 100, 201), np.uint8)
    assert np.array_equal(changed(levels, kind, key), levels)


def test_half_a_turn():
    levels = noise()
    assert np.array_equal(changed(levels, "rotation", degrees=180), levels[::-1, ::-1])


def test_turns_go_both_ways_about_the_middle():
    levels = np.zeros((41, 41, 3), np.uint8)
    levels[20, 32] = 255
    angles = []
    for key in range(40):
        down, across = ndimage.center_of_mass(changed(levels, "rotation", str(key), degrees=(10, 30))[..., 0])
        angles.append(np.degrees(np.arctan2(20 - down, across - 20)))
    assert min(np.abs(angles)) > 9
    assert max(np.abs(angles)) < 31
    assert 8 < sum(angle > 0 for angle in angles) < 32


def test_a_crop_has_the_area_and_the_aspect_that_were_asked_for():
    down, across = np.mgrid[0:256, 0:256]
    levels = np.stack([across, down, 0 * down], axis=2).astype(np.uint8)
    part = changed(levels, "crop", area=0.25, aspect=1)
    span = part[128, -1, 0] - part[128, 0, 0], part[-1, 128, 1] - part[0, 128, 1]
    assert span == pytest.approx((128, 128), abs=3)
    wide = changed(levels, "crop", area=0.25, aspect=4)
    assert wide[128, -1, 0] - wide[128, 0, 0] == pytest.approx(255, abs=3)
    assert wide[-1, 128, 1] - wide[0, 128, 1] == pytest.approx(64, abs=3)


def test_four_corners_go_where_they_should():
    start = np.asarray([(0, 0), (8, 0), (8, 6), (0, 6)], dtype=float)
    end = np.asarray([(1, 0.5), (7, 1), (8, 5), (0.2, 6)])
    a, b, c, d, e, f, g, h = _homography(start, end)
    for (x, y), goal in zip(start, end, strict=True):
        scale = g * x + h * y + 1
        assert np.allclose(((a * x + b * y + c) / scale, (d * x + e * y + f) / scale), goal)


def test_perspective_looks_at_an_inner_part():
    down, across = np.mgrid[0:256, 0:256]
    levels = np.stack([across, down, 0 * down], axis=2).astype(np.uint8)
    for key in "abcdef":
        seen = changed(levels, "perspective", key, distortion=0.4)
        # a fifth of the side at most, a level and cubic overshoot aside
        assert seen[0, 0, :2].max() <= 53
        assert seen[-1, -1, :2].min() >= 202


# degradation


def test_jpeg_is_pillows_own_at_a_quality_within_the_range():
    levels = smooth()
    made = []
    for quality in (20, 21, 22):
        memory = io.BytesIO()
        Image.fromarray(levels).save(memory, "JPEG", quality=quality, subsampling=2)
        made.append(np.asarray(Image.open(memory)).tobytes())
    drawn = [changed(levels, "jpeg", str(key), quality=(20, 22)).astype(np.uint8).tobytes() for key in range(60)]
    assert set(drawn) == set(made)


def test_jpeg_errs_less_at_a_higher_quality():
    levels = smooth()
    errors = [np.abs(changed(levels, "jpeg", quality=q) - levels).mean() for q in (5, 30, 95)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 2


def test_gaussian_noise_has_the_deviation_asked_for():
    levels = np.full((200, 200, 3), 128, np.uint8)
    difference = changed(levels, "gaussian-noise", deviation=10) - 128.0
    assert abs(difference.mean()) < 0.15  # 5 standard errors
    assert difference.std() == pytest.approx(np.sqrt(100 + 1 / 12), rel=0.02)


def test_shot_noise_is_poisson():
    for level in (51, 204):
        levels = np.full((200, 200, 3), level, np.uint8)
        difference = changed(levels, "shot-noise", photons=237) - float(level)
        assert abs(difference.mean()) < 0.3
        assert difference.var() == pytest.approx(level * 255 / 237 + 1 / 12, rel=0.02)
    assert not changed(np.zeros((9, 9, 3), np.uint8), "shot-noise").any()


# scene


@given(height=st.integers(1, 70), width=st.integers(1, 70), decay=st.floats(1, 4), seed=st.integers(0, 99))
def test_clouds_fill_the_image_from_0_to_1(height, width, decay, seed):
    cloud = plasma(width, height, decay, np.random.default_rng(seed))
    assert cloud.shape == (height, width)
    assert 0 <= cloud.min() <= cloud.max() <= 1


def test_clouds_join_up_with_themselves_and_smooth_out_with_decay():
    steps = {}
    for decay in (1.2, 2.0, 3.0):
        cloud = plasma(128, 128, decay, np.random.default_rng(3))
        assert (cloud.min(), cloud.max()) == (0, 1)
        steps[decay] = np.abs(np.diff(cloud, axis=1)).mean()
        seam = np.abs(cloud[:, 0] - cloud[:, -1]).mean()
        assert seam < 2 * steps[decay]
    assert steps[1.2] > 1.5 * steps[2.0] > 2 * steps[3.0]


def test_clouds_over_large_images_are_stretched():
    cloud = plasma(3 * LARGEST, 2, 2.0, np.random.default_rng(0))
    assert cloud.shape == (2, 3 * LARGEST)
    assert np.abs(np.diff(cloud, axis=1)).max() < 0.1


@given(size=SIZES, seed=st.integers(0, 99))
def test_fog_keeps_what_is_darker_darker(size, seed):
    dark, light = np.sort(np.stack([noise(*size, seed), noise(*size, seed + 100)]), axis=0)
    fogged = changed(dark, "fog"), changed(light, "fog")
    assert (fogged[0] <= fogged[1]).all()
    # levels from 0 to 255 shrink by 1 + density, so contrast goes and nothing is cut
    assert np.ptp(fogged[0] - fogged[1]) <= np.ptp(dark.astype(int) - light) / 1.8 + 1


def test_fog_of_no_density_is_nothing_and_dense_fog_is_the_haze():
    levels = smooth()
    assert np.array_equal(changed(levels, "fog", density=0), levels)
    thick = changed(levels, "fog", density=10)
    assert np.ptp(thick, axis=2).max() <= 255 / 11 + 1


def on_white(size=40):
    """A ring on white, with noise in it; and where the ring and its inside are."""
    down, across = np.mgrid[:size, :size]
    radius = np.hypot(down - size / 2, across - size / 2)
    levels = np.full((size, size, 3), 250, np.uint8)
    ring = (radius > size / 6) & (radius < size / 3)
    levels[ring] = np.random.default_rng(0).integers(0, 150, (int(ring.sum()), 3))
    return levels, radius < size / 3


def inner(mask, pixels):
    """What lies further than so many pixels from the mask's edge, diagonals among them."""
    return ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=pixels)


def test_the_hole_of_a_ring_is_no_background():
    levels, inside = on_white()
    assert np.array_equal(background(Image.fromarray(levels), 24), ~inside)


@settings(deadline=None)
@given(height=st.integers(3, 24), width=st.integers(3, 24), share=st.floats(0.2, 0.9), seed=st.integers(0, 999))
def test_background_is_scipys_component_at_the_border(height, width, share, seed):
    free = np.random.default_rng(seed).random((height, width)) < share
    edge = np.pad(np.zeros((height - 2, width - 2), bool), 1, constant_values=True)
    free[edge & (np.random.default_rng(seed + 1).random(free.shape) < 0.8)] = True
    image = Image.fromarray(np.where(free[..., None], 255, 0).repeat(3, 2).astype(np.uint8))
    parts, _ = ndimage.label(free)
    expected = np.isin(parts, np.setdiff1d(parts[edge], 0))
    if free[edge].mean() > 0.5 and 0.05 <= expected.mean() <= 0.95:
        assert np.array_equal(background(image, 24), expected)


def test_a_winding_background_is_followed_to_its_end():
    free = np.pad(np.zeros((25, 25), bool), 1, constant_values=True)
    for turn, row in enumerate(range(2, 25, 2)):
        free[row, 2:25] = free[row - 1, (2, 24)[turn % 2]] = True
    image = Image.fromarray(np.where(free[..., None], 255, 0).repeat(3, 2).astype(np.uint8))
    parts, _ = ndimage.label(free)
    assert parts.max() == 1
    assert np.array_equal(background(image, 24), free)


@pytest.mark.parametrize(
    ("levels", "reason"),
    [
        (noise(), "no single colour"),
        (np.full((9, 9, 3), 77, np.uint8), "nearly none or nearly all"),
        (np.pad(noise(200, 200), ((1, 1), (1, 1), (0, 0))), "nearly none or nearly all"),
    ],
)
def test_images_without_a_background_are_refused(levels, reason):
    for kind in ("background-texture", "background-swap"):
        with pytest.raises(NotApplicableError, match=reason):
            changed(levels, kind, donor=noise())


@pytest.mark.parametrize("kind", ["background-texture", "background-swap"])
def test_the_thing_stays_and_the_background_goes(kind):
    levels, inside = on_white()
    after = changed(levels, kind, donor=smooth(40, 40))
    kept, gone = inner(inside, 3), inner(~inside, 3)
    assert np.array_equal(after[kept], levels[kept])
    assert np.abs(after[gone] - levels[gone]).max(axis=1).mean() > 20


def test_a_texture_without_contrast_is_one_colour():
    levels, inside = on_white()
    after = changed(levels, "background-texture", contrast=0)
    assert len(np.unique(after[inner(~inside, 3)], axis=0)) == 1


def test_the_new_background_is_the_donors():
    levels, inside = on_white()
    donor = np.full((40, 40, 3), (10, 200, 90), np.uint8)
    after = changed(levels, "background-swap", donor=donor)
    assert (after[inner(~inside, 3)] == (10, 200, 90)).all()


# style exchange


def fda(source, target, share):
    """FDA's published exchange (github.com/YanchaoYang/FDA, utils, low_freq_mutate_np), channels last."""
    ours, theirs = np.fft.fft2(source, axes=(0, 1)), np.fft.fft2(target, axes=(0, 1))
    amplitude = np.fft.fftshift(np.abs(ours), axes=(0, 1))
    other = np.fft.fftshift(np.abs(theirs), axes=(0, 1))
    height, width = source.shape[:2]
    reach = int(np.floor(min(height, width) * share))
    rows = slice(height // 2 - reach, height // 2 + reach + 1)
    columns = slice(width // 2 - reach, width // 2 + reach + 1)
    amplitude[rows, columns] = other[rows, columns]
    amplitude = np.fft.ifftshift(amplitude, axes=(0, 1))
    return np.real(np.fft.ifft2(amplitude * np.exp(1j * np.angle(ours)), axes=(0, 1)))


@settings(deadline=None)
@given(height=st.integers(2, 20), width=st.integers(2, 20), share=st.floats(0, 0.45), seed=st.integers(0, 99))
def test_full_strength_is_fdas_exchange(height, width, share, seed):
    source, target = noise(height, width, seed).astype(float), noise(height, width, seed + 1).astype(float)
    assert np.allclose(mix_amplitudes(source, target, 1.0, share), fda(source, target, share), atol=1e-6)


@given(size=SIZES, strength=st.floats(0, 1), window=st.floats(0, 0.5), seed=st.integers(0, 9))
def test_an_image_exchanged_with_itself_is_itself(size, strength, window, seed):
    levels = noise(*size, seed)
    after = changed(levels, "style-exchange", donor=levels, strength=strength, window=window)
    assert np.abs(after - levels).max() <= 1


def test_phases_are_kept_and_amplitudes_are_mixed():
    source, target = noise(16, 20).astype(float), noise(16, 20, 1).astype(float)
    before, other = np.fft.fft2(source, axes=(0, 1)), np.fft.fft2(target, axes=(0, 1))
    after = np.fft.fft2(mix_amplitudes(source, target, 0.3, 0.5), axes=(0, 1))
    assert np.allclose(np.exp(1j * np.angle(after)), np.exp(1j * np.angle(before)), atol=1e-6)
    assert np.allclose(np.abs(after)[:9, :9], (0.7 * np.abs(before) + 0.3 * np.abs(other))[:9, :9])
    high = np.abs(np.fft.fftfreq(20)) * 20 > 8.5  # beyond half of the shorter side
    assert np.allclose(after[:, high], before[:, high])


def test_what_has_no_phase_is_left_alone():
    """Rounding errors have a phase too, another one on every machine."""
    flat = np.full((16, 16, 3), 90.0)
    after = mix_amplitudes(flat, noise(16, 16).astype(float), 1.0, 0.5)
    assert np.allclose(after, after.mean(axis=(0, 1)))


def test_exchange_brings_the_donors_mean_colour():
    donor = np.full((32, 48, 3), (40, 120, 200), np.uint8)
    levels = np.full((32, 48, 3), 128, np.uint8) + noise(32, 48) // 16
    after = changed(levels, "style-exchange", donor=donor, strength=1, window=0)
    assert after.mean(axis=(0, 1)) == pytest.approx((40, 120, 200), abs=1)
