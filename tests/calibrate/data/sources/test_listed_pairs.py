"""Pairs that a file lists, of images and of texts; classes in several templates."""

import json
import pickle
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from invariclip.calibrate.data import problems as reasons
from invariclip.calibrate.data.encode import embed_texts
from invariclip.calibrate.data.moments import of_pairs, of_points
from invariclip.calibrate.data.sources import listed_pairs as module
from invariclip.calibrate.data.sources.listed_pairs import HALF, PairsFile, TemplatePairs, TextPairs
from invariclip.calibrate.data.stream.collect import collect
from invariclip.errors import InputError
from invariclip.preprocessing.pixels import stack


def draw(folder, count=6):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.fromarray(rng.integers(0, 256, (18, 18, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def write(folder, rows, name="pairs.jsonl"):
    (folder / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return PairsFile("p", str(folder / name))


def unit(encoder, paths):
    raw = encoder.encode_images(stack(paths, encoder.pixels)).astype(np.float64)
    return raw / np.linalg.norm(raw, axis=1, keepdims=True)


@settings(max_examples=15, deadline=None)
@given(
    pairs=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 5), st.floats(0, 9)).filter(lambda pair: pair[0] != pair[1]),
        min_size=1,
        max_size=9,
    ),
    size=st.integers(1, 4),
)
def test_moments_whatever_the_ranges(reading, tmp_path_factory, pairs, size):
    folder = draw(tmp_path_factory.mktemp("pairs"))
    rows = [{"first": f"{a}.png", "second": f"{b}.png", "weight": weight} for a, b, weight in pairs]
    source, encoder = write(folder, rows), reading.Rowwise()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PAIRS_PER_SHARD", size)
        assert len(source.shards()) == -(-len(pairs) // size)
        read = reading.read_all(source, encoder)
    vectors = unit(encoder, [folder / f"{index}.png" for index in range(6)])
    first, second, weights = (np.asarray(column) for column in zip(*pairs, strict=True))
    reading.assert_same(read.parts["natural"], of_pairs(vectors[first], vectors[second], weights.astype(float)))
    reading.assert_same(read.points, of_points(vectors[np.concatenate([first, second])]))
    assert not read.tally.counts


def test_an_image_is_embedded_once_in_a_shard(reading, tmp_path):
    source = write(draw(tmp_path), [{"first": "0.png", "second": f"{index}.png"} for index in (1, 2, 3, 4, 5)])
    encoder = reading.Rowwise()
    assert reading.read_all(source, encoder).parts["natural"].pairs == 5
    assert encoder.batches == [6]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.csv", "first,second,weight\n0.png,1.png,2\n"),
        ("p.csv", "image1,image2,weight\n0.png,1.png,2\n"),
        ("p.tsv", "a\tb\tweight\n0.png\t1.png\t2\n"),
        ("p.jsonl", '{"path_1": "0.png", "path_2": "1.png", "weight": "2"}'),
    ],
)
def test_columns(reading, tmp_path, name, content):
    (draw(tmp_path) / name).write_text(content)
    read = reading.read_all(PairsFile("p", str(tmp_path / name)), reading.Rowwise())
    assert read.parts["natural"].pair_weight == 2


@pytest.mark.parametrize(("points", "count"), [("both", 2), ("first", 1), ("none", 0)])
def test_points(reading, tmp_path, points, count):
    write(draw(tmp_path), [{"first": "0.png", "second": "1.png"}])
    read = reading.read_all(PairsFile("p", str(tmp_path / "pairs.jsonl"), points=points), reading.Rowwise())
    assert read.points.points == count


