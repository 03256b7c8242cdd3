"""Levels of fidelity: what a record says, and what it does not."""

import pytest

from invariclip.artifact.fidelity import LEVELS, reached, reaches, require_level
from invariclip.errors import InputError


def test_a_record_reaches_what_it_kept_and_nothing_else():
    record = {"passed": True, "fidelity": ["near"]}
    assert [level for level in LEVELS if reaches(record, level)] == ["near"]
    assert reached(record) == "near"
    assert reached({"passed": True, "fidelity": ["fast", "exact"]}) == "exact"


@pytest.mark.parametrize(
    "record",
    [{}, {"passed": True}, {"passed": False, "fidelity": ["exact"]}, {"passed": 1, "fidelity": ["exact"]},
     {"passed": True, "fidelity": "exact"}, {"passed": True, "fidelity": None}],
)  # fmt: skip
def test_what_is_not_said_or_did_not_pass_reaches_nothing(record):
    assert reached(record) is None


def test_unknown_levels_are_refused():
    with pytest.raises(InputError, match="no fidelity is called 'close'; available: exact, near, fast"):
        require_level("close")
