"""int8 and float16 in a graph: rounding that keeps outputs, the edit itself, and which parts may have it."""

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.errors import ContractError, InputError
from invariclip.export.graphs.writing import write_graph
from invariclip.export.quantization import other_quantizers
from invariclip.export.quantization.float16 import halve
from invariclip.export.quantization.mixed import groups_of, mix
from invariclip.export.quantization.products import flops, products_of
from invariclip.export.quantization.qdq import QuantizationRecipe, quantise, ranges_of, rounded, smoothable
from invariclip.export.quantization.ranges import Flow, flows_of
from invariclip.export.quantization.rounding import compensated, factors, nearest, sharing
from invariclip.export.quantization.variants import KINDS, require_kinds

SEEDS = st.integers(0, 2**31)
WIDTH, INNER = 72, 96


def layer(rng, *, bias=True, outlier=1.0):
    """pixels [N, 4, 6, 3] → norm → two products, gelu → one product, as a tower has them."""
    x = onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.UINT8, ["batch", 4, 6, 3])
    y = onnx.helper.make_tensor_value_info("embedding", onnx.TensorProto.FLOAT, ["batch", 4, WIDTH])
    gain = np.ones(WIDTH, np.float32)
    gain[3] = outlier
    numbers = {
        "grow": rng.normal(size=(18, WIDTH)), "gain": gain, "shift": rng.normal(size=WIDTH) * 0.1,
        "first": rng.normal(size=(WIDTH, INNER)) / 8, "second": rng.normal(size=(WIDTH, INNER)) / 8,
        "last": rng.normal(size=(INNER, WIDTH)) / 8, "bias": rng.normal(size=INNER),
    }  # fmt: skip
    nodes = [
        ("Cast", ["pixels"], "floats", {"to": onnx.TensorProto.FLOAT}),
        ("Reshape", ["floats", "shape"], "rows", {}),
        ("MatMul", ["rows", "grow"], "grown", {}),
        ("LayerNormalization", ["grown", "gain", "shift"], "normed", {"axis": -1}),
        ("MatMul", ["normed", "first"], "one", {}),
        ("MatMul", ["normed", "second"], "two", {}),
        *([("Add", ["one", "bias"], "biased", {})] if bias else []),
        ("Add", ["biased" if bias else "one", "two"], "sum", {}),
        ("Gelu", ["sum"], "bent", {}),
        ("MatMul", ["bent", "last"], "embedding", {}),
    ]
    held = [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in numbers.items()]
    held.append(onnx.numpy_helper.from_array(np.array([0, 4, 18]), "shape"))
    made = [onnx.helper.make_node(kind, given, [out], name=f"node_{out}", **more) for kind, given, out, more in nodes]
    graph = onnx.helper.make_graph(made, "layer", [x], [y], held)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model))


def images(rng, count=40):
    return rng.integers(0, 256, (count, 4, 6, 3), dtype=np.uint8)


def answers(model, path, batch):
    write_graph(model, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["embedding"], {"pixels": batch})[0]


def error(one, other):
    return float(((one - other) ** 2).mean() / (other**2).mean())


def int8(rng, tmp_path, recipe=None, **how):
    """float32's answers and int8's, of one layer."""
    state = rng.bit_generator.state
    model, seen, asked = layer(rng, **how), images(rng), images(rng, 16)
    wanted = answers(model, tmp_path / "float.onnx", asked)
    sites = products_of(model)
    flows = flows_of(model, sites, [seen[:20], seen[20:]], threads=1)
    recipe = recipe or QuantizationRecipe()
    weights = rounded(model, sites, flows, recipe)
    ranges = ranges_of(model, sites, flows, weights, clip=recipe.clip)
    rng.bit_generator.state = state
    model = layer(rng, **how)
    quantise(model, sites, ranges, weights)
    return wanted, answers(model, tmp_path / "int8.onnx", asked)


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.integers(1, 40), st.integers(1, 30))
def test_nearest_is_within_half_a_level(seed, size, outputs):
    weights = np.random.default_rng(seed).normal(size=(size, outputs)).astype(np.float32)
    levels, scales = nearest(weights)
    assert np.abs(levels).max() <= 127
    assert (np.abs(levels * scales - weights) <= scales * 0.5001).all()


