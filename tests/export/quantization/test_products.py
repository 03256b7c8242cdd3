"""Convolutions as products of windows, against the engine; and int8 of a small convolutional tower."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.export.graphs.writing import write_graph
from invariclip.export.quantization.products import ConvWindow, flops, matrix, products_of, window_of
from invariclip.export.quantization.qdq import QuantizationRecipe, quantise, ranges_of, rounded, smoothable
from invariclip.export.quantization.ranges import flows_of


def conv_graph(weights, *, bias=None, size=(11, 13), **attributes):
    """planes [N, C, H, W] → Conv → out."""
    info = onnx.helper.make_tensor_value_info
    given_ = ["planes", "w"] + ([] if bias is None else ["b"])
    node = onnx.helper.make_node("Conv", given_, ["out"], name="conv", **attributes)
    held = [onnx.numpy_helper.from_array(weights, "w")]
    held += [] if bias is None else [onnx.numpy_helper.from_array(bias, "b")]
    graph = onnx.helper.make_graph(
        [node], "conv", [info("planes", 1, ["n", weights.shape[1], *size])], [info("out", 1, None)], held
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


@settings(deadline=None, max_examples=40)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)), strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*[st.integers(0, 2)] * 4), dilations=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)  # fmt: skip
def test_windows_times_the_matrix_are_the_convolution(kernel, strides, pads, dilations):
    rng = np.random.default_rng(0)
    planes = rng.normal(size=(2, 3, 11, 13)).astype(np.float32)
    weights = rng.normal(size=(500, 3, *kernel)).astype(np.float32)
    proto = conv_graph(weights, strides=strides, pads=pads, dilations=dilations)
    wanted = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"planes": planes})[0]
    model = ir.from_proto(proto)
    sites = products_of(model)
    assert bool(sites) == (weights.size >= 4096)
    window = ConvWindow(kernel, strides, pads, dilations)
    assert window_of(model.graph[0]) == window
    rows = window.rows(planes)
    got = rows @ weights.reshape(500, -1).T
    np.testing.assert_allclose(got.reshape(2, -1, 500).transpose(0, 2, 1), wanted.reshape(2, 500, -1), atol=1e-4)
    some = window.rows(planes, most=4)
    assert 0 < len(some) <= len(rows)
    assert {row.tobytes() for row in some} <= {row.tobytes() for row in rows}


@pytest.mark.parametrize("attributes", [{"group": 2}, {"auto_pad": "SAME_UPPER"}])
def test_what_int8_leaves_alone(attributes):
    weights = np.ones((64, 64 // attributes.get("group", 1), 3, 3), np.float32)
    proto = conv_graph(weights, **attributes)
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 64
    assert products_of(ir.from_proto(proto)) == []


def net(rng):
    """pixels → conv (ReLU) → conv, and a shortcut of one by one beside it → mean: a residual block."""
    info = onnx.helper.make_tensor_value_info
    numbers = {
        "stem": rng.normal(size=(64, 3, 7, 7)) / 500, "stem_b": rng.normal(size=64) / 10,
        "one": rng.normal(size=(64, 64, 3, 3)) / 20, "two": rng.normal(size=(64, 64, 3, 3)) / 20,
        "side": rng.normal(size=(64, 64, 1, 1)) / 8, "two_b": rng.normal(size=64) / 10,
    }  # fmt: skip
    make = onnx.helper.make_node
    nodes = [
        make("Cast", ["pixels"], ["floats"], to=1),
        make("Transpose", ["floats"], ["planes"], perm=[0, 3, 1, 2]),
        make("Conv", ["planes", "stem", "stem_b"], ["a"], name="conv_stem", strides=[2, 2], pads=[3] * 4),
        make("Relu", ["a"], ["b"]),
        make("Conv", ["b", "one"], ["c"], name="conv_one", strides=[2, 2], pads=[1] * 4),
        make("Relu", ["c"], ["d"]),
        make("Conv", ["d", "two", "two_b"], ["e"], name="conv_two", pads=[1] * 4),
        make("Conv", ["b", "side"], ["f"], name="conv_side", strides=[2, 2]),
        make("Add", ["e", "f"], ["g"]),
        make("ReduceMean", ["g", "axes"], ["embedding"], keepdims=0),
    ]
    held = [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in numbers.items()]
    held.append(onnx.numpy_helper.from_array(np.array([2, 3]), "axes"))
    pixels, embedding = info("pixels", onnx.TensorProto.UINT8, ["n", 32, 32, 3]), info("embedding", 1, ["n", 64])
    graph = onnx.helper.make_graph(nodes, "net", [pixels], [embedding], held)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def waves(rng, count):
    """Images whose neighbouring pixels are alike, as those of photographs are."""
    y, x = np.mgrid[0:32, 0:32]
    slopes = rng.normal(size=(count, 2, 3)) / 4
    turns = y[None, ..., None] * slopes[:, None, None, 0] + x[None, ..., None] * slopes[:, None, None, 1]
    return (127 + 120 * np.sin(turns + rng.uniform(0, 6, (count, 1, 1, 3)))).astype(np.uint8)


def answers(model, path, batch):
    write_graph(model, path)
    return onnxruntime.InferenceSession(str(path)).run(["embedding"], {"pixels": batch})[0]


@pytest.mark.parametrize("clip", [False, True])
def test_a_convolutional_tower_in_int8(tmp_path, clip):
    seen, asked = waves(np.random.default_rng(1), 24), waves(np.random.default_rng(2), 16)
    wanted = answers(net(np.random.default_rng(0)), tmp_path / "float.onnx", asked)
    found = {}
    for compensate in (False, True):
        model = net(np.random.default_rng(0))
        sites = products_of(model)
        assert [site.node for site in sites] == ["conv_stem", "conv_one", "conv_two", "conv_side"]
        assert smoothable(model, sites) == []
        assert flops(model, sites[1]) == 64 * 64 * 9 * 8 * 8
        assert matrix(model, sites[3]).shape == (64, 64)
        flows = flows_of(model, sites, [seen[:12], seen[12:]], threads=1)
        assert len(flows) == 4  # two of one value, which see it through different windows
        weights = rounded(model, sites, flows, QuantizationRecipe(compensate=compensate))
        quantise(model, sites, ranges_of(model, sites, flows, weights, clip=clip), weights)
        got = answers(model, tmp_path / "int8.onnx", asked)
        found[compensate] = float(((got - wanted) ** 2).mean() / ((wanted - wanted.mean(axis=0)) ** 2).mean())
    kinds = [node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node]
    assert (kinds.count("QuantizeLinear"), kinds.count("DequantizeLinear")) == (3, 7)
    assert 0 < found[True] < 2e-3
    assert found[True] < found[False]
