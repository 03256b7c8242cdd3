"""Changed versions: which interventions an image gets, and which other image one borrows from."""

import hashlib
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from invariclip.calibrate.data.images import ImageRecord
from invariclip.calibrate.data.versions import Donors, changed_versions
from invariclip.errors import InputError
from invariclip.preprocessing.interventions import choose_kinds, parse_kinds


def digest_of(number):
    return hashlib.sha256(str(number).encode()).hexdigest()


def world(count, environments=3):
    return [(digest_of(n), f"e{n % environments}", Path(str(n))) for n in range(count)]


@given(order=st.permutations(range(24)), environments=st.integers(1, 4), seed=st.integers(0, 9))
def test_a_donor_is_another_image_of_another_environment_whatever_the_order(order, environments, seed):
    rows = world(24, environments)
    donors, shuffled = Donors(rows), Donors([rows[index] for index in order])
    for digest, environment, path in rows:
        donor = donors.choose(digest, environment, "swap", seed)
        assert donor == shuffled.choose(digest, environment, "swap", seed) != path
        if environments > 1:
            assert int(str(donor)) % environments != int(environment[1:])


def test_donors_are_drawn_evenly_and_anew_by_label_and_seed():
    rows = world(60)
    donors = Donors(rows)
    chosen = [donors.choose(d, e, label, seed) for d, e, _ in rows for label in "ab" for seed in range(10)]
    counts = Counter(int(str(path)) % 3 for path in chosen)
    assert min(counts.values()) > 330  # 400 expected of each environment
    assert len(set(chosen)) > 50
    assert len({donors.choose(*rows[0][:2], label, seed) for label in "ab" for seed in range(10)}) > 10


def test_an_image_more_changes_few_donors():
    rows = world(200)
    before, after = Donors(rows), Donors([*rows, (digest_of("new"), "e0", Path("new"))])
    moved = sum(before.choose(d, e, "swap", 0) != after.choose(d, e, "swap", 0) for d, e, _ in rows)
    assert moved < 20


def test_the_same_content_is_no_donor():
    twins = [(digest_of(1), "red", Path("a")), (digest_of(1), "blue", Path("b"))]
    with pytest.raises(InputError, match="swap needs a second image and there is none"):
        Donors(twins).choose(digest_of(1), "red", "swap", 0)
    other = Donors([*twins, (digest_of(2), "red", Path("c"))])
    assert other.choose(digest_of(1), "red", "swap", 0) == Path("c")


def test_versions_are_those_that_were_chosen_and_only_some_borrow():
    kinds = parse_kinds("invert,style-exchange,fog")
    images = [ImageRecord(path, "c", "c", environment) for _, environment, path in world(12)]
    digests = [digest_of(n) for n in range(12)]
    versions = changed_versions(images, digests, kinds, draws=2, seed=5)
    assert len(versions) == 24
    for version in versions:
        assert version.job.kind == kinds[version.kind]
        assert (version.job.path, version.job.seed) == (images[version.origin].path, 5)
        assert (version.job.donor is not None) == (version.job.kind.label == "style-exchange")
    drawn = [version.job.kind.label for version in versions if version.origin == 3]
    assert drawn == list(choose_kinds(("invert", "style-exchange", "fog"), digests[3], 5, 2))
    assert changed_versions(images, digests, (), draws=2, seed=5) == []
