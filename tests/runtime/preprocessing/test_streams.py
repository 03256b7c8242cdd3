"""Reading ahead changes nothing but the time: order, rows, errors, memory and threads are those of the plain loop."""

import io
import itertools
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from invariclip.errors import InputError
from invariclip.preprocessing.pixels import PixelSpec, pixels
from invariclip.preprocessing.streams import MAX_AHEAD, ImageReader, prefetch

SPEC = PixelSpec((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def image(seed, size=12):
    return np.random.default_rng(seed).integers(0, 256, (size, size + seed % 5, 3), dtype=np.uint8)


def workers_alive():
    return [thread for thread in threading.enumerate() if thread.name.startswith("invariclip-read")]


def collect(batches, into):
    for batch in batches:
        into.append(batch)
    return into


@settings(max_examples=60, deadline=None)
@given(
    good=st.lists(st.booleans(), max_size=23),
    batch_size=st.integers(1, 7),
    look_ahead=st.integers(0, 4),
    workers=st.integers(1, 4),
    as_iterator=st.booleans(),
)
def test_rows_are_those_of_the_plain_loop(good, batch_size, look_ahead, workers, as_iterator):
    given_ = [image(number) if fine else b"no image" for number, fine in enumerate(good)]
    bad = []
    batches = ImageReader(SPEC, workers=workers).batches(
        iter(given_) if as_iterator else given_,
        batch_size,
        look_ahead=look_ahead,
        unreadable=lambda place, what, error: bad.append((place, what, str(error))),
    )
    seen = list(batches)
    wanted = [number for number, fine in enumerate(good) if fine]
    assert [len(batch.places) for batch in seen[:-1]] == [batch_size] * (len(seen) - 1)
    assert [place for batch in seen for place in batch.places] == wanted
    assert all(what is given_[place] for batch in seen for place, what in zip(batch.places, batch.images, strict=True))
    rows = [row for batch in seen for row in batch.pixels]
    for row, place in zip(rows, wanted, strict=True):
        np.testing.assert_array_equal(row, pixels(given_[place], SPEC))
    assert [(place, what) for place, what, _ in bad] == [(n, b"no image") for n, fine in enumerate(good) if not fine]
    assert not workers_alive()


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 50])
def test_before_an_error_comes_all_that_lies_before_it(tmp_path, workers, batch_size):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG")
    given_ = [*map(image, range(7)), tmp_path / "cut.png", tmp_path / "absent.png", *map(image, range(9))]
    seen = []
    with pytest.raises(InputError, match=r"cut\.png"):
        collect(ImageReader(SPEC, workers=workers).batches(given_, batch_size), seen)
    assert [place for batch in seen for place in batch.places] == list(range(7))
    assert not workers_alive()


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_of_the_source_comes_after_its_images(workers):
    def source():
        yield from map(image, range(5))
        raise OSError("the camera is gone")

    seen = []
    with pytest.raises(OSError, match="camera is gone"):
        collect(ImageReader(SPEC, workers=workers).batches(source(), 2), seen)
    assert [batch.places for batch in seen] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("workers", [1, 3])
def test_what_the_listener_raises_ends_the_stream_where_it_stands(workers):
    def refuse(place, what, error):
        raise KeyError(place)

    seen = []
    with pytest.raises(KeyError):
        collect(ImageReader(SPEC, workers=workers).batches([image(0), b"", image(1)], 4, unreadable=refuse), seen)
    assert [batch.places for batch in seen] == [[0]]


@pytest.mark.parametrize(("batch_size", "look_ahead", "most"), [(1, 1, 1), (4, 2, 8), (4, 0, 0), (200, 9, MAX_AHEAD)])
def test_no_more_is_taken_from_an_endless_source_than_was_said(batch_size, look_ahead, most):
    taken = []

    def endless():
        for number in itertools.count():
            taken.append(number)
            yield image(number % 7)

    batches = ImageReader(SPEC, workers=2).batches(endless(), batch_size, look_ahead=look_ahead)
    assert not taken
    for done in range(1, 3):
        next(batches)
        assert done * batch_size <= len(taken) <= done * batch_size + most
    assert len(taken) == 2 * batch_size + most  # it does read ahead, and so far
    batches.close()
    assert not workers_alive()
    assert len(taken) == 2 * batch_size + most


def test_work_goes_on_while_the_caller_is_busy():
    begun = [threading.Event() for _ in range(4)]

    def work(number):
        begun[number].set()
        return number

    stream = prefetch(range(4), work, workers=2, ahead=3)
    assert next(stream) == (0, 0)
    # nothing more is asked of the stream, and yet the others are worked on
    assert all(event.wait(10) for event in begun)
    assert list(stream) == [(1, 1), (2, 2), (3, 3)]


def test_several_threads_work_at_once():
    meeting = threading.Barrier(2, timeout=10)
    assert [done for _, done in prefetch(range(4), lambda _: meeting.wait() >= 0, workers=2, ahead=3)] == [True] * 4


@pytest.mark.parametrize(("workers", "ahead"), [(1, 8), (4, 0)])
def test_without_a_second_core_or_look_ahead_all_is_in_the_callers_thread(workers, ahead):
    stream = prefetch(range(5), lambda _: threading.current_thread(), workers=workers, ahead=ahead)
    assert {thread for _, thread in stream} == {threading.current_thread()}


def test_one_image_needs_no_threads(monkeypatch):
    monkeypatch.setattr("invariclip.preprocessing.streams.ThreadPoolExecutor", None)
    assert len(list(ImageReader(SPEC, workers=4).batches([image(0)]))) == 1


def test_an_image_that_is_not_decoded_yet_may_stand_in_a_list_twice():
    stream = io.BytesIO()
    Image.fromarray(image(3, 400)).save(stream, "PNG")
    lazy = Image.open(stream)
    rows = next(ImageReader(SPEC, workers=4).batches([lazy] * 16)).pixels
    assert (rows == pixels(image(3, 400), SPEC)).all()


def test_the_mode_reaches_the_pixels():
    stream = io.BytesIO()
    Image.fromarray(image(3, 128)).save(stream, "JPEG")
    data = stream.getvalue()
    fast = next(ImageReader(SPEC, "fast").batches([data])).pixels[0]
    np.testing.assert_array_equal(fast, pixels(data, SPEC, "fast"))
    assert not np.array_equal(fast, pixels(data, SPEC))


def test_prepared_batches_are_cut():
    prepared = np.stack([pixels(image(n), SPEC) for n in range(5)])
    seen = list(ImageReader(SPEC).batches(prepared, 2))
    assert [batch.places for batch in seen] == [[0, 1], [2, 3], [4]]
    np.testing.assert_array_equal(np.concatenate([batch.pixels for batch in seen]), prepared)


@pytest.mark.parametrize(
    ("images", "options", "reason"),
    [
        ("cat.png", {}, "list of images"),
        (b"bytes", {}, "list of images"),
        (Image.new("RGB", (9, 9)), {}, "list of images"),
        (np.zeros((9, 9, 3), np.uint8), {}, "list of images"),
        (7, {}, "list of images"),
        (np.zeros((2, 9, 9, 3), np.uint8), {}, "prepared batch"),
        (np.zeros((2, 8, 8, 3), np.float32), {}, "prepared batch"),
        ([], {"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ([], {"look_ahead": -1}, "look_ahead must be at least 0, not -1"),
    ],
)
def test_wrong_calls_are_refused_at_once(images, options, reason):
    with pytest.raises(InputError, match=reason):
        ImageReader(SPEC).batches(images, **options)
