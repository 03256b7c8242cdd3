"""A site measured from the traffic: windows, floors, refusals, and the same again from a log."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import invariclip
from invariclip.cli.main import main
from invariclip.errors import InputError, SiteError
from invariclip.preprocessing.find import find_images
from invariclip.records import seal
from invariclip.sites.live_site import CHANGED, EVENTS, LiveSite, SiteWindow
from invariclip.sites.site import new_site, read_site, write_site
from invariclip.sites.site_log import PART_FILE, SiteLog, replay

WIDTH, CLASSES = 64, 8
SMALL = SiteWindow(floor=8, step=4, block=8, blocks=4)
BANK = np.eye(CLASSES, WIDTH, dtype=np.float32)


def _unit(rows):
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def _rows(count, seed=0, along=9, size=0.5):
    """Images of several kinds of things, moved along one direction as a place moves them."""
    rng = np.random.default_rng(seed)
    kinds = np.eye(CLASSES, WIDTH)[rng.integers(0, CLASSES, count)]
    moved = np.zeros(WIDTH)
    moved[along] = size
    return _unit(kinds + 0.5 * rng.normal(size=(count, WIDTH)) / np.sqrt(WIDTH) * 3 + moved)


def _empty():
    return new_site("yard", "space", np.full(WIDTH, 0.01), CLASSES, {"why": "a test"})


def _live(**how):
    return LiveSite(_empty(), BANK, how.pop("window", SMALL), **how)


@given(st.lists(st.integers(1, 9), min_size=3, max_size=12), st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_it_depends_on_the_order_alone_not_on_batches(sizes, seed):
    rows = _rows(sum(sizes), seed)
    one, many = _live(), _live()
    one.add(rows)
    for part in np.split(rows, np.cumsum(sizes)[:-1]):
        many.add(part)
    assert one.facts() == many.facts()
    assert one.site.digest == many.site.digest


def test_nothing_is_taken_away_before_the_floor_and_then_in_steps():
    live, rows = _live(), _rows(16)
    plain = live.site
    live.add(rows[:7])
    assert live.site is plain
    live.add(rows[7:8])
    first = live.site
    assert first.images == 8
    live.add(rows[8:11])
    assert live.site is first
    live.add(rows[11:12])
    assert live.site.images == 12
    assert live.revision == 2


def test_within_the_window_it_is_the_site_of_all_images():
    live, rows = _live(), _rows(32)
    live.add(rows)
    wanted = _empty().adding(rows, BANK)
    assert live.site.images == 32
    np.testing.assert_allclose(live.site.total, wanted.total, atol=1e-12)
    np.testing.assert_allclose(live.site.shift, wanted.shift, atol=1e-7)
    assert live.rejected == {"repeated": 0, "unlike": 0}


def test_beyond_the_window_the_oldest_are_forgotten():
    live, rows = _live(), _rows(72, 3)
    live.add(rows)
    assert live.site.images == 32
    np.testing.assert_allclose(live.site.mean, rows[-32:].astype(np.float64).mean(axis=0), atol=1e-12)


def test_an_image_is_answered_with_what_was_known_before_it():
    live, rows = _live(), _rows(40)
    live.add(rows[:8])
    before = live.site
    adapted, taken = live.take(rows[8:24])
    assert taken is before
    np.testing.assert_array_equal(adapted, before.apply(rows[8:24]))
    assert live.site.images == 24


def test_an_image_shown_again_and_again_counts_once():
    live, rows = _live(), _rows(9)
    live.add(rows[:8])
    kept = live.site.digest
    live.add(np.tile(rows[8], (500, 1)))
    assert live.rejected["repeated"] == 499
    assert live.site.digest == kept


def test_unlike_images_do_not_count_until_there_are_no_others():
    live = _live()
    live.add(_rows(32, 1))
    kept = live.site.digest
    rng = np.random.default_rng(0)
    far = _unit(-BANK.sum(axis=0) - 3 * np.eye(WIDTH)[9] + 0.3 * rng.normal(size=(CHANGED + 40, WIDTH)))
    live.add(far[: CHANGED - 1])
    assert live.rejected["unlike"] == CHANGED - 1
    assert live.site.digest == kept
    live.add(_rows(4, 7))  # the place is as it was: what was unlike was a bad moment
    assert live.changes == 0
    live.add(far[:CHANGED])
    assert live.changes == 1
    assert live.site.weight == 0  # a shift of another place costs more than none
    live.add(far[CHANGED:])
    assert live.site.images >= SMALL.floor
    assert live.facts()["drift"] > 0.3


def test_freeze_thaw_and_reset():
    live, rows = _live(), _rows(48)
    live.add(rows[:16])
    kept = live.site.digest
    live.tell("freeze")
    live.add(rows[16:32])
    assert live.site.digest == kept
    live.tell("thaw")
    live.add(rows[32:36])
    assert live.site.digest != kept
    live.tell("reset")
    assert live.site.images == 0
    np.testing.assert_allclose(live.take(rows[:2])[0], rows[:2], atol=1e-6)
    with pytest.raises(InputError, match="freeze, thaw, reset"):
        live.tell("melt")


def test_what_is_known_holds_and_counts_as_half_a_window_at_most():
    known = _empty().adding(_rows(1000, 5), BANK)
    live = LiveSite(known, BANK, SMALL)
    assert live.site.digest == known.digest
    live.add(_rows(4, 6))
    assert live.site.images == 16 + 4
    for row in _rows(60, 8):
        live.add(row[None])
        assert live.site.images <= 32  # also while the start is not the oldest yet
    assert live.site.images == 32


def test_rows_that_are_no_embeddings_are_refused_whole():
    live = _live()
    rows = _rows(8)
    rows[5] = np.nan
    with pytest.raises(SiteError):
        live.add(rows)
    assert live.seen == 0


@pytest.mark.parametrize(
    "window", [{"floor": 0}, {"step": 3, "block": 8}, {"blocks": True}, {"block": 2.0}, {"floor": 65, "blocks": 1}]
)
def test_windows_that_cannot_be_counted_are_refused(window):
    with pytest.raises(InputError):
        SiteWindow(**window)


@given(st.lists(st.one_of(st.integers(1, 20), st.sampled_from(EVENTS)), max_size=12), st.integers(0, 20))
@settings(max_examples=25, deadline=None)
def test_a_log_gives_the_same_site_bit_for_bit(tmp_path_factory, what, seed):
    folder = tmp_path_factory.mktemp("log") / "yard"
    log = SiteLog(folder, _empty(), SMALL, 1 << 20)
    live, rows, done = _live(log=log), _rows(300, seed), 0
    for one in what:
        if isinstance(one, str):
            live.tell(one)
        else:
            live.add(rows[done : done + one])
            done += one
    log.flush()
    again = replay(folder, BANK)
    assert again.facts() == live.facts()
    np.testing.assert_array_equal(again.site.total, live.site.total)


def test_a_log_is_bounded_and_says_when_it_is_full(tmp_path, capsys):
    log = SiteLog(tmp_path / "yard", _empty(), SMALL, 600 * WIDTH * 4)
    live = _live(log=log)
    for part in range(10):
        live.add(_rows(128, part))
    assert log.full
    assert "is full" in capsys.readouterr().err
    assert replay(tmp_path / "yard", BANK).seen == 512
    with pytest.raises(SiteError, match="exists already"):
        SiteLog(tmp_path / "yard", _empty(), SMALL, 1)


def test_a_damaged_log_is_refused(tmp_path):
    with pytest.raises(SiteError, match="cannot be read"):
        replay(tmp_path, BANK)
    log = SiteLog(tmp_path / "yard", _empty(), SMALL, 1 << 20)
    live = _live(log=log)
    live.add(_rows(300))
    live.tell("reset")
    log.flush()
    first = tmp_path / "yard" / "000001.safetensors"
    content = first.read_bytes()
    for place in (0, 7, 40, len(content) - 1):
        first.write_bytes(content[:place])
        with pytest.raises(SiteError):
            replay(tmp_path / "yard", BANK)
    first.unlink()
    with pytest.raises(SiteError, match="is missing"):
        replay(tmp_path / "yard", BANK)
    (tmp_path / "yard" / "log.json").write_text(json.dumps({"schema_version": 9}))
    with pytest.raises(SiteError, match="schema_version 9"):
        replay(tmp_path / "yard", BANK)


def test_a_model_adapts_to_what_it_is_shown(tiny_artifact, tiny_images, tmp_path):
    plain, paths = invariclip.load(tiny_artifact), find_images([tiny_images])
    live = invariclip.open_live_site(plain, "yard", window=SiteWindow(floor=2, step=2, block=2, blocks=8))
    model = plain.adapting(live)
    model.warm_up((2,))
    assert live.seen == 0
    rows = plain.embed_images(paths)
    first = model.embed_images(paths[:2])
    np.testing.assert_allclose(first, rows[:2], atol=1e-6)
    model.embed_images(paths[2:])
    assert live.seen == len(paths)
    assert model.site is live.site
    assert model.site_sha256 == live.site.digest
    live.tell("freeze")
    write_site(tmp_path / "yard.safetensors", live.site)
    static = plain.with_site(read_site(tmp_path / "yard.safetensors"))
    np.testing.assert_array_equal(model.probabilities(paths), static.probabilities(paths))


def test_adapt_replays_a_log(tiny_artifact, tiny_images, tmp_path, capsys):
    plain, paths = invariclip.load(tiny_artifact), find_images([tiny_images])
    window = SiteWindow(floor=2, step=2, block=2, blocks=8)
    start = invariclip.open_live_site(plain, "yard").site
    log = SiteLog(tmp_path / "log", start, window, 1 << 20)
    live = LiveSite(start, plain.class_bank(), window, log=log)
    plain.adapting(live).embed_images(paths, batch_size=3)
    log.flush()
    out = tmp_path / "yard.safetensors"
    with pytest.raises(SystemExit) as end:
        main(["adapt", str(tiny_artifact), "--replay", str(tmp_path / "log"), "-o", str(out), "--quiet"])
    assert end.value.code == 0
    assert read_site(out).digest == live.site.digest
    assert live.site.images > 0
    with pytest.raises(SystemExit) as end:
        main(["adapt", str(tiny_artifact), "--replay", str(tmp_path / "log"), "--images", str(tiny_images), "-o",
              str(out)])  # fmt: skip
    assert end.value.code == 2
    assert "goes alone" in capsys.readouterr().err


def test_a_step_of_one_image_is_counted():
    live = _live(window=SiteWindow(floor=2, step=1, block=4, blocks=1))
    live.add(_rows(40))
    assert live.site.images > 0
    assert live.seen == 40


def _refusing(folder):
    """A folder in the place of the next part, which no write can replace."""
    for number in range(1, 4):
        (folder / f"{number:06d}.safetensors" / "in the way").mkdir(parents=True)


def test_a_log_that_cannot_be_written_stops_and_nothing_else_does(tmp_path, capsys):
    log = SiteLog(tmp_path / "yard", _empty(), SMALL, 1 << 20)
    _refusing(tmp_path / "yard")
    live, wanted = _live(log=log), _live()
    for part in range(6):
        live.add(_rows(128, part))
        wanted.add(_rows(128, part))
    live.close(log.flush)
    assert live.facts() == wanted.facts()
    assert log.full
    assert not log._rows
    [line] = capsys.readouterr().err.splitlines()
    assert "cannot be written" in line
    assert "not logged" in line


def test_events_alone_are_bounded_too(tmp_path, capsys):
    log = SiteLog(tmp_path / "yard", _empty(), SMALL, 1 << 15)
    live = _live(log=log)
    live.add(_rows(20))
    for _ in range(1000):
        live.tell("freeze")
    assert len(log._events) < 256
    assert replay(tmp_path / "yard", BANK).frozen
    for _ in range(10_000):
        live.tell("thaw")
    assert log.full
    assert sum(path.stat().st_size for path in (tmp_path / "yard").glob("0*")) <= 1 << 15
    assert "is full" in capsys.readouterr().err


def test_a_replay_with_other_classes_is_refused(tiny_artifact, tiny_images, tmp_path, capsys):
    plain = invariclip.load(tiny_artifact)
    start = invariclip.open_live_site(plain, "yard").site
    log = SiteLog(tmp_path / "log", start, SMALL, 1 << 20)
    LiveSite(start, plain.class_bank(), SMALL, log=log).add(plain.embed_images(find_images([tiny_images])))
    log.flush()
    for more, code, said in ((["--classes", "sun,moon,sea"], 2, "other classes"), (["--name", "hall"], 0, "hall: ")):
        with pytest.raises(SystemExit) as end:
            main(["adapt", str(tiny_artifact), "--replay", str(tmp_path / "log"), "-o",
                  str(tmp_path / "yard.safetensors"), *more])  # fmt: skip
        assert end.value.code == code
        assert said in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda facts: facts["window"].pop("blocks"),
            "its window lacks a field; available: floor, step, block",
        ),
        (lambda facts: facts.update(more=1), "has a field that is not known: 'more'"),
        (lambda facts: facts["window"].update({"": 1}), "has a field that is not known: ''"),
    ],
)
def test_a_logs_window_is_whole_or_refused(tmp_path, change, said):
    SiteLog(tmp_path / "yard", _empty(), SMALL, 1 << 20)
    path = tmp_path / "yard" / "log.json"
    facts = json.loads(path.read_text())
    change(facts)
    path.write_bytes(seal(json.dumps(facts).encode()))
    with pytest.raises(SiteError, match=said):
        replay(tmp_path / "yard", BANK)


def test_events_that_are_no_numbers_are_refused(tmp_path):
    log = SiteLog(tmp_path / "yard", _empty(), SMALL, 1 << 20)
    rows = {"embeddings": _rows(2)}
    for events in ([["x", "freeze"]], 5, [[0, ["freeze"]]], [["1" * 5000, "freeze"]]):
        (log.folder / "000001.safetensors").write_bytes(PART_FILE.to_bytes(rows, {"events": events}))
        with pytest.raises(SiteError, match="not a part"):
            replay(log.folder, BANK)
