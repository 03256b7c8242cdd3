"""Ids are cut to a batch's longest text only where the graph takes that, and never too short."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import invariclip
from invariclip.artifact.folder import describe_file, read_manifest
from invariclip.export.graphs.writing import write_facts
from invariclip.preprocessing.tokenizer import TextSpec
from invariclip.text_tower import TextTower, cut_to_longest, taking_turns
from invariclip.view import TEXTS_AT_ONCE

CONTEXT, START, END = 12, 90, 91


def spec(**changes):
    fields = {"start_token_ids": (START,), "end_token_ids": (END,), "pad_token_id": 0, **changes}
    return TextSpec(context_length=CONTEXT, **fields)


def rows(texts, of):
    ids = np.full((len(texts), CONTEXT), of.pad_token_id, dtype=np.int64)
    for row, text in zip(ids, texts, strict=True):
        whole = [*of.start_token_ids, *text, *of.end_token_ids]
        row[: len(whole)] = whole
    return ids


# 0, which is also the padding, is a token of its own in CLIP's vocabulary: the exclamation mark
TEXTS = st.lists(st.lists(st.integers(0, 80), max_size=CONTEXT - 2), min_size=1, max_size=5)


@given(texts=TEXTS, pad=st.sampled_from([0, END, 85]))
def test_every_end_stays_inside_and_nothing_more(texts, pad):
    of = spec(pad_token_id=pad)
    ids = rows(texts, of)
    cut = cut_to_longest(ids, of)
    length = max(map(len, texts)) + 2
    assert cut.shape == (len(texts), length)
    np.testing.assert_array_equal(cut, ids[:, :length])
    assert all(END in row for row in cut)
    assert cut.flags.c_contiguous


@pytest.mark.parametrize(
    "changes",
    [{"end_token_ids": ()}, {"pad_side": "left"}, {"last_token_id": 7}, {"zeroed_token_id": END}],
)
def test_where_the_end_cannot_be_told_nothing_is_cut(changes):
    of = spec(**changes)
    ids = rows([[1], [2, 3]], of)
    assert cut_to_longest(ids, of) is ids


def test_rows_of_nothing_but_padding_keep_a_column():
    of = spec()
    assert cut_to_longest(np.zeros((2, CONTEXT), np.int64), of).shape == (2, 1)
    assert cut_to_longest(np.zeros((0, CONTEXT), np.int64), of).shape == (0, 1)


@pytest.fixture
def folder(tiny_artifact, tmp_path):
    """The tiny artifact with a text graph that answers with the number of ids it was given, at any length."""
    helper = onnx.helper
    given = helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["batch", "length"])
    answer = helper.make_tensor_value_info("embedding", onnx.TensorProto.FLOAT, ["batch", 1])
    nodes = [
        helper.make_node("Greater", ["input_ids", "below"], ["all"]),
        helper.make_node("Cast", ["all"], ["ones"], to=onnx.TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["ones", "axis"], ["embedding"], keepdims=1),
    ]
    constants = [
        helper.make_tensor("below", onnx.TensorProto.INT64, [], [-1]),
        helper.make_tensor("axis", onnx.TensorProto.INT64, [1], [1]),
    ]
    graph = helper.make_graph(nodes, "length", [given], [answer], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "t.onnx")
    manifest = read_manifest(tiny_artifact)
    write_facts(tmp_path / "t.onnx", manifest.facts("t.onnx"))
    (tmp_path / manifest.tokenizer.path).write_bytes((tiny_artifact / manifest.tokenizer.path).read_bytes())
    variant = replace(manifest.variants["float32"], text=describe_file(tmp_path, "t.onnx"))
    return tmp_path, lambda length: replace(manifest, variants={"float32": replace(variant, text_length=length)})


@pytest.mark.parametrize(("length", "seen"), [("fixed", [16, 16, 16]), ("dynamic", [5, 5, 3])])
def test_only_dynamic_graphs_get_short_ids(folder, length, seen):
    path, manifest = folder
    tower = TextTower(path, manifest(length), "float32", backend="onnxruntime", threads=1)
    assert tower.embed(["a cat sat", "", "dog"], 2, {})[:, 0].tolist() == seen


def test_turns_are_taken_for_what_is_embedded_and_not_for_what_is_kept(tiny_artifact):
    model = invariclip.load(tiny_artifact, threads=1)
    texts, taken = [f"thing {number}" for number in range(TEXTS_AT_ONCE + 5)], []

    @contextmanager
    def turn(rows):
        taken.append(rows)
        yield

    with taking_turns(turn):
        first = model.embed_texts(texts)
        assert taken == [TEXTS_AT_ONCE, 5]
        np.testing.assert_array_equal(model.embed_texts([*texts[:3], "new"])[:3], first[:3])
    assert taken == [TEXTS_AT_ONCE, 5, 1]
    model.embed_texts(["nobody's turn"])
    assert taken == [TEXTS_AT_ONCE, 5, 1]


def test_a_turn_can_stop_an_embedding_between_two_runs(tiny_artifact):
    model = invariclip.load(tiny_artifact, threads=1)
    taken = []

    @contextmanager
    def turn(rows):
        if taken:
            raise InterruptedError
        taken.append(rows)
        yield

    with taking_turns(turn), pytest.raises(InterruptedError):
        model.embed_texts([f"thing {number}" for number in range(3 * TEXTS_AT_ONCE)])
    assert taken == [TEXTS_AT_ONCE]