@settings(deadline=None, max_examples=15)
@given(SEEDS)
def test_compensated_rounding_changes_outputs_less_where_inputs_go_together(seed):
    rng = np.random.default_rng(seed)
    inputs = (rng.normal(size=(400, 8)) @ rng.normal(size=(8, 48)) + 2).astype(np.float32)
    inputs += rng.normal(size=inputs.shape).astype(np.float32) * 0.1
    weights = rng.normal(size=(48, 16)).astype(np.float32)
    errors = []
    for levels, scales in (nearest(weights), compensated(weights, sharing(inputs.T @ inputs))):
        errors.append(((inputs @ weights - inputs @ (levels * scales)) ** 2).mean())
    assert errors[1] < errors[0] * 0.5


def test_sharing_is_the_factor_of_the_inverse():
    rows = np.random.default_rng(0).normal(size=(300, 20)).astype(np.float32)
    moments = rows.T @ rows
    upper = sharing(moments).astype(np.float64)
    damped = moments + np.eye(20) * 0.01 * np.diag(moments).mean()
    assert np.abs(np.tril(upper, -1)).max() == 0
    assert np.allclose(upper.T @ upper @ damped, np.eye(20), atol=1e-4)


def test_a_value_that_is_always_zero_rounds_anyway():
    weights = np.ones((6, 3), np.float32)
    levels, _ = compensated(weights, sharing(np.zeros((6, 6), np.float32)))
    assert (levels == 127).all()


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.floats(0, 1))
def test_smoothing_is_exact_and_evens_out_channels(seed, alpha):
    rng = np.random.default_rng(seed)
    peaks = np.exp(rng.normal(size=30) * 2).astype(np.float32)
    weights = rng.normal(size=(30, 7)).astype(np.float32)
    s = factors(peaks, [weights], alpha)
    rows = rng.normal(size=(5, 30)) * peaks
    assert np.allclose((rows / s) @ (weights * s[:, None]), rows @ weights, rtol=1e-4, atol=1e-4 * np.abs(rows).max())
    if alpha == 1:
        assert np.ptp(peaks / s) < 1e-3 * peaks.max()


def test_statistics_are_those_of_all_rows_whatever_the_batches():
    rng = np.random.default_rng(1)
    model, seen = layer(rng), images(rng, 30)
    whole = flows_of(model, products_of(model), [seen], threads=1)["normed"]
    parts = flows_of(model, products_of(model), [seen[:7], seen[7:8], seen[8:]], threads=1)["normed"]
    assert whole.rows == parts.rows == 120
    assert np.allclose(whole.moments, parts.moments, rtol=1e-4, atol=1e-3)
    assert np.allclose(whole.mean, parts.mean, atol=1e-6)
    assert (whole.low, whole.high) == (parts.low, parts.high)
    assert [output.name for output in model.graph.outputs] == ["embedding"]
    assert [value.name for node in model.graph for value in node.outputs if value.is_graph_output()] == ["embedding"]


