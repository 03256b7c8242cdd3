"""Plans: shapes from batch buckets, precision read from the graph, what stays exchangeable; without a device."""

import json
import sys

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from invariclip.backends.batching import buckets
from invariclip.backends.batching import plan as runs_of
from invariclip.errors import ArtifactError, InputError
from invariclip.export.tensorrt.plan import SIDES, Tensor, plan_engine, precision_of, profiles_of

PIXELS = {"pixels": Tensor("uint8", (-1, 224, 224, 3))}
IDS = {"input_ids": Tensor("int64", (-1, -1))}


def three(inputs, batch, longest=77):
    (profile,) = profiles_of(inputs, (batch,), longest=longest)
    return next(iter(profile.shapes.values()))


def test_a_profile_says_smallest_usual_and_largest():
    assert three(PIXELS, 32) == ((1, 224, 224, 3), (32, 224, 224, 3), (32, 224, 224, 3))
    assert three(IDS, 32) == ((1, 1), (32, 16), (32, 77))
    assert three(IDS, 32, longest=7) == ((1, 1), (32, 7), (32, 7))
    assert three({"input_ids": Tensor("int64", (-1, 64))}, 8) == ((1, 64), (8, 64), (8, 64))
    assert three({"pixels": Tensor("uint8", (-1, -1, -1, 3))}, 8) == tuple(
        (rows, side, side, 3) for rows, side in zip((1, 8, 8), SIDES, strict=True)
    )
    (profile,) = profiles_of({"projection": Tensor("float32", (512, 64))}, (8,))
    assert profile.shapes == {}


@given(st.lists(st.integers(1, 300), min_size=1, max_size=5), st.data())
def test_every_bucket_lies_in_exactly_one_profile(batches, data):
    profiles = profiles_of(PIXELS, batches)
    largest = buckets(max(batches))[-1]
    for bucket in buckets(largest):
        assert sum(profile.takes({"pixels": (bucket, 224, 224, 3)}) for profile in profiles) == 1
    rows = data.draw(st.integers(1, 1000))
    for _, bucket in runs_of(rows, largest):
        assert any(profile.takes({"pixels": (bucket, 224, 224, 3)}) for profile in profiles)
    assert not any(profile.takes({"pixels": (largest + 1, 224, 224, 3)}) for profile in profiles)


def test_what_cannot_be_planned_is_refused(tmp_path, tiny_artifact):
    with pytest.raises(InputError, match="needs a batch size"):
        profiles_of(PIXELS, ())
    with pytest.raises(InputError, match="at least 1, not 0"):
        profiles_of(PIXELS, (8, 0))
    with pytest.raises(InputError, match="level is from 0 to 5, not 6"):
        plan_engine(tiny_artifact / "image.onnx", level=6)
    (tmp_path / "a.onnx").write_bytes(b"nonsense")
    with pytest.raises(ArtifactError, match=r"a\.onnx: is not an ONNX graph"):
        plan_engine(tmp_path / "a.onnx")
    with pytest.raises(InputError, match="has nothing to exchange"):
        plan_engine(tiny_artifact / "text.onnx", refit=True)


def test_a_plan_is_plain_data_and_follows_its_graph(tiny_artifact):
    plan = plan_engine(tiny_artifact / "image.onnx", batches=(1, 8), refit=True)
    assert plan.inputs == {"pixels": Tensor("uint8", (-1, 32, 32, 3))}
    assert {name: tensor.dtype for name, tensor in plan.outputs.items()} == {
        "embedding": "float32", "logits": "float32", "probabilities": "float32",
    }  # fmt: skip
    assert (plan.precision, plan.refit, plan.tf32) == ("float32", ("class_bank",), False)
    assert json.loads(json.dumps(plan.to_json()))["profiles"][1]["shapes"]["pixels"][2] == [8, 32, 32, 3]
    text = plan_engine(tiny_artifact / "text.onnx", longest=16)
    assert text.graph_sha256 != plan.graph_sha256
    assert list(text.inputs) == ["input_ids"]


def test_planning_needs_neither_tensorrt_nor_a_gpu(tiny_artifact, run, monkeypatch):
    for name in ("tensorrt", "tensorrt_rtx", "cuda", "cuda.bindings", "cuda.bindings.runtime"):
        monkeypatch.setitem(sys.modules, name, None)
    code, out, _ = run("engines", tiny_artifact, "--plan", "--json", "--batch", 4)
    assert code == 0
    image, text = json.loads(out)
    assert (image["graph"], text["graph"], image["engines"]) == ("image.onnx", "text.onnx", {})
    assert text["profiles"][0]["shapes"]["input_ids"] == [[1, 1], [4, 16], [4, 16]]
    code, out, _ = run("engines", tiny_artifact, "--plan")
    assert code == 0
    assert out.count("image.onnx") == 3
    code, _, err = run("engines", tiny_artifact)
    assert code == 2
    assert err.startswith("invariclip: TensorRT engines need the package tensorrt or tensorrt_rtx: pip install")
    assert err.count("\n") == 1
    code, _, err = run("engines", tiny_artifact, "--plan", "--variant", "int4")
    assert (code, err.count("\n")) == (2, 1)
    assert "no variant 'int4'; available: float32" in err


def test_precision_is_read_from_the_products():
    def model(*nodes, **initializers):
        held = [onnx.numpy_helper.from_array(value, name) for name, value in initializers.items()]
        graph = onnx.helper.make_graph(list(nodes), "g", [], [], held)
        return onnx.helper.make_model(graph)

    product = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    assert precision_of(model(product, w=np.ones((2, 2), np.float32))) == "float32"
    assert precision_of(model(product, w=np.ones((2, 2), np.float16))) == "float16"
    dequantize = onnx.helper.make_node("DequantizeLinear", ["levels", "s"], ["w"])
    assert precision_of(model(dequantize, product, levels=np.ones((2, 2), np.int8))) == "int8"
    eight = onnx.helper.make_tensor("levels", onnx.TensorProto.FLOAT8E4M3FN, [1], b"\0", raw=True)
    graph = onnx.helper.make_graph([dequantize, product], "g", [], [], [eight])
    assert precision_of(onnx.helper.make_model(graph)) == "fp8"
    assert precision_of(model(onnx.helper.make_node("Add", ["x", "w"], ["y"]), w=np.ones(2, np.float16))) == "float32"
