"""Each rewrite on and off, in ONNX Runtime against PyTorch; and what a graph with all of them must always give."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.artifact.manifest import EMBEDDING
from invariclip.backends import open_backend
from invariclip.errors import ContractError
from invariclip.export.graphs.rewrites import Subject
from invariclip.export.graphs.rewrites.plan import NAMES, REWRITES, chosen, require_held
from invariclip.export.graphs.tower_graph import tower_graph
from invariclip.export.graphs.writing import write_graph

EXACT = 2e-6
TEXTS = ["", "a cat", "two dogs", "x", " ".join("abcdefghijklmn")]  # the last fills the context
# what the graph without a rewrite has that its post-condition does not allow; the others promise nothing of the graph
BROKEN = {
    "pooled-last-block": "the last softmax is not of one query",
    "plain-mean": "the graph still has Range",
    "text-cut": "the graph takes texts of one length only",
    "plain-pooling": "the graph still has GatherND",
    "normalisation": "pixels still go through Div",
}
CASES = {
    "image": ("plain-attention", "attention-biases", "pooled-last-block", "normalisation"),
    "text": ("plain-attention", "attention-biases", "pooled-last-block", "text-cut", "plain-pooling", "tidy"),
}


@pytest.fixture(scope="session")
def made(kind, tmp_path_factory):
    """A kind's tower without some rewrites: the graph, its plan, and a function from rows to embeddings."""
    folder = tmp_path_factory.mktemp("graphs")

    @cache
    def make(name, tower, *without):
        graph = tower_graph(kind(name), tower, rewrites=chosen(without))
        path = folder / f"{name}.{tower}.{'.'.join(without)}.onnx"
        write_graph(graph.model, path)
        backend = open_backend("onnxruntime", path, threads=1)
        entry = backend.input_names[0]
        return graph, lambda rows: backend.run({entry: rows}, (EMBEDDING,))[EMBEDDING]

    return make


@pytest.fixture(scope="session")
def reference(kind):
    """Rows for a kind's tower and what the original model answers, in unit length."""

    @cache
    def answer(name, tower):
        loaded = kind(name)
        if tower == "image":
            rng = np.random.default_rng(0)
            rows = rng.integers(0, 256, (5, *loaded.pixels.image_size, 3), dtype=np.uint8)
            raw = loaded.encode_images(rows)
        else:
            rows = loaded.tokenizer(TEXTS)
            raw = loaded.encode_texts(rows)
        raw = raw.astype(np.float64)
        return rows, raw / np.linalg.norm(raw, axis=1, keepdims=True)

    return answer


def agree(ask, rows, wanted):
    for count in (1, 2, 5):
        got = ask(rows[:count])
        assert (got.dtype, got.shape) == (np.float32, wanted[:count].shape)
        assert np.abs(got - wanted[:count]).max() <= EXACT


@pytest.mark.parametrize(("tower", "name"), [(tower, name) for tower, names in CASES.items() for name in names])
def test_with_and_without_a_rewrite_the_answers_are_pytorchs(made, reference, tower, name):
    # what promises nothing of this graph is looked at beside the plain export, which is traced anyway
    off = (name,) if name in BROKEN else NAMES
    (graph, ask), (without, ask_without) = made("clip", tower), made("clip", tower, *off)
    rows, wanted = reference("clip", tower)
    assert graph.applied(name)
    assert [(step.applied, step.detail) for step in without.plan if step.name == name] == [(False, "switched off")]
    agree(ask, rows, wanted)
    agree(ask_without, rows, wanted)
    rewrite = next(one for one in REWRITES if one.name == name)
    assert rewrite.holds(graph.model) is None
    if name in BROKEN:
        assert rewrite.holds(without.model).startswith(BROKEN[name])
        # nobody may say that it was applied and hand such a graph on
        with pytest.raises(ContractError, match=f"rewrite {name} was applied to the {tower} tower, but {BROKEN[name]}"):
            require_held(without.model, Subject(tower, None, None, frozenset({name})))


