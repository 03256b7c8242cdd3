"""Shards → state: sums against plain ones, the same bits however often a run is killed, nothing counted twice."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.calibrate.data.moments import of_pairs, of_points
from invariclip.calibrate.data.problems import NOT_FINITE, SAME, ZERO, ProblemCounts
from invariclip.calibrate.data.sources.embeddings import EmbeddingSource
from invariclip.calibrate.data.stream.blocks import POINTS, RowBlock, Shard
from invariclip.calibrate.data.stream.collect import Sums, collect
from invariclip.calibrate.data.stream.state import (
    MomentsState,
    read_state,
    state_from_bytes,
    state_to_bytes,
    write_state,
)
from invariclip.errors import InputError
from invariclip.records import seal

WIDTH = 48


def files(folder, count, rows=500, seed=0):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    for k in range(count):
        first = rng.normal(size=(rows, WIDTH)).astype(np.float32)
        np.save(folder / f"a{k:02}.npy", first)
        np.save(folder / f"b{k:02}.npy", first + rng.normal(size=first.shape).astype(np.float32))
    return EmbeddingSource("given", first=str(folder / "a*.npy"), second=str(folder / "b*.npy"), points="first")


def bits(state):
    plain = {
        key: [np.asarray(getattr(found, each.name)).tobytes() for each in fields(found)]
        for key, found in state.sums.items()
    }
    return plain, state.done, {name: tally.to_json() for name, tally in state.tallies.items()}


def run(source, path):
    os.setpgrp()
    collect([source], state_file=path, save_every=0)


def test_twenty_kills_at_random_moments_end_with_the_same_bits(tmp_path):
    source = files(tmp_path / "data", 24)
    wanted = bits(collect([source]))
    fork = multiprocessing.get_context("fork")
    rng = np.random.default_rng(0)
    started = time.perf_counter()
    collect([source], state_file=tmp_path / "timing.safetensors", save_every=0)
    whole = time.perf_counter() - started
    partly = 0
    for trial in range(20):
        path = tmp_path / f"{trial}.safetensors"
        child = fork.Process(target=run, args=(source, path))
        child.start()
        time.sleep(rng.uniform(0, whole))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        if path.exists():
            partly += 0 < len(read_state(path).done) < 24
        assert bits(collect([source], state_file=path, save_every=0)) == wanted
        assert bits(read_state(path)) == wanted
    assert partly >= 5  # or the kills came too early or too late to say anything


def test_a_finished_run_reads_nothing_again(tmp_path, monkeypatch):
    source = files(tmp_path / "data", 3)
    first = bits(collect([source], state_file=tmp_path / "m"))
    monkeypatch.setattr(EmbeddingSource, "read", lambda *_: pytest.fail("read again"))
    assert bits(collect([source], state_file=tmp_path / "m")) == first


def test_new_shards_continue_an_old_state(tmp_path):
    files(tmp_path / "data", 2)
    source = files(tmp_path / "data", 2)
    collect([source], state_file=tmp_path / "m")
    more = files(tmp_path / "more", 2, seed=1)
    more = replace(more, name="more")
    state = collect([source, more], state_file=tmp_path / "m")
    assert state.counts() == {"given": {"pairs": 1000, "points": 1000}, "more": {"pairs": 1000, "points": 1000}}
    whole = collect([source, more]).combined()
    np.testing.assert_allclose(state.combined().sigma_delta, whole.sigma_delta, rtol=0, atol=1e-15)


def test_a_file_that_changed_since_is_not_counted_again(tmp_path):
    source = files(tmp_path / "data", 2)
    collect([source], state_file=tmp_path / "m")
    changed = tmp_path / "data/a01.npy"
    np.save(changed, np.load(changed) + 1)
    with pytest.raises(InputError, match=r"a01\.npy\[0:500\] changed since it was counted"):
        collect([source], state_file=tmp_path / "m")


def test_states_merge_and_come_apart(tmp_path):
    one, two = files(tmp_path / "one", 2), files(tmp_path / "two", 3, seed=1)
    two = replace(two, name="two")
    both, first, second = collect([one, two]), collect([one]), collect([two])
    with pytest.raises(InputError, match="is in both"):
        both.merge(second)
    first.merge(second)
    assert bits(first) == bits(both)
    both.subtract(second)
    plain, again = collect([one]).combined(), both.combined()
    assert both.done == collect([one]).done
    np.testing.assert_allclose(again.sigma, plain.sigma, rtol=0, atol=1e-15)
    np.testing.assert_allclose(again.sigma_delta, plain.sigma_delta, rtol=0, atol=1e-15)
    with pytest.raises(InputError, match="is not counted here"):
        both.subtract(second)


def test_sources_count_by_their_weights_not_by_their_pairs(tmp_path):
    few, many = files(tmp_path / "few", 1, rows=20), files(tmp_path / "many", 3, seed=1)
    many = replace(many, name="many")
    state = collect([few, many])
    alone = {name: collect([source]).combined() for name, source in (("few", few), ("many", many))}
    found = state.combined({"given": 3.0})
    wanted = (3 * alone["few"].sigma_delta + alone["many"].sigma_delta) / 4
    np.testing.assert_allclose(found.sigma_delta, wanted, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(
        found.sigma, (3 * 20 * alone["few"].sigma + 1500 * alone["many"].sigma) / 1560, rtol=1e-12, atol=1e-15
    )
    with pytest.raises(InputError, match=r"no source is called 'few'; available: given, many"):
        state.combined({"few": 1.0})


def test_a_source_of_which_nothing_could_be_used_says_why(tmp_path):
    state = collect([files(tmp_path / "data", 1, rows=20)])
    state.tallies["gone"] = ProblemCounts()
    state.tallies["gone"].add("no such file", ["a.png", "b.png"])
    with pytest.raises(InputError, match=r"source 'gone': nothing in it could be used \(.*2.*no such file.*a\.png"):
        state.combined({"gone": 2.0})


def test_groups_add_up_to_the_whole(tmp_path):
    state = collect([files(tmp_path / "data", 12)])
    groups, whole = state.groups(), state.combined()
    assert len(groups) > 3
    assert [bool(group.points) for group in groups] == [True] + [False] * (len(groups) - 1)
    for name in ("point_weight", "point_weight_squares", "point_fourth", "pair_weight", "point_outer", "pair_outer"):
        np.testing.assert_allclose(sum(getattr(g, name) for g in groups), getattr(whole, name), rtol=1e-12, atol=1e-15)
    assert sum(group.pairs for group in groups) == whole.pairs == 6000


@dataclass(frozen=True)
class Faulty:
    """Two shards, one of which cannot be read."""

    name: str = "faulty"
    weight: float = 1.0
    needs_encoder: bool = False

    def shards(self):
        return [Shard(self.name, f"part {k}", {"width": WIDTH, "k": k}) for k in range(3)]

    def read(self, shard, encoder, tally):
        yield RowBlock(points=np.random.default_rng(shard.spec["k"]).normal(size=(9, WIDTH)))
        if shard.spec["k"] == 1:
            raise InputError("part 1: the tape is torn")


def test_a_shard_that_cannot_be_read_is_named_and_all_others_are_kept(tmp_path):
    with pytest.raises(InputError, match=r"1 of 3 shards .*faulty: part 1: the tape is torn; the other 2 are kept"):
        collect([Faulty()], state_file=tmp_path / "m")
    state = read_state(tmp_path / "m")
    assert sorted(name for _, name in state.done.values()) == ["part 0", "part 2"]
    assert state.counts() == {"faulty": {"points": 18}}  # nothing of the torn one


def test_what_was_left_out_is_in_the_state(tmp_path):
    source = files(tmp_path / "data", 2)
    path = tmp_path / "data/b01.npy"
    rows = np.load(path)
    rows[7] = np.nan
    np.save(path, rows)
    collect([source], state_file=tmp_path / "m")
    tally = read_state(tmp_path / "m").tallies["given"]
    assert tally.counts == {NOT_FINITE: 1}
    assert tally.examples[NOT_FINITE] == ["a01.npy, row 7"]


def test_plans_that_would_count_twice(tmp_path):
    source = files(tmp_path / "data", 2)
    with pytest.raises(InputError, match="two sources are called 'given'"):
        collect([source, source])


def test_states_that_cannot_be_read(tmp_path):
    state = collect([files(tmp_path / "data", 1)])
    path = tmp_path / "m.safetensors"
    write_state(path, state)
    content = path.read_bytes()
    for damaged in (
        b"",
        content[:-100],
        content[:200],
        b"\xff" * 64,
        content.replace(b'\\"schema\\": 3', b'\\"schema\\": 9'),
    ):
        assert damaged != content
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"m\.safetensors"):
            read_state(path)
    with pytest.raises(InputError, match="no such file; `invariclip calibrate --sources` writes moments"):
        read_state(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda facts: facts["sums"][0].update(points="many"), "points of given is 'many'"),
        (lambda facts: facts["sums"][0].update(pairs=1.5), "pairs of given is 1.5"),
        (lambda facts: facts["sums"][0].update(pair_independent=0.5), "pair_independent of given is 0.5"),
        (lambda facts: facts["sums"][0].update(pair_weight=float("nan")), "NaN is no number in JSON"),
        (lambda facts: facts["sums"][0].update(point_fourth=-1.0), "point_fourth of given is -1.0"),
        (lambda facts: facts["sums"][0].update(unknown=1), "not moments written by"),
        (lambda facts: facts["sums"][0].pop("pair_fourth"), "not moments written by"),
        (lambda facts: facts.update(width=WIDTH + 1), "is not .* of float64 values"),
        (lambda facts: facts.pop("done"), "not moments written by"),
        (lambda facts: facts.update(done={"digest": "x"}), r"Expected `array`, got `str` - at `\$\.done"),
        (lambda facts: facts.update(width=2**40), "its width is 1099511627776, not from 1 to"),
        (
            lambda facts: facts.update(left_out={"given": {"zero": {"count": 9, "examples": ["a"] * 9}}}),
            "its count of what was left out of 'given' is impossible",
        ),
        (lambda facts: facts.update(more=1), "has a field that is not known: more"),
        (lambda facts: facts["sums"].append(facts["sums"][0]), "stand twice"),
        (lambda facts: facts["sums"].pop(), "a matrix that belongs to no sums"),
    ],
)
def test_states_whose_facts_are_damaged(tmp_path, change, told):
    content = state_to_bytes(collect([files(tmp_path / "data", 1)]))
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    facts = json.loads(header["__metadata__"]["invariclip.state"])
    change(facts)
    header["__metadata__"]["invariclip.state"] = json.dumps(facts)
    head = json.dumps(header).encode()
    with pytest.raises(InputError, match=told):
        state_from_bytes(seal(len(head).to_bytes(8, "little") + head + content[8 + length :]), "m")


def test_a_flipped_bit_anywhere_is_refused():
    content = state_to_bytes(MomentsState(2, "e"))
    state_from_bytes(content, "m")
    for place in range(len(content)):
        with pytest.raises(InputError, match="m: "):
            state_from_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :], "m")


SUM_WIDTH = 6


def rows(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, SUM_WIDTH)).astype(np.float32)


def unit(vectors):
    plain = vectors.astype(np.float64)
    return plain / np.linalg.norm(plain, axis=1, keepdims=True)


def same(a, b):
    for name in vars(a):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-12, atol=1e-13, err_msg=name)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 700), min_size=1, max_size=4), st.booleans(), st.booleans())
def test_blocks_of_any_size_give_the_moments_of_all_rows(sizes, weighted, shared):
    sums, total = Sums(SUM_WIDTH, "s"), sum(sizes)
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
    sums = Sums(SUM_WIDTH, "a.npy")
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
    sums = Sums(SUM_WIDTH, "s")
    sums.add(RowBlock(first=first, second=second, pair_names=["a", "b", "c", "d", "e"]))
    assert sums.moments()["pairs"].pairs == 3
    assert sums.tally.counts == {SAME: 2}
    assert sums.tally.examples[SAME] == ["c", "e"]


def test_pairs_that_share_members_are_counted_by_what_is_left_of_them():
    first, second = rows(5), rows(5, 1)
    second[4] = first[4]
    triangle = np.asarray([[0, 1, 0], [0, 2, 0], [1, 2, 0]])
    more = np.concatenate([triangle + np.asarray([3, 3, 1]), [[6, 7, 2], [8, 9, 3]]])
    sums = Sums(SUM_WIDTH, "s")
    sums.add(RowBlock(first=first[:3], second=second[:3], ties=triangle))
    sums.add(RowBlock(first=first, second=second, ties=more))
    found = sums.moments()["pairs"]
    assert (found.pairs, found.pair_independent) == (7, 2 + 2 + 1)  # the last is a pair of one thing with itself
    assert found.effective_pairs == 5
    sums.add(RowBlock(first=rows(4, 2), second=rows(4, 3)))  # of these nothing is known: each is independent
    assert sums.moments()["pairs"].pair_independent == 9


def test_nothing_good_gives_no_moments():
    sums = Sums(SUM_WIDTH, "s")
    sums.add(RowBlock(points=np.zeros((4, SUM_WIDTH))))
    assert sums.moments() == {}
    assert sums.tally.counts == {ZERO: 4}


@pytest.mark.parametrize(
    ("block", "told"),
    [
        (RowBlock(points=np.ones((2, SUM_WIDTH + 1))), "not of width 6"),
        (RowBlock(points=np.ones(SUM_WIDTH)), "not of width 6"),
        (
            RowBlock(first=np.ones((2, SUM_WIDTH)), second=np.ones((3, SUM_WIDTH))),
            "2 first members of pairs and 3",
        ),
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
        Sums(SUM_WIDTH, "s").add(block)
