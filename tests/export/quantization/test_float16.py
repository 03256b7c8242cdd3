"""float16 with float32 islands: what stays float32, that inputs and outputs do, and how close the answers are."""

from itertools import pairwise

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from invariclip.artifact.projection import Projection
from invariclip.backends import open_backend
from invariclip.errors import ContractError
from invariclip.export.graphs.head import attach_head
from invariclip.export.graphs.tower_graph import tower_graph
from invariclip.export.graphs.writing import write_graph
from invariclip.export.quantization.float16 import ACTIVATIONS, LADDER, NORMS, SUMS, to_float16

HALF, WHOLE = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
PROJECTION = Projection(np.random.default_rng(0).normal(size=(24, 8)), "icm", 2.0)


@pytest.fixture(scope="module")
def tower(kind):
    """A tower's graph with classes; a copy of its own at each call."""
    made = {}

    def of(name, which="image", **how):
        key = (name, which, repr(how))
        if key not in made:
            model = tower_graph(kind(name), which, PROJECTION, **how).model
            if which == "image":
                bank = np.random.default_rng(1).normal(size=(3, 8))
                attach_head(model, bank / np.linalg.norm(bank, axis=1, keepdims=True), 100.0, None)
            made[key] = ir.to_proto(model)
        return ir.from_proto(made[key])

    return of


def typed(model):
    """The graph as onnx's own inference types it: name to element type."""
    inferred = onnx.shape_inference.infer_shapes(ir.to_proto(model), strict_mode=True)
    graph = inferred.graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output, *graph.input)}
    return graph, {**types, **{item.name: item.data_type for item in graph.initializer}}


def feed(checkpoint, which, rows=4):
    if which == "text":
        return {"input_ids": checkpoint.tokenizer(["a cat", "two dogs", "", "x y z"][:rows])}
    shape = (rows, *checkpoint.pixels.image_size, 3)
    return {"pixels": np.random.default_rng(2).integers(0, 256, shape, dtype=np.uint8)}


TOWERS = [("clip", "image"), ("clip", "text"), ("resnet", "image"), ("quick", "image"), ("mean", "text")]


@pytest.mark.parametrize(("name", "which"), TOWERS)
def test_islands_stay_float32_and_everything_else_is_half(tower, name, which):
    model = tower(name, which)
    before = [(value.name, value.dtype) for value in (*model.graph.inputs, *model.graph.outputs)]
    islands = to_float16(model)
    assert [(value.name, value.dtype) for value in (*model.graph.inputs, *model.graph.outputs)] == before
    graph, types = typed(model)  # strict: a sum of two types does not pass
    for node in graph.node:
        if node.op_type in NORMS:
            assert {types[value] for value in (*node.input, *node.output) if value} <= {WHOLE, onnx.TensorProto.INT64}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    whole = [node for node in products if types[node.output[0]] == WHOLE]
    assert len(whole) == (1 if which == "image" else 0)  # the class head
    assert sum(islands.halved.get(kind, 0) for kind in ("MatMul", "Gemm", "Conv")) == len(products) - len(whole)
    assert islands.kept["ReduceL2"] == 1
    assert islands.casts == sum(node.op_type == "Cast" for node in graph.node) - (which == "image")


@pytest.mark.parametrize(("name", "which"), TOWERS)
def test_it_answers_like_the_float32_graph(tower, kind, tmp_path, name, which):
    checkpoint = kind(name)
    write_graph(tower(name, which), tmp_path / "whole.onnx")
    inputs = feed(checkpoint, which)
    wanted = open_backend("onnxruntime", tmp_path / "whole.onnx", threads=1).run(inputs)
    for step, (_, keep) in enumerate(LADDER):
        model = tower(name, which)
        to_float16(model, keep)
        path = tmp_path / f"half-{step}.onnx"
        write_graph(model, path)
        got = open_backend("onnxruntime", path, threads=1).run(inputs)
        cosines = (got["embedding"].astype(np.float64) * wanted["embedding"]).sum(axis=1)
        assert cosines.min() > 0.9999
        assert np.abs(got["embedding"] - wanted["embedding"]).max() > 0  # something was rounded
        assert got["embedding"].dtype == np.float32
        if which == "image":
            assert np.abs(got["probabilities"].sum(axis=1) - 1).max() < 1e-5


