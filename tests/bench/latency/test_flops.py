"""Operations counted from a graph's shapes, against counts done by hand."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from invariclip.bench.latency.flops import graph_flops
from invariclip.errors import InputError
from invariclip.export.checkpoints.checkpoint import load_checkpoint
from invariclip.export.graphs.tower_graph import tower_graph
from invariclip.export.graphs.writing import write_graph


def saved(tmp_path, nodes, weights, given, answer):
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, given)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, answer)]
    tensors = [numpy_helper.from_array(np.zeros(shape, np.float32), name) for name, shape in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    path = tmp_path / "g.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize("batch", [1, 3])
def test_products_counted_by_hand(tmp_path, batch):
    matmul = helper.make_node("MatMul", ["x", "w"], ["y"])
    assert graph_flops(saved(tmp_path, [matmul], {"w": (7, 5)}, ["n", 7], ["n", 5]), batch) == 2 * batch * 7 * 5
    gemm = helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
    assert graph_flops(saved(tmp_path, [gemm], {"w": (5, 7)}, ["n", 7], ["n", 5]), batch) == 2 * batch * 7 * 5
    conv = helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2], group=2)
    # each of 6×4×4 answers meets 4/2 channels of 3×3
    path = saved(tmp_path, [conv], {"w": (6, 2, 3, 3)}, ["n", 4, 9, 9], ["n", 6, 4, 4])
    assert graph_flops(path, batch) == 2 * batch * 6 * 4 * 4 * 2 * 3 * 3


def test_large_weights_need_not_be_read(tmp_path):
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    assert graph_flops(saved(tmp_path, [node], {"w": (64, 100)}, ["n", 64], ["n", 100]), 1) == 2 * 64 * 100


def test_a_whole_tower(tiny_checkpoint, tmp_path):
    write_graph(tower_graph(load_checkpoint(str(tiny_checkpoint)), "image", rewrites=()).model, tmp_path / "t.onnx")
    width, tokens, patch, embed = 64, 17, 8, 24
    block = 12 * width * width * tokens + 2 * width * tokens * tokens  # four linear layers, two attention products
    by_hand = 2 * (2 * block + 16 * width * 3 * patch * patch + width * embed)
    assert graph_flops(tmp_path / "t.onnx", 1) == by_hand
    assert graph_flops(tmp_path / "t.onnx", 8) == 8 * by_hand


def test_a_shape_that_cannot_be_known_is_named(tmp_path):
    nodes = [helper.make_node("NonZero", ["x"], ["i"]), helper.make_node("Cast", ["i"], ["f"], to=1)]
    nodes.append(helper.make_node("MatMul", ["f", "w"], ["y"]))
    with pytest.raises(InputError, match="MatMul y: the shape of f cannot be found out"):
        graph_flops(saved(tmp_path, nodes, {"w": (7, 5)}, ["n", 7], [None, 5]), 1)
    with pytest.raises(InputError, match="batch must be at least 1"):
        graph_flops(tmp_path / "g.onnx", 0)


def test_a_shape_that_is_computed_on_the_way_is_taken_from_the_file(tmp_path):
    info = onnx.helper.make_tensor_value_info
    make = onnx.helper.make_node
    held = [
        onnx.numpy_helper.from_array(np.ones((12, 5), np.float32), "w"),
        onnx.numpy_helper.from_array(np.array([6.0], np.float32), "half"),
    ]
    nodes = [
        make("Shape", ["x"], ["sides"], start=0, end=1),
        make("Cast", ["half"], ["six"], to=onnx.TensorProto.INT64),
        make("Add", ["six", "six"], ["twelve"]),
        make("Concat", ["sides", "twelve"], ["target"], axis=0),
        make("Reshape", ["x", "target"], ["view"]),
        make("Gemm", ["view", "w"], ["y"]),
    ]
    graph = onnx.helper.make_graph(nodes, "g", [info("x", 1, ["n", 3, 4])], [info("y", 1, None)], held)
    graph.value_info.append(info("view", 1, ["n", 12]))
    graph.output[0].CopyFrom(info("y", 1, ["n", 5]))
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10),
        tmp_path / "g.onnx",
    )
    assert graph_flops(tmp_path / "g.onnx", 7) == 2 * 7 * 12 * 5
