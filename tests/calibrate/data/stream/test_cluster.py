"""Ray: the same matrix as one process, also where workers are killed on the way; shards counted once."""

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install invariclip[ray]")

from invariclip.calibrate.data.stream.blocks import RowBlock, Shard
from invariclip.calibrate.data.stream.cluster import Cluster, RayEngine
from invariclip.calibrate.data.stream.collect import collect
from invariclip.calibrate.data.stream.state import read_state
from invariclip.errors import InputError

WIDTH = 16


@dataclass(frozen=True)
class Slow:
    """Twelve shards that take a while; each tells who reads it."""

    folder: str
    seconds: float = 0.0
    torn: int = -1
    name: str = "slow"
    weight: float = 1.0
    needs_encoder: bool = False

    def shards(self):
        return [Shard(self.name, f"part {k}", {"width": WIDTH, "k": k}) for k in range(12)]

    def read(self, shard, encoder, tally):
        k = shard.spec["k"]
        (Path(self.folder) / f"{k}-{os.getpid()}").touch()
        time.sleep(self.seconds)
        if k == self.torn:
            raise InputError(f"part {k}: the tape is torn")
        rng = np.random.default_rng(k)
        first = rng.normal(size=(200, WIDTH))
        first[k] = np.nan
        yield RowBlock(points=first, first=first, second=rng.normal(size=(200, WIDTH)))


def pids(folder):
    return {int(path.name.split("-")[1]) for path in folder.iterdir()}


def test_two_killed_workers_change_nothing(cluster, tmp_path):
    seen = tmp_path / "seen"
    seen.mkdir()
    alone = collect([Slow(str(seen))])
    for path in seen.iterdir():
        path.unlink()
    killed = set()

    def kill_two():
        while len(killed) < 2:
            time.sleep(0.2)
            fresh = pids(seen) - killed - {os.getpid()}
            if fresh:
                victim = fresh.pop()
                os.kill(victim, signal.SIGKILL)
                killed.add(victim)
                time.sleep(1.0)

    killer = threading.Thread(target=kill_two, daemon=True)
    killer.start()
    source = Slow(str(seen), seconds=0.4)
    state = collect([source], engine=RayEngine(Cluster(workers=2)), state_file=tmp_path / "m", save_every=0)
    killer.join(timeout=1)
    assert len(killed) == 2
    assert state.done == alone.done
    assert state.counts() == alone.counts() == {"slow": {"pairs": 12 * 199, "points": 12 * 199}}
    assert read_state(tmp_path / "m").tallies["slow"].to_json() == alone.tallies["slow"].to_json()
    for name in ("sigma", "sigma_delta"):
        np.testing.assert_allclose(
            getattr(state.combined(), name), getattr(alone.combined(), name), rtol=1e-10, atol=1e-12
        )


def test_a_shard_that_cannot_be_read_is_named_and_taken_up_again(cluster, tmp_path):
    with pytest.raises(InputError, match=r"1 of 12 shards .*slow: part 3: the tape is torn; the other 11 are kept"):
        collect([Slow(str(tmp_path), torn=3)], engine=RayEngine(Cluster(workers=2)), state_file=tmp_path / "m")
    for path in tmp_path.glob("*-*"):
        path.unlink()
    state = collect([Slow(str(tmp_path))], engine=RayEngine(Cluster(workers=2)), state_file=tmp_path / "m")
    assert [path.name.split("-")[0] for path in tmp_path.glob("*-*")] == ["3"]  # nothing else was read again
    assert len(state.done) == 12


def test_workers_below_one():
    with pytest.raises(InputError, match="--workers must be 1 or more, not 0"):
        Cluster(workers=0)


@pytest.mark.parametrize(("address", "asked"), [(None, "local"), ("auto", "auto")])
def test_a_cluster_is_joined_only_where_it_is_named(monkeypatch, address, asked):
    """Without an address Ray itself would join one that it finds on the machine."""
    told = {}
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **given: told.update(given))
    assert Cluster(address)._connect()
    assert told["address"] == asked
