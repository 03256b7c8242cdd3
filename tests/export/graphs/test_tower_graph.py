"""Towers as graphs: the projection in them in every way, nothing of the other tower, every engine that is there."""

from functools import cache
from importlib.util import find_spec

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from invariclip.artifact.manifest import EMBEDDING, PROJECTION_INPUT
from invariclip.artifact.projection import Projection
from invariclip.backends import open_backend
from invariclip.export.graphs.head import attach_head
from invariclip.export.graphs.tower_graph import tower_graph
from invariclip.export.graphs.writing import weight_bytes, write_graph
from invariclip.export.tensorrt.engines import build_on_cpu

WIDTH, RANK = 24, 8
ROWS = {"image": ("pixels", onnx.TensorProto.UINT8), "text": ("input_ids", onnx.TensorProto.INT64)}


def projection(rank=RANK, seed=0):
    return Projection(np.random.default_rng(seed).normal(size=(WIDTH, rank)), "icm", 2.0)


def unit(rows):
    rows = rows.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def answers(path, rows, engine="onnxruntime", outputs=(EMBEDDING,), **more):
    backend = open_backend(engine, path, threads=1)
    entry = next(name for name in backend.input_names if name != PROJECTION_INPUT)
    return backend.run({entry: rows, **more}, outputs)


TOWERS = [
    ("vit", "image", "folded"),
    ("resnet, attention pool with bias", "image", "folded"),
    ("timm, attention as head", "image", "matmul"),
    ("text without projection", "text", "matmul"),
]


@pytest.fixture(scope="module")
def written(checkpoint, tmp_path_factory):
    """A tower with its projection as a file, onnx's full check passed: the graph and its path."""
    folder = tmp_path_factory.mktemp("towers")

    @cache
    def write(name, tower):
        graph = tower_graph(checkpoint(name), tower, projection())
        path = folder / f"{name}.onnx".replace(", ", "_")
        write_graph(graph.model, path)
        return graph, path

    return write


@pytest.mark.parametrize(("name", "tower", "fold"), TOWERS)
def test_a_projected_tower_answers_like_torch_in_every_engine(checkpoint, batch, written, name, tower, fold):
    loaded, A = checkpoint(name), projection()
    graph, path = written(name, tower)
    assert graph.fold == fold
    (given,) = onnx.load(path).graph.input
    assert (given.name, given.type.tensor_type.elem_type) == ROWS[tower]
    assert given.type.tensor_type.shape.dim[0].dim_param == "batch"
    rows = batch(loaded) if tower == "image" else loaded.tokenizer(["", "a cat", "two dogs", "x", "y z"])
    raw = loaded.encode_images(rows) if tower == "image" else loaded.encode_texts(rows)
    wanted = unit(raw.astype(np.float64) @ A.A_inv)
    for engine in ("onnxruntime", "openvino"):
        for count in (1, 2, 5):
            got = answers(path, rows[:count], engine)[EMBEDDING]
            assert got.shape == (count, RANK)
            assert np.abs(got - wanted[:count]).max() <= 5e-6


@pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason='TensorRT-RTX is not installed: pip install "invariclip[tensorrt-rtx]"'
)
@pytest.mark.parametrize(("name", "tower", "fold"), TOWERS)
def test_a_projected_tower_builds_with_tensorrt(written, name, tower, fold):
    _, path = written(name, tower)
    shape = onnx.load(path).graph.input[0].type.tensor_type.shape
    assert (tower == "text") == (shape.dim[1].dim_param == "length")
    gate = build_on_cpu(path, longest=16)
    assert gate.engine_bytes > 10_000
    assert gate.seconds > 0
    assert gate.version.startswith("1.")


@pytest.fixture(scope="module")
def left_open(checkpoint):
    return tower_graph(checkpoint("vit"), "image", projection(), projection_as_input=True)


def test_a_projection_as_input_has_a_default_and_takes_another(checkpoint, batch, tmp_path, left_open):
    loaded, path = checkpoint("vit"), tmp_path / "open.onnx"
    assert left_open.fold == "input"
    write_graph(left_open.model, path)
    rows = batch(loaded)
    raw = loaded.encode_images(rows).astype(np.float64)
    given = {"": projection(), "another": projection(seed=1)}
    for name, one in given.items():
        fed = {PROJECTION_INPUT: one.A_inv.astype(np.float32)} if name else {}
        got = answers(path, rows, **fed)[EMBEDDING]
        assert np.abs(got - unit(raw @ one.A_inv)).max() <= 5e-6


def test_a_class_head_stands_behind_any_of_them(checkpoint, batch, tmp_path, left_open):
    loaded, path = checkpoint("vit"), tmp_path / "head.onnx"
    bank = unit(np.random.default_rng(0).normal(size=(3, RANK)))
    model = ir.from_proto(ir.to_proto(left_open.model))
    attach_head(model, bank, loaded.logit_scale, None)
    write_graph(model, path)
    got = answers(path, batch(loaded), outputs=(EMBEDDING, "logits", "probabilities"))
    logits = loaded.logit_scale * got[EMBEDDING].astype(np.float64) @ bank.T
    np.testing.assert_allclose(got["logits"], logits, atol=1e-4)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(got["probabilities"], powers / powers.sum(axis=1, keepdims=True), atol=1e-5)


def test_a_graph_holds_its_own_tower_alone(checkpoint, left_open):
    loaded = checkpoint("vit")
    visual = sum(value.numel() * 4 for value in loaded.module.visual.parameters())
    texts = loaded.module.token_embedding.weight.numel() * 4
    assert visual * 0.9 < weight_bytes(left_open.model) < visual + 50_000 < texts


def test_facts_keep_the_plan_and_let_go_of_the_graph(left_open):
    facts = left_open.facts
    assert (facts.fold, facts.plan) == ("input", left_open.plan)
    assert not hasattr(facts, "model")
    assert facts.applied("normalisation")
    assert not facts.applied("plain-mean")
    assert not facts.applied("no such rewrite")