def test_what_cannot_be_used_is_named_and_not_counted(reading, tmp_path):
    draw(tmp_path)
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:99])
    names = [("0.png", "0.png"), ("0.png", "copy.png"), ("1.png", "cut.png"), ("2.png", "gone.png"), ("3.png", "4.png")]
    source = write(tmp_path, [{"first": first, "second": second} for first, second in names])
    read = reading.read_all(source, reading.Rowwise())
    found = read.tally.to_json()
    assert found[reasons.SAME] == {"count": 2, "examples": ["0.png | 0.png", "0.png | copy.png"]}
    assert sorted(found[reasons.UNREADABLE]["examples"]) == ["cut.png", "gone.png"]
    assert found[HALF]["count"] == 2
    assert (read.parts["natural"].pairs, read.points.points) == (1, 2)


def test_an_embedding_that_is_not_a_number_goes_on_with_its_name(reading, tmp_path):
    source = write(draw(tmp_path), [{"first": "0.png", "second": "1.png"}, {"first": "2.png", "second": "3.png"}])
    encoder = reading.Rowwise(refuse=reading.pixels_of(tmp_path / "1.png"))
    read = reading.read_all(source, encoder)
    bad = [
        name
        for block in read.blocks
        if block.first is not None
        for name, row in zip(block.pair_names, block.second, strict=True)
        if np.isnan(row).any()
    ]
    assert bad == ["0.png | 1.png"]
    assert read.parts["natural"].pairs == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"first": "0.png"}, "line 1 has no column 'second'"),
        ({"first": "0.png", "second": ""}, "line 1 has no 'second'"),
        ({"first": "0.png", "second": 3}, "line 1 has no 'second'"),
        ({"first": "0.png", "second": "1.png", "weight": -1}, "weight '-1'; it must be a number of zero or more"),
        ({"first": "0.png", "second": "1.png", "weight": "nan"}, "weight 'nan'"),
        ({"first": "0.png", "second": "1.png", "weight": [1]}, "must be a number"),
        ({"first": "0.png", "second": "../1.png"}, "outside its folder"),
        ({"first": "/etc/hostname", "second": "1.png"}, "outside its folder"),
        ({"first": "a\0b", "second": "1.png"}, "no file can be called"),
    ],
)
def test_wrong_records_are_refused_before_anything_is_read(tmp_path, row, said):
    source = write(draw(tmp_path), [row])
    with pytest.raises(InputError, match=said):
        source.shards()


def test_outside_with_leave(reading, tmp_path):
    draw(tmp_path / "images")
    (tmp_path / "lists").mkdir()
    rows = [{"first": "../images/0.png", "second": str(tmp_path / "images" / "1.png")}]
    write(tmp_path / "lists", rows)
    source = PairsFile("p", str(tmp_path / "lists" / "pairs.jsonl"), allow_outside=True)
    assert reading.read_all(source, reading.Rowwise()).parts["natural"].pairs == 1


def test_another_content_is_another_shard(reading, tmp_path):
    source = write(draw(tmp_path), [{"first": "0.png", "second": "1.png"}])
    (before,) = source.shards()
    Image.new("RGB", (50, 50), "red").save(tmp_path / "1.png")
    assert source.shards()[0].digest != before.digest
    with pytest.raises(InputError, match="has changed since"):
        list(source.read(before, reading.Rowwise(), reasons.ProblemCounts()))
    assert pickle.loads(pickle.dumps(source)) == source  # noqa: S301 -- our own bytes
    (tmp_path / "empty.csv").write_text("first,second\n")
    with pytest.raises(InputError, match="lists no pair"):
        PairsFile("p", str(tmp_path / "empty.csv")).shards()


TEMPLATES = ("a photo of a {}", "a sketch of a {}", "the {} as a toy")


def test_a_file(reading, tmp_path, monkeypatch):
    rows = [("a dog", "a drawing of a dog", 1.0), ("a cat", "a cat, at night", 2.5), ("a tree", "trees", 0.0)]
    lines = [json.dumps({"text_1": first, "text_2": second, "weight": weight}) for first, second, weight in rows]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    source, encoder = TextPairs("t", str(tmp_path / "t.jsonl")), reading.Rowwise()
    read = reading.read_all(source, encoder)
    first, second = (embed_texts(encoder, [row[side] for row in rows]) for side in (0, 1))
    reading.assert_same(read.parts["texts"], of_pairs(first, second, np.asarray([1.0, 2.5, 0.0])))
    assert read.points.points == 0
    monkeypatch.setattr(module, "TEXTS_PER_SHARD", 2)
    assert len(source.shards()) == 2
    reading.assert_same(reading.read_all(source, encoder).parts["texts"], read.parts["texts"])
    assert pickle.loads(pickle.dumps(source)) == source  # noqa: S301 -- our own bytes


