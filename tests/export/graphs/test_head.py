"""The class head as an edit of a graph, and the projection as an overridable initializer."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.backends import open_backend
from invariclip.errors import ArtifactError, ContractError, InputError
from invariclip.export.graphs import head
from invariclip.export.graphs.trace import ImageTower, part_of, traced
from invariclip.export.graphs.writing import write_graph

WIDTH = 6


def small(name="embedding", scale_name="w"):
    """x [batch, 4] → unit embedding [batch, 6], by hand."""
    rng = np.random.default_rng(3)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", 4]))
    weight = ir.tensor(rng.normal(size=(4, WIDTH)).astype(np.float32), name=scale_name)
    w = ir.Value(name=scale_name, type=ir.TensorType(weight.dtype), shape=weight.shape, const_value=weight)
    raw = ir.node("MatMul", [x, w])
    unit = ir.node("LpNormalization", raw.outputs, {"axis": -1, "p": 2})
    (embedding,) = unit.outputs
    embedding.name, embedding.shape = name, ir.Shape(["batch", WIDTH])
    embedding.type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [embedding], nodes=[raw, unit], initializers=[w], opset_imports={"": 20}, name="small")
    return ir.Model(graph, ir_version=10)


def unit_rows(rows, seed=0, width=WIDTH):
    bank = np.random.default_rng(seed).normal(size=(rows, width))
    return bank / np.linalg.norm(bank, axis=1, keepdims=True)


def answers(model, **inputs):
    """Checks the graph in full and runs it in ONNX Runtime."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([item.name for item in session.get_outputs()], session.run(None, inputs), strict=True))


def formula(embedding, bank, scale, bias):
    logits = scale * embedding.astype(np.float64) @ bank.T + (bias or 0.0)
    if bias is not None:
        return logits, 1 / (1 + np.exp(-logits))
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return logits, powers / powers.sum(axis=1, keepdims=True)


@settings(max_examples=25, deadline=None)
@given(
    classes=st.integers(1, 40),
    rows=st.integers(1, 5),
    scale=st.floats(0.1, 100),
    bias=st.none() | st.floats(-20, 20),
    seed=st.integers(0, 99),
)
def test_the_head_is_the_formula(classes, rows, scale, bias, seed):
    model, bank = small(), unit_rows(classes, seed)
    head.attach_head(model, bank, scale, bias)
    got = answers(model, x=np.random.default_rng(seed).normal(size=(rows, 4)).astype(np.float32))
    assert list(got) == ["embedding", "logits", "probabilities"]
    logits, wanted = formula(got["embedding"], bank, scale, bias)
    np.testing.assert_allclose(got["logits"], logits, atol=2e-6 * max(scale, 1) + 2e-6 * abs(bias or 0))
    np.testing.assert_allclose(got["probabilities"], wanted, atol=1e-6 * max(scale, 1))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_weak_classes_of_a_sigmoid_keep_their_order(tmp_path, engine):
    """Scale and bias as published for SigLIP SO400M; ONNX Runtime's own Sigmoid gives all of these one value."""
    model, bank, scale, bias = small(), unit_rows(30), 112.67, -16.55
    head.attach_head(model, bank, scale, bias)
    onnx.save(ir.to_proto(model), tmp_path / "x.onnx")
    x = np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32)
    got = open_backend(engine, tmp_path / "x.onnx", threads=1).run({"x": x})
    logits, wanted = formula(got["embedding"], bank, scale, bias)
    kept = (logits > -80) & (logits < 15)
    assert kept.mean() > 0.5
    assert (logits < -30).mean() > 0.2
    np.testing.assert_allclose(got["probabilities"][kept], wanted[kept], rtol=2e-4)
    for row, probabilities, shown in zip(logits, got["probabilities"], kept, strict=True):
        apart = np.abs(np.subtract.outer(row, row)) > 1e-3
        order = np.sign(np.subtract.outer(row, row)) == np.sign(np.subtract.outer(probabilities, probabilities))
        assert order[apart & shown & shown[:, None]].all()


@settings(max_examples=15, deadline=None)
@given(heads=st.lists(st.none() | st.tuples(st.integers(1, 9), st.none() | st.floats(-5, 5)), max_size=4))
def test_a_head_leaves_no_trace_and_the_last_one_counts(heads):
    model, plain = small(), ir.to_proto(small())
    x = np.ones((2, 4), np.float32)
    before = answers(small(), x=x)["embedding"]
    for item in heads:
        head.attach_head(model, None if item is None else unit_rows(item[0]), 3.0, None if item is None else item[1])
    last = heads[-1] if heads else None
    got = answers(model, x=x)
    np.testing.assert_array_equal(got["embedding"], before)
    assert ("logits" in got) == (last is not None)
    if last is not None:
        assert got["probabilities"].shape == (2, last[0])
        assert ("logit_bias" in model.graph.initializers) == (last[1] is not None)
        assert len(model.graph) == len(small().graph) + (3 if last[1] is None else 10)
    head.attach_head(model, None, 1.0, None)
    assert ir.to_proto(model) == plain


