"""The search for the cheapest schedule, and what a schedule may be, without any tower."""

from itertools import pairwise

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from invariclip.errors import InputError
from invariclip.export.graphs.token_schedules import FAMILIES, MergeSchedules, TowerShape, written
from invariclip.export.quantization.token_search import WORTH, fewest_tokens
from invariclip.export.verification.figures import Thresholds, TowerFigures

E2 = 768 * 768
B16 = TowerShape(12, 197, 1, 768, 768, 2 * E2, 2 * E2, 8 * E2, 196 * E2)
B32 = TowerShape(12, 50, 1, 768, 768, 2 * E2, 2 * E2, 8 * E2, 49 * 4 * E2)
BOUNDS = Thresholds(min_cosine=0.9, min_top1=0.99)


def figures(cosine, top1=1.0):
    return TowerFigures(240, 0.0, cosine, cosine, top1, 0, 56, 0, 0.0, 0.0)


def by_total(threshold):
    """A tower that passes with this many tokens in all, and gets better with every one."""
    return lambda schedule: figures(0.9 + (sum(schedule) - threshold) / 1e5)


shapes = st.builds(
    TowerShape,
    blocks=st.integers(2, 30),
    tokens=st.integers(4, 260),
    prefix=st.integers(1, 2),
    width=st.just(64),
    inner=st.just(64),
    key_weights=st.just(8192),
    query_weights=st.just(8192),
    mlp=st.just(32768),
    stem=st.just(10**6),
)


@settings(deadline=None, max_examples=30)
@given(shapes, st.sampled_from(FAMILIES))
def test_every_member_of_a_family_is_a_schedule_of_the_tower(shape, family):
    members = list(family.members(shape))
    assert members
    assert len(set(members)) == len(members)
    for schedule in members:
        assert shape.require(schedule) == schedule
        assert shape.merges(schedule) <= len(family.places(shape))
    merged = {tokens for schedule in members for tokens in schedule if tokens < shape.tokens}
    assert not any(tokens % 2 for tokens in merged)
    for more, fewer in pairwise(members):
        assert all(one >= other for one, other in zip(more, fewer, strict=True))


@settings(deadline=None, max_examples=30)
@given(shapes, st.data())
def test_a_schedule_that_no_tower_can_have_is_refused(shape, data):
    schedule = list(shape.all)
    place = data.draw(st.integers(0, len(schedule) - 1))
    least = shape.fewest(shape.tokens)
    wrong = data.draw(st.integers(-3, least - 1) | st.integers(shape.tokens + 1, shape.tokens + 9))
    schedule[place:] = [wrong] * (len(schedule) - place)
    with pytest.raises(InputError, match=rf"block {place + 1} of \d+ gets {shape.tokens} tokens and can leave {least}"):
        shape.require(schedule)


def test_a_schedule_of_the_wrong_length_is_refused():
    with pytest.raises(InputError, match="every block but the last: 11, not 12"):
        B16.require((197,) * 12)


def test_the_cost_of_all_tokens_is_the_towers():
    # 2 x (stem + per token 12 E2 and two products of all tokens) for 11 blocks, and a last one for one token
    last = 197 * 2 * E2 + 2 * 197 * 768 + 10 * E2
    wanted = 2 * (196 * E2 + 11 * (197 * 12 * E2 + 2 * 197 * 197 * 768) + last)
    assert B16.flops(B16.all) == wanted
    assert B16.saving(B16.all) == 0


def test_a_merge_costs_what_it_is_said_to_cost():
    schedule = (99,) * 11
    assert B16.flops(schedule, merge=5e6) - B16.flops(schedule, merge=0) == 5e6
    assert B16.saving((196,) * 11, merge=1e9) < 0


def test_a_schedule_in_words():
    assert written((197, 197, 99, 99, 50)) == "197 ×2, 99 ×2, 50 ×1"


@settings(deadline=None, max_examples=30)
@given(st.integers(150, 2200), st.sampled_from([B32, B16]), st.integers(1, 40))
@example(150, B16, 24)
def test_what_is_found_was_asked_and_passes_and_is_the_cheapest_of_all_that_passed(threshold, shape, trials):
    asked = []

    def ask(schedule):
        asked.append(schedule)
        return by_total(threshold)(schedule)

    found = fewest_tokens(shape, ask, BOUNDS, trials=trials)
    assert len(asked) == len(set(asked)) <= trials
    assert [trial.schedule for trial in found.trials] == asked
    passing = [trial for trial in found.trials if not trial.broken]
    assert [sum(trial.schedule) >= threshold for trial in found.trials] == [not trial.broken for trial in found.trials]
    assert found.best == min(passing, key=lambda trial: trial.flops, default=None)
    assert all(shape.require(schedule) == schedule for schedule in asked)