def test_every_two_templates_of_a_class(reading, monkeypatch):
    names = ("dog", "cat", "old oak")
    encoder = reading.Rowwise()
    source = TemplatePairs("t", names, TEMPLATES)
    read = reading.read_all(source, encoder)
    vectors = {name: embed_texts(encoder, [template.replace("{}", name) for template in TEMPLATES]) for name in names}
    # the rule of natural pairs: twice the pooled covariance within a class
    within = sum(np.cov(rows.T) for rows in vectors.values()) / 3
    assert np.allclose(read.parts["texts"].sigma_delta, 2 * within)
    assert read.parts["texts"].pairs == 3 * len(list(combinations(TEMPLATES, 2)))
    assert read.parts["texts"].pair_weight == pytest.approx(3 * 2)
    assert collect([source], encoder).combined().effective_pairs == pytest.approx(3 * 2)
    monkeypatch.setattr(module, "BLOCK_ROWS", 3)
    assert len(source.shards()) == 3
    reading.assert_same(reading.read_all(source, encoder).parts["texts"], read.parts["texts"])


def test_what_the_encoder_cannot_tell_apart(reading, tmp_path):
    long = "a text that goes on beyond what the tower sees"
    rows = [("a dog", "a dog"), ("a Dog", "A DOG"), (f"{long} here", f"{long} there"), ("a dog", "a cat")]
    (tmp_path / "t.csv").write_text("first,second\n" + "".join(f"{first},{second}\n" for first, second in rows))
    read = reading.read_all(TextPairs("t", str(tmp_path / "t.csv")), reading.Rowwise())
    assert read.tally.counts == {reasons.SAME: 3}
    assert read.tally.examples[reasons.SAME][1] == "a Dog | A DOG"
    assert read.parts["texts"].pairs == 1


def test_a_lone_template_and_wrong_ones():
    for templates, said in [
        (("a {}",), "one template gives no pair"),
        (("a {}", "b"), "exactly one"),
        (("a {}", "a {}"), "given twice"),
    ]:
        with pytest.raises(InputError, match=said):
            TemplatePairs("t", ("dog",), templates)


def test_no_text_tower(world, reading, tmp_path):
    class Blind:
        """A tower of images alone."""

        sha256, embed_dim, pixels = "0", 24, world.SPEC

    source = TemplatePairs("t", ("dog",), TEMPLATES)
    for encoder, said in [(Blind(), "takes no texts"), (None, "texts need an encoder")]:
        blocks = source.read(source.shards()[0], encoder, reasons.ProblemCounts())
        with pytest.raises(InputError, match=said):
            list(blocks)
    (tmp_path / "t.csv").write_text("first,second\na,b\n")
    listed = TextPairs("t", str(tmp_path / "t.csv"))
    (shard,) = listed.shards()
    (tmp_path / "t.csv").write_text("first,second\na,b\nc,d\n")
    with pytest.raises(InputError, match="has changed since"):
        list(listed.read(shard, reading.Rowwise(), reasons.ProblemCounts()))


def test_an_image_that_is_changed_while_a_shard_is_read(reading, tmp_path):
    source = write(draw(tmp_path), [{"first": "0.png", "second": "1.png"}])
    (shard,) = source.shards()

    class Changing(reading.Rowwise):
        def encode_images(self, batch):
            Image.new("RGB", (50, 50), "red").save(tmp_path / "1.png")
            return super().encode_images(batch)

    with pytest.raises(InputError, match="has changed while it was read"):
        list(source.read(shard, Changing(), reasons.ProblemCounts()))
