"""Images as a source: the same moments as in memory, and nothing left out without a word."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from invariclip.calibrate.data import problems as reasons
from invariclip.calibrate.data.encode import DECLINED
from invariclip.calibrate.data.images import SkippedImageWarning, read_images
from invariclip.calibrate.data.pairs import Sources, fitted_moments
from invariclip.calibrate.data.problems import EMPTY, SINGLE
from invariclip.calibrate.data.sources import images as module
from invariclip.calibrate.data.sources.images import ImageSource
from invariclip.calibrate.data.stream.collect import collect, read_shard
from invariclip.calibrate.data.stream.state import MomentsState, state_from_bytes, state_to_bytes
from invariclip.calibrate.data.versions import Changes
from invariclip.calibrate.fit import FitOptions, tabulate
from invariclip.calibrate.projection.estimators import shares
from invariclip.errors import InputError
from invariclip.export.reference import __file__ as reference

KINDS = ("greyscale", "invert", "posterize")
CHANGES = Changes(KINDS, draws=2)
BOTH = Sources()


def in_memory(encoder, path, changes=CHANGES, sources=BOTH):
    table, facts = tabulate(encoder, read_images(path), FitOptions(interventions=changes.kinds, draws=changes.draws))
    return fitted_moments(table, sources), facts


def write_folder(root, layout, seed=0):
    """Noise images `environment/class/file`; the layout maps environment/class to how many."""
    rng = np.random.default_rng(seed)
    for place, count in layout.items():
        (root / place).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            array = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(array).save(root / place / f"{place.replace('/', '-')}-{index}.png")
    return root


def rewrite(path, content):
    """Other content of the same size, and another time of change."""
    facts = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))


def test_the_bundled_subset_gives_the_moments_of_the_path_in_memory(reading, tmp_path):
    folder = Path(reference).parent
    rows = [json.loads(line) for line in (folder / "images.jsonl").read_text(encoding="utf-8").splitlines()]
    concepts = sorted({row["concept"] for row in rows})[::6]
    rows = [{**row, "file": str(folder / row["file"])} for row in rows if row["concept"] in concepts]
    manifest = tmp_path / "subset.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    encoder = reading.Rowwise()
    options = FitOptions(interventions=CHANGES.kinds, draws=CHANGES.draws)
    with pytest.warns(SkippedImageWarning, match="greyscale: it changes nothing"):  # drawings in black and white
        table, facts = tabulate(encoder, read_images(manifest, allow_outside=True), options)
    source = ImageSource("set", str(manifest), changes=CHANGES, allow_outside=True)
    state = collect([source], encoder)
    reading.assert_same(state.combined(), fitted_moments(table))
    assert state.combined().pairs > 100
    assert state.combined().effective_pairs == pytest.approx(fitted_moments(table).effective_pairs, rel=1e-12)
    told = reading.read_all(source, encoder).tally.counts
    assert told[reasons.LONE] + told[SINGLE] == facts["unpaired_concepts"]
    assert told[DECLINED] == sum(facts["declined"].values())


@settings(max_examples=8, deadline=None)
@given(size=st.integers(1, 12), rows=st.integers(2, 40))
def test_the_size_of_shards_and_blocks_does_not_change_the_moments(reading, tmp_path_factory, size, rows):
    root = tmp_path_factory.mktemp("folder")
    write_folder(root, {f"{environment}/c{number}": 1 + number % 3 for environment in "abc" for number in range(6)})
    encoder = reading.Rowwise()
    source = ImageSource("p", str(root), changes=CHANGES)
    whole = reading.read_all(source, encoder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CONCEPTS", size)
        patch.setattr("invariclip.calibrate.data.stream.blocks.BLOCK_ROWS", rows)
        cut = reading.read_all(source, encoder)
        assert len(source.shards()) == -(-6 // size)
    assert max(len(part) for block in cut.blocks for part in (block.points, block.first) if part is not None) <= rows
    reading.assert_same(cut.moments, whole.moments)
    reading.assert_same(whole.moments, in_memory(encoder, root)[0])


@settings(max_examples=8, deadline=None)
@given(
    images=st.dictionaries(
        st.sampled_from([f"{e}/c{n}" for e in "abc" for n in range(5)]), st.integers(1, 5), min_size=6
    ),
    size=st.integers(1, 3),
    changes=st.sampled_from([Changes(), CHANGES]),
)
def test_pairs_count_for_as_many_independent_ones_as_in_memory(reading, tmp_path_factory, images, size, changes):
    """However concepts are cut into shards, and shards into groups: else a stream would shrink little data less."""
    root = write_folder(tmp_path_factory.mktemp("folder"), images)
    encoder = reading.Rowwise()
    wanted, _ = in_memory(encoder, root, changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CONCEPTS", size)
        state = collect([ImageSource("p", str(root), changes=changes)], encoder)
    state = state_from_bytes(state_to_bytes(state), "m")
    found, groups = state.combined(), state.groups()
    assert found.pairs == wanted.pairs
    for each in (found, sum(groups[1:], start=groups[0])):
        assert each.effective_pairs == pytest.approx(wanted.effective_pairs, rel=1e-12)
        assert each.pair_fourth * each.crowding == pytest.approx(wanted.pair_fourth * wanted.crowding, rel=1e-9)
    if wanted.pairs:
        assert shares(found) == pytest.approx(shares(wanted), rel=1e-9)


@pytest.mark.parametrize(("natural", "changed", "points"), [(1, 0, 1), (0, 1, 1), (1, 0, 0), (0, 0, 1)])
def test_parts_can_be_left_out(reading, tmp_path, natural, changed, points):
    write_folder(tmp_path, {f"{environment}/{concept}": 2 for environment in "ab" for concept in "xy"})
    encoder = reading.Rowwise()
    changes = CHANGES if changed else Changes()
    source = ImageSource("p", str(tmp_path), natural=bool(natural), changes=changes, points=bool(points))
    read = reading.read_all(source, encoder)
    expected, _ = in_memory(encoder, tmp_path, changes, Sources(bool(natural), bool(changed)))
    assert sorted(read.parts) == ["interventions"] * changed + ["natural"] * natural
    assert read.points.points == 8 * points
    assert np.allclose(read.moments.pair_outer, expected.pair_outer, atol=1e-12)


def test_nothing_to_take(tmp_path):
    write_folder(tmp_path, {"a/x": 1})
    with pytest.raises(InputError, match="neither points nor natural pairs nor interventions"):
        ImageSource("p", str(tmp_path), natural=False, points=False).shards()
    source = ImageSource("p", str(tmp_path))
    blocks = source.read(source.shards()[0], None, reasons.ProblemCounts())
    with pytest.raises(InputError, match="need an encoder"):
        list(blocks)


def test_what_cannot_be_used_is_named_and_not_counted(reading, tmp_path):
    layout = {"a/x": 3, "b/x": 3, "a/alone": 2, "b/single": 1, "a/cut": 1, "b/cut": 1}
    write_folder(tmp_path, layout)
    cut = tmp_path / "a/cut/a-cut-0.png"
    Image.open(cut).convert("RGB").resize((64, 64)).save(cut.with_suffix(".jpg"))
    cut.unlink()
    cut = cut.with_suffix(".jpg")
    cut.write_bytes(cut.read_bytes()[:300])
    (tmp_path / "sketch" / "x").mkdir(parents=True)
    encoder = reading.Rowwise()
    read = reading.read_all(ImageSource("p", str(tmp_path), changes=CHANGES), encoder)
    found = read.tally.to_json()
    assert found[reasons.UNREADABLE] == {"count": 1, "examples": ["a/cut/a-cut-0.jpg"]}
    assert found[reasons.LONE] == {"count": 1, "examples": ["alone"]}
    assert sorted(found[SINGLE]["examples"]) == ["cut", "single"]
    assert found[EMPTY] == {"count": 1, "examples": ["sketch"]}
    with pytest.warns(SkippedImageWarning):
        expected, _ = in_memory(encoder, tmp_path)
    reading.assert_same(read.moments, expected)


def test_embeddings_that_are_not_numbers(reading, tmp_path):
    write_folder(tmp_path, {"a/x": 3, "b/x": 2})
    files = sorted(tmp_path.rglob("*.png"))
    Image.new("RGB", (20, 20)).save(files[1])  # all black: this encoder answers zero
    encoder = reading.Rowwise(refuse=reading.pixels_of(files[3]))
    changes = Changes(("invert",), draws=1)
    source = ImageSource("p", str(tmp_path), changes=changes)
    state = collect([source], encoder)
    with pytest.warns(SkippedImageWarning, match="zero or not finite"):
        expected, _ = in_memory(encoder, tmp_path, changes)
    reading.assert_same(state.combined(), expected)
    assert state.combined().points == 3
    silent = reading.read_all(ImageSource("p", str(tmp_path), points=False), encoder).tally.to_json()
    assert silent[reasons.ZERO] == {"count": 1, "examples": ["a/x/a-x-1.png"]}
    assert silent[reasons.NOT_FINITE] == {"count": 1, "examples": ["b/x/b-x-0.png"]}


def test_every_fault_is_named_counted_and_not_in_the_moments(reading, tmp_path):
    """All of them at once; what is left is the moments of what is good, and of nothing else."""
    good = {f"{environment}/c{number}": 2 for environment in "ab" for number in range(4)}
    write_folder(tmp_path, good)
    encoder = reading.Rowwise()
    before = collect([ImageSource("p", str(tmp_path), changes=CHANGES)], encoder)
    assert before.tallies["p"].counts == {}
    array = np.random.default_rng(9).integers(0, 256, (2, 20, 20, 3), dtype=np.uint8)
    faulty = {
        "nan/c0/refused.png": Image.fromarray(array[0]),
        "nan/c1/zero.png": Image.new("RGB", (20, 20)),
        "alike/x0/one.png": Image.fromarray(array[1]),
        "alike/x0/two.png": Image.fromarray(array[1]),
        "twin/x0/same.png": Image.fromarray(array[1]),
    }
    for name, image in faulty.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / name)
    (tmp_path / "torn/only").mkdir(parents=True)
    (tmp_path / "torn/only/torn.png").write_bytes(b"no image")
    (tmp_path / "mist/c0").mkdir(parents=True)
    encoder.refuse = reading.pixels_of(tmp_path / "nan/c0/refused.png")
    # Without interventions the twins are in no pair but those of themselves; points they are like any others.
    source = ImageSource("p", str(tmp_path))
    state = collect([source], encoder)
    assert {name: told["count"] for name, told in state.tallies["p"].to_json().items()} == {
        reasons.UNREADABLE: 1,
        reasons.NOT_FINITE: 1,
        reasons.ZERO: 1,
        reasons.SAME: 2,
        reasons.EMPTY: 1,
        reasons.EMPTY_HERE: 2,
        reasons.ALIKE_HERE: 1,
        reasons.SINGLE_OF_CLASS: 1,
    }
    examples = state.tallies["p"].examples
    assert examples[reasons.UNREADABLE] == ["torn/only/torn.png"]
    assert examples[reasons.NOT_FINITE] == ["nan/c0/refused.png"]
    assert examples[reasons.SAME] == ["alike/x0/one.png | twin/x0/same.png", "alike/x0/two.png | twin/x0/same.png"]
    assert (examples[reasons.EMPTY], examples[reasons.EMPTY_HERE]) == (["mist"], ["nan", "torn"])
    assert (examples[reasons.ALIKE_HERE], examples[reasons.SINGLE_OF_CLASS]) == (["alike"], ["only"])
    moments = {key[1]: found for key, found in state.sums.items()}
    wanted = {key[1]: found for key, found in before.sums.items()}
    assert (moments["points"].points, moments["natural"].pairs) == (16 + 3, 16)
    np.testing.assert_allclose(moments["natural"].pair_outer, wanted["natural"].pair_outer, rtol=0, atol=1e-12)
    assert moments["natural"].pair_independent == wanted["natural"].pair_independent == 4 * 3
    for faulty_one in ("nan", "torn", "alike", "twin", "mist"):
        shutil.rmtree(tmp_path / faulty_one)
    again = collect([ImageSource("p", str(tmp_path))], encoder).combined()
    np.testing.assert_allclose(again.sigma_delta, state.combined().sigma_delta, rtol=0, atol=1e-12)


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(6)), size=st.integers(1, 3))
def test_states_of_some_shards_merge_in_any_order(reading, tmp_path_factory, order, size):
    """With their counts of faults and of independent pairs, to rounding."""
    root = write_folder(tmp_path_factory.mktemp("folder"), {f"{e}/c{n}": 2 for e in "abc" for n in range(6)})
    (root / "a/c3/a-c3-0.png").write_bytes(b"no image")
    encoder = reading.Rowwise()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CONCEPTS", size)
        source = ImageSource("p", str(root))
        whole = collect([source], encoder)
        parts = []
        for shard in source.shards():
            part = MomentsState(encoder.embed_dim, whole.encoder)
            found = read_shard(source, shard, encoder.embed_dim, encoder)
            part.add(shard, found.moments, found.tally)
            parts.append(part)
    total = MomentsState(encoder.embed_dim, whole.encoder)
    for place in order:
        if place < len(parts):
            total.merge(parts[place])
    assert total.done == whole.done
    assert total.tallies["p"].to_json() == whole.tallies["p"].to_json()
    reading.assert_same(total.combined(), whole.combined())
    assert total.combined().effective_pairs == pytest.approx(whole.combined().effective_pairs, rel=1e-12)


def test_a_large_concept_is_cut(reading, tmp_path, monkeypatch):
    write_folder(tmp_path, {"a/big": 30, "b/big": 5, "a/x": 2, "b/x": 2})
    encoder = reading.Rowwise()
    whole = reading.read_all(ImageSource("p", str(tmp_path), changes=CHANGES), encoder)
    monkeypatch.setattr(module, "LARGE", 12)
    source = ImageSource("p", str(tmp_path), changes=CHANGES)
    cut = reading.read_all(source, encoder)
    assert [len(shard.spec["files"]) for shard in source.shards()] == [11, 12, 12, 11, 4]
    reading.assert_same(cut.points, whole.points)
    reading.assert_same(cut.parts["interventions"], whole.parts["interventions"])
    assert cut.parts["natural"].pairs == 6 * 5 + 2 * 2
    assert cut.parts["natural"].pair_weight == pytest.approx(whole.parts["natural"].pair_weight)
    assert not cut.tally.counts


def test_donors_lie_in_the_same_shard(reading, tmp_path):
    write_folder(tmp_path, {"a/x": 3, "b/x": 3})
    encoder = reading.Rowwise()
    changes = Changes(("style-exchange",), draws=1)
    read = reading.read_all(ImageSource("p", str(tmp_path), changes=changes), encoder)
    reading.assert_same(read.moments, in_memory(encoder, tmp_path, changes)[0])
    (tmp_path / "lone").mkdir()
    write_folder(tmp_path / "lone", {"a/x": 1})
    lone = reading.read_all(ImageSource("p", str(tmp_path / "lone"), changes=changes), encoder)
    assert lone.tally.counts[DECLINED] == 1
    assert "interventions" not in lone.parts


def test_another_content_is_another_shard(reading, tmp_path):
    write_folder(tmp_path, {"a/x": 1, "b/x": 1})
    source = ImageSource("p", str(tmp_path))
    (before,) = source.shards()
    assert [shard.digest for shard in source.shards()] == [before.digest]
    file = next(tmp_path.rglob("*.png"))
    rewrite(file, file.read_bytes()[::-1])
    (after,) = source.shards()
    assert after.digest != before.digest
    with pytest.raises(InputError, match="has changed since"):
        list(source.read(before, reading.Rowwise(), reasons.ProblemCounts()))
    other = ImageSource("p", str(tmp_path), changes=CHANGES)
    assert other.shards()[0].digest != after.digest
    assert pickle.loads(pickle.dumps(other)).shards() == other.shards()  # noqa: S301 -- our own bytes


def test_filters(reading, tmp_path):
    write_folder(tmp_path, {"a/x": 1, "b/x": 1, "c/x": 1})
    (tmp_path / "none").mkdir()
    read = reading.read_all(ImageSource("p", str(tmp_path), environments=("a", "b", "none")), reading.Rowwise())
    assert (read.points.points, read.parts["natural"].pairs) == (2, 1)
    assert read.tally.to_json()[EMPTY]["examples"] == ["none"]
    with pytest.raises(InputError, match="no image has environment 'q'"):
        ImageSource("p", str(tmp_path), environments=("a", "q")).shards()


def test_an_image_that_is_changed_while_a_shard_is_read(reading, tmp_path):
    write_folder(tmp_path, {"a/x": 1, "b/x": 1})
    source = ImageSource("p", str(tmp_path))
    (shard,) = source.shards()

    class Changing(reading.Rowwise):
        def encode_images(self, batch):
            Image.new("RGB", (50, 50), "red").save(next(tmp_path.rglob("*.png")))
            return super().encode_images(batch)

    with pytest.raises(InputError, match="has changed while it was read"):
        list(source.read(shard, Changing(), reasons.ProblemCounts()))
