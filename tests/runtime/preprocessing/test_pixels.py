"""Pixels equal open_clip's evaluation transform, bit by bit, on every kind of image."""

import io
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from invariclip.errors import ArtifactError, ImageSizeError, InputError, ScaledImageWarning
from invariclip.preprocessing.find import find_images
from invariclip.preprocessing.pixels import (
    MAX_RESIZED_PIXELS,
    PixelSpec,
    normalise,
    open_image,
    pixels,
    resized_pixels,
    stack,
)
from invariclip.records import to_record

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def spec_of(size=(224, 224), **changes):
    return PixelSpec(image_size=size, image_mean=MEAN, image_std=STD, **changes)


def reference(image, spec):
    """open_clip's own transform, as the tensor that it feeds to the tower."""
    from invariclip.export.libraries import declare_missing_ops

    declare_missing_ops()
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = PreprocessCfg(
        size=spec.image_size,
        mean=spec.image_mean,
        std=spec.image_std,
        interpolation=spec.interpolation,
        resize_mode=spec.resize_mode,
        fill_color=spec.fill_color,
    )
    return image_transform_v2(config, is_train=False)(image).numpy()


def image(width, height, mode="RGB", seed=0):
    """An image with edges and noise, so that a pixel's shift or another filter would show."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 3 % 256, y * 5 % 256, (x + y) * 2 % 256, np.where(x > y, 255, 60)], axis=-1)
    noisy = np.clip(base + rng.integers(-40, 40, base.shape), 0, 255).astype(np.uint8)
    if mode == "RGBA":
        return Image.fromarray(noisy)
    rgb = Image.fromarray(np.ascontiguousarray(noisy[..., :3]))
    if mode == "P transparent":
        palette = rgb.quantize(32)
        palette.info["transparency"] = 3
        return palette
    return rgb.quantize(64) if mode == "P" else rgb.convert(mode)


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "P transparent", "1", "CMYK", "YCbCr"])
@pytest.mark.parametrize("size", [(640, 480), (300, 500), (333, 127), (224, 224), (31, 17), (1, 3)])
def test_equal_to_open_clip_in_every_mode(mode, size):
    opened = image(*size, mode)
    np.testing.assert_array_equal(
        normalise(pixels(opened, spec_of())[None], spec_of())[0], reference(opened, spec_of())
    )


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 700),
    height=st.integers(1, 700),
    resize_mode=st.sampled_from(["shortest", "longest", "squash"]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    size=st.sampled_from([(64, 64), (63, 63), (48, 80)]),
)
def test_any_size_any_mode_of_resize(width, height, resize_mode, interpolation, size):
    spec = spec_of(size, resize_mode=resize_mode, interpolation=interpolation, fill_color=17)
    if resize_mode == "longest" and min(width, height) * max(size) < max(width, height):
        return  # a side rounds to nothing there, and open_clip itself raises
    opened = image(width, height)
    np.testing.assert_array_equal(normalise(pixels(opened, spec)[None], spec)[0], reference(opened, spec))


def test_exif_orientation_is_ignored_like_open_clip_unless_asked_for():
    opened = image(320, 200)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(opened, "JPEG", exif=exif)
    plain = pixels(data, spec_of())
    np.testing.assert_array_equal(
        normalise(plain[None], spec_of())[0], reference(Image.open(io.BytesIO(data)), spec_of())
    )
    turned = pixels(data, spec_of(), exif_transpose=True)
    upright = open_image(data).transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(turned, pixels(upright, spec_of()))
    assert not np.array_equal(plain, turned)


def test_every_way_to_pass_an_image_gives_the_same_pixels(tmp_path):
    opened = image(90, 70)
    path = tmp_path / "image.png"
    opened.save(path)
    ways = [str(path), path, path.read_bytes(), opened, np.asarray(opened)]
    batch = stack(ways, spec_of((32, 32)), workers=2)
    assert batch.shape == (5, 32, 32, 3)
    for row in batch:
        np.testing.assert_array_equal(row, batch[0])
    grey = image(20, 30, "L")
    np.testing.assert_array_equal(pixels(np.asarray(grey), spec_of((8, 8))), pixels(grey, spec_of((8, 8))))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: folder / "absent.png", "no such file"),
        (lambda folder: folder, "directory"),
        (lambda folder: b"not an image at all", "not an image"),
        (lambda folder: b"", "not an image"),
        (lambda folder: encoded(image(200, 200), "JPEG")[:2000], "truncated"),
        (lambda folder: encoded(image(200, 200), "PNG")[:3000], "damaged"),
        (lambda folder: np.zeros((4, 4, 3), np.float32), "uint8"),
        (lambda folder: np.zeros((4, 4, 4), np.uint8), "uint8"),
        (lambda folder: 7, "pass a path"),
    ],
)
def test_bad_images_are_one_typed_line(tmp_path, make, reason):
    with pytest.raises(InputError, match=reason) as caught:
        pixels(make(tmp_path), spec_of())
    assert "\n" not in str(caught.value)


def test_an_image_above_the_limit_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr("invariclip.preprocessing.decode.MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="above the limit"):
        pixels(encoded(image(11, 10), "PNG"), spec_of())


def test_finds_images_below_folders_in_order(tmp_path):
    for name in ("b/2.png", "a/1.JPG", "a/note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert find_images([tmp_path]) == [tmp_path / "a/1.JPG", tmp_path / "b/2.png"]
    with pytest.raises(InputError, match="no such file or folder"):
        find_images([tmp_path / "absent"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no image in this folder"):
        find_images([tmp_path / "empty"])


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": [0, 4]},
        {"image_size": [4]},
        {"interpolation": "nearest"},
        {"resize_mode": "fit"},
        {"image_std": [0, 1, 1]},
        {"surprise": 1},
    ],
)
def test_a_spec_out_of_range_is_refused(change):
    good = spec_of().to_json()
    assert to_record(PixelSpec, good, "x", error=ArtifactError) == spec_of()
    with pytest.raises(ArtifactError):
        to_record(PixelSpec, {**good, **change}, "x", error=ArtifactError)


def test_a_strip_that_would_grow_beyond_memory_is_refused():
    spec = PixelSpec((224, 224), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with pytest.raises(ImageSizeError, match=r"1x100000 becomes 5,017,600,000 pixels .* to 224x22400000"):
        pixels(Image.new("L", (1, 100_000)), spec)


@pytest.mark.parametrize("pixel_mode", ["exact", "fast"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_small_file_of_a_strip_is_refused_before_it_grows(monkeypatch, kind, pixel_mode):
    """99 bytes of PNG, under every limit of the decoder, were 200 million pixels after the resize."""
    monkeypatch.setattr(Image.Image, "resize", lambda *_: pytest.fail("it was resized"))
    for size in ((1, 3985), (3985, 1)):
        with pytest.raises(ImageSizeError, match=r"<\d+ bytes>: .* above the limit of 25,000,000; crop it"):
            pixels(encoded(Image.new("L", size), kind), spec_of(), pixel_mode)


@pytest.mark.parametrize(
    ("size", "mode", "reason"),
    [
        ((1200, 112_000), "squash", "becomes 25,088,000 pixels"),  # between the two passes: 224 columns of all rows
        ((1200, 121_000), "squash", None),  # columns first
        ((1, 180_000_000), "squash", "too long to resize to 224x224"),
        ((180_000_000, 1), "longest", "too long to resize to 224x1"),
        ((224, 112_000), "shortest", "becomes 25,088,000 pixels"),
        ((11_000, 11_000), "shortest", None),
    ],
)
def test_the_resize_is_bounded_in_every_mode(size, mode, reason):
    if reason is None:
        assert resized_pixels(size, spec_of(resize_mode=mode)) <= MAX_RESIZED_PIXELS
    else:
        with pytest.raises(ImageSizeError, match=reason):
            resized_pixels(size, spec_of(resize_mode=mode))


@given(
    size=st.tuples(st.integers(1, 10_000), st.integers(1, 10_000)),
    target=st.tuples(st.integers(1, 300), st.integers(1, 300)) | st.integers(1, 300).map(lambda side: (side, side)),
    mode=st.sampled_from(["shortest", "longest", "squash"]),
)
def test_ordinary_shapes_are_resized_in_every_mode(size, target, mode):
    short, long = sorted(size)
    if long <= 20 * short:
        height, width = target
        aspect = max(height / width, width / height)
        assert resized_pixels(size, spec_of(target, resize_mode=mode)) <= 21 * aspect * (height + 1) * (width + 1)


def test_an_image_above_pillows_own_limit_is_one_of_too_many_pixels(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(ImageSizeError, match=r"exceeds limit of 100 pixels.*; make the image smaller"):
        pixels(encoded(image(11, 10), "PNG"), spec_of())


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_images_of_sixteen_bits_keep_their_shades(tmp_path, mode):
    """open_clip clips at 255, so most of such an image is white; ours divides by 257."""
    shades = np.linspace(0, 65535, 60 * 50).astype(np.uint16).reshape(60, 50)
    Image.fromarray(shades).save(tmp_path / "a.png")
    Image.fromarray(shades).save(tmp_path / "a.tif")
    eight = Image.fromarray(np.rint(shades / 257).astype(np.uint8))
    for path in (tmp_path / "a.png", tmp_path / "a.tif"):
        assert Image.open(path).mode.startswith("I")
        np.testing.assert_array_equal(pixels(path, spec_of(), mode), pixels(eight, spec_of()))


@pytest.mark.parametrize(
    ("numbers", "limit"),
    [
        (np.linspace(0, 1, 900, dtype=np.float32), 1), (np.linspace(0, 200, 900, dtype=np.float32), 255),
        (np.linspace(0, 60000, 900, dtype=np.float32), 65535), (np.arange(900, dtype=np.int32) // 4, 255),
        (np.arange(900, dtype=np.int32) * 60, 65535), (np.arange(900, dtype=np.int32) % 2, 255),
    ],
)  # fmt: skip
def test_wider_images_are_scaled_by_their_range_and_say_so(tmp_path, numbers, limit):
    image = Image.fromarray(numbers.reshape(30, 30))
    image.save(tmp_path / "a.tif")
    eight = Image.fromarray(np.rint(numbers.reshape(30, 30).astype(np.float64) * (255 / limit)).astype(np.uint8))
    for shown in (image, tmp_path / "a.tif"):
        with pytest.warns(ScaledImageWarning, match=f"read as from 0 to {limit}"):
            np.testing.assert_array_equal(pixels(shown, spec_of()), pixels(eight, spec_of()))


@pytest.mark.parametrize("worst", [-1.0, 1e6, np.nan, np.inf])
def test_numbers_that_no_image_has_are_refused(worst):
    numbers = np.zeros((9, 9), np.float32)
    numbers[3, 3] = worst
    with pytest.raises(InputError, match="convert it to eight bits first"):
        pixels(Image.fromarray(numbers), spec_of())


@pytest.mark.parametrize("shape", [(0, 30, 3), (30, 0, 3), (0, 0), (0, 5)])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_an_empty_crop_is_refused_by_name_in_every_mode(shape, resize_mode):
    with pytest.raises(InputError, match=f"is empty: {shape[1]}x{shape[0]} pixels"):
        pixels(np.zeros(shape, np.uint8), spec_of(resize_mode=resize_mode))
    with pytest.raises(InputError, match="is empty"):
        pixels(Image.new("RGB", (shape[1], shape[0])), spec_of(resize_mode=resize_mode))


def test_postscript_starts_no_program(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\nexit 1\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n"
    (tmp_path / "a.png").write_bytes(script)
    for shown in (script, tmp_path / "a.png"):
        with pytest.raises(InputError, match="not an image of a known format: AVIF, BMP"):
            open_image(shown)
    assert not (tmp_path / "ran").exists()


def test_many_damaged_images_leave_no_file_open(tmp_path):
    image = Image.radial_gradient("L").resize((40, 30))
    image.save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    before = len(os.listdir("/proc/self/fd"))
    kept = []
    for number in range(60):
        path = tmp_path / f"{number}.png"
        path.write_bytes(whole[: 20 + number])
        with pytest.raises(InputError) as refused:
            pixels(path, spec_of())
        kept.append(refused)  # its traceback would keep a file open
        kept.append(open_image(tmp_path / "good.png"))
    assert len(os.listdir("/proc/self/fd")) <= before + 2
