"""Pairs of texts add to Σ_Δ alone."""

import json
import pickle
from itertools import combinations

import numpy as np
import pytest

from invariclip.calibrate.data import problems as reasons
from invariclip.calibrate.data.encode import embed_texts
from invariclip.calibrate.data.moments import of_pairs
from invariclip.calibrate.data.sources import listed_pairs as module
from invariclip.calibrate.data.sources.listed_pairs import TemplatePairs, TextPairs
from invariclip.calibrate.data.stream.collect import collect
from invariclip.errors import InputError

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
