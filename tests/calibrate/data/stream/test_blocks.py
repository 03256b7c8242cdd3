"""Ties of listed pairs, against the rank of what they say."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from invariclip.calibrate.data.stream.blocks import ties_of

NAMES = st.sampled_from("abcdefgh")


@given(st.lists(st.tuples(NAMES, NAMES).filter(lambda pair: pair[0] != pair[1]), max_size=20))
def test_members_less_things_is_the_rank_of_the_differences(pairs):
    ties = ties_of(pairs)
    assert len(ties) == len(pairs)
    incidence = np.zeros((len(pairs), 8))
    for row, (first, second) in zip(incidence, pairs, strict=True):
        row["abcdefgh".index(first)], row["abcdefgh".index(second)] = 1, -1
    members, things = {number for tie in ties for number in tie[:2]}, {tie[2] for tie in ties}
    assert len(members) - len(things) == (np.linalg.matrix_rank(incidence) if pairs else 0)
    names = {
        number: name for tie, pair in zip(ties, pairs, strict=True) for number, name in zip(tie, pair, strict=False)
    }
    assert [(names[tie[0]], names[tie[1]]) for tie in ties] == pairs
