"""Sums of blocks: the moments of unit rows, whatever the blocks; what is no embedding never in them, always counted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.calibrate.data.moments import of_pairs, of_points
from invariclip.calibrate.data.problems import NOT_FINITE, SAME, ZERO
from invariclip.calibrate.data.stream.blocks import POINTS, RowBlock
from invariclip.calibrate.data.stream.collect import Sums
from invariclip.errors import InputError

WIDTH = 6


def rows(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)


def unit(vectors):
    plain = vectors.astype(np.float64)
    return plain / np.linalg.norm(plain, axis=1, keepdims=True)


def same(a, b):
    for name in vars(a):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-12, atol=1e-13, err_msg=name)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 700), min_size=1, max_size=4), st.booleans(), st.booleans())
def test_blocks_of_any_size_give_the_moments_of_all_rows(sizes, weighted, shared):
    sums, total = Sums(WIDTH, "s"), sum(sizes)
    first, second = rows(total), rows(total, 1)
    weights = np.random.default_rng(2).uniform(0, 3, total) if weighted else None
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        block = first[part]
        chosen = None if weights is None else weights[part]
        points = block if shared else block.copy()
        sums.add(RowBlock(points=points, first=block, second=second[part], weights=chosen, part="natural"))
        start += size
    found = sums.moments()
    same(found[POINTS], of_points(unit(first)))
    same(found["natural"], of_pairs(unit(first), unit(second), weights))
    assert not sums.tally.counts


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 0.0])
def test_what_is_no_embedding_is_left_out_and_named(bad):
    first, second = rows(10), rows(10, 1)
    first[3] = bad
    if bad:
        second[7, 2] = bad
    sums = Sums(WIDTH, "a.npy")
    sums.add(RowBlock(points=first, first=first, second=second, point_names=[f"p{k}" for k in range(10)]))
    found = sums.moments()
    kept = [k for k in range(10) if k != 3]
    paired = [k for k in kept if k != 7 or not bad]
    same(found[POINTS], of_points(unit(first[kept])))
    same(found["pairs"], of_pairs(unit(first[paired]), unit(second[paired])))
    reason = NOT_FINITE if bad else ZERO
    assert sums.tally.counts == {reason: 10 - len(kept) + 10 - len(paired)}
    assert sums.tally.examples[reason] == ["p3", "a.npy, pair 3", *(["a.npy, pair 7"] if bad else [])]


def test_a_pair_of_one_thing_with_itself_is_no_pair():
    first, second = rows(5), rows(5, 1)
    second[2] = first[2]
    second[4] = 2 * first[4]  # the same embedding, once its length is one
    sums = Sums(WIDTH, "s")
    sums.add(RowBlock(first=first, second=second, pair_names=["a", "b", "c", "d", "e"]))
    assert sums.moments()["pairs"].pairs == 3
    assert sums.tally.counts == {SAME: 2}
    assert sums.tally.examples[SAME] == ["c", "e"]


def test_pairs_that_share_members_are_counted_by_what_is_left_of_them():
    first, second = rows(5), rows(5, 1)
    second[4] = first[4]
    triangle = np.asarray([[0, 1, 0], [0, 2, 0], [1, 2, 0]])
    more = np.concatenate([triangle + np.asarray([3, 3, 1]), [[6, 7, 2], [8, 9, 3]]])
    sums = Sums(WIDTH, "s")
    sums.add(RowBlock(first=first[:3], second=second[:3], ties=triangle))
    sums.add(RowBlock(first=first, second=second, ties=more))
    found = sums.moments()["pairs"]
    assert (found.pairs, found.pair_independent) == (7, 2 + 2 + 1)  # the last is a pair of one thing with itself
    assert found.effective_pairs == 5
    sums.add(RowBlock(first=rows(4, 2), second=rows(4, 3)))  # of these nothing is known: each is independent
    assert sums.moments()["pairs"].pair_independent == 9


def test_nothing_good_gives_no_moments():
    sums = Sums(WIDTH, "s")
    sums.add(RowBlock(points=np.zeros((4, WIDTH))))
    assert sums.moments() == {}
    assert sums.tally.counts == {ZERO: 4}


@pytest.mark.parametrize(
    ("block", "told"),
    [
        (RowBlock(points=np.ones((2, WIDTH + 1))), "not of width 6"),
        (RowBlock(points=np.ones(WIDTH)), "not of width 6"),
        (RowBlock(first=np.ones((2, WIDTH)), second=np.ones((3, WIDTH))), "2 first members of pairs and 3"),
        (RowBlock(first=rows(2), second=rows(2, 1), weights=np.array([1.0, -1.0])), "finite numbers of zero or more"),
        (RowBlock(first=rows(2), second=rows(2, 1), weights=np.array([1.0, np.nan])), "finite numbers of zero or more"),
        (RowBlock(first=rows(2), second=rows(2, 1), weights=np.ones(3)), "must be 2 finite numbers"),
        (
            RowBlock(first=rows(2), second=rows(2, 1), ties=np.ones((2, 2), dtype=np.int64)),
            r"2 pairs, and ties of shape \[2, 2",
        ),
    ],
)
def test_blocks_that_cannot_be_used(block, told):
    with pytest.raises(InputError, match=told):
        Sums(WIDTH, "s").add(block)
