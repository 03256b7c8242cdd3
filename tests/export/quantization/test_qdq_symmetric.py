"""Q/DQ on both sides of zero: the same ranges, no uint8 left, answers within a level."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.errors import ContractError
from invariclip.export.quantization.qdq import to_symmetric, uint8_values


def graph_of(body, constants, source="float[n, 2] x"):
    text = f"""<ir_version: 10, opset_import: ["" : 20]> g ({source}) => (float[n, 2] y) <{constants}> {{ {body} }}"""
    return ir.from_proto(onnx.parser.parse_model(text))


def run(model, x):
    import onnxruntime

    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": x})[0]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 255), st.floats(1e-4, 1.0))
def test_what_the_range_holds_comes_back_within_half_a_level(zero, scale):
    model = graph_of(
        "q = QuantizeLinear (x, s, o) y = DequantizeLinear (q, s, o)", f"float s = {{{scale}}}, uint8 o = {{{zero}}}"
    )
    assert len(uint8_values(model)) == 1
    assert to_symmetric(model) == 1
    assert uint8_values(model) == []
    low, high = -zero * scale, (255 - zero) * scale
    x = np.linspace(low, high, 64, dtype=np.float32).reshape(-1, 2)
    level = max(-low, high) / 127
    assert np.abs(run(model, x) - x).max() <= level / 2 * 1.001 + 1e-6
    # and nothing is cut off that the range held
    assert abs(run(model, np.full((1, 2), high, np.float32))[0, 0] - high) <= level / 2 * 1.001 + 1e-6


@pytest.mark.parametrize(("scale", "zero"), [(1.0, 115), (0.5, 0), (0.25, 255)])
def test_bytes_are_cast_before_they_are_moved(scale, zero):
    model = graph_of(
        "r = Reshape (x, shape) t = Transpose <perm = [1, 0, 2]> (r) b = Reshape (t, back) "
        "y = DequantizeLinear (b, s, o)",
        f"int64[3] shape = {{2, -1, 2}}, int64[2] back = {{-1, 2}}, float s = {{{scale}}}, uint8 o = {{{zero}}}",
        "uint8[n, 2] x",
    )
    x = np.random.default_rng(0).integers(0, 256, (8, 2), dtype=np.uint8)
    wanted = run(model, x)
    assert to_symmetric(model) == 1
    assert next(node.op_type for node in model.graph) == "Cast"
    moved = [value for node in model.graph for value in node.outputs if node.op_type in ("Reshape", "Transpose")]
    assert {value.dtype for value in moved} == {ir.DataType.FLOAT}
    level = scale * max(zero, 255 - zero) / 127
    assert np.abs(run(model, x) - wanted).max() <= level / 2 * 1.001


def test_int8_that_is_symmetric_already_is_left_alone():
    model = graph_of("q = QuantizeLinear (x, s, o) y = DequantizeLinear (q, s, o)", "float s = {0.1}, int8 o = {0}")
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert to_symmetric(model) == 0
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_what_cannot_be_changed_is_refused():
    spread = graph_of(
        "q = QuantizeLinear <axis = 1> (x, s, o) y = DequantizeLinear <axis = 1> (q, s, o)",
        "float[2] s = {0.1, 0.2}, uint8[2] o = {1, 2}",
    )
    with pytest.raises(ContractError, match="not one constant each"):
        to_symmetric(spread)
    shared = graph_of(
        "r = Reshape (x, shape) a = DequantizeLinear (r, s, o) c = Cast <to = 1> (r) y = Add (a, c)",
        "int64[2] shape = {-1, 2}, float s = {0.1}, uint8 o = {1}", "uint8[n, 2] x",
    )  # fmt: skip
    with pytest.raises(ContractError, match="its bytes go elsewhere too"):
        to_symmetric(shared)
