"""A patch convolution written as a product: the same answers, only where it is one, and bytes as they are in int8."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.export.graphs.rewrites import Subject
from invariclip.export.graphs.rewrites.plan import require_held, rewrite_graph
from invariclip.export.graphs.rewrites.stem import PATCHES, patches_as_bytes
from invariclip.export.quantization.products import products_of
from invariclip.export.quantization.qdq import QuantizationRecipe, quantise, ranges_of, rounded
from invariclip.export.quantization.ranges import flows_of
from invariclip.preprocessing.pixels import PixelSpec

WIDTH = 64
FRONT = """
  floats = Cast <to = 1> (pixels)
  turned = Transpose <perm = [0, 3, 1, 2]> (floats)
  centred = Sub (turned, mean)
  normal = Div (centred, std)
"""
TOKENS = "flat = Reshape (planes, to_tokens)\n tokens = Transpose <perm = [0, 2, 1]> (flat)\n embedding = Neg (tokens)"


def graph(rows=2, columns=3, high=6, wide=8, *, bias=True, stem=None, end=TOKENS):
    """uint8 pixels → normalised → a patch convolution → tokens [N, rows · columns, WIDTH]."""
    bias_name = ", b" if bias else ""
    conv = f"planes = Conv <kernel_shape = [{high}, {wide}], strides = [{high}, {wide}]> (normal, w{bias_name})"
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
    g (uint8[batch, {rows * high}, {columns * wide}, 3] pixels) => (float[batch, p, q] embedding)
    {{ {FRONT} {stem or conv} {end} }}"""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    values = {
        "w": rng.normal(size=(WIDTH, 3, high, wide)) / 100, "b": rng.normal(size=WIDTH),
        "mean": np.reshape([122.0, 116.0, 104.0], (3, 1, 1)), "std": np.reshape([70.0, 66.0, 71.0], (3, 1, 1)),
    }  # fmt: skip
    used = {name for node in proto.graph.node for name in node.input}
    for name, value in values.items():
        if name in used:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(value.astype(np.float32), name))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, WIDTH, -1]), "to_tokens"))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def subject(mean=(0.48, 0.46, 0.41)):
    return Subject("image", None, PixelSpec((12, 24), mean, (0.27, 0.26, 0.28)))


def rewritten(model):
    what = subject()
    steps = {step.name: step for step in rewrite_graph(model, what, ("normalisation", "patch-product"))}
    require_held(model, what)
    return steps["patch-product"]


def run(model, batch):
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["embedding"], {"pixels": batch})[0]


def images(rows=2, columns=3, high=6, wide=8, count=5):
    return np.random.default_rng(1).integers(0, 256, (count, rows * high, columns * wide, 3), dtype=np.uint8)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_a_patch_convolution_answers_the_same_as_a_product(rows, columns, high, wide, bias):
    sizes = (rows, columns, high, wide)
    wanted = run(graph(*sizes, bias=bias), images(*sizes))
    model = graph(*sizes, bias=bias)
    step = rewritten(model)
    assert (step.applied, step.detail) == (
        True, f"{rows * columns} patches of {high * wide * 3} numbers, less 115, times a matrix"
    )  # fmt: skip
    assert not {"Conv", "Div"} & {node.op_type for node in model.graph}
    np.testing.assert_allclose(run(model, images(*sizes)), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


KERNEL = "kernel_shape = [6, 8]"
NOT_PATCHES = {
    "overlapping": (
        f"planes = Conv <{KERNEL}, strides = [3, 4]> (normal, w, b)", TOKENS, "overlaps, pads or is grouped",
    ),
    "dilated": (
        f"planes = Conv <{KERNEL}, strides = [6, 8], dilations = [2, 1]> (normal, w, b)", TOKENS, "overlaps, pads",
    ),
    "with a rest": (
        # strides of the kernel, but what follows is read as planes
        f"planes = Conv <{KERNEL}, strides = [6, 8]> (normal, w, b)",
        "flat = Reshape (planes, to_tokens)\n embedding = Relu (flat)",
        "is not flattened into tokens",
    ),
    "read twice": (
        f"planes = Conv <{KERNEL}, strides = [6, 8]> (normal, w, b)",
        "other = Relu (planes)\n sum = Add (planes, other)\n flat = Reshape (sum, to_tokens)\n"
        "embedding = Transpose <perm = [0, 2, 1]> (flat)",
        "is not flattened into tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_PATCHES)
def test_what_is_no_patch_embedding_stays(kind):
    stem, end, reason = NOT_PATCHES[kind]
    model = graph(stem=stem, end=end)
    wanted = run(graph(stem=stem, end=end), images())
    step = rewritten(model)
    assert not step.applied
    assert reason in step.detail
    np.testing.assert_allclose(run(model, images()), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def int8(model, seen):
    sites = products_of(model)
    flows = flows_of(model, sites, [seen], threads=1)
    weights = rounded(model, sites, flows, QuantizationRecipe())
    ranges = ranges_of(model, sites, flows, weights, clip=True)
    assert ranges == {PATCHES: (-115.0, 140.0)}  # whatever was seen: a level for every byte
    quantise(model, sites, ranges, weights)
    return weights[sites[0].node]


def test_int8_takes_pixels_as_they_are():
    model, dim = graph(), images(count=20) // 3
    rewritten(model)
    held = int8(model, dim)
    kinds = [node.op_type for node in model.graph]
    assert kinds == ["Reshape", "Transpose", "Reshape", "DequantizeLinear", "DequantizeLinear", "MatMul", "Add", "Neg"]
    # the weights are all that is rounded: against whole numbers in float64
    levels = images().reshape(5, 2, 6, 3, 24).transpose(0, 1, 3, 2, 4).reshape(5, 6, 144).astype(np.float64) - 115
    bias = next(value for name, value in model.graph.initializers.items() if name == "patch_bias").const_value.numpy()
    wanted = -levels @ (held.levels * held.scales.astype(np.float64)) - bias
    np.testing.assert_allclose(run(model, images()), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_floats_from_a_front_are_rounded_to_the_same_levels():
    model = graph()
    rewritten(model)
    floats = next(node for node in model.graph if node.op_type == "Cast").outputs[0]
    whole = ir.node("Floor", [floats], name="front_fitted")
    whole.outputs[0].dtype, whole.outputs[0].shape = floats.dtype, floats.shape
    floats.replace_all_uses_with(whole.outputs[0])
    whole.replace_input_with(0, floats)
    model.graph.insert_after(floats.producer(), [whole])
    assert patches_as_bytes(model) is None
    int8(model, images(count=20))
    other = graph()
    rewritten(other)
    int8(other, images(count=20))
    assert "QuantizeLinear" in [node.op_type for node in model.graph]
    assert np.array_equal(run(model, images()), run(other, images()))
