"""What a busy machine is told by, and that a quiet one is not called busy."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from invariclip.bench.latency.machine import MOST_OTHERS, MOST_STEAL
from invariclip.bench.latency.measure import Timing, busy_machine
from invariclip.measure.statistics import mean_load

QUIET = [
    Timing("PyTorch", 1, 40.0, 41.0, 1.0, 1.0, 1.0, 70, rounds=7, steal=0.0, others=0.01),
    Timing("ours", 1, 20.0, 21.0, 2.0, 1.95, 2.05, 70, rounds=7, steal=0.0, others=0.01),
]


def test_a_quiet_machine_says_nothing():
    assert busy_machine(QUIET) is None
    assert busy_machine([]) is None
    # Where the system does not tell, the rounds alone speak
    assert busy_machine([replace(row, steal=None, others=None) for row in QUIET]) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"others": 0.42}, "42% of processor time went to other programs on this machine at batch 1, above 5%"),
        ({"steal": 0.13}, "13% of processor time went to other machines of this host"),
        ({"ratio": 14.7, "ratio_low": 6.0, "ratio_high": 21.0}, "disagree by more than 20% at batch 1 about ours"),
        ({"rounds": 2}, "fewer than 3 rounds at batch 1"),
    ],
)
def test_what_speaks_against_the_ratios_is_said(change, said):
    told = busy_machine([QUIET[0], replace(QUIET[1], **change)])
    assert told.startswith("timed on a busy machine: ")
    assert "the ratios cannot be trusted" in told
    assert "\n" not in told
    assert said in told


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 1))
def test_it_is_busy_exactly_above_the_bounds(steal, others, width):
    rows = [replace(QUIET[1], steal=steal, others=others, ratio_low=2 - width, ratio_high=2 + width)]
    quiet = steal <= MOST_STEAL and others <= MOST_OTHERS and rows[0].ratio_high - rows[0].ratio_low <= 0.2 * 2
    assert (busy_machine(rows) is None) == quiet


def test_the_mean_leaves_out_what_is_not_known():
    assert mean_load([None, 0.2, 0.4]) == pytest.approx(0.3)
    assert mean_load([None]) is None
