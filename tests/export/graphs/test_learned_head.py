"""The head of learned templates in a graph, held against the pairwise rule in float64, in two engines and dtypes."""

import importlib.util

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from invariclip.artifact.manifest import LearnedPromptsFacts
from invariclip.backends import open_backend
from invariclip.errors import InputError
from invariclip.export.graphs import head, learned_head
from invariclip.export.graphs.writing import write_graph
from invariclip.export.tensorrt.engines import build_on_cpu
from invariclip.export.verification.class_head import earned, pairwise

WIDTH = 16
ENGINES = ("onnxruntime", "openvino")


def semantics_of(scale, bias, background=0.1):
    numbers = [tuple(map(float, np.broadcast_to(own, len(scale)))) for own in (scale, bias, background)]
    return LearnedPromptsFacts("c" * 64, len(scale) - 1, 4, *numbers)


def graph_of(dtype=ir.DataType.FLOAT, width=WIDTH):
    """x → embedding, the same."""
    x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape(["batch", width]))
    node = ir.node("Identity", [x])
    (embedding,) = node.outputs
    embedding.name, embedding.shape, embedding.type = "embedding", ir.Shape(["batch", width]), ir.TensorType(dtype)
    return ir.Model(ir.Graph([x], [embedding], nodes=[node], opset_imports={"": 20}, name="g"), ir_version=10)


def unit(rng, *shape):
    rows = rng.normal(size=shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def world(seed, templates, classes, rows, scale, width=WIDTH, alike=0.7):
    """Unit embeddings near classes, banks that agree in part, and evidence that is neither all nor nothing."""
    rng = np.random.default_rng(seed)
    shared = unit(rng, classes, width)
    bank = unit(rng, templates, classes, width) * (1 - alike) + alike * shared
    bank /= np.linalg.norm(bank, axis=-1, keepdims=True)
    embedding = shared[rng.integers(classes, size=rows)] + unit(rng, rows, width)
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    slopes = scale * rng.uniform(0.5, 1.5, templates) / 100
    heights = rng.uniform(-2, 1, templates)
    return embedding, bank, semantics_of(slopes, heights, rng.uniform(-0.2, 0.7, templates))


def wanted(embedding, bank, semantics, logit_scale=100.0):
    cosines = np.einsum("nd,mkd->nmk", embedding.astype(np.float64), bank)
    slope = np.array(semantics.evidence_scale) * logit_scale
    return cosines, *rule(cosines * slope[:, None], semantics.evidence_bias, slope * semantics.background)


def rule(logits, bias, background):
    """Evidence by its definition, fused by the pairwise rule: [N, M, K] to [N, K] and [N]."""
    behind = np.broadcast_to(background, logits.shape[:2])
    evidence = [earned(own, np.asarray(bias), level) for own, level in zip(logits, behind, strict=True)]
    belief, unsure = pairwise(np.stack(evidence))
    powers = np.exp(logits[:, 0] - logits[:, 0].max(axis=-1, keepdims=True))
    return belief + unsure[:, None] * powers / powers.sum(axis=-1, keepdims=True), unsure


def headed(bank, semantics, bias=None, width=WIDTH):
    model = graph_of(width=width)
    head.attach_head(model, bank, 100.0, bias, semantics)
    return model


def halved(bank, semantics, width=WIDTH):
    model = graph_of(ir.DataType.FLOAT16, width)
    (embedding,) = model.graph.outputs
    learned_head.attach(model.graph, embedding, bank, semantics, 100.0, None)
    return model


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("learned", "classes", "scale"),
    [(1, 2, 20), (1, 1000, 30), (4, 7, 100), (8, 1000, 30), (16, 1000, 10), (16, 100, 60)],
)
def test_it_is_the_pairwise_rule(engine, learned, classes, scale, tmp_path):
    embedding, bank, semantics = world(learned, learned + 1, classes, 5, scale, width=64)
    model = headed(bank, semantics, bias=-3.0, width=64)
    write_graph(model, tmp_path / "head.onnx")
    given = embedding.astype(np.float32)
    got = open_backend(engine, tmp_path / "head.onnx", threads=1).run({"x": given})
    cosines, probabilities, uncertainty = wanted(given, bank, semantics)
    assert [got[name].shape for name in ("logits", "probabilities", "uncertainty")] == [(5, classes)] * 2 + [(5,)]
    np.testing.assert_allclose(got["probabilities"], probabilities, atol=1e-5, rtol=0)
    np.testing.assert_allclose(got["uncertainty"], uncertainty, atol=1e-5, rtol=0)
    np.testing.assert_allclose(got["logits"], 100 * cosines[:, 0] - 3.0, atol=2e-4)
    np.testing.assert_array_equal(got["probabilities"].argmax(1), probabilities.argmax(1))


def run(model, x):
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    names = [output.name for output in proto.graph.output]
    with np.errstate(over="ignore"):
        return dict(zip(names, ReferenceEvaluator(proto).run(None, {"x": x}), strict=True))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 99),
    learned=st.integers(1, 16),
    classes=st.integers(1, 60),
    scale=st.floats(1, 30),
    level=st.floats(-60, 5),
)
def test_evidence_of_any_height_is_exact(seed, learned, classes, scale, level):
    """Also where all of it is tiny: then it is the sum over classes that tells how unsure the whole is."""
    embedding, bank, semantics = world(seed, learned + 1, classes, 2, scale)
    semantics = semantics_of(semantics.evidence_scale, np.array(semantics.evidence_bias) + level)
    given = embedding.astype(np.float32)
    got = run(headed(bank, semantics), given)
    _, probabilities, uncertainty = wanted(given, bank, semantics)
    np.testing.assert_allclose(got["probabilities"], probabilities, atol=1e-5, rtol=0)
    np.testing.assert_allclose(got["uncertainty"], uncertainty, atol=1e-5, rtol=0)


