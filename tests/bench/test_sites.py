"""The bench of sites: what is measured on is not scored, a planted shift is won back, the page says what was found."""

import numpy as np
import pytest

from invariclip.bench import site_forms, sites
from invariclip.bench.sites_page import render
from invariclip.calibrate.evaluate import Bootstrap, unit
from invariclip.calibrate.pairs import UNCHANGED, Table
from invariclip.projection import identity

WIDTH, CLASSES, EACH = 16, 6, 20
NAMES = tuple(f"class {number}" for number in range(CLASSES))
CENTRES = unit(np.random.default_rng(0).normal(size=(CLASSES, WIDTH)))


def table(seed, *, shift=0.0, environments=1):
    rng = np.random.default_rng(seed)
    labels = np.tile(np.repeat(np.arange(CLASSES), EACH), environments)
    vectors = unit(CENTRES[labels] + 0.25 * rng.normal(size=(len(labels), WIDTH)) + shift)
    places = np.repeat(np.arange(environments), CLASSES * EACH)
    rows = np.arange(len(labels))
    return Table(
        vectors, rows, labels, places, np.full(len(rows), UNCHANGED), rows, tuple(map(str, rows)), NAMES,
        tuple(f"place {code}" for code in range(environments)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def place():
    shift = 0.5 * unit(np.random.default_rng(5).normal(size=WIDTH)) + 0.7 * CENTRES[0]
    site = table(1, shift=shift)
    other = table(2, shift=-shift)
    return sites.Place(table(3, environments=2), {"yard": site}, {"yard": other}, {"yard": site.labels}, CENTRES, NAMES)


@pytest.fixture(scope="module", params=["zero-shot", "prototypes", "probe"])
def found(request, place):
    ward = sites.ward(identity(WIDTH), place, request.param)
    tally = sites.Tally()
    for seed in range(2):
        sites.score(ward, ward, seed, tally)
    return tally, sites.summarised(tally, {"yard": place.sites["yard"].concepts}, Bootstrap)


def test_a_planted_shift_is_won_back(found):
    rows = found[1]
    assert rows["20 pictures"]["to_projection"]["low"] > 0
    assert rows["half of them"]["mean"]["value"] > rows["1 picture"]["mean"]["value"]
    assert rows["20 of one kind"]["to_projection"]["value"] < rows["20 pictures"]["to_projection"]["value"]
    assert rows["20 of another site"]["mean"]["value"] < rows["20 pictures"]["mean"]["value"]
    assert rows["projection"]["to_none"]["value"] == 0  # the identity


def test_no_picture_is_scored_in_a_draw_that_it_was_measured_in(found):
    tally, _ = found
    draws = 2 * sites.DRAWS
    asked = tally.asked["half of them"]["yard"]
    assert asked.sum() == draws * CLASSES * EACH / 2
    assert (asked < draws).any()
    assert (tally.right["half of them"]["yard"] <= asked).all()
    assert (tally.asked["projection"]["yard"] == 2).all()


def test_the_page_computes_what_it_claims(found):
    rows = found[1]
    page = render({"model": "m", "seeds": 2, "draws": sites.DRAWS, "worlds": {"yards": {"prototypes": rows}}})
    few = rows["20 pictures"]["to_projection"]
    assert f"**{few['value']:+.1f} [{few['low']:+.1f}, {few['high']:+.1f}]** over the projection" in page
    skewed = [name for name in rows if "kind" in name or name == "1 picture"]
    worst = min(rows[name]["to_projection"]["value"] for name in skewed)
    assert ("**beyond** the bound" if worst < -0.5 else "within the bound") in page
    assert page.count("\n| ") > 15


def test_forms_are_compared_on_the_same_pictures():
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(site_forms.CONCEPTS), 5 * 2 * (len(site_forms.CHANGES) + 1))
    changes = np.tile(np.repeat(np.arange(len(site_forms.CHANGES) + 1), 2), site_forms.CONCEPTS * 5)
    styles = np.tile(np.repeat(np.arange(5), 2 * (len(site_forms.CHANGES) + 1)), site_forms.CONCEPTS)
    centres = unit(rng.normal(size=(site_forms.CONCEPTS, WIDTH)))
    moves = 0.6 * unit(rng.normal(size=(len(site_forms.CHANGES) + 1, WIDTH)))
    moves[0] = 0
    vectors = unit(centres[labels] + 0.2 * rng.normal(size=(len(labels), WIDTH)) + moves[changes])
    gains = site_forms.measured(vectors, labels, styles, changes, centres)
    for rows in gains.values():
        assert rows[site_forms.TAKEN]["70 mixed"] > 1
        # what `adapt` does is one of the forms that are spelt out here
        assert rows[site_forms.TAKEN] == pytest.approx(rows["e / (e + 10), 5 a kind"], abs=0.05)
        assert rows["whole shift"]["10 of one class"] < rows[site_forms.TAKEN]["10 of one class"]
    page = site_forms.render({"worlds": 1, "gains": gains})
    assert page.count("| taken |") == 2
