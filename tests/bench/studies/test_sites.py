"""The bench of sites: what is measured on is not scored, a planted shift is won back, the page says what was found."""

from dataclasses import replace

import numpy as np
import pytest

from invariclip.artifact.projection import identity
from invariclip.bench.studies.sites import __main__ as sites
from invariclip.bench.studies.sites import worlds as site_worlds
from invariclip.bench.studies.sites.report import plot, render
from invariclip.calibrate.data.pairs import UNCHANGED, EmbeddingTable
from invariclip.calibrate.projection.bootstrap import Bootstrap
from invariclip.calibrate.projection.classifiers import unit

WIDTH, CLASSES, EACH = 16, 6, 20
NAMES = tuple(f"class {number}" for number in range(CLASSES))
CENTRES = unit(np.random.default_rng(0).normal(size=(CLASSES, WIDTH)))


def table(seed, *, shifts=(0.0,)):
    """Images of some environments, each moved by its shift."""
    rng = np.random.default_rng(seed)
    labels = np.tile(np.repeat(np.arange(CLASSES), EACH), len(shifts))
    moves = np.repeat([np.broadcast_to(shift, WIDTH) for shift in shifts], CLASSES * EACH, axis=0)
    vectors = unit(CENTRES[labels] + 0.25 * rng.normal(size=(len(labels), WIDTH)) + moves)
    places = np.repeat(np.arange(len(shifts)), CLASSES * EACH)
    rows = np.arange(len(labels))
    return EmbeddingTable(
        vectors, rows, labels, places, np.full(len(rows), UNCHANGED), rows, tuple(map(str, rows)), NAMES,
        tuple(f"place {code}" for code in range(len(shifts))),
    )  # fmt: skip


def world(seen, **sites_of):
    return site_worlds.Place(
        seen, sites_of, {name: table(2, shifts=(-0.1,)) for name in sites_of}, lambda each: each.labels, CENTRES, NAMES,
        lambda name: identity(WIDTH),
    )  # fmt: skip


@pytest.fixture(scope="module")
def place():
    shift = 0.5 * unit(np.random.default_rng(5).normal(size=WIDTH)) + 0.7 * CENTRES[0]
    found = world(table(3, shifts=(0.0, 0.0)), yard=table(1, shifts=(shift,)))
    return replace(found, others={"yard": table(2, shifts=(-shift,))})


@pytest.fixture(scope="module", params=["zero-shot", "prototypes", "probe"])
def found(request, place):
    both, tally = site_worlds.wards(identity(WIDTH), place, request.param), sites.SiteScores()
    choice = site_worlds.choose(place, request.param, 0, Bootstrap)
    for seed in range(2):
        sites.score(both, choice, ("yard", seed), tally)
    return request.param, tally, sites.summarised(tally, {"yard": place.sites["yard"].concepts}, Bootstrap)


def test_a_planted_shift_is_won_back(found):
    rows = found[2]
    assert rows["20 images"]["to_projection"]["low"] > 0
    assert rows["half of them"]["mean"]["value"] > rows["1 image"]["mean"]["value"]
    assert rows["20 of one kind"]["to_projection"]["value"] < rows["20 images"]["to_projection"]["value"]
    assert rows["20 of another site"]["mean"]["value"] < rows["20 images"]["mean"]["value"]
    assert rows["projection"]["to_none"]["value"] == 0  # the identity
    assert rows["20 images"]["to_adapted"] == {"value": 0, "low": 0, "high": 0}


def test_no_image_is_scored_in_a_draw_that_it_was_measured_in(found):
    tally = found[1]
    draws = 2 * sites.DRAWS
    for row in ("half of them", "half of them, T3A", "bound: projection, whole shift by the true means of its classes"):
        asked = tally.asked[row]["yard"]
        assert asked.sum() == draws * CLASSES * EACH / 2
        assert (asked < draws).any()
        assert (tally.right[row]["yard"] <= asked).all()
    for row in ("projection", "all of them, and scored on all"):
        assert (tally.asked[row]["yard"] == 2).all()


def test_bounds_take_the_labels_and_are_above(found):
    way, _, rows = found
    bounds = [row for row in rows if row.startswith("bound: ")]
    assert len(bounds) == (4 if way == "zero-shot" else 5)
    assert rows[bounds[0]]["mean"]["value"] > rows["20 images"]["mean"]["value"]


def test_bounds_need_images_of_every_class():
    # one image of each class, as stylebench has it: half of them cannot show all classes
    site = table(1)
    few = site.where(np.arange(len(site.labels)) % EACH == 0)
    both = site_worlds.wards(identity(WIDTH), world(table(3, shifts=(0.0, 0.0)), yard=few), "prototypes")
    asked = np.isin(np.arange(CLASSES), [3, 4, 5])
    assert not list(sites._bounds(sites.Draw(both, "yard", np.arange(3), asked)))


def test_costs_are_counted(found):
    rows = found[2]
    assert rows["20 images"]["cost"] == {"numbers": WIDTH, "products": 0}
    assert rows["20 images, CORAL"]["cost"] == {"numbers": WIDTH * (WIDTH + 1), "products": WIDTH**2}
    assert rows["20 images, T3A"]["cost"] == {"numbers": CLASSES * WIDTH, "products": 0}
    assert 0 < rows["20 images, TDA"]["cost"]["products"] < (3 + 2) * CLASSES * (WIDTH + CLASSES)