def test_a_thousand_traces_of_evidence_are_not_lost():
    """log(1 + y) taken literally loses y = 2e-8 here, and u would be 1."""
    bank = np.tile(np.eye(1, WIDTH), (2, 1000, 1))
    # a thousand classes alike, and a background like them: p is 1/1000 for each, the odds of the best too
    semantics = semantics_of([1e-9, 1e-9], [np.log(2e-8 * 1000 * 1000)] * 2)
    got = run(headed(bank, semantics), np.eye(1, WIDTH, dtype=np.float32))
    exact = 1 / (1 + 1000 * ((1 + 2e-8) ** 2 - 1))
    assert exact < 1 - 3.9e-5
    np.testing.assert_allclose(got["uncertainty"], exact, atol=2e-7)


@pytest.mark.parametrize("learned", [1, 4, 8, 16])
@pytest.mark.parametrize("classes", [3, 100, 1000])
def test_in_float16_it_is_near(learned, classes, tmp_path):
    """Truly float16 at every node in onnx's evaluator, and ONNX Runtime's float16."""
    embedding, bank, semantics = world(learned + classes, learned + 1, classes, 4, 30, width=64)
    given = embedding.astype(np.float16)
    model = halved(bank, semantics, width=64)
    held = {name: value.const_value.numpy().astype(np.float64) for name, value in model.graph.initializers.items()}
    # the same numbers that the graph holds, so that what is measured is the arithmetic
    product = given.astype(np.float64) @ held["evidence_bank"]
    q, means = product[:, : -learned - 1].reshape(4, learned + 1, classes), product[:, -learned - 1 :]
    background = held["evidence_background"][:, 0] - means
    probabilities, uncertainty = rule(q, held["evidence_height"][:, 0], background)
    write_graph(model, tmp_path / "half.onnx")
    for got in (run(model, given), open_backend("onnxruntime", tmp_path / "half.onnx", threads=1).run({"x": given})):
        assert got["probabilities"].dtype == np.float16
        np.testing.assert_allclose(got["probabilities"], probabilities, atol=5e-3, rtol=0)
        np.testing.assert_allclose(got["uncertainty"], uncertainty, atol=5e-3, rtol=0)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast", "ignore:invalid value")  # logits beyond float16
@pytest.mark.parametrize("build", [headed, halved])
@pytest.mark.parametrize("height", [0.0, 1e4, -1e4, 6e4, -6e4])
@pytest.mark.parametrize("classes", [1, 3, 1000])
def test_nothing_is_lost_at_extremes(build, height, classes):
    _, bank, _ = world(0, 17, classes, 1, 1)
    for slope in (1e-6, 1.0, 300.0):
        model = build(bank, semantics_of([slope] * 17, [height] * 17))
        got = run(model, np.eye(3, WIDTH, dtype=np.float16 if build is halved else np.float32))
        for name in ("probabilities", "uncertainty"):
            assert np.isfinite(got[name]).all()
            assert got[name].min() >= 0
            assert got[name].max() <= 1.001
        np.testing.assert_allclose(got["probabilities"].astype(np.float64).sum(1), 1, atol=2e-2)


def test_the_polynomial_is_the_logarithm():
    y = np.linspace(0, 1, 10_001)[1:]
    s = y / (2 + y)
    assert (
        np.abs(s * np.polynomial.polynomial.polyval(s**2, learned_head.log1p_polynomial()) / np.log1p(y) - 1).max()
        < 4e-8
    )


def test_heads_of_both_kinds_take_each_others_place():
    _, bank, semantics = world(3, 3, 4, 2, 30)
    kinds = {"plain": (bank[0], 100.0, None), "evidential": (bank, 100.0, None, semantics), "none": (None, 100.0, None)}
    fresh = {}
    for kind, arguments in kinds.items():
        model = graph_of()
        head.attach_head(model, *arguments)
        fresh[kind] = ir.to_proto(model)
    for before in kinds.values():
        for after, arguments in kinds.items():
            model = graph_of()
            head.attach_head(model, *before)
            head.attach_head(model, *arguments)
            assert ir.to_proto(model) == fresh[after]


@pytest.mark.parametrize("shape", [(3, 4, WIDTH), (2, 0, WIDTH), (2, WIDTH), (2, 3, WIDTH + 1)])
def test_banks_that_do_not_fit_are_refused(shape):
    with pytest.raises(InputError, match=r"needs \[2, K, 16\]"):
        head.attach_head(graph_of(), np.ones(shape), 100.0, None, semantics_of([1, 1], [0, 0]))


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
def test_tensorrt_builds_it(tmp_path):
    _, bank, semantics = world(1, 9, 20, 1, 30)
    write_graph(headed(bank, semantics), tmp_path / "head.onnx")
    write_graph(halved(bank, semantics), tmp_path / "half.onnx")
    assert build_on_cpu(tmp_path / "head.onnx").engine_bytes > 1000
    assert build_on_cpu(tmp_path / "half.onnx").engine_bytes > 1000
