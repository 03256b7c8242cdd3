"""The range of 256 levels: inside the whole one, never worse where it was fitted; and the sample it is fitted on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.export.quantization import ranges as clipping
from invariclip.export.quantization.ranges import StreamSample, clipped, step


def error(numbers, low, high):
    scale, zero = step(low, high)
    return float(np.square((np.clip(np.rint(numbers / scale) + zero, 0, 255) - zero) * scale - numbers).mean())


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from(["normal", "laplace", "gelu", "uniform"]))
def test_a_clipped_range_lies_inside_and_errs_no_more(seed, kind):
    rng = np.random.default_rng(seed)
    numbers = rng.normal(size=4000) if kind in ("normal", "gelu") else getattr(rng, kind)(size=4000)
    numbers = (np.maximum(numbers, -0.17) if kind == "gelu" else numbers).astype(np.float32)
    whole = min(0.0, float(numbers.min())), max(0.0, float(numbers.max()))
    low, high = clipped(numbers, *whole)
    assert whole[0] <= low <= 0 <= high <= whole[1]
    assert error(numbers, low, high) <= error(numbers, *whole) * (1 + 1e-5)


def test_one_number_far_out_is_cut_off():
    numbers = np.append(np.random.default_rng(0).normal(size=200_000), 9.0).astype(np.float32)
    low, high = clipped(numbers, float(numbers.min()), 9.0)
    assert high < 7
    assert error(numbers, low, high) < 0.8 * error(numbers, float(numbers.min()), 9.0)


@pytest.mark.parametrize("numbers", [np.zeros(5, np.float32), np.ones(5, np.float32)])
def test_what_does_not_vary_has_a_range_too(numbers):
    low, high = clipped(numbers, 0.0, float(numbers.max()))
    assert error(numbers, low, high) == pytest.approx(0, abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_a_sample_is_bounded_and_even_whatever_the_batches(sizes):
    held, clipping.SAMPLE = clipping.SAMPLE, 60
    try:
        rows = np.arange(sum(sizes), dtype=np.float32)[:, None].repeat(3, axis=1)
        parts, whole = StreamSample(), StreamSample()
        for part in np.split(rows, np.cumsum(sizes)[:-1]):
            parts.add(part)
        whole.add(rows)
        kept = parts.rows[:, 0]
        assert 0 < len(kept) <= 20
        assert kept[0] == 0
        assert len(set(np.diff(kept))) <= 1  # the same distance everywhere
        assert np.array_equal(parts.rows, whole.rows)
    finally:
        clipping.SAMPLE = held
