"""What a record comes to: ratios of the rounds that both have, warnings, levels, peaks."""

import pytest

from invariclip.bench.latency import report
from invariclip.bench.latency.report import verdicts
from invariclip.bench.latency.session import LatencyRecord, Round

NAMES = {"torch": "pytorch", "peer": "peer", "slow peer": "peer", "ours": "ours", "peak": "peak"}


def record(rounds=6, steal=0.0, others=0.0, jitter=0.0, cosine=1.0, top1=1.0):
    turns = [
        {
            "torch": [0.100, 0.110, 0.100],
            "peer": [0.050 * (1 + jitter * (place % 3)), 0.051 * (1 + jitter * (place % 3))],
            "slow peer": [0.090, 0.091],
            "ours": [0.020, 0.020],
            "peak": [0.010, 0.010],
        }
        for place in range(rounds)
    ]
    return LatencyRecord(
        {},
        entries=[
            {"name": name, "group": group, "arithmetic": "float32", "reason": "", "engine": {}}
            for name, group in NAMES.items()
        ],
        rounds={"1": [Round(one, steal, others, 0.0) for one in turns]},
        accuracy={"ours": {"cosine_min": cosine, "top1_agreement": top1, "gap_increase": 0.0}},
        flops={"1": 1e9},
        peaks={"peak": 2e9},
    )


def test_ratios_peaks_and_the_best_peer():
    found = report.summarise(record())
    row = found["batches"]["1"]["ours"]
    assert row["ratio"]["value"] == pytest.approx(5)
    assert row["per_second"] == pytest.approx(50)
    assert row["peak_share"] == pytest.approx((1e9 / 0.02) / (2e9 / 0.01))
    assert found["peaks"]["peak"]["gflop_per_second"] == pytest.approx(200)
    assert "peak" not in found["batches"]["1"]
    assert found["best_peer"] == {"1": "peer"}
    assert found["against_best_peer"]["1"]["ours"]["value"] == pytest.approx(0.0505 / 0.02)
    assert found["warnings"] == []
    (line,) = verdicts(record(), found)
    assert line.startswith("Batch 1. exact: ours, 5.00 × (5.00 … 5.00); best peer: peer")
    assert line.endswith("the best peer (exact: cosine 1.0000, top-1 100.0%).")


def test_our_cold_start_is_held_against_the_same_engine():
    one = record()
    for entry, engine in zip(one.entries, ("torch", "openvino", "openvino", "openvino", "torch"), strict=True):
        entry["engine"] = {"engine": engine}
    one.cold = {
        "peer": [{"start_s": 9, "load_s": 9, "first_s": 9}, {"start_s": 2, "load_s": 1, "first_s": 0.5}],
        "ours": [{"start_s": 3, "load_s": 1.2, "first_s": 0.2}],
    }
    cold = report.summarise(one)["cold"]
    assert (cold["peer"]["median_s"], cold["peer"]["first_s"]) == (2, 9)
    assert cold["ours"]["over_plain"] == pytest.approx(1.4)
    assert "over_plain" not in cold["peer"]


def test_only_rounds_that_both_have_are_compared():
    one = record()
    for round_ in one.rounds["1"][:4]:
        del round_.turns["ours"]
    one.rounds["1"][4].turns["torch"] = [0.2]
    one.rounds["1"][5].turns["torch"] = [0.4]
    ratio = report.summarise(one)["batches"]["1"]["ours"]["ratio"]
    assert (ratio["value"], ratio["rounds"], ratio["decides"]) == (pytest.approx(15), 2, False)


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ({"steal": 0.03}, "3.0% of processor time went to other machines of this host"),
        ({"others": 0.2}, "20.0% of processor time went to other programs"),
        ({"rounds": 2}, "2 rounds are too few"),
        ({"jitter": 0.5}, "wider than 20% for peer"),
    ],
)
def test_a_noisy_machine_is_told(faults, words):
    (warning,) = report.summarise(record(**faults))["warnings"]
    assert words in warning


@pytest.mark.parametrize(
    ("cosine", "top1", "level"),
    [
        (1.0, 1.0, "exact"), (0.99995, 1.0, "near"), (0.99, 0.996, "fast"), (0.99, 0.99, ""), (None, 1.0, ""),
        (0.5, 1.0, ""),
    ],
)  # fmt: skip
def test_levels(cosine, top1, level):
    assert report.level_of({"cosine_min": cosine, "top1_agreement": top1}) == level


def test_a_system_that_does_not_tell_gives_no_warning():
    one = record(steal=None, others=None)
    assert report.summarise(one)["warnings"] == []


def test_nothing_measured_is_no_fault():
    empty = LatencyRecord({}, entries=record().entries)
    found = report.summarise(empty)
    assert (found["batches"], found["yardstick"]) == ({}, "")
    assert report.summary_table(empty, found) == ""
