"""Planted faults are found at the operator where they are, and nowhere else; right graphs have none."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper

from invariclip.backends import is_installed
from invariclip.errors import ContractError
from invariclip.export.config import ExportConfig
from invariclip.export.graph_files import write_image_graph, write_text_graph
from invariclip.export.quantization.float16 import to_float16
from invariclip.export.verification.bisect import BOUNDS, GRAPH_FILE, VALUES_FILE, bisect, relative_error
from invariclip.export.verification.candidate import prepare

CLASSES = ("cat", "dog", "tree")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory, checkpoint):
    """The folder of the tiny ViT's two right graphs."""
    folder = tmp_path_factory.mktemp("right")
    job = prepare(checkpoint("vit"), None, CLASSES, ("a {}.",))
    write_image_graph(job, ExportConfig(), folder / "image.onnx")
    write_text_graph(job, ExportConfig(), folder / "text.onnx")
    return folder


@pytest.fixture(scope="module")
def images(checkpoint, batch):
    return {"pixels": batch(checkpoint("vit"), count=6)}


@pytest.fixture(scope="module")
def texts(checkpoint):
    return {"input_ids": checkpoint("vit").tokenizer(["a cat", "two dogs in a park", "tree"])}


def planted(source, target, change):
    model = onnx.load(source)
    found = change(model)
    onnx.save(model, target)
    return found


def only(model, kind, place=0):
    return [node for node in model.graph.node if node.op_type == kind][place]


def scaled(model, name, factor):
    (weight,) = [one for one in model.graph.initializer if one.name == name]
    weight.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(weight) * factor).astype(np.float32), name))


def test_a_right_graph_has_nothing_wrong(graphs, images, texts):
    for tower, feed in (("image", images), ("text", texts)):
        found = bisect(graphs / f"{tower}.onnx", graphs / f"{tower}.onnx", feed)
        assert (found.wrong, found.prefix) == ((), None)
        assert found.whole < 1e-6  # an engine that is asked for values in between fuses less
        assert found.rows == len(next(iter(feed.values())))
        assert found.nodes >= found.parts > 20
        assert all(part.cost < 1e-12 for part in found.costliest)


