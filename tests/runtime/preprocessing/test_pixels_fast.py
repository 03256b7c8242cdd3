"""The fast mode touches JPEGs alone, never falls below the size needed, and stays close to the exact one."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from invariclip.errors import InputError
from invariclip.preprocessing.decode import open_reduced
from invariclip.preprocessing.pixels import PixelSpec, pixels, stack

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def spec_of(size=(64, 64), **changes):
    return PixelSpec(image_size=size, image_mean=MEAN, image_std=STD, **changes)


def photograph(width, height, mode="RGB"):
    """Smooth shapes with some detail, different in every corner: a shift, a flip or a wrong part would show."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [np.sin(9 * x + 5 * y * y + k) + 0.3 * np.cos(40 * (x + k * y)) + x - y / 2 for k in range(3)]
    levels = np.stack(waves, -1)
    levels = (levels - levels.min()) / np.ptp(levels) * 255
    return Image.fromarray(levels.astype(np.uint8)).convert(mode)


def jpeg(image, **options):
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=92, **options)
    return stream.getvalue()


def off(data, spec, **options):
    exact = pixels(data, spec, **options).astype(int)
    return np.abs(pixels(data, spec, "fast", **options) - exact)


@settings(max_examples=80, deadline=None)
@given(
    width=st.integers(1, 900),
    height=st.integers(1, 900),
    resize_mode=st.sampled_from(["shortest", "longest", "squash"]),
    size=st.sampled_from([(64, 64), (63, 63), (48, 80)]),
    mode=st.sampled_from(["RGB", "L", "CMYK"]),
    turn=st.integers(1, 8),
    turned=st.booleans(),
)
def test_close_to_exact_for_any_jpeg(width, height, resize_mode, size, mode, turn, turned):
    if max(width, height) > 40 * min(width, height):
        return  # strips become large, and slow
    spec = spec_of(size, resize_mode=resize_mode, fill_color=17)
    exif = Image.Exif()
    exif[0x0112] = turn
    data = jpeg(photograph(width, height, mode), exif=exif)
    difference = off(data, spec, exif_transpose=turned)
    assert difference.shape == (*size, 3)
    assert difference.max() <= 12
    assert difference.mean() <= 1


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("size", [(801, 603), (607, 1213)])
def test_turned_images_are_the_same_part_to_a_fraction_of_a_pixel(size, turn):
    # 801 and 603 are not whole multiples of 8: what the last column stands for must stay at its side
    exif = Image.Exif()
    exif[0x0112] = turn
    data = jpeg(photograph(*size), exif=exif)
    assert off(data, spec_of((48, 48)), exif_transpose=True).max() <= 3
    whole = open_reduced(data, lambda _: (60, 60), exif_transpose=True)
    assert min(whole[0].size) < min(size) / 3  # it was reduced at all
    assert whole[1] == (size if turn < 5 else size[::-1])


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 1500), height=st.integers(1, 1500), needed=st.integers(1, 300))
def test_a_decoded_jpeg_is_never_below_what_is_needed(width, height, needed):
    image, whole, box = open_reduced(jpeg(Image.new("L", (width, height))), lambda _: (needed, needed))
    assert whole == (width, height)
    assert min(image.size) >= min(needed, width, height)
    assert (box[0], box[1]) == (0, 0)
    assert image.width - 1 < box[2] <= image.width
    assert image.height - 1 < box[3] <= image.height


def test_what_is_needed_is_turned_back_before_the_decoder_is_asked():
    exif = Image.Exif()
    exif[0x0112] = 6
    # upright it is 480x640, and may become 60x160; asked for lying down, 60x160 would allow a half alone
    image, whole, _ = open_reduced(jpeg(photograph(640, 480), exif=exif), lambda _: (60, 160), exif_transpose=True)
    assert (image.size, whole) == ((120, 160), (480, 640))


def test_the_decoder_leaves_out_what_it_may():
    seen = []

    def decoded(size):
        return open_reduced(jpeg(photograph(*size)), lambda whole: seen.append(whole) or (128, 128))[0].size

    assert [decoded((255, 255)), decoded((256, 256)), decoded((512, 513))] == [(255, 255), (128, 128), (128, 129)]
    assert seen == [(255, 255), (256, 256), (512, 513)]


def test_the_margin_is_what_pixels_asks_for(monkeypatch):
    sharp = np.random.default_rng(0).integers(0, 256, (448, 448, 3), dtype=np.uint8)
    data = jpeg(Image.fromarray(sharp))
    held = off(data, spec_of((64, 64))).mean()
    monkeypatch.setattr("invariclip.preprocessing.pixels.FAST_MARGIN", 1)
    assert off(data, spec_of((64, 64))).mean() > 2 * held > 0


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_other_formats_are_untouched(kind):
    stream = io.BytesIO()
    photograph(500, 301).save(stream, kind)
    assert not off(stream.getvalue(), spec_of()).any()


def test_images_and_arrays_are_untouched():
    lazy = Image.open(io.BytesIO(jpeg(photograph(640, 480))))
    wanted = pixels(photograph(640, 480), spec_of())
    np.testing.assert_array_equal(pixels(photograph(640, 480), spec_of(), "fast"), wanted)
    np.testing.assert_array_equal(pixels(np.asarray(photograph(640, 480)), spec_of(), "fast"), wanted)
    np.testing.assert_array_equal(pixels(lazy, spec_of(), "fast"), pixels(jpeg(photograph(640, 480)), spec_of()))
    assert lazy.size == (640, 480)  # the caller's own image was not made smaller


def test_stack_has_the_mode_too_and_exact_is_the_default(tmp_path):
    path = tmp_path / "large.jpg"
    path.write_bytes(jpeg(Image.fromarray(np.random.default_rng(1).integers(0, 256, (512, 512, 3), dtype=np.uint8))))
    fast, exact = stack([path], spec_of(), "fast")[0], stack([path], spec_of())[0]
    np.testing.assert_array_equal(fast, pixels(path, spec_of(), "fast"))
    np.testing.assert_array_equal(exact, pixels(path, spec_of(), "exact"))
    assert not np.array_equal(fast, exact)


def test_cameras_files_with_several_images_are_jpegs_too():
    stream = io.BytesIO()
    photograph(640, 480).save(stream, "MPO", save_all=True, append_images=[photograph(64, 48)])
    assert Image.open(io.BytesIO(stream.getvalue())).format == "MPO"
    image, whole, _ = open_reduced(stream.getvalue(), lambda _: (100, 100))
    assert (image.size, whole) == ((160, 120), (640, 480))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (jpeg(photograph(640, 480))[:4000], "truncated"),
        (b"not an image at all", "not an image"),
        ("absent.jpg", "absent.jpg: no such file"),
    ],
)
def test_bad_images_are_refused_as_in_exact(data, reason):
    with pytest.raises(InputError, match=reason) as caught:
        pixels(data, spec_of(), "fast")
    with pytest.raises(InputError) as exact:
        pixels(data, spec_of())
    assert str(caught.value) == str(exact.value)


def test_a_strip_that_would_grow_beyond_memory_is_refused_by_name(tmp_path):
    path = tmp_path / "strip.jpg"
    path.write_bytes(jpeg(Image.new("L", (1, 60_000))))
    with pytest.raises(InputError, match=r"strip\.jpg: an image of 1x60000 becomes"):
        pixels(path, spec_of((224, 224)), "fast")


def test_an_unknown_mode_is_refused():
    with pytest.raises(InputError, match="no pixel mode is called 'quick'; available: exact, fast"):
        pixels(photograph(9, 9), spec_of(), "quick")
