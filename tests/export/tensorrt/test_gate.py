"""TensorRT-RTX's own word on the portable graphs, without a GPU: they parse and build; a Resize front does not."""

import importlib.util
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from invariclip.backends import open_backend
from invariclip.errors import ContractError, MissingExtraError
from invariclip.export.graphs.front import add_front
from invariclip.export.graphs.head import attach_head
from invariclip.export.graphs.tower_graph import tower_graph
from invariclip.export.graphs.trace import write_graph
from invariclip.export.tensorrt.gate import build_on_cpu
from invariclip.projection import Projection

needs_tensorrt = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason='TensorRT-RTX is not installed: pip install "invariclip[tensorrt-rtx]"',
)


@pytest.fixture(scope="module")
def tower(checkpoint):
    """A graph whose projection is an input; each call gives a copy of its own."""
    projection = Projection(np.random.default_rng(0).normal(size=(24, 8)), "icm", 2.0)
    made = tower_graph(checkpoint("vit"), "image", projection, projection_as_input=True).model
    return lambda: ir.from_proto(ir.to_proto(made))


def write(model, path):
    """Writes, with onnx's full check; the other two engines take it as well."""
    write_graph(model, path)
    for engine in ("onnxruntime", "openvino"):
        open_backend(engine, path, threads=1)
    return path


@needs_tensorrt
def test_with_classes_and_a_projection_that_can_be_exchanged_it_builds(tower, tmp_path):
    model = tower()
    assert [value.name for value in model.graph.inputs] == ["pixels", "projection"]
    plain = build_on_cpu(write(model, tmp_path / "plain.onnx"))
    attach_head(model, np.eye(3, 8), 100.0, None)
    gate = build_on_cpu(write(model, tmp_path / "head.onnx"))
    assert gate.version == plain.version
    assert gate.engine_bytes > plain.engine_bytes > 10_000


@needs_tensorrt
def test_with_pixels_in_the_graph_it_builds_as_matmul_and_not_as_resize(tower, checkpoint, tmp_path):
    loaded = checkpoint("vit")
    portable, native = tower(), tower()
    add_front(portable, loaded.pixels, "matmul")
    add_front(native, loaded.pixels, "resize")
    path = write(portable, tmp_path / "matmul.onnx")
    shape = onnx.load(path).graph.input[0].type.tensor_type.shape
    assert [size.dim_param for size in shape.dim][:3] == ["batch", "height", "width"]
    assert build_on_cpu(path).engine_bytes > 10_000
    path = tmp_path / "resize.onnx"
    write_graph(native, path)
    with pytest.raises(
        ContractError, match=r"^resize\.onnx: TensorRT-RTX [\d.]+ does not parse it: .*Resize"
    ) as caught:
        build_on_cpu(path)
    assert "\n" not in str(caught.value)


@needs_tensorrt
def test_what_parses_and_cannot_be_built_is_refused(tmp_path):
    """The profile asks for shapes at which a constant of another batch cannot be added."""
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[batch, 4] x) => (float[batch, 4] y) <float[3, 4] w = {0,0,0,0,0,0,0,0,0,0,0,0}> { y = Add (x, w) }"""
    path = tmp_path / "wrong.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    with pytest.raises(ContractError, match=r"^wrong\.onnx: TensorRT-RTX [\d.]+ cannot build it: \S+"):
        build_on_cpu(path)


@needs_tensorrt
def test_a_file_that_is_no_graph_is_refused(tmp_path):
    path = tmp_path / "text.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(ContractError, match=r"^text\.onnx: TensorRT-RTX [\d.]+ does not parse it: "):
        build_on_cpu(path)


def test_without_it_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingExtraError, match=r'^the TensorRT gate .*: pip install "invariclip\[tensorrt-rtx\]"$'):
        build_on_cpu(tmp_path / "x.onnx")


def test_profiles():
    assert _shapes((-1, 224, 224, 3), 77) == [(1, 224, 224, 3), (8, 224, 224, 3), (32, 224, 224, 3)]
    assert _shapes((-1, -1), 77) == [(1, 1), (8, 16), (32, 77)]
    assert _shapes((-1, -1), 7) == [(1, 1), (8, 7), (32, 7)]
    assert _shapes((-1, 64), 77) == [(1, 64), (8, 64), (32, 64)]
    assert _shapes((-1, -1, -1, 3), 77) == [(1, 32, 32, 3), (8, 480, 480, 3), (32, 1024, 1024, 3)]
    assert _shapes((512, 64), 77) == [(512, 64)] * 3
