"""Graphs: names, dynamic batch, node counts, facts inside, probabilities."""

import numpy as np
import onnx
import pytest
import torch

from invariclip.backends.onnxruntime import OnnxRuntimeBackend
from invariclip.errors import ContractError
from invariclip.export import towers
from invariclip.export.fold import Folded, fold_images, fold_texts
from invariclip.export.trace import METADATA_KEY, OPSET, node_count, read_facts, trace

RANK = 8


def graphs(loaded, folder, A=None, bank=None, facts=None):
    """Traces both towers of a checkpoint into a folder; returns the image and the text file."""
    height, width = loaded.pixels.image_size
    ids = torch.from_numpy(loaded.tokenizer(["a", "b c", "d"]))
    image = text = Folded(loaded.module, "folded", None, "")
    if A is not None:
        image, text = fold_images(loaded.module, A, torch.rand(2, 3, height, width)), fold_texts(loaded.module, A, ids)
    image_tower = towers.ImageTower(
        image, loaded.pixels, bank=bank, logit_scale=loaded.logit_scale, logit_bias=loaded.logit_bias
    )
    folder.mkdir(exist_ok=True)
    example = torch.zeros((2, height, width, 3), dtype=torch.uint8)
    trace(
        image_tower, example, folder / "image.onnx", input_name="pixels", output_names=image_tower.output_names,
        facts=facts,
    )  # fmt: skip
    trace(
        towers.TextTower(text), ids, folder / "text.onnx", input_name="input_ids", output_names=("embedding",),
        facts=facts,
    )  # fmt: skip
    return folder / "image.onnx", folder / "text.onnx"


@pytest.mark.parametrize(
    "name",
    [
        "vit",
        "resnet, attention pool with bias",
        "timm, linear head",
        "timm, classifier as head",
        "text projection with bias",
    ],
)
def test_fused_graphs_answer_like_torch_and_have_no_more_nodes(checkpoint, batch, tmp_path, name):
    loaded = checkpoint(name)
    A = np.random.default_rng(0).normal(size=(24, RANK))
    plain, fused = graphs(loaded, tmp_path / "plain"), graphs(loaded, tmp_path / "fused", A)
    allowed = 1 if name == "timm, classifier as head" else 0  # the explicit MatMul
    assert node_count(fused[0]) <= node_count(plain[0]) + allowed
    assert node_count(fused[1]) <= node_count(plain[1])
    pictures, ids = batch(loaded, 17), loaded.tokenizer([f"text {i} " * i for i in range(17)][:5])
    for path, given, raw in (
        (fused[0], {"pixels": pictures}, loaded.encode_images(pictures)),
        (fused[1], {"input_ids": ids}, loaded.encode_texts(ids)),
    ):
        backend = OnnxRuntimeBackend(path, threads=1)
        wanted = raw.astype(np.float64) @ A
        wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
        for count in (1, 2, len(raw)):
            part = {key: value[:count] for key, value in given.items()}
            got = backend.run(part)["embedding"]
            assert (got.dtype, got.shape) == (np.float32, (count, RANK))
            assert np.abs(got - wanted[:count]).max() <= 1e-5


def test_the_signature_and_the_facts(checkpoint, tmp_path):
    facts = {"model": "tiny", "classes": ["Käse", "猫"]}
    image, text = graphs(checkpoint("vit"), tmp_path, facts=facts)
    for path, name, kind, shape in (
        (image, "pixels", onnx.TensorProto.UINT8, ["batch", 32, 32, 3]),
        (text, "input_ids", onnx.TensorProto.INT64, ["batch", 16]),
    ):
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        assert [(item.domain, item.version) for item in model.opset_import if item.domain == ""] == [("", OPSET)]
        assert {node.domain for node in model.graph.node} == {""}
        (given,) = model.graph.input
        dims = [dim.dim_param or dim.dim_value for dim in given.type.tensor_type.shape.dim]
        assert (given.name, given.type.tensor_type.elem_type, dims) == (name, kind, shape)
        assert [output.name for output in model.graph.output] == ["embedding"]
        assert read_facts(path) == facts
        assert {item.key for item in model.metadata_props} == {METADATA_KEY}
        # where this machine keeps its files is nobody's business
        assert str(tmp_path.parent).encode() not in path.read_bytes()
        assert b"site-packages" not in path.read_bytes()


def test_the_image_graph_holds_nothing_of_the_text_tower(checkpoint, tmp_path):
    image, _ = graphs(checkpoint("vit"), tmp_path)
    loaded = checkpoint("vit")
    visual = sum(value.numel() * 4 for value in loaded.module.visual.parameters())
    assert image.stat().st_size < visual * 1.5 + 200_000


@pytest.mark.parametrize("name", ["vit", "vit, sigmoid"])
def test_classes_in_the_graph(checkpoint, batch, tmp_path, name):
    loaded = checkpoint(name)
    bank = np.random.default_rng(0).normal(size=(3, 24))
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    image, _ = graphs(loaded, tmp_path, bank=bank)
    answers = OnnxRuntimeBackend(image, threads=1).run({"pixels": batch(loaded)})
    assert list(answers) == ["embedding", "logits", "probabilities"]
    logits = loaded.logit_scale * answers["embedding"].astype(np.float64) @ bank.T
    if loaded.logit_bias is None:
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        wanted = powers / powers.sum(axis=1, keepdims=True)
    else:
        logits = logits + loaded.logit_bias
        wanted = 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(answers["logits"], logits, atol=1e-4)
    np.testing.assert_allclose(answers["probabilities"], wanted, atol=1e-5)


def test_an_embedding_of_length_zero_is_not_nan():
    assert towers._unit(torch.zeros(1, 4), None).tolist() == [[0, 0, 0, 0]]


class Untraceable(torch.nn.Module):
    def forward(self, x):
        return (x if x.float().sum().item() > 3 else x + 1,)


def test_a_tower_that_torch_cannot_export_is_one_line(tmp_path):
    with pytest.raises(ContractError, match=r"x\.onnx: torch cannot export this tower") as caught:
        trace(Untraceable().eval(), torch.zeros(2, 3), tmp_path / "x.onnx", input_name="x", output_names=("embedding",))
    assert "\n" not in str(caught.value)
