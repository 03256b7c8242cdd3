"""Pixels equal open_clip's evaluation transform, bit by bit, on every kind of image."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from invariclip.errors import ArtifactError, InputError
from invariclip.preprocessing.pixels import PixelSpec, find_images, normalise, open_image, pixels, stack

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
    if mode == "I;16":
        return Image.fromarray(noisy[..., 0].astype(np.uint16) * 257)
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


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "P transparent", "1", "CMYK", "I;16", "YCbCr"])
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
    assert PixelSpec.from_json(good) == spec_of()
    with pytest.raises(ArtifactError):
        PixelSpec.from_json({**good, **change})


def test_a_strip_that_would_grow_beyond_memory_is_refused():
    spec = PixelSpec((224, 224), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with pytest.raises(InputError, match="1x100000 becomes 5,017,600,000 pixels when its shorter side is fitted"):
        pixels(Image.new("L", (1, 100_000)), spec)