def test_names_and_shapes_are_the_documented_ones():
    model = small()
    head.attach_head(model, unit_rows(3), 2.5, -1.0)
    weights = {name: model.graph.initializers[name].const_value.numpy() for name in ("class_bank", "logit_scale")}
    assert (weights["class_bank"].dtype, weights["class_bank"].shape) == (np.float32, (WIDTH, 3))
    assert (weights["logit_scale"].shape, float(weights["logit_scale"])) == ((), 2.5)
    dims = [[dim.dim_param or dim.dim_value for dim in output.type.tensor_type.shape.dim]
            for output in ir.to_proto(model).graph.output]  # fmt: skip
    assert dims == [["batch", WIDTH], ["batch", 3], ["batch", 3]]


def test_a_weight_that_bears_the_name_already_makes_way():
    model = small(scale_name="class_bank")
    x = np.ones((1, 4), np.float32)
    before = answers(small(), x=x)["embedding"]
    head.attach_head(model, unit_rows(3), 2.5, None)
    np.testing.assert_array_equal(answers(model, x=x)["embedding"], before)


@pytest.mark.parametrize(
    "bank", [unit_rows(3, width=5), np.zeros((0, WIDTH)), np.zeros(WIDTH), np.full((2, WIDTH), np.nan)]
)
def test_a_bank_that_does_not_fit_changes_nothing(bank):
    model = small()
    with pytest.raises(InputError, match="class bank"):
        head.attach_head(model, bank, 1.0, None)
    assert ir.to_proto(model) == ir.to_proto(small())


def test_a_bank_is_bounded(monkeypatch):
    monkeypatch.setattr(head, "MAX_BANK_BYTES", 100)
    with pytest.raises(InputError, match="bytes is above 100; bake in fewer classes"):
        head.attach_head(small(), unit_rows(9), 1.0, None)


def test_graphs_that_no_head_fits_are_refused():
    with pytest.raises(ArtifactError, match="'embedding'; the graph answers: vector"):
        head.attach_head(small("vector"), unit_rows(3), 1.0, None)
    model = small()
    (embedding,) = model.graph.outputs
    extra = ir.node("Neg", [embedding])
    extra.outputs[0].name, extra.outputs[0].type = "distance", ir.TensorType(ir.DataType.FLOAT)
    model.graph.append(extra)
    model.graph.outputs.append(extra.outputs[0])
    with pytest.raises(ArtifactError, match="the graph answers distance from the embedding"):
        head.attach_head(model, unit_rows(3), 1.0, None)


@pytest.fixture(scope="module")
def unfolded(checkpoint, tmp_path_factory):
    """The tiny ViT's image tower with an explicit projection [24, 8] and no classes, traced."""
    loaded, path = checkpoint("vit"), tmp_path_factory.mktemp("unfolded") / "image.onnx"
    matrix = torch.from_numpy(np.random.default_rng(1).normal(size=(24, 8))).float()
    tower = ImageTower(part_of(loaded.module, "image"), loaded.pixels, matrix)
    example = torch.zeros((2, *loaded.pixels.image_size, 3), dtype=torch.uint8)
    write_graph(traced(tower, example, input_name="pixels", output_name="embedding"), path)
    return path


@pytest.mark.parametrize("bias", [None, -10.0])
def test_on_a_real_tower_it_computes_what_torch_computes(unfolded, checkpoint, batch, bias):
    model, bank, scale = ir.load(unfolded), unit_rows(3, width=8), checkpoint("vit").logit_scale
    head.attach_head(model, bank, scale, bias)
    got = answers(model, pixels=batch(checkpoint("vit")))
    logits = torch.from_numpy(got["embedding"]) @ torch.from_numpy(bank.T.copy()).float() * scale
    wanted = logits.softmax(dim=-1) if bias is None else (logits + bias).sigmoid()
    np.testing.assert_allclose(got["probabilities"], wanted.numpy(), atol=1e-6)


def test_the_projection_becomes_an_input_with_a_default(unfolded, checkpoint, batch):
    model, images = ir.load(unfolded), batch(checkpoint("vit"))
    before = answers(ir.load(unfolded), pixels=images)["embedding"]
    head.expose_projection(model)
    head.expose_projection(model)  # twice is once
    assert [value.name for value in model.graph.inputs] == ["pixels", "projection"]
    np.testing.assert_allclose(answers(model, pixels=images)["embedding"], before, atol=1e-6)
    other = np.random.default_rng(2).normal(size=(24, 8))
    wanted = checkpoint("vit").encode_images(images).astype(np.float64) @ other
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    got = answers(model, pixels=images, projection=other.astype(np.float32))["embedding"]
    assert np.abs(got - wanted).max() <= 1e-6
    assert np.abs(got - before).max() > 0.1


def test_a_folded_graph_has_no_projection_to_expose():
    with pytest.raises(ContractError, match="no MatMul takes the projection alone"):
        head.expose_projection(small())
    shared = small(scale_name="matrix")
    again = ir.node("MatMul", [shared.graph.inputs[0], shared.graph.initializers["matrix"]])
    shared.graph.append(again)
    with pytest.raises(ContractError, match="no MatMul takes the projection alone"):
        head.expose_projection(shared)
