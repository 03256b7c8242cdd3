"""Rewrites of the traced graph, on small graphs written by hand: what they give and what they refuse."""

import math

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.errors import ContractError
from invariclip.export.graphs.rewrites import RewriteNotApplicableError, Subject
from invariclip.export.graphs.rewrites import stem as stems
from invariclip.export.graphs.rewrites.plan import NAMES, require_held, rewrite_graph
from invariclip.export.graphs.rewrites.tidy import _target, duplicates, tidy, write_shapes

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
FRONT = """
  floats = Cast <to = 1> (pixels)
  turned = Transpose <perm = [0, 3, 1, 2]> (floats)
  scaled = Div (turned, most)
  centred = Sub (scaled, mean)
  normal = Div (centred, std)
"""


def graph(body, weights=None, **sizes):
    """uint8 pixels [batch, 8, 8, 3], normalised as the tower does it, then `body`; `weights` name -> shape."""
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
    g (uint8[batch, 8, 8, 3] pixels) => (float[batch, c, h, w] embedding) {{ {FRONT} {body} }}"""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=shape) for name, shape in (weights or {}).items()}
    values |= {"most": np.array(255.0), "mean": np.reshape(MEAN, (3, 1, 1)), "std": np.reshape(STD, (3, 1, 1))}
    used = {name for node in proto.graph.node for name in node.input}
    for name, value in values.items():
        if name in used:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(value.astype(np.float32), name))
    proto = onnx.shape_inference.infer_shapes(proto)
    return ir.from_proto(proto)


def run(model, rows):
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"pixels": rows})[0]


def images(count=2):
    return np.random.default_rng(1).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def of_image(encoder=None):
    return Subject("image", encoder or torch.nn.Identity(), None)


W = {"w": (4, 3, 3, 3), "b": (4,), "w2": (4, 3, 3, 3)}
STEMS = {
    "with a bias": ("embedding = Conv <kernel_shape = [3, 3]> (normal, w, b)", "scale and shift, into 1 convolution"),
    "without a bias": ("embedding = Conv <kernel_shape = [3, 3]> (normal, w)", "scale and shift, into 1 convolution"),
    "that pads": (
        "embedding = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (normal, w, b)",
        "scale only, because it pads, into 1 convolution",
    ),
    "that pads at one side": (
        "embedding = Conv <kernel_shape = [3, 3], pads = [0, 0, 0, 1]> (normal, w)",
        "scale only, because it pads, into 1 convolution",
    ),
    "of two": (
        """a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]> (normal, w)
        c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]> (normal, w2, b)
        embedding = Add (a, c)""",
        "scale only, because it pads, into 2 convolutions",
    ),
    "of two of which one pads": (
        """a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (normal, w)
        c = Conv <kernel_shape = [1, 1]> (normal, point, b)
        embedding = Add (a, c)""",
        "scale only, because it pads, into 2 convolutions",
    ),
}


@pytest.mark.parametrize("stem", STEMS)
def test_normalisation_goes_into_a_stem(stem):
    body, said = STEMS[stem]
    model = graph(body, {**W, "point": (4, 3, 1, 1)})
    wanted = run(model, images())
    assert stems.not_normalised(model) == "pixels still go through Div"
    subject = of_image()
    step, *_ = rewrite_graph(model, subject, ("normalisation",))
    assert (step.name, step.applied, step.detail) == ("normalisation", True, said)
    require_held(model, subject)  # also where nobody tidies up behind it
    kinds = [node.op_type for node in model.graph]
    assert "Div" not in kinds
    assert "Sub" not in kinds
    got = run(model, images())
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


NOT_STEMS = {
    "grouped": (
        "embedding = Conv <kernel_shape = [3, 3], group = 3> (normal, depth)",
        "its first convolution is grouped, or its weights are not constant",
    ),
    "with a computed bias": (
        "sum = Neg (b)\n embedding = Conv <kernel_shape = [3, 3]> (normal, w, sum)",
        "its first convolution has a bias that is not constant",
    ),
    "padded by itself": (
        'embedding = Conv <kernel_shape = [3, 3], auto_pad = "SAME_UPPER"> (normal, w)',
        "its first convolution pads by itself",
    ),
    "no convolution": (
        "embedding = Relu (normal)",
        "its normalised pixels go into Relu, not into a convolution",
    ),
    "not only convolutions": (
        """a = Conv <kernel_shape = [1, 1]> (normal, point)
        c = ReduceMean <keepdims = 1> (normal)
        embedding = Add (a, c)""",
        "its normalised pixels go into ReduceMean, not into a convolution",
    ),
    "not normalised": (
        "embedding = Conv <kernel_shape = [3, 3]> (turned, w)",
        "its pixels are not normalised before the first convolution",
    ),
}


@pytest.mark.parametrize("stem", NOT_STEMS)
def test_other_stems_keep_their_normalisation_and_say_why(stem):
    body, why = NOT_STEMS[stem]
    model = graph(body, {**W, "depth": (3, 1, 3, 3), "point": (4, 3, 1, 1)})
    if stem == "not normalised":
        for node in [node for node in model.graph if node.op_type in ("Div", "Sub")][::-1]:
            model.graph.remove(node, safe=True)
    wanted = run(model, images())
    (step, *_) = rewrite_graph(model, of_image(), ("normalisation",))
    assert (step.applied, step.detail) == (False, why)
    np.testing.assert_array_equal(run(model, images()), wanted)


FAULTS = {
    "the shift is folded though it pads": (stems, "_pads", lambda node: False, "that pads"),
    "the mean has the wrong sign": (
        stems,
        "_followed",
        lambda start, kept=stems._followed: (lambda end: type(end)(end.scale, -end.shift, end.value))(kept(start)),
        "with a bias",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_fold_is_seen(monkeypatch, fault):
    """These tests' own eyes: the two mistakes that are easily made change answers by far more than rounding."""
    place, name, wrong, stem = FAULTS[fault]
    model = graph(STEMS[stem][0], W)
    wanted = run(model, images())
    monkeypatch.setattr(place, name, wrong)
    rewrite_graph(model, of_image(), ("normalisation",))
    assert np.abs(run(model, images()) - wanted).max() > 0.1 * np.abs(wanted).max()