def test_nan_inside_and_no_images_are_refused():
    flow, model = Flow.empty(2), layer(np.random.default_rng(0))
    with pytest.raises(ContractError, match="NaN or infinite on a calibration image"):
        flow.widen(np.array([[1, np.nan]], np.float32))
    with pytest.raises(ContractError, match="no calibration image came"):
        flows_of(model, products_of(model), [], threads=1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "recipe",
    [
        QuantizationRecipe(),
        QuantizationRecipe(compensate=False),
        QuantizationRecipe(smoothing=0.5),
        QuantizationRecipe(clip=True),
        QuantizationRecipe(0.5, clip=True),
    ],
)
def test_int8_answers_almost_like_float32(tmp_path, bias, recipe):
    wanted, got = int8(np.random.default_rng(2), tmp_path, recipe, bias=bias)
    assert 0 < error(got, wanted) < 5e-3
    graph = onnx.load(tmp_path / "int8.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("QuantizeLinear") == 2
    assert kinds.count("DequantizeLinear") == 5
    assert not {"first", "second", "last"} & {item.name for item in graph.initializer}


def test_the_mean_of_the_outputs_stays(tmp_path):
    wanted, got = int8(np.random.default_rng(3), tmp_path, QuantizationRecipe(compensate=False))
    shift = np.abs((got - wanted).mean(axis=(0, 1))).max()
    assert shift < 0.25 * np.abs(got - wanted).max()


def test_what_can_be_smoothed_is_what_goes_into_products_alone():
    model = layer(np.random.default_rng(0))
    assert smoothable(model, products_of(model)) == ["normed"]
    assert smoothable(model, products_of(model)[:1]) == []  # the other product would read divided numbers


def test_smoothing_helps_where_one_channel_is_far_larger(tmp_path):
    plain = error(*int8(np.random.default_rng(4), tmp_path, QuantizationRecipe(), outlier=200.0)[::-1])
    smooth = error(*int8(np.random.default_rng(4), tmp_path, QuantizationRecipe(smoothing=0.5), outlier=200.0)[::-1])
    assert smooth < plain * 0.7


def test_half_weights_halve_the_file_and_keep_answers(tmp_path):
    rng = np.random.default_rng(5)
    model, asked = layer(rng), images(rng)
    wanted = answers(model, tmp_path / "float.onnx", asked)
    assert halve(model) == 4
    got = answers(model, tmp_path / "half.onnx", asked)
    assert 0 < error(got, wanted) < 1e-6
    sizes = [(tmp_path / f"{name}.onnx").stat().st_size for name in ("float", "half")]
    assert sizes[1] < sizes[0] * 0.65


def test_weights_that_float16_lacks_are_refused():
    model = layer(np.random.default_rng(6))
    model.graph.initializers["first"].const_value = ir.tensor(np.full((WIDTH, INNER), 1e6, np.float32), name="first")
    with pytest.raises(ContractError, match="numbers above 65504"):
        halve(model)


@dataclass
class Told:
    """As much of `Figures` as a mix reads."""

    cosine_min: float
    cosine_mean: float
    top1_agreement: float


def told(harm):
    def ask(chosen):
        loss = sum(harm[group.value] for group in chosen)
        return Told(1 - loss, 1 - loss, 1.0)

    return ask


def groups():
    return groups_of(products_of(layer(np.random.default_rng(0))), lambda site: 10)


def test_groups_share_a_value():
    found = groups()
    assert [(group.value, len(group.products), group.work) for group in found] == [("normed", 2, 20), ("bent", 1, 10)]
    model = layer(np.random.default_rng(0))
    assert flops(model, products_of(model)[0]) == WIDTH * INNER * 4  # rows of each image


def broken(figures):
    return [] if figures.cosine_min >= 0.9 else ["too far"]


def test_everything_is_int8_where_that_passes():
    found = mix(groups(), told({"normed": 0.01, "bent": 0.01}), broken)
    assert (len(found.chosen), found.back, found.share, found.costs) == (2, (), 1.0, {})


def test_the_most_harmful_goes_back_and_the_report_says_so():
    found = mix(groups(), told({"normed": 0.01, "bent": 0.3}), broken)
    assert [group.value for group in found.back] == ["bent"]
    assert found.share == pytest.approx(2 / 3)
    report = found.to_json()
    assert report["float32"] == [{"value": "bent", "products": ["node_embedding"]}]
    assert report["cosine_cost_alone"]["bent"] == pytest.approx(0.3)
    assert report["trials"][0]["broken"] == ["too far"]


def test_no_mix_is_an_answer_too():
    found = mix(groups(), told({"normed": 0.5, "bent": 0.5}), broken)
    assert (found.chosen, found.figures, len(found.back)) == ((), None, 2)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 0.1), min_size=1, max_size=14))
def test_a_mix_always_keeps_the_bound_and_puts_no_more_back_than_its_order_needs(harms):
    template = groups()[0]
    many = [type(template)(f"v{place}", template.products, 1) for place in range(len(harms))]
    harm = {f"v{place}": value for place, value in enumerate(harms)}
    found = mix(many, told(harm), broken)
    if found.figures is not None:
        assert sum(harm[group.value] for group in found.chosen) <= 0.1 + 1e-9
    else:
        assert min(harms) > 0.1 - 1e-9
    if found.back and found.chosen:
        # with one group fewer put back, the bound is broken
        kept = sum(harm[group.value] for group in found.chosen)
        assert kept + harm[found.back[-1].value] > 0.1 - 1e-9


@pytest.mark.parametrize("method", ["dynamic", "static", "nncf"])
def test_the_libraries_quantise_too(tmp_path, method):
    if method == "nncf":
        pytest.importorskip("nncf", reason="nncf is not installed")
    rng = np.random.default_rng(7)
    model, seen, asked = layer(rng), images(rng, 20), images(rng, 8)
    source, target = tmp_path / "float.onnx", tmp_path / f"{method}.onnx"
    wanted = answers(model, source, asked)
    getattr(other_quantizers, method)(source, target, *([] if method == "dynamic" else [[seen[:10], seen[10:]]]))
    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])
    assert 0 < error(session.run(["embedding"], {"pixels": asked})[0], wanted) < 5e-3


def test_unknown_variants_are_refused():
    require_kinds(KINDS)
    known = "bfloat16, float16, float16-islands, int8"
    with pytest.raises(InputError, match=f"no variant is called 'int4'; available: {known}"):
        require_kinds(["int4"])
