"""Artifacts: whole, verified, atomic, or not there at all."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest

import invariclip
from invariclip.artifact.folder import checked_path, read_manifest
from invariclip.artifact.manifest import space_id
from invariclip.artifact.projection import Projection, read_projection
from invariclip.errors import ArtifactError, ContractError, InputError, ProjectionError
from invariclip.export import build, graph_files
from invariclip.export.config import ExportConfig
from invariclip.export.verification.figures import Thresholds
from invariclip.preprocessing.find import find_images
from invariclip.preprocessing.pixels import stack


def test_the_manifest_tells_everything(tiny_artifact, checkpoint, tiny_projection):
    manifest = read_manifest(tiny_artifact)
    assert manifest.model.embed_dim == 24
    assert manifest.projection.sha256 == tiny_projection.digest
    assert (manifest.projection.image_fold, manifest.projection.text_fold) == ("folded", "folded")
    assert (manifest.classes, manifest.templates) == (("cat", "dog", "tree"), ("a photo of a {}.",))
    assert manifest.space_id == space_id(
        manifest.model.checkpoint_sha256, tiny_projection.digest, manifest.pixels, manifest.text
    )
    assert {"torch", "onnx", "open_clip", "onnxruntime", "invariclip", "python", "weights"} <= set(manifest.producer)
    (variant,) = manifest.variants.values()
    assert variant.precision == "float32"
    assert variant.parity["onnxruntime"]["passed"] is True
    for entry in (variant.image, variant.text, manifest.tokenizer, manifest.projection_file):
        checked_path(tiny_artifact, entry)
    np.testing.assert_array_equal(
        read_projection(tiny_artifact / "projection.safetensors").A_inv, tiny_projection.A_inv
    )
    assert {path.name for path in tiny_artifact.iterdir()} == {
        "manifest.json", "image.onnx", "text.onnx", "tokenizer.json", "projection.safetensors",
    }  # fmt: skip


def test_each_graph_carries_the_facts(tiny_artifact, facts_in):
    plain = json.loads((tiny_artifact / "manifest.json").read_text())
    plain.pop("file_sha256")
    plain.pop("variants")
    plain.pop("left_out")
    plain.pop("fast_pixels")
    for name in ("image.onnx", "text.onnx"):
        facts = facts_in(tiny_artifact / name)
        assert facts.pop("tower") == name
        assert facts == plain


def test_the_runtime_answers_from_it(tiny_artifact, tiny_checkpoint, tiny_projection, tiny_images):
    from invariclip.export.checkpoints.checkpoint import load_checkpoint

    loaded = load_checkpoint(str(tiny_checkpoint))
    model = invariclip.load(tiny_artifact)
    paths = find_images([tiny_images])
    wanted = tiny_projection.apply(loaded.encode_images(stack(paths, loaded.pixels)))
    np.testing.assert_allclose(model.embed_images(paths), wanted, atol=1e-5)
    texts = ["a cat", "", "猫"]
    np.testing.assert_allclose(
        model.embed_texts(texts), tiny_projection.apply(loaded.encode_texts(loaded.tokenizer(texts))), atol=1e-5
    )
    baked, swapped = model.probabilities(paths), model.with_classes(["cat", "dog", "tree"]).probabilities(paths)
    np.testing.assert_allclose(baked, swapped, atol=1e-5)


@pytest.fixture
def export(checkpoint, tiny_images, tmp_path):
    def of(name="vit", out=tmp_path / "out.icm", projection=None, **options):
        config = ExportConfig(threads=1, **{"images": [tiny_images], **options})
        return build.export_artifact(checkpoint(name), out, config, projection=projection), out

    return of


def test_without_projection_or_classes(export):
    manifest, out = export()
    assert (manifest.projection, manifest.projection_file, manifest.classes) == (None, None, ())
    assert manifest.width == 24
    assert [output.name for output in onnx.load(out / "image.onnx").graph.output] == ["embedding"]
    # classes can still be given later
    assert invariclip.load(out).with_classes(["a", "b"]).classes == ("a", "b")


def test_a_tower_that_cannot_fold_gets_one_matmul_and_says_so(export, tiny_artifact, tiny_projection):
    manifest, out = export("timm, attention as head", projection=tiny_projection, classes=("x",))
    assert (manifest.projection.image_fold, manifest.projection.text_fold) == ("matmul", "folded")
    assert manifest.variants["float32"].parity["onnxruntime"]["image"]["max_abs_diff"] <= 1e-5
    assert [24, 8] in [list(item.dims) for item in onnx.load(out / "image.onnx").graph.initializer]


def test_sigmoid_models_answer_independent_probabilities(export):
    manifest, out = export("vit, sigmoid", classes=("cat", "dog"))
    assert manifest.model.logit_bias == -10
    assert manifest.variants["float32"].parity["onnxruntime"]["image"]["probability_diff"] < 1e-6
    assert invariclip.load(out).classes == ("cat", "dog")


def test_a_variant_that_fails_is_not_written(export, tiny_artifact, tmp_path):
    out = tmp_path / "out.icm"
    with pytest.raises(
        ContractError,
        match=r"out\.icm: the float32 variant on onnxruntime does not answer .* image max \|Δ\| .* above 0",
    ):
        export(thresholds=Thresholds(max_abs_diff=0.0))
    assert list(tmp_path.iterdir()) == []
    assert not out.exists()


def test_a_failed_export_leaves_the_old_artifact(export, monkeypatch, tmp_path):
    _, out = export()
    before = (out / "manifest.json").read_bytes()

    def broken(*_, **__):
        raise ContractError("planted")

    monkeypatch.setattr(graph_files, "tower_graph", broken)
    with pytest.raises(ContractError, match="planted"):
        export()
    assert (out / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out.icm"]


def test_a_projection_of_another_width_is_refused_before_any_work(export, tmp_path):
    with pytest.raises(ProjectionError, match="for embeddings of width 32, but vit gives 24; calibrate one"):
        export(projection=Projection(np.eye(32)[:, :4], "icm"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_things_is_never_replaced(export, tmp_path):
    precious = tmp_path / "home" / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("years of work")
    with pytest.raises(InputError, match="not an artifact; name another output"):
        export(out=tmp_path / "home")
    assert precious.read_text() == "years of work"


def test_bad_classes_are_refused(export):
    with pytest.raises(InputError, match="empty or repeated"):
        export(classes=("cat", "cat"))
    with pytest.raises(InputError, match=r"exactly one \{\}"):
        export(classes=("cat",), templates=("a photo",))


def test_random_weights_are_on_record(checkpoint, tiny_images, tmp_path):
    random = replace(checkpoint("vit"), source="random weights, seed 7")
    assert build._producer(random)["weights"] == "random weights, seed 7"


def test_large_weights_lie_beside_the_graph_and_are_checked(export, monkeypatch, tiny_images, tiny_projection):
    from invariclip.export.graphs import writing

    monkeypatch.setattr(writing, "EXTERNAL_DATA_BYTES", 0)
    manifest, out = export(projection=tiny_projection)
    assert {path.name for path in out.iterdir()} >= {"image.onnx.data", "text.onnx.data"}
    assert (out / "text.onnx").stat().st_size < (out / "text.onnx.data").stat().st_size
    assert manifest == read_manifest(out)
    assert invariclip.load(out).embed_images(find_images([tiny_images])[:2]).shape == (2, 8)
    with (out / "image.onnx.data").open("r+b") as stream:
        stream.write(b"\x01\x02\x03\x04")
    with pytest.raises(ArtifactError, match=r"image\.onnx\.data is missing or not what was exported"):
        invariclip.load(out)
