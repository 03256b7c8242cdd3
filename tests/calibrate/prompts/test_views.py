"""Which images are learned from, validated on and held back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.calibrate.prompts.options import PromptOptions
from invariclip.calibrate.prompts.views import split_rows
from invariclip.errors import InputError


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=12),
    st.sampled_from([None, 1, 2, 4]),
    st.integers(0, 100),
)
def test_parts_are_apart_complete_and_every_class_is_learnt(sizes, shots, seed):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    try:
        split = split_rows(labels, shots=shots, validation=0.3, held=0.2, seed=seed)
    except InputError:
        assert max(sizes) <= (shots or 1) or shots is None
        return
    parts = np.concatenate([split.train, split.validation, split.held])
    assert sorted(parts) == list(range(len(labels)))
    assert set(labels[split.train]) == set(range(len(sizes)))
    if shots:
        assert np.bincount(labels[split.train]).max() <= shots
    again = split_rows(labels, shots=shots, validation=0.3, held=0.2, seed=seed)
    np.testing.assert_array_equal(split.train, again.train)


def test_shares_are_kept_on_average():
    labels = np.repeat(np.arange(600), 5)
    split = split_rows(labels, shots=None, validation=0.25, held=0.15, seed=0)
    assert len(split.validation) / len(labels) == pytest.approx(0.25, abs=0.02)
    assert len(split.held) / len(labels) == pytest.approx(0.15, abs=0.02)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"learned": 0}, "learned templates: 0"),
        ({"context_tokens": 99}, "vectors a template: 99"),
        ({"shots": 17}, "shots: 17"),
        ({"losses": ("evidence",)}, "available: evidential"),
        ({"losses": ("diversity",)}, "one of the losses evidential and softmax"),
        ({"target_risk": 1.5}, "between 0 and 1"),
        ({"target_risk": 0.1, "held": 0.0}, "held back"),
        ({"validation": 0.7, "held": 0.3}, "leave nothing to learn"),
        ({"augmentations": (None,)}, "1 augmentations for 4"),
        ({"rate": 0.0}, "above zero"),
    ],
)
def test_options_that_cannot_be_used_are_refused(given, said):
    with pytest.raises(InputError, match=said):
        PromptOptions(**given)
