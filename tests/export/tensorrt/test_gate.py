"""TensorRT-RTX's own word, without a GPU: what ships parses and builds in every precision; a Resize front does not."""

import importlib.util
import sys
from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from invariclip.artifact.projection import Projection
from invariclip.backends import open_backend
from invariclip.errors import ContractError, MissingExtraError
from invariclip.export.checkpoints.checkpoint import load_checkpoint
from invariclip.export.graphs.front import add_front
from invariclip.export.graphs.head import attach_head
from invariclip.export.graphs.tower_graph import tower_graph
from invariclip.export.graphs.writing import write_graph
from invariclip.export.quantization.float16 import to_float16
from invariclip.export.quantization.products import products_of
from invariclip.export.quantization.qdq import QuantizationRecipe, quantise, ranges_of, rounded, to_symmetric
from invariclip.export.quantization.ranges import flows_of
from invariclip.export.tensorrt.engines import build_on_cpu

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


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A real architecture's image or text tower, of first and last blocks, in a precision: its file."""
    folder = tmp_path_factory.mktemp("real")

    @cache
    def short(name):
        return load_checkpoint(name, allow_random=True, short=True)

    @cache
    def whole(name, tower):
        loaded = short(name)
        model = tower_graph(loaded, tower).model
        if tower == "image":
            bank = np.random.default_rng(0).normal(size=(5, loaded.module.visual.output_dim))
            attach_head(model, bank / np.linalg.norm(bank, axis=1, keepdims=True), 100.0, None)
        return ir.to_proto(model)

    def of(name, tower, precision):
        model = ir.from_proto(whole(name, tower))
        if precision == "float16":
            to_float16(model)
        elif precision == "int8":
            quantised(model)
            to_symmetric(model)
            to_float16(model)
        path = folder / f"{name}.{tower}.{precision}.onnx"
        write_graph(model, path)
        return path

    return of


def quantised(model):
    """Every product in int8, its ranges from two images of noise."""
    sites = products_of(model)
    rng = np.random.default_rng(0)
    flows = flows_of(model, sites, [rng.integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)], threads=2)
    recipe = QuantizationRecipe(compensate=False)
    weights = rounded(model, sites, flows, recipe)
    quantise(model, sites, ranges_of(model, sites, flows, weights, clip=False), weights)


@needs_tensorrt
@pytest.mark.parametrize(
    ("name", "tower", "precision"),
    [
        (name, tower, precision)
        for name, tower in (("ViT-B-32", "image"), ("ViT-B-32", "text"), ("RN50", "image"))
        for precision in ("float32", "float16", "int8")
        if (tower, precision) != ("text", "int8")  # no variant has its text tower in int8
    ],
)
def test_real_towers_build_in_every_precision(real, name, tower, precision):
    path = real(name, tower, precision)
    gate = build_on_cpu(path)
    assert gate.precision == precision
    assert gate.engine_bytes > path.stat().st_size / 4


@needs_tensorrt
def test_uint8_levels_are_refused_with_the_variant_that_has_none(tmp_path):
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float[batch, 4] x) => (float[batch, 4] y)
    <float s = {0.1}, uint8 o = {7}, int8[4, 4] w = {1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}, int8 z = {0}> {
        q = QuantizeLinear (x, s, o) d = DequantizeLinear (q, s, o) u = DequantizeLinear (w, s, z) y = MatMul (d, u)
    }"""
    path = tmp_path / "unsigned.onnx"
    model = ir.from_proto(onnx.parser.parse_model(text))
    write_graph(model, path)
    with pytest.raises(ContractError, match=r"^unsigned\.onnx: holds uint8 levels .*--variant int8-symmetric$"):
        build_on_cpu(path)
    to_symmetric(model)
    write_graph(model, path)
    assert build_on_cpu(path).precision == "int8"