@pytest.mark.parametrize(
    ("name", "tower", "kinds"),
    [
        ("quick", "text", {"Sigmoid"}),
        ("coca", "text", {"Softmax"}),
        ("stem", "image", {"ReduceMean"}),
        ("eva", "image", {"Softmax"}),
    ],
)
def test_other_towers_keep_their_answers_too(made, reference, name, tower, kinds):
    graph, ask = made(name, tower)
    rows, wanted = reference(name, tower)
    agree(ask, rows, wanted)
    assert kinds & {node.op_type for node in graph.model.graph}


def test_the_mean_without_its_rewrite_has_an_index_computation(made, reference):
    without, ask = made("stem", "image", *(name for name in NAMES if name not in ("normalisation", "tidy")))
    agree(ask, *reference("stem", "image"))
    rewrite = next(one for one in REWRITES if one.name == "plain-mean")
    assert rewrite.holds(made("stem", "image")[0].model) is None
    assert rewrite.holds(without.model) == BROKEN["plain-mean"]


@pytest.mark.parametrize("tower", ["image", "text"])
def test_all_of_them_can_be_switched_off(made, reference, tower):
    graph, ask = made("clip", tower, *NAMES)
    assert {(step.applied, step.detail) for step in graph.plan} == {(False, "switched off")}
    agree(ask, *reference("clip", tower))
    assert len(made("clip", tower)[0].model.graph) < 0.75 * len(graph.model.graph)


@pytest.mark.parametrize("name", ["clip", "quick"])
def test_texts_may_be_as_short_as_they_are(made, reference, name):
    _, ask = made(name, "text")
    rows, wanted = reference(name, "text")
    lengths = [int(np.flatnonzero(row)[-1]) + 1 for row in rows]
    assert (min(lengths), max(lengths)) == (2, rows.shape[1])
    for row, answer, shortest in zip(rows, wanted, lengths, strict=True):
        for length in range(shortest, rows.shape[1] + 1):
            assert np.abs(ask(row[None, :length]) - answer).max() <= EXACT


def test_of_two_ends_the_first_is_pooled(made, reference, kind):
    _, ask = made("clip", "text")
    rows = reference("clip", "text")[0][1:2].copy()
    rows[0, 6], rows[0, 9] = 300, 49407
    assert int((rows == 49407).sum()) == 2
    raw = kind("clip").encode_texts(rows).astype(np.float64)
    assert np.abs(ask(rows) - raw / np.linalg.norm(raw)).max() <= EXACT


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_row_is_the_same_in_any_batch_at_any_length(made, data):
    _, ask = made("clip", "text")
    ends = data.draw(st.lists(st.integers(2, 16), min_size=1, max_size=9))
    seed = data.draw(st.integers(0, 2**32 - 1))
    rows = np.zeros((len(ends), 16), dtype=np.int64)
    for row, end in zip(rows, ends, strict=True):
        row[:end] = np.random.default_rng(seed).integers(1, 49406, end)
        row[0], row[end - 1] = 49406, 49407
    alone = np.concatenate([ask(row[None, :end]) for row, end in zip(rows, ends, strict=True)])
    length = data.draw(st.integers(max(ends), 16))
    assert np.abs(ask(rows[:, :length]) - alone).max() <= 1e-6


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 17), seed=st.integers(0, 2**32 - 1))
def test_an_image_is_the_same_in_any_batch(made, count, seed):
    _, ask = made("clip", "image")
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    picked = rng.integers(count)
    assert np.abs(ask(rows)[picked] - ask(rows[picked : picked + 1])[0]).max() <= 1e-6


def test_every_rewrite_is_described_and_has_a_way():
    assert len(set(NAMES)) == len(NAMES)
    for rewrite in REWRITES:
        assert rewrite.saves
        assert (rewrite.module is None) != (rewrite.graph is None)
        assert set(rewrite.needs) <= set(NAMES[: NAMES.index(rewrite.name)])