def test_another_activation_is_found(graphs, images, tmp_path):
    def change(model):
        gelu = only(model, "Gelu", 1)
        value, out = gelu.input[0], gelu.output[0]
        place = list(model.graph.node).index(gelu)
        model.graph.node.remove(gelu)
        model.graph.initializer.append(numpy_helper.from_array(np.float32(1.702), "quick"))
        made = [
            onnx.helper.make_node("Mul", [value, "quick"], ["quick_in"], "quick_in"),
            onnx.helper.make_node("Sigmoid", ["quick_in"], ["quick_gate"], "quick_gate"),
            onnx.helper.make_node("Mul", [value, "quick_gate"], [out], "quick_out"),
        ]
        for node in reversed(made):
            model.graph.node.insert(place, node)
        return out

    value = planted(graphs / "image.onnx", tmp_path / "x.onnx", change)
    found = bisect(tmp_path / "x.onnx", graphs / "image.onnx", images, out=tmp_path / "part")
    (part,) = found.wrong
    assert part.value == value
    assert part.nodes == ("quick_in (Mul)", "quick_gate (Sigmoid)", "quick_out (Mul)")
    assert (part.wanted, part.arithmetic) == (("Gelu",), "float32")
    assert found.costliest[0].value == value
    assert part.cost == found.costliest[0].cost > 0
    # the part that was written fails by itself
    values = np.load(tmp_path / "part" / VALUES_FILE, allow_pickle=False)
    inputs = {name.partition(":")[2]: values[name] for name in values.files if name.startswith("input:")}
    session = onnxruntime.InferenceSession(tmp_path / "part" / GRAPH_FILE, providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == list(inputs)
    (got,) = session.run(None, inputs)
    assert relative_error(got, values[f"wanted:{value}"]) == part.error


def test_a_missing_mask_is_found(graphs, texts, tmp_path):
    def change(model):
        softmax = only(model, "Softmax")
        (add,) = [node for node in model.graph.node if softmax.input[0] in node.output]
        assert add.op_type == "Add"
        softmax.input[0] = add.input[0]
        model.graph.node.remove(add)
        return softmax.output[0]

    value = planted(graphs / "text.onnx", tmp_path / "x.onnx", change)
    (part,) = bisect(tmp_path / "x.onnx", graphs / "text.onnx", texts).wrong
    assert (part.value, part.nodes[-1].partition(" ")[2]) == (value, "(Softmax)")
    assert part.wanted[-2:] == ("Add", "Softmax")


def test_swapped_weights_are_found_at_both_places(graphs, images, tmp_path):
    def change(model):
        shapes = {one.name: tuple(one.dims) for one in model.graph.initializer}
        products = [n for n in model.graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in shapes]
        one, other = next(
            (a, b) for i, a in enumerate(products) for b in products[i + 1 :]
            if shapes[a.input[1]] == shapes[b.input[1]] and a.input[1] != b.input[1]
        )  # fmt: skip
        one.input[1], other.input[1] = other.input[1], one.input[1]
        return [one.output[0], other.output[0]]

    values = planted(graphs / "image.onnx", tmp_path / "x.onnx", change)
    assert [part.value for part in bisect(tmp_path / "x.onnx", graphs / "image.onnx", images).wrong] == values


def test_an_overflow_of_float16_is_found(graphs, images, tmp_path):
    right = tmp_path / "loud.onnx"

    def loud(model):
        """The first norm's output and what reads it are the same as before; what it is given is too large for half."""
        norm = only(model, "LayerNormalization")
        source = norm.input[0]
        model.graph.initializer.append(numpy_helper.from_array(np.float32(600), "loud"))
        place = list(model.graph.node).index(norm)
        model.graph.node.insert(place, onnx.helper.make_node("Mul", ["louder", "loud"], ["loud_out"], "loud_node"))
        model.graph.node.insert(place, onnx.helper.make_node("Mul", [source, "loud"], ["louder"], "louder_node"))
        norm.input[0] = "loud_out"

    planted(graphs / "image.onnx", right, loud)
    loudest = bisect(right, right, images)
    assert loudest.wrong == ()
    model = ir.load(right)
    to_float16(model, keep=())
    ir.save(model, tmp_path / "half.onnx")
    found = bisect(tmp_path / "half.onnx", right, images)
    assert found.wrong[0].value == "loud_out"
    assert (found.wrong[0].arithmetic, found.wrong[0].error) == ("float16", np.inf)
    assert found.costliest[0].cost > 1e-3
    quiet = ir.load(graphs / "image.onnx")
    to_float16(quiet)
    ir.save(quiet, tmp_path / "quiet.onnx")
    assert bisect(tmp_path / "quiet.onnx", graphs / "image.onnx", images).wrong == ()


def quantized(source, target, *, factor=None):
    """Each product's left side through Q/DQ by its own range; `factor` narrows the second's."""
    model = onnx.load(source)
    products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
    named = {one.name for one in model.graph.initializer}
    products = [node for node in products if node.input[1] in named]
    inner = {node.input[0]: None for node in products}
    shown = onnx.load(source)
    have = {one.name for one in shown.graph.output}
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner if name not in have)
    session = onnxruntime.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"])

    def finish(feed):
        largest = dict(zip(inner, session.run(list(inner), feed), strict=True))
        for place, name in enumerate(inner):
            scale = float(np.abs(largest[name]).max()) / 127 / (factor if factor and place == 1 else 1)
            model.graph.initializer.append(numpy_helper.from_array(np.float32(scale), f"{name}_scale"))
            model.graph.initializer.append(numpy_helper.from_array(np.int8(0), f"{name}_zero"))
            at = next(i for i, node in enumerate(model.graph.node) if node in products and node.input[0] == name)
            pair = [
                onnx.helper.make_node("QuantizeLinear", [name, f"{name}_scale", f"{name}_zero"], [f"{name}_q"]),
                onnx.helper.make_node(
                    "DequantizeLinear", [f"{name}_q", f"{name}_scale", f"{name}_zero"], [f"{name}_dq"]
                ),
            ]
            for node in products:
                if node.input[0] == name:
                    node.input[0] = f"{name}_dq"
            for node in reversed(pair):
                model.graph.node.insert(at, node)
        onnx.save(model, target)
        written = [node.output[0] for node in products if node.input[0] == f"{list(inner)[1]}_dq"]
        # a bias after a product belongs to it: quantisers correct it
        biased = {node.input[0]: node.output[0] for node in model.graph.node if node.op_type == "Add"}
        return [biased.get(name, name) for name in written]

    return finish