def test_a_rewrite_that_does_not_keep_its_word_is_refused():
    model = graph(STEMS["with a bias"][0], W)
    subject = of_image()
    subject.applied = frozenset({"normalisation"})
    message = (
        r"^rewrite normalisation was applied to the image tower, but pixels still go through Div; leave it out with "
        "--without normalisation$"
    )
    with pytest.raises(ContractError, match=message):
        require_held(model, subject)


# ---------------------------------------------------------------- tidy


def test_dead_duplicate_and_identity_nodes_go():
    body = """same = Identity (normal)
    dead = Relu (normal)
    a = Sigmoid (same)
    c = Sigmoid (normal)
    embedding = Add (a, c)"""
    model = graph(body)
    wanted = run(model, images())
    assert duplicates(model) == "computed twice: nothing; computed for nobody: Relu"
    detail = tidy(model, of_image())
    assert detail == "3 nodes gone, 0 shapes written as constants"
    assert duplicates(model) is None
    assert [node.op_type for node in model.graph][-2:] == ["Sigmoid", "Add"]
    np.testing.assert_array_equal(run(model, images()), wanted)
    with pytest.raises(RewriteNotApplicableError, match=r"^there was nothing to remove$"):
        tidy(model, of_image())


def test_what_is_computed_twice_is_named():
    model = graph("a = Relu (normal)\n c = Relu (normal)\n embedding = Add (a, c)")
    assert duplicates(model) == "computed twice: Relu; computed for nobody: nothing"


def test_nodes_with_other_settings_are_not_the_same():
    model = graph("a = Softmax <axis = 1> (normal)\n c = Softmax <axis = 2> (normal)\n embedding = Add (a, c)")
    assert duplicates(model) is None


# a shape as factors: numbers, or names of free dimensions; grouped into dimensions in two ways
FACTORS = st.lists(st.sampled_from([2, 3, 5, "batch", "length"]), min_size=1, max_size=6)


def grouped(draw, factors):
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(factors) - 1)), max_size=len(factors) - 1)))
    return [factors[a:b] for a, b in zip([0, *cuts], [*cuts, len(factors)], strict=True)]


@st.composite
def reshapes(draw):
    factors = draw(FACTORS)
    return grouped(draw, factors), grouped(draw, factors)


def symbolic(groups):
    """Dimensions as the graph would state them; a product with a free factor has no name of its own."""
    named = []
    for factors in groups:
        free = [one for one in factors if isinstance(one, str)]
        if not free:
            named.append(math.prod(factors))
        else:
            named.append(factors[0] if len(factors) == 1 else None)
    return ir.Shape(named)


@settings(max_examples=300, deadline=None)
@given(pair=reshapes(), batch=st.integers(1, 7), length=st.integers(1, 7))
def test_written_shapes_are_the_computed_ones(pair, batch, length):
    sizes = {"batch": batch, "length": length}
    before, after = ([math.prod(sizes.get(one, one) for one in group) for group in groups] for groups in pair)
    written = _target(symbolic(pair[0]), symbolic(pair[1]))
    if written is None:
        return
    # ONNX: 0 copies the input's dimension of that place, -1 takes what is left
    resolved = [before[place] if size == 0 else size for place, size in enumerate(written)]
    assert list(np.empty(before).reshape(resolved).shape) == after


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 5), heads=st.sampled_from([1, 2, 4]), rows=st.integers(1, 6))
def test_a_reshape_whose_target_is_computed_gets_a_constant(batch, heads, rows):
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
    g (float[batch, length, 8] pixels) => (float[batch, length, {heads}, {8 // heads}] embedding)
    <int64[2] tail = {{{heads}, {8 // heads}}}, int64[1] all = {{-1}}> {{
      sizes = Shape <start = 0, end = 2> (pixels)
      target = Concat <axis = 0> (sizes, tail)
      embedding = Reshape <allowzero = 1> (pixels, target)
    }}"""
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))
    assert write_shapes(model) == 1
    node = next(node for node in model.graph if node.op_type == "Reshape")
    assert node.inputs[1].const_value.numpy().tolist() == [0, 0, heads, 8 // heads]
    assert "allowzero" not in node.attributes
    given_ = np.random.default_rng(0).normal(size=(batch, rows, 8)).astype(np.float32)
    np.testing.assert_array_equal(run(model, given_), given_.reshape(batch, rows, heads, 8 // heads))
    assert write_shapes(model) == 0


def test_an_empty_dimension_is_left_alone():
    assert _target(ir.Shape(["batch", 4]), ir.Shape(["batch", 0])) is None
    assert _target(ir.Shape(["batch", 4]), ir.Shape([None, None])) is None
    assert _target(None, ir.Shape([1])) is None


def test_graph_rewrites_can_be_switched_off():
    model = graph(STEMS["with a bias"][0], W)
    steps = rewrite_graph(model, of_image(), [name for name in NAMES if name not in ("normalisation", "tidy")])
    assert [(step.name, step.applied, step.detail) for step in steps] == [
        ("normalisation", False, "switched off"),
        ("patch-product", False, "needs normalisation"),
        ("tidy", False, "switched off"),
    ]
