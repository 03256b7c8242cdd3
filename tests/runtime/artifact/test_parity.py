"""Figures of the contract as people read them, and what an agreement on few inputs says of others."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from invariclip.artifact.parity import agreement_interval, items_needed, parity_rows, parity_table
from invariclip.errors import ArtifactError


@given(st.integers(1, 5000).flatmap(lambda items: st.tuples(st.integers(0, items), st.just(items))))
def test_the_interval_is_wilson_s(given_):
    agreed, items = given_
    ours = agreement_interval(agreed / items, items)
    theirs = binomtest(agreed, items).proportion_ci(0.95, "wilson")
    assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-9)


@pytest.mark.parametrize(("share", "items"), [(0.98, 189), (0.995, 765), (0.5, 4)])
def test_as_many_inputs_as_a_level_needs(share, items):
    assert items_needed(share) == items
    assert agreement_interval(1.0, items)[0] >= share > agreement_interval(1.0, items - 1)[0]


def _record(min_top1):
    figures = {"items": 240, "top1_agreement": 0.995833, "failed": []}
    names = (
        "max_abs_diff min_cosine min_top5 max_probability_diff max_uncertainty_diff max_order_gap max_invariance_gap "
        "max_batch_diff max_rerun_diff max_pixel_levels max_front_levels min_front_cosine"
    )
    bounds = dict.fromkeys(names.split(), 0.0)
    return {"image": figures, "text": {"items": 3}, "thresholds": {**bounds, "min_top1": min_top1}}


def test_a_level_below_all_says_its_interval():
    rows = {row[0]: row[1:] for row in parity_rows(_record(0.995))}
    assert rows["  on others like these, 95 %"] == ["97.7% to 99.9%", "–", ""]
    assert "  on others like these, 95 %" not in {row[0] for row in parity_rows(_record(1.0))}
    with pytest.raises(ArtifactError, match="a parity record cannot be read"):
        parity_table({"image": {}})