def test_a_bad_range_of_int8_is_found(graphs, images, tmp_path):
    quantized(graphs / "image.onnx", tmp_path / "good.onnx")(images)
    good = bisect(tmp_path / "good.onnx", graphs / "image.onnx", images)
    assert good.wrong == ()
    assert {part.arithmetic for part in good.costliest} >= {"int8"}
    readers = quantized(graphs / "image.onnx", tmp_path / "bad.onnx", factor=20.0)(images)
    found = bisect(tmp_path / "bad.onnx", graphs / "image.onnx", images)
    assert [part.value for part in found.wrong] == readers
    assert {part.arithmetic for part in found.wrong} == {"int8"}
    assert all(part.cost is not None for part in found.wrong)


def test_an_engine_that_changes_a_graph_is_bisected(graphs, images, monkeypatch):
    """Parts are compiled with values between them, so an engine may be wrong on the whole alone."""
    from invariclip.export.verification import bisect as module

    opened = module.open_backend

    class FusesWrongly:
        """Drops what an Add after a Gelu adds, where no value in between is asked for."""

        def __init__(self, inner, path):
            self._inner, self._path = inner, path

        def run(self, feed, names):
            answers = self._inner.run(feed, names)
            if any("__given" in name for name in feed) or len(names) > 1:
                return answers
            reached = [node.op_type for node in onnx.load(self._path).graph.node].count("Gelu") >= 2
            return {name: value * 1.5 if reached else value for name, value in answers.items()}

    def open_(name, path, **options):
        inner = opened(name, path, **options)
        return FusesWrongly(inner, path) if "compute" in options else inner

    monkeypatch.setattr(module, "open_backend", open_)
    found = bisect(graphs / "image.onnx", graphs / "image.onnx", images)
    assert found.wrong == ()
    second = only(onnx.load(graphs / "image.onnx"), "Gelu", 1).output[0]
    assert found.prefix == second


@pytest.mark.skipif(not is_installed("openvino"), reason="openvino is not installed")
def test_in_another_engine(graphs, images, tmp_path):
    assert bisect(graphs / "image.onnx", graphs / "image.onnx", images, backend="openvino").wrong == ()
    name = planted(graphs / "image.onnx", tmp_path / "x.onnx", lambda model: _louder(model))
    (part,) = bisect(tmp_path / "x.onnx", graphs / "image.onnx", images, backend="openvino").wrong
    assert part.value == name


def _louder(model):
    product = only(model, "MatMul", 2)
    weight = next(name for name in product.input if name in {one.name for one in model.graph.initializer})
    scaled(model, weight, 1.01)
    return product.output[0]


def test_where_there_are_fewer_tokens_nothing_is_judged_and_that_is_said(checkpoint, graphs, images, tmp_path):
    job = prepare(checkpoint("vit"), None, CLASSES, ("a {}.",))
    write_image_graph(job, ExportConfig(), tmp_path / "thin.onnx", tokens=[9])
    found = bisect(tmp_path / "thin.onnx", graphs / "image.onnx", images)
    assert (found.wrong, found.prefix) == ((), None)
    assert found.reshaped > 5
    assert found.whole > 1e-3
    assert f"{found.reshaped} values have fewer tokens than in the right graph and are not compared" in found.lines("x")
    assert max(part.error for part in found.costliest if part.arithmetic == "fewer tokens") > 1e-3


def test_a_graph_of_another_tower_is_refused(graphs, images):
    with pytest.raises(ContractError, match=r"text\.onnx: is no graph of this tower"):
        bisect(graphs / "text.onnx", graphs / "image.onnx", images)


def test_what_is_infinite_in_both_is_no_error():
    mask = np.array([[0.5, -np.inf], [1.0, 2.0]])
    assert relative_error(mask, mask) == 0
    assert relative_error(mask + 0.5, mask) == pytest.approx(np.sqrt(0.75) / np.sqrt(5.25))
    assert relative_error(np.zeros((2, 2)), mask) == np.inf
    assert relative_error(np.array([np.nan]), np.array([1.0])) == np.inf
    assert relative_error(np.zeros(2), np.zeros(3)) == np.inf
    assert set(BOUNDS) == {"float32", "float16", "bfloat16", "int8", "fewer tokens"}
