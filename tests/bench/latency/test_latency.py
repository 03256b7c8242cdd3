"""The timing harness: one process per candidate, ratios per round, and a death that is reported."""

import pytest

from invariclip.bench.latency.measure import artifact_candidate, measure
from invariclip.bench.latency.worker import LatencyCandidate
from invariclip.errors import InvariclipError


def test_two_processes_take_turns_and_the_first_is_the_yardstick(tiny_checkpoint, tiny_artifact):
    candidates = [
        LatencyCandidate("pytorch", "pytorch", str(tiny_checkpoint)),
        artifact_candidate("onnx", tiny_artifact),
    ]
    rows = measure(candidates, batches=(1, 2), rounds=3, seconds_per_turn=0.01, threads=1)
    assert [(row.name, row.batch) for row in rows] == [("pytorch", 1), ("onnx", 1), ("pytorch", 2), ("onnx", 2)]
    for row in rows:
        assert 0 < row.median_ms <= row.p95_ms
        assert row.ratio_low <= row.ratio <= row.ratio_high
        assert row.repetitions >= 6
    assert [(row.ratio, row.ratio_low, row.ratio_high) for row in rows if row.name == "pytorch"] == [(1, 1, 1)] * 2


def test_a_candidate_that_cannot_start_is_named(tmp_path):
    with pytest.raises(InvariclipError, match="'broken' stopped"):
        measure([LatencyCandidate("broken", "artifact", str(tmp_path))], rounds=3)
