"""A manifest that says something else than the checkpoint: the graphs are right, and what serves them would not be."""

import json
import shutil

import pytest

import invariclip
from invariclip.artifact.folder import describe_file, read_manifest
from invariclip.artifact.manifest import Manifest, space_id
from invariclip.cli.main import main
from invariclip.errors import ArtifactError, InputError, UnprovedBackendWarning
from invariclip.records import seal, to_record


@pytest.fixture
def altered(tiny_artifact, tmp_path):
    """A copy of the tiny artifact whose manifest went through `change`."""

    def of(change):
        folder = shutil.copytree(tiny_artifact, tmp_path / "x.icm")
        plain = json.loads((folder / "manifest.json").read_text())
        change(plain, folder)
        kept = to_record(Manifest, {name: value for name, value in plain.items() if name != "file_sha256"}, "x")
        plain["space_id"] = space_id(
            kept.model.checkpoint_sha256, kept.projection.sha256 if kept.projection else None, kept.pixels, kept.text
        )
        (folder / "manifest.json").write_bytes(seal(json.dumps(plain).encode()))
        return folder

    return of


def other_tokenizer(plain, folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["a</w>"], words["b</w>"] = words["b</w>"], words["a</w>"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    plain["tokenizer"] = vars(describe_file(folder, "tokenizer.json"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plain, _: plain["pixels"].update(interpolation="bilinear"), "the manifest says pixels "),
        (lambda plain, _: plain["text"].update(clean="whitespace"), "the manifest says text "),
        (
            lambda plain, _: plain["model"].update(logit_scale=3.5),
            "the manifest says logit_scale 3.5, the ",
        ),
        (
            lambda plain, _: plain["model"].update(logit_bias=-10.0),
            "the manifest says logit_bias -10.0, the ",
        ),
        (lambda plain, _: plain["projection"].update(sha256="1" * 64), "the manifest says projection 1111"),
        (other_tokenizer, "tokenizer.json makes other ids of the texts"),
    ],
)
def test_verify_finds_it(altered, tiny_checkpoint, tiny_images, capsys, change, words):
    folder = altered(change)
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(folder), "--model", str(tiny_checkpoint), "--images", str(tiny_images), "--quiet"])
    said = capsys.readouterr()
    assert (stopped.value.code, said.out) == (1, "")
    assert words in said.err
    assert said.err.count("\n") == 1


def test_a_space_that_is_not_what_its_parts_come_to_is_refused_when_it_is_read(tiny_artifact, tmp_path):
    folder = shutil.copytree(tiny_artifact, tmp_path / "x.icm")
    plain = json.loads((folder / "manifest.json").read_text()) | {"space_id": "0" * 32}
    (folder / "manifest.json").write_bytes(seal(json.dumps(plain).encode()))
    with pytest.raises(ArtifactError, match="space_id is not that of its checkpoint, projection, pixels and text"):
        read_manifest(folder)


def test_an_artifact_without_variants_proves_nothing(altered):
    folder = altered(lambda plain, _: plain.update(variants={}))
    with pytest.raises(ArtifactError, match="lists no variant, so nothing in it was proved"):
        read_manifest(folder)


def test_an_engine_that_was_not_proved_is_warned_of(tiny_artifact, tiny_images):
    with pytest.warns(UnprovedBackendWarning, match="was proved on onnxruntime, not on openvino"):
        model = invariclip.load(tiny_artifact, backend="openvino")
    assert model.describe()["engine"] == "openvino"


def test_a_resize_that_an_engine_computes_wrongly_is_refused(altered):
    folder = altered(lambda plain, _: plain["variants"]["float32"].update(front="resize"))
    with pytest.raises(InputError, match="resizes by ONNX's Resize, which openvino computes differently"):
        invariclip.load(folder, backend="openvino")


def test_a_text_in_place_of_classes_is_refused(tiny_artifact):
    with pytest.raises(InputError, match="classes must be a list of texts, not 'cat'"):
        invariclip.load(tiny_artifact).with_classes("cat")


def test_ids_that_no_vocabulary_has_are_one_typed_line(tiny_artifact):
    import numpy as np

    from invariclip.backends import open_backend

    backend = open_backend("onnxruntime", tiny_artifact / "text.onnx")
    with pytest.raises(InputError, match="cannot answer this input") as caught:
        backend.run({"input_ids": np.full((1, 4), 10**6, dtype=np.int64)})
    assert "\n" not in str(caught.value)
