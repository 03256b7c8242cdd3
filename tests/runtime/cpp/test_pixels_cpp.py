"""Pixels of the C++ runtime equal the Python runtime's, and so Pillow's, bit by bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from invariclip.errors import ImageSizeError, InputError
from invariclip.preprocessing.pixels import PixelSpec, pixels

ORDERS = {"grey": 1, "rgb": 3, "bgr": 3, "rgba": 4, "bgra": 4}
SHOWN = st.tuples(st.sampled_from(sorted(ORDERS)), st.integers(0, 7), st.integers(0, 5))


@pytest.fixture(scope="module", params=["answer", "answer-plain"])
def processor(request, built):
    """A process of `answer` as this processor has it, and as one without AVX2 does."""
    with built.answering(request.param) as process:
        yield process


def spec_of(size, interpolation="bicubic", mode="shortest", fill=0):
    return PixelSpec(size, (0.5,) * 3, (0.5,) * 3, interpolation, mode, fill)


def in_cpp(asked, array, spec, order="rgb", gap=0):
    """What the C++ runtime makes of an array [rows, columns, channels], or the kind of its error."""
    rows, columns, channels = array.shape
    stride = columns * channels + gap
    padded = np.full((rows, stride), 201, np.uint8)
    padded[:, : columns * channels] = array.reshape(rows, -1)
    height, width = spec.image_size
    said = asked.ask(
        f"pixels {height} {width} {spec.interpolation} {spec.resize_mode} {spec.fill_color} "
        f"{order} {columns} {rows} {stride}",
        padded.tobytes(),
    )
    if not said.startswith("ok"):
        return said
    return np.frombuffer(asked.read(int(said.split()[1])), np.uint8).reshape(height, width, 3)


def in_python(array, spec, order="rgb"):
    if order == "grey":
        return pixels(array[..., 0], spec)
    if order in ("bgr", "bgra"):
        array = array[..., [2, 1, 0, 3][: array.shape[2]]]
    return pixels(Image.fromarray(np.ascontiguousarray(array)), spec)


@settings(max_examples=150, deadline=None)
@given(
    columns=st.integers(1, 420) | st.integers(1, 9),
    rows=st.integers(1, 420) | st.integers(150, 1500),
    shown=SHOWN,
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    mode=st.sampled_from(["shortest", "longest", "squash"]),
    size=st.sampled_from([(64, 64), (63, 63), (48, 80), (81, 40), (1, 1), (3, 100)]),
)
def test_equal_to_python_at_any_size(processor, image, columns, rows, shown, interpolation, mode, size):
    (order, gap, seed), spec = shown, spec_of(size, interpolation, mode, 17)
    array = image(columns, rows, ORDERS[order], seed)
    try:
        wanted = in_python(array, spec, order)
    except InputError:
        assert in_cpp(processor, array, spec, order, gap).startswith("InputError")
        return
    np.testing.assert_array_equal(in_cpp(processor, array, spec, order, gap), wanted)


@pytest.mark.parametrize("order", sorted(ORDERS))
@pytest.mark.parametrize(
    ("columns", "rows"),
    [(1, 1), (1, 300), (300, 1), (2, 200), (2, 201), (2, 900), (3000, 7), (224, 224), (224, 300), (225, 224),
     (448, 224), (1280, 720), (720, 1280), (17, 31)],
)  # fmt: skip
def test_equal_to_python_at_the_size_of_a_tower(asked, image, columns, rows, order):
    array = image(columns, rows, ORDERS[order])
    for mode in ("shortest", "longest", "squash"):
        spec = spec_of((224, 224), mode=mode, fill=250)
        np.testing.assert_array_equal(in_cpp(asked, array, spec, order), in_python(array, spec, order))


def test_a_transparent_image_of_the_right_size_is_not_premultiplied(asked, image):
    array = image(32, 32, 4)
    array[..., 3] = np.arange(32)
    np.testing.assert_array_equal(in_cpp(asked, array, spec_of((32, 32)), "rgba"), array[..., :3])


@pytest.mark.parametrize(
    ("columns", "rows", "side", "mode", "reason"),
    [
        (1, 3985, 224, "shortest", "1x3985 becomes 199951360 pixels when it is resized to 224x892640, above the limit"),
        (32, 3985, 900, "shortest", "becomes 100870200 pixels when it is resized to 900x112078"),
        (3985, 32, 900, "shortest", "becomes 100870200 pixels when it is resized to 112078x900"),
        (62, 6200, 4096, "squash", "becomes 25395200 pixels when it is resized to 4096x4096"),
        (5_000_000, 1, 224, "squash", "too long to resize to 224x224"),
        (1, 5_000_000, 224, "squash", "too long to resize"),
        (5_000_000, 1, 224, "longest", "too long to resize to 224x1"),
    ],
)
def test_what_cannot_be_resized_is_refused_in_one_line_as_in_python(asked, columns, rows, side, mode, reason):
    array, spec = np.zeros((rows, columns, 1), np.uint8), spec_of((side, side), mode=mode)
    said = in_cpp(asked, array, spec, "grey")
    assert said.startswith("InputError")
    assert reason in said
    with pytest.raises(ImageSizeError) as refused:
        in_python(array, spec, "grey")
    assert str(refused.value).replace(",", "").partition(": ")[2] in said.replace(",", "")


def test_rows_that_overlap_and_towers_out_of_range_are_refused(asked):
    assert "100x0 pixels has nothing to see" in asked.ask("pixels 8 8 bicubic shortest 0 rgb 100 0 300")
    assert "rows are 5 bytes apart, but hold 6" in asked.ask("pixels 8 8 bicubic shortest 0 rgb 2 2 5", bytes(10))
    assert "from 1 to 4096" in asked.ask("pixels 4097 8 bicubic shortest 0 grey 2 2 2", bytes(4))


@pytest.mark.parametrize(("columns", "rows"), [(640, 480), (31, 17), (5, 900)])
def test_a_size_that_was_met_before_allocates_nothing(asked, columns, rows):
    said, new, met = asked.ask(f"allocations {columns} {rows}").split()
    assert said == "ok"
    assert int(new) > 3  # at least one for each order of bytes, or nothing was counted
    assert int(met) == 0