@settings(deadline=None, max_examples=30)
@given(st.integers(600, 2000))
def test_bisection_ends_beside_the_bound(threshold):
    family = MergeSchedules("after every block", (), "linear")
    found = fewest_tokens(B16, by_total(threshold), BOUNDS, families=[family], trials=9)
    reachable = [schedule for schedule in family.members(B16) if sum(schedule) >= threshold]
    best = max((B16.saving(schedule) for schedule in reachable), default=0.0)
    assume(best >= WORTH)
    # what is left out would not have been worth a trial; refining may go below the family
    assert found.best.saving > best - WORTH


def test_refining_ends_beside_the_best_there_is():
    # enough after the first block and at the end pass, whatever lies between: no family gives up tokens so early
    best = (120, *(60,) * 10)
    found = fewest_tokens(
        B16,
        lambda schedule: figures(0.95 if schedule[0] >= 120 and schedule[-1] >= 60 else 0.85),
        BOUNDS,
        families=[MergeSchedules("twice", (0.0, 0.5))],
        trials=60,
    )
    assert found.complete
    assert B16.flops(best) <= found.best.flops < B16.flops(best) + 0.02 * B16.flops(B16.all)


@pytest.mark.parametrize(
    ("family", "left", "wanted"),
    [
        (MergeSchedules("", (0.0, 0.17, 0.34)), 26, (100, 100, 52, 52, *(26,) * 7)),  # 196, 99, 50, 25 patches: by half
        (MergeSchedules("", (), "linear"), 21, tuple(198 - 16 * block for block in range(1, 12))),  # ToMe's r = 16
        (MergeSchedules("", (0.0,)), 2, (100,) * 11),  # no fewer than one merge can leave
    ],
)
def test_what_a_family_leaves(family, left, wanted):
    assert family.schedule(B16, left) == wanted


def test_a_family_without_a_chance_is_asked_twice_and_once_where_something_was_found():
    found = fewest_tokens(B16, lambda schedule: figures(0.85), BOUNDS, families=FAMILIES[:3])
    assert len(found.trials) == 6  # the middle of each, and the dearest
    assert found.complete
    # merging once passes, however much; merging twice does not
    once, twice = FAMILIES[1], FAMILIES[2]
    found = fewest_tokens(
        B16, lambda schedule: figures(0.95 if len(set(schedule)) == 1 else 0.85), BOUNDS, families=[once, twice]
    )
    merged_twice = [trial.schedule for trial in found.trials if len(set(trial.schedule)) == 2]
    assert found.best.schedule[0] == 102  # 100 saves less than a hundredth more
    assert merged_twice[:1] == [s for s in twice.members(B16) if B16.saving(s) >= found.best.saving + WORTH][:1]
    assert not set(merged_twice[1:]) & set(twice.members(B16))


def test_where_nothing_passes_it_says_by_how_much_the_nearest_misses():
    found = fewest_tokens(B16, lambda schedule: figures(0.8 + sum(schedule) / 1e5, 0.5), BOUNDS)
    assert found.best is None
    assert found.complete
    assert found.nearest == max(found.trials, key=lambda trial: sum(trial.schedule))
    lines = found.lines()
    assert lines[0] == "no schedule passes"
    assert "image top-1 agreement 0.5 is below 0.99, by 0.49" in lines[1]
    assert "cosine, min" in lines[1]
    assert len(lines) == 2 + len(found.trials)


def test_a_nan_is_no_pass_and_no_near_miss():
    def ask(schedule):
        return figures(float("nan"), float("nan")) if sum(schedule) > 2000 else figures(0.5, 0.5)

    found = fewest_tokens(B16, ask, BOUNDS, trials=6)
    assert found.best is None
    assert found.nearest.figures.cosine_min == 0.5 or all(
        t.figures.cosine_min != t.figures.cosine_min for t in found.trials
    )


def test_the_same_answers_give_the_same_search():
    first, second = (fewest_tokens(B32, by_total(350), BOUNDS) for _ in range(2))
    assert first == second


def test_a_search_that_runs_out_of_trials_says_so():
    found = fewest_tokens(B16, by_total(900), BOUNDS, trials=3)
    assert not found.complete
    assert len(found.trials) == 3
    assert any("stopped after 3 trials" in line for line in found.lines())
    with pytest.raises(InputError, match="1 trial or more, not 0"):
        fewest_tokens(B16, by_total(900), BOUNDS, trials=0)
