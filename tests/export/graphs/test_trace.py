"""Graphs as files: names, dynamic sizes, opset, facts inside, weights beside; and what torch cannot export."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto

from invariclip.artifact.manifest import METADATA_KEY
from invariclip.backends import open_backend
from invariclip.errors import ContractError
from invariclip.export.graphs import trace, writing
from invariclip.export.graphs.trace import OPSET, traced
from invariclip.export.graphs.writing import weight_bytes, write_facts, write_graph


class Tower(torch.nn.Module):
    """Rows of ids to something of their own, at any batch and length."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(
            50, 6, _weight=torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
        )

    def forward(self, x):
        embedding = self.embedding(x)
        return (embedding * torch.arange(1, x.shape[1] + 1)[None, :, None]).sum(dim=1)


def ids(rows=3, length=7):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 50, (rows, length)))


@pytest.fixture(scope="module")
def model():
    return traced(Tower().eval(), ids(), input_name="ids", output_name="embedding", longest=16)


def test_batch_and_length_are_free(model, tmp_path):
    path = tmp_path / "x.onnx"
    write_graph(model, path)
    backend = open_backend("onnxruntime", path, threads=1)
    for rows, length in ((1, 1), (1, 16), (2, 7), (5, 3)):
        given = ids(rows, length)
        got = backend.run({"ids": given.numpy()}, ("embedding",))["embedding"]
        np.testing.assert_allclose(got, Tower()(given).detach().numpy(), atol=1e-5)
    (given,) = onnx.load(path).graph.input
    assert [size.dim_param for size in given.type.tensor_type.shape.dim] == ["batch", "length"]
    assert (given.name, given.type.tensor_type.elem_type) == ("ids", TensorProto.INT64)


def test_a_graph_is_plain_onnx_and_says_nothing_of_this_machine(model, tmp_path):
    path = tmp_path / "x.onnx"
    write_graph(model, path)
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert [(item.domain, item.version) for item in proto.opset_import if item.domain == ""] == [("", OPSET)]
    assert {node.domain for node in proto.graph.node} == {""}
    # the token embedding has the output's name in torch, and gives it up
    assert [output.name for output in proto.graph.output] == ["embedding"]
    assert sum("embedding" in node.output for node in proto.graph.node) == 1
    for secret in (b"site-packages", b"/tests/", str(tmp_path).encode()):
        assert secret not in path.read_bytes()


def test_facts_are_appended_and_the_last_ones_count(model, tmp_path, facts_in):
    path = tmp_path / "x.onnx"
    write_graph(model, path)
    before = path.read_bytes()
    facts = {"model": "tiny", "classes": ["Käse", "猫"], "width": 6}
    write_facts(path, facts)
    assert path.read_bytes().startswith(before)
    assert facts_in(path) == facts
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert [item.key for item in proto.metadata_props] == [METADATA_KEY]
    assert len(proto.graph.node) == len(model.graph)


def test_large_weights_go_into_a_file_beside(model, tmp_path, monkeypatch, facts_in):
    monkeypatch.setattr(writing, "EXTERNAL_DATA_BYTES", 1000)
    assert weight_bytes(model) >= 50 * 6 * 4 > 1000
    path = tmp_path / "x.onnx"
    write_graph(model, path)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["x.onnx", "x.onnx.data"]
    assert path.stat().st_size < (tmp_path / "x.onnx.data").stat().st_size + 4000
    write_facts(path, {"a": 1})
    got = open_backend("onnxruntime", path, threads=1).run({"ids": ids().numpy()}, ("embedding",))["embedding"]
    np.testing.assert_allclose(got, Tower()(ids()).detach().numpy(), atol=1e-5)
    assert len(onnx.load(path, load_external_data=False).graph.node) == len(model.graph)
    assert facts_in(path) == {"a": 1}


def test_a_graph_that_is_not_valid_is_refused(tmp_path):
    text = f"""<ir_version: 10, opset_import: ["" : {OPSET}]>
    g (float[n, 4] x) => (float[n, 5] y) {{ y = Relu (x) }}"""
    wrong = ir.from_proto(onnx.parser.parse_model(text))
    with pytest.raises(ContractError, match=r"^x\.onnx: the exported graph is not valid ONNX \("):
        write_graph(wrong, tmp_path / "x.onnx")


class Untraceable(torch.nn.Module):
    def forward(self, x):
        return x if x.float().sum().item() > 3 else x + 1


class Frozen(torch.nn.Module):
    def forward(self, x):
        return x + torch.ones(2, 3)  # the example's batch, and no other


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        (Untraceable(), r"^Untraceable: torch cannot export it \("),
        (Frozen(), r"^x: torch froze dimension 0 of \[2,3\] while tracing$"),
    ],
    ids=["Untraceable", "Frozen"],
)
def test_a_tower_that_torch_cannot_export_is_one_line(tower, message):
    with pytest.raises(ContractError, match=message) as caught:
        traced(tower.eval(), torch.zeros(2, 3), input_name="x", output_name="embedding")
    assert "\n" not in str(caught.value)


def test_an_embedding_of_length_zero_is_not_nan():
    assert trace._unit(torch.zeros(1, 4), None).tolist() == [[0, 0, 0, 0]]


def test_unit_length_is_torchs():
    rows = torch.randn((4, 7), generator=torch.Generator().manual_seed(0)) * 1e-3
    torch.testing.assert_close(trace._unit(rows, None), torch.nn.functional.normalize(rows, dim=-1), rtol=1e-6, atol=0)
    matrix = torch.eye(7)[:, :3]
    torch.testing.assert_close(trace._unit(rows, matrix), torch.nn.functional.normalize(rows[:, :3], dim=-1))
