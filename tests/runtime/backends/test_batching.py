"""Runs of a few sizes: every row answered once, filled up with real rows only, memory bounded over any sizes."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from invariclip.backends import BACKENDS, open_backend
from invariclip.backends.batching import buckets, largest_bucket, plan, run_in_buckets
from invariclip.errors import InputError


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request, tiny_artifact):
    return open_backend(request.param, tiny_artifact / "image.onnx", threads=1)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)


class Recorder:
    """An engine that remembers what it was given."""

    def __init__(self, inner):
        self.inner, self.given = inner, []

    def run(self, inputs, outputs):
        self.given.append(inputs)
        return self.inner.run(inputs, outputs)


@given(rows=st.integers(0, 3000), largest=st.one_of(st.none(), st.integers(1, 300)))
def test_a_plan_takes_every_row_once_and_wastes_little(rows, largest):
    parts = plan(rows, largest)
    assert sum(count for count, _ in parts) == rows
    assert all(0 < count <= bucket and bucket - count <= max(1, bucket // 8) for count, bucket in parts)
    assert all(bucket & (bucket - 1) == 0 for _, bucket in parts)
    assert all(count == bucket for count, bucket in parts[:-1])
    if largest is not None:
        assert {bucket for _, bucket in parts} <= set(buckets(largest))
        assert max(buckets(largest)) <= largest < 2 * max(buckets(largest))


@pytest.mark.parametrize(
    ("rows", "largest", "parts"),
    [
        (0, None, []),
        (1, None, [(1, 1)]),
        (3, None, [(3, 4)]),
        (5, None, [(4, 4), (1, 1)]),
        (6, None, [(4, 4), (2, 2)]),
        (7, None, [(7, 8)]),
        (13, None, [(8, 8), (4, 4), (1, 1)]),
        (14, 16, [(14, 16)]),
        (14, 8, [(8, 8), (4, 4), (2, 2)]),
        (7, 7, [(4, 4), (3, 4)]),
        (35, 16, [(16, 16), (16, 16), (3, 4)]),
    ],
)
def test_plans(rows, largest, parts):
    assert plan(rows, largest) == parts


def test_wrong_numbers_are_refused(images):
    assert (buckets(1), buckets(20), largest_bucket(20)) == ((1,), (1, 2, 4, 8, 16), 16)
    for call in (lambda: plan(-1), lambda: plan(1, 0), lambda: buckets(0), lambda: largest_bucket(-3)):
        with pytest.raises(InputError, match="must be at least"):
            call()
    with pytest.raises(InputError, match="input pixels has no rows"):
        run_in_buckets(Recorder(None), "pixels", images[:0], ("embedding",))

    class Forgets:
        def run(self, inputs, outputs):
            return dict.fromkeys(outputs, inputs["pixels"][1:])

    with pytest.raises(InputError, match="8 rows of pixels gave another number"):
        run_in_buckets(Forgets(), "pixels", images[:7], ("a",))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 40), largest=st.one_of(st.none(), st.integers(1, 40)))
def test_rows_are_those_of_the_buckets_own_runs_whatever_fills_them_up(backend, images, rows, largest):
    asked = Recorder(backend)
    before = images.copy()
    got = run_in_buckets(asked, "pixels", images[:rows], ("embedding", "probabilities"), largest=largest)
    assert np.array_equal(images, before)
    assert [len(inputs["pixels"]) for inputs in asked.given] == [bucket for _, bucket in plan(rows, largest)]
    start = 0
    for (count, bucket), inputs in zip(plan(rows, largest), asked.given, strict=True):
        # what fills up is a real row, and has no influence on the others
        assert all(np.array_equal(row, images[start + count - 1]) for row in inputs["pixels"][count:])
        others = np.concatenate([images[start : start + count], images[: bucket - count]])
        own = backend.run({"pixels": others}, ("embedding", "probabilities"))
        for name, value in own.items():
            assert np.array_equal(got[name][start : start + count], value[:count])
        start += count
    whole = backend.run({"pixels": images[:rows]}, ("embedding",))["embedding"]
    assert np.abs(got["embedding"] - whole).max() <= 1e-6


def test_further_inputs_go_into_every_run(images):
    class Adds:
        def run(self, inputs, outputs):
            return dict.fromkeys(outputs, inputs["pixels"][:, 0, 0, 0] + inputs["one"])

    got = run_in_buckets(Adds(), "pixels", images[:13], ("a",), feeds={"one": np.float32(1)})
    assert np.array_equal(got["a"], images[:13, 0, 0, 0] + np.float32(1))


# In a process of its own: another test's memory is not counted.
GROWTH = """
import gc, json, random, sys
from pathlib import Path
import numpy as np
from invariclip.backends import open_backend
from invariclip.backends.batching import run_in_buckets

def resident():
    gc.collect()
    lines = Path('/proc/self/status').read_text().splitlines()
    return int(next(line for line in lines if line.startswith('VmRSS')).split()[1]) / 1024

backend = open_backend(sys.argv[1], Path(sys.argv[2]), threads=1)
rows = np.random.default_rng(0).integers(0, 256, (500, 32, 32, 3), dtype=np.uint8)
sizes = list(range(1, 501))
random.Random(0).shuffle(sizes)
seen = []
for number, size in enumerate([500, *sizes]):
    if sys.argv[3] == 'buckets':
        run_in_buckets(backend, 'pixels', rows[:size], ('embedding',), largest=64)
    else:
        backend.run({'pixels': rows[:size]}, ('embedding',))
    if number in (100, 500):
        seen.append(resident())
print(json.dumps(seen))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", BACKENDS)
def test_five_hundred_batch_sizes_do_not_grow_memory(name, tiny_artifact):
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, name, str(tiny_artifact / "image.onnx"), "buckets"],
        capture_output=True,
        text=True,
        check=True,
    )
    early, late = json.loads(done.stdout)
    assert late - early < 8  # MB; without buckets and without a bound of what it keeps, OpenVINO takes 280 more
