"""A candidate in its own process: what it answers, how it dies, and that it sleeps between turns."""

import os
import time

import numpy as np
import pytest

from invariclip.artifact.folder import read_manifest
from invariclip.bench.latency.measure import artifact_candidate, measure
from invariclip.bench.latency.worker import KINDS, LatencyCandidate, LatencyWorker
from invariclip.errors import InputError
from invariclip.measure.worker import WorkerError
from invariclip.preprocessing.find import find_images
from invariclip.preprocessing.pixels import stack


def test_a_candidate_answers_like_the_artifact_and_sleeps_meanwhile(tiny_artifact, tiny_images, tmp_path):
    spec = read_manifest(tiny_artifact).pixels
    batch = stack([str(path) for path in find_images([tiny_images])], spec)
    np.save(tmp_path / "in.npy", batch)
    with LatencyWorker(artifact_candidate("ours", tiny_artifact), threads=1) as worker:
        assert worker.start_s > worker.facts["load_s"] > 0
        assert worker.facts["engine"]["threads"] == 1
        turn = worker.turn(3, batch=2)
        assert len(turn.times) == 3
        time.sleep(0.2)
        assert worker.turn(1, batch=1).idle_cpu_s < 0.1
        assert worker.ask("memory")["peak_bytes"] > 10_000_000
        files = {"images": str(tmp_path / "in.npy"), "out": str(tmp_path / "out.npy")}
        assert worker.ask("embed", batch=5, **files) == {"rows": 12}
    from invariclip import load

    assert np.allclose(np.load(tmp_path / "out.npy"), load(tiny_artifact, threads=1).embed_images(batch), atol=1e-5)


def test_a_process_that_dies_is_named_with_its_reason(tiny_artifact):
    with pytest.raises(WorkerError, match="'odd' stopped: no candidate is of kind 'steam'; available: artifact, "):
        LatencyWorker(LatencyCandidate("odd", "steam", ""), threads=1)
    with LatencyWorker(artifact_candidate("ours", tiny_artifact), threads=1) as worker:
        with pytest.raises(WorkerError, match="'ours' stopped: ") as error:
            worker.ask("dance")
        assert "dance" in error.value.reason
        with pytest.raises(WorkerError, match="exit 1"):
            worker.turn(1, batch=1)


def test_a_process_that_is_killed_is_named(tiny_artifact):
    with LatencyWorker(artifact_candidate("ours", tiny_artifact), threads=1) as worker:
        os.kill(worker._process.pid, 9)
        with pytest.raises(WorkerError, match=r"exit -9\): killed"):
            worker.turn(1, batch=1)


def test_it_ends_with_the_one_who_asked(tiny_artifact):
    with LatencyWorker(artifact_candidate("ours", tiny_artifact), threads=1) as worker:
        worker._process.stdin.close()
        assert worker._process.wait(timeout=60) == 0


def test_two_of_one_name_are_refused(tiny_artifact):
    with pytest.raises(InputError, match="'ours' twice"):
        measure([artifact_candidate("ours", tiny_artifact)] * 2)


@pytest.mark.filterwarnings("ignore:torch.quantize")
@pytest.mark.parametrize("compute", ["float32", "int8"])
def test_a_peak_multiplies_matrices_of_its_own_arithmetic(compute):
    opened = KINDS["peak"](LatencyCandidate("peak", "peak", "", compute=compute), 1)
    assert opened.engine["computes_in"] == compute
    assert opened.engine["flop"] >= 2 * 1024**3
    opened.run(opened.make(1))