def test_the_ladder_goes_up():
    steps = [keep for _, keep in LADDER]
    assert steps[0] == NORMS
    assert all(lower < upper for lower, upper in pairwise(steps))
    assert not (steps[-1] & {"MatMul", "Gemm", "Conv"})
    for one, other in ((NORMS, SUMS), (SUMS, ACTIVATIONS), (NORMS, ACTIVATIONS)):
        assert not one & other


def test_a_projection_that_is_exchanged_keeps_its_type(tower):
    model = tower("clip", "image", projection_as_input=True)
    to_float16(model)
    value = next(value for value in model.graph.inputs if value.name == "projection")
    assert value.dtype == ir.DataType.FLOAT
    (use,) = value.uses()
    assert use.node.op_type == "MatMul"
    assert use.node.outputs[0].dtype == ir.DataType.FLOAT


def graph_of(text):
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {text}'))


def test_a_constant_beyond_float16_stays_and_infinity_does_not_matter():
    model = graph_of(
        """
        g (float[n, 2] x) => (float[n, 2] y) <float[2] big = {70000.0, 1.0}, float[2] mask = {-inf, 0.0}> {
            a = Mul (x, big)
            y = Add (a, mask)
        }""".replace("-inf", "0.0")
    )
    mask = model.graph.initializers["mask"]
    mask.const_value = ir.tensor(np.array([-np.inf, 0], np.float32), name="mask")
    islands = to_float16(model)
    assert (islands.halved, islands.kept) == ({"Add": 1}, {"Mul": 1})
    _, types = typed(model)
    assert (types["big"], types["mask_float16"], types["y"]) == (WHOLE, HALF, WHOLE)
    assert "mask" not in model.graph.initializers


def test_a_value_read_on_both_sides_is_cast_once_each_way():
    model = graph_of("""
        g (float[n, 4] x) => (float[n, 4] y, float[n, 4] z) {
            a = Relu (x)
            b = Softmax (a)
            c = Softmax (a)
            d = Add (b, a)
            y = Mul (d, c)
            z = Relu (a)
        }""")
    islands = to_float16(model)
    assert islands.kept == {"Softmax": 2}
    graph, types = typed(model)
    casts = [(node.input[0], node.output[0]) for node in graph.node if node.op_type == "Cast"]
    assert len(casts) == len({source for source, _ in casts}) == islands.casts
    assert (types["y"], types["z"]) == (WHOLE, WHOLE)
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    import onnxruntime

    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    y, z = session.run(["y", "z"], {"x": x})
    a = np.maximum(x, 0)
    soft = np.exp(a) / np.exp(a).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(y, (soft + a) * soft, atol=2e-3)
    np.testing.assert_allclose(z, a, atol=2e-3)


def test_scales_too_fine_for_float16_keep_their_product_and_its_operands_whole():
    model = graph_of("""
        g (float[n, 2] x) => (float[n, 2] y) <
            float s = {0.1}, int8 o = {0}, int8[2, 2] w = {1, 2, 3, 4}, int8[2] z = {0, 0},
            float[2] fine = {0.00001, 0.1}, float[2] coarse = {0.1, 0.1}
        > {
            q = QuantizeLinear (x, s, o)
            d = DequantizeLinear (q, s, o)
            u = DequantizeLinear <axis = 1> (w, fine, z)
            a = MatMul (d, u)
            q2 = QuantizeLinear (a, s, o)
            d2 = DequantizeLinear (q2, s, o)
            v = DequantizeLinear <axis = 1> (w, coarse, z)
            y = MatMul (d2, v)
        }""")
    islands = to_float16(model)
    _, types = typed(model)
    assert (types["d"], types["u"], types["a"]) == (WHOLE, WHOLE, WHOLE)
    assert (types["d2"], types["v"]) == (HALF, HALF)
    assert islands.halved["MatMul"] == islands.kept["MatMul"] == 1


def test_a_graph_with_nothing_to_halve_is_refused():
    with pytest.raises(ContractError, match="no node of it can compute in float16"):
        to_float16(graph_of("g (int64[n] x) => (int64[n] y) { y = Add (x, x) }"))


def test_weights_are_rounded_to_the_nearest_half(tower):
    model = tower("clip")
    weights = {value.name: value.const_value.numpy().copy() for value in model.graph.initializers.values()}
    to_float16(model)
    halves = [item for item in ir.to_proto(model).graph.initializer if item.data_type == HALF]
    assert len(halves) > 10
    for item in halves:
        original = weights[item.name.removesuffix("_float16")]
        assert np.array_equal(numpy_helper.to_array(item), original.astype(np.float16))