@pytest.mark.parametrize("way", ["zero-shot", "prototypes", "probe"])
def test_training_environments_choose_the_shift_where_they_differ_by_one(way):
    moves = 0.5 * unit(np.random.default_rng(8).normal(size=(3, WIDTH)))
    choice = site_worlds.choose(world(table(4, shifts=moves)), way, 0, Bootstrap)
    assert choice.form != site_worlds.ALONE
    assert choice.gains[choice.form]["20 images"] > 1
    assert min(choice.gains[choice.form][sample] for sample in site_worlds.GUARDS) >= -site_worlds.HARM
    # a skewed sample's mean is not that of a place: centring has no guard
    assert choice.gains["projection, centring"]["20 of one kind"] < choice.gains[choice.form]["20 of one kind"]


@pytest.mark.parametrize("way", ["zero-shot", "prototypes", "probe"])
def test_the_projection_alone_wins_where_environments_do_not_differ(way):
    choice = site_worlds.choose(world(table(4, shifts=(0.0, 0.0, 0.0))), way, 0, Bootstrap)
    assert choice.form == site_worlds.ALONE
    assert choice.to_json()["gains"][site_worlds.ALONE]["20 images"] == 0


def test_a_choice_never_looks_at_the_sites():
    def choose(**sites_of):
        return site_worlds.choose(world(table(4, shifts=(0.0, 0.1, -0.1)), **sites_of), "prototypes", 0, Bootstrap)

    assert choose(yard=table(1)) == choose(yard=table(9, shifts=(0.9,))) == choose()


def test_each_environment_is_left_out_of_its_own_projection_and_classes():
    asked = []
    seen = table(4, shifts=(0.0, 0.5, -0.5))
    place = replace(world(seen), refit=lambda name: asked.append(name) or identity(WIDTH))
    worlds = list(site_worlds.left_out(place, "prototypes"))
    assert asked == [name for both in worlds for name in both["projection"].sites] == list(seen.environment_names)
    for code, both in enumerate(worlds):
        rest = seen.vectors[seen.environments != code]
        means = np.mean([part.mean(axis=0) for part in np.split(rest, 2)], axis=0)
        assert np.allclose(both["projection"].training, means)


def test_the_page_computes_what_it_claims(found):
    way, tally, rows = found
    result = {"model": "m", "seeds": 2, "draws": sites.DRAWS, "worlds": {"yards": {way: rows}},
              "choices": {"yards": {way: tally.choices}}}  # fmt: skip
    page = render(result, "yards")
    few = rows["20 images"]["to_projection"]
    assert f"**{few['value']:+.1f} [{few['low']:+.1f}, {few['high']:+.1f}]** over the projection" in page
    skewed = ["1 image", "20 of one kind", "half of one kind", "20 of two kinds", "half of two kinds",
              "20, kinds by Zipf's law"]  # fmt: skip
    worst = min(rows[name]["to_projection"]["value"] for name in skewed)
    assert ("**beyond** the bound" if worst < -0.5 else "within the bound") in page
    assert f"{tally.choices[0]['form']} (2)" in page
    chosen = rows["20 images, chosen"]["to_adapted"]
    gained = chosen["low"] > 0 and chosen["value"] >= -0.5
    assert ("no table speaks against it" in page.split("- `chosen`: ")[1].split("\n")[0]) == gained
    recoloured = tally.choices[0]["recolours"]["20 images"]
    every, none = page.split("(points against `adapt`) in ")[1].split("; none, so that nothing changes, in ")
    assert (", 20 images" in every) == recoloured
    assert (", 20 images" in none.split("; some in ")[0]) == (not recoloured)
    assert ("How far a shift can take the probe" in page) == (way == "probe")
    assert "![Accuracy by the number of the site's images](yards.svg)" in page
    assert page.count("\n| ") > 30


@pytest.mark.parametrize("found", ["probe"], indirect=True)
def test_the_page_says_whether_a_shift_could_reach_the_goal(found):
    way, tally, rows = found
    far = {row: {**each, "to_none": {"value": 2.0, "low": 1.0, "high": 3.0}} for row, each in rows.items()}
    near = {row: {**each, "to_none": {"value": 12.0, "low": 11.0, "high": 13.0}} for row, each in rows.items()}
    for changed, told in ((far, "is out of reach of a shift, with"), (near, "is within reach of a shift, where")):
        page = render({"model": "m", "seeds": 2, "draws": 6, "worlds": {"yards": {way: changed}},
                       "choices": {"yards": {way: tally.choices}}})  # fmt: skip
        assert told in page


def test_the_plot_has_a_panel_for_each_table(found):
    way, _, rows = found
    image = plot({"worlds": {"yards": {way: rows, "prototypes": rows}}})
    assert image.startswith("<?xml")
    assert image.count('id="axes_') == 3  # the last holds the legend
    assert plot({"worlds": {"yards": {way: rows, "prototypes": rows}}}).count("<dc:date>") == 0
