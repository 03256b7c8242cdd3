"""Shards → state: the same bits however often a run is killed; nothing counted twice, nothing lost without a name."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest

from invariclip.calibrate.data.problems import NOT_FINITE
from invariclip.calibrate.data.sources.embeddings import EmbeddingSource
from invariclip.calibrate.data.stream.blocks import RowBlock, Shard
from invariclip.calibrate.data.stream.collect import collect
from invariclip.calibrate.data.stream.state import read_state, state_from_bytes, state_to_bytes, write_state
from invariclip.errors import InputError

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
        content.replace(b'\\"schema\\": 2', b'\\"schema\\": 9'),
    ):
        assert damaged != content
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"m\.safetensors"):
            read_state(path)
    with pytest.raises(InputError, match="no such moments file"):
        read_state(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda facts: facts["sums"][0].update(points="many"), "points of given is 'many'"),
        (lambda facts: facts["sums"][0].update(pairs=1.5), "pairs of given is 1.5"),
        (lambda facts: facts["sums"][0].update(pair_independent=0.5), "pair_independent of given is 0.5"),
        (lambda facts: facts["sums"][0].update(pair_weight=float("nan")), "pair_weight of given is nan"),
        (lambda facts: facts["sums"][0].update(point_fourth=-1.0), "point_fourth of given is -1.0"),
        (lambda facts: facts["sums"][0].update(unknown=1), "not moments written by invariclip"),
        (lambda facts: facts["sums"][0].pop("pair_fourth"), "not moments written by invariclip"),
        (lambda facts: facts.update(width=WIDTH + 1), "is not .* of finite float64 values"),
        (lambda facts: facts.pop("done"), "not moments written by invariclip"),
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
        state_from_bytes(len(head).to_bytes(8, "little") + head + content[8 + length :], "m")
