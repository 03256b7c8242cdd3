"""Decoding ahead of the encoder: order, batches, and bounded memory."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from invariclip.calibrate.data import encode as module
from invariclip.calibrate.data.encode import DECLINED, Ready, Request, encode_images, encoded, unit_rows
from invariclip.calibrate.data.problems import UNREADABLE, ProblemCounts
from invariclip.calibrate.data.versions import Changes, changed
from invariclip.errors import InputError, NotApplicableError


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(0, 9), max_size=30), batch=st.integers(1, 8), workers=st.integers(1, 3))
def test_every_item_in_order_with_its_own_rows(reading, counts, batch, workers):
    encoder = reading.Rowwise(width=4)

    def prepare(index):
        rng = np.random.default_rng(index)
        images = [rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(counts[index])]
        return Ready(index, images, "" if images else "none")

    found = list(encoded(encoder, range(len(counts)), prepare, batch=batch, workers=workers))
    assert [ready.item for ready, _ in found] == list(range(len(counts)))
    assert all(size <= batch for size in encoder.batches)
    for ready, rows in found:
        images = prepare(ready.item).images
        expected = reading.Rowwise(width=4).encode_images(images) if images else np.empty((0, 4))
        assert np.array_equal(rows, expected)


@pytest.mark.parametrize(("size", "most"), [(0, 8), (10, 2)])
def test_no_more_is_under_way_than_a_batch_or_what_memory_bears(reading, monkeypatch, size, most):
    monkeypatch.setattr(module, "HELD_BYTES", 20)
    taken, given, ahead = 0, 0, []

    def items():
        nonlocal taken
        for index in range(100):
            taken += 1
            ahead.append(taken - given)
            yield index

    def prepare(index):
        return Ready(index, reason="none")

    for _ in module._prepared(items(), prepare, lambda _: size, 8, 2):
        given += 1
    assert given == 100
    assert max(ahead) == most + 1


def test_an_error_of_the_encoder_comes_through_and_threads_end(reading):
    class Broken(reading.Rowwise):
        def encode_images(self, batch):
            raise RuntimeError("out of memory")

    before = threading.active_count()
    image = np.zeros((16, 16, 3), dtype=np.uint8)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(encoded(Broken(), range(500), lambda index: Ready(index, [image]), batch=4))
    assert threading.active_count() == before


def test_paths_and_bytes_are_the_same(reading, tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(file)
    requests = [Request(file, "path"), Request(b"damaged", "bad"), Request(file.read_bytes(), "bytes", 7)]
    tally = ProblemCounts()
    changes = Changes(("invert", "fog"), draws=2)
    first, second = encode_images(reading.Rowwise(), requests, tally, changes=changes)
    assert (second.name, second.place, second.labels) == ("bytes", 7, first.labels)
    assert np.array_equal(first.row, second.row)
    assert np.array_equal(first.versions, second.versions)
    assert np.linalg.norm(first.versions, axis=1) == pytest.approx([1, 1])
    assert tally.to_json() == {UNREADABLE: {"count": 1, "examples": ["bad"]}}


def test_versions_that_cannot_be_made_are_told(reading, tmp_path):
    Image.new("RGB", (16, 16), (9, 9, 9)).save(tmp_path / "grey.png")
    tally = ProblemCounts()
    changes = Changes(("greyscale", "style-exchange", "invert"), draws=3)
    (seen,) = encode_images(reading.Rowwise(), [Request(tmp_path / "grey.png", "g")], tally, changes=changes)
    assert seen.labels == ("invert",)
    assert tally.counts == {DECLINED: 2}
    assert sorted(tally.examples[DECLINED])[0] == "g (greyscale: it changes nothing in this image)"
    assert "needs a second image" in sorted(tally.examples[DECLINED])[1]
    with pytest.raises(NotApplicableError, match="changes nothing"):
        changed(np.zeros((16, 16, 3), np.uint8), "greyscale", "0", 0)


def test_wrong_changes():
    with pytest.raises(InputError, match="no intervention is called 'fogg'; nearest: fog"):
        Changes(("fogg",))
    with pytest.raises(InputError, match="draws must be one or more"):
        Changes(("fog",), draws=0)
    assert Changes().to_json() is None
    assert Changes(("fog",)).to_json() != Changes(("fog",), seed=1).to_json()


def test_unit_rows_leave_what_is_none():
    rows = unit_rows(np.asarray([[3.0, 4.0], [0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]]))
    assert rows[0] == pytest.approx([0.6, 0.8])
    assert not rows[1].any()
    assert np.isnan(rows[2, 0])
    assert np.isinf(rows[3, 0])
