"""Atomic writes, the manifest's refusals, embeddings that know their space, prompts."""

import json
from dataclasses import replace

import numpy as np
import pytest

from invariclip.artifact.embeddings import Embeddings, read_embeddings, write_embeddings
from invariclip.artifact.folder import checked_path, describe_file, read_manifest
from invariclip.artifact.manifest import MANIFEST, SCHEMA_VERSION, FileFacts, ModelFacts, Step, space_id
from invariclip.errors import ArtifactError, InputError
from invariclip.files import new_directory, write_atomically
from invariclip.preprocessing.pixels import PixelSpec
from invariclip.preprocessing.prompts import class_bank
from invariclip.preprocessing.tokenizer import TextSpec
from invariclip.records import sealed_json, to_record


def test_a_failed_write_leaves_the_old_folder_and_no_litter(tmp_path):
    target = tmp_path / "name.icm"
    with new_directory(target) as folder:
        (folder / "a").write_text("old")

    def half_a_write():
        with new_directory(target) as folder:
            (folder / "a").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half_a_write()
    assert (target / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["name.icm"]
    with new_directory(target) as folder:
        (folder / "b").write_text("newer")
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["name.icm"]


def test_a_file_where_a_folder_should_be_is_refused(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(InputError, match="is a file"), new_directory(tmp_path / "x"):
        pass
    with pytest.raises(InputError, match="cannot be written"):
        write_atomically(tmp_path / "x" / "y", "z")


def test_files_outside_changed_or_missing_are_refused(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret").write_bytes(b"s")
    secret = describe_file(tmp_path, "secret")
    (tmp_path / "inside" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError, match="leaves the artifact"):
        checked_path(tmp_path / "inside", FileFacts("link", secret.sha256, secret.size_bytes))
    with pytest.raises(ArtifactError, match="missing"):
        checked_path(tmp_path, FileFacts("absent", secret.sha256, 1))
    (tmp_path / "secret").write_bytes(b"t")
    with pytest.raises(ArtifactError, match="digest differs"):
        checked_path(tmp_path, secret)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "holds no manifest"),
        ("{", "not readable as JSON"),
        ("[]", "JSON object"),
        ('{"schema_version": 99}', "schema_version 99"),
        ('{"schema_version": 1}', "schema_version 1 is not known.*: export again"),
        (json.dumps({"schema_version": SCHEMA_VERSION}), "carries no digest of itself"),
        (sealed_json({"schema_version": SCHEMA_VERSION}).decode(), "missing required field"),
        (
            sealed_json({"schema_version": SCHEMA_VERSION, "model": 3}).decode(),
            r"Expected `object`, got `int` - at `\$.model`",
        ),
    ],
)
def test_damaged_manifests_are_one_typed_line(tmp_path, content, reason):
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ArtifactError, match=reason) as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)


def test_space_id_names_checkpoint_projection_and_preparation():
    pixels = PixelSpec((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    text = TextSpec(context_length=16)
    same = space_id("a", "b", pixels, text)
    assert same == space_id("a", "b", pixels, text)
    others = [
        space_id("a", None, pixels, text),
        space_id("b", "b", pixels, text),
        space_id("a", "b", replace(pixels, image_mean=(0.4, 0.5, 0.5)), text),
        space_id("a", "b", replace(pixels, interpolation="bilinear"), text),
        space_id("a", "b", pixels, replace(text, clean="whitespace")),
    ]
    assert len({same, *others}) == 6


@pytest.mark.parametrize("path", ["", ".", "..", "a/b.onnx", "/a.onnx", "../a.onnx", "a\\b", "a\0b", "manifest.json"])
def test_a_file_of_an_artifact_is_a_bare_name(path):
    with pytest.raises(ArtifactError, match="is not the name of a file in the artifact's folder"):
        FileFacts(path, "0" * 64, 3)


MODEL = {"name": "a", "checkpoint_sha256": "0" * 64, "embed_dim": 8, "logit_scale": 1.0}


@pytest.mark.parametrize(
    "build",
    [
        lambda: to_record(FileFacts, {"path": "a", "sha256": "0" * 64, "size_bytes": 3.5}, "x", error=ArtifactError),
        lambda: to_record(Step, {"name": "a", "applied": "no", "detail": "b"}, "x", error=ArtifactError),
        lambda: to_record(ModelFacts, {**MODEL, "logit_scale": "abc"}, "x", error=ArtifactError),
        lambda: to_record(ModelFacts, {**MODEL, "embed_dim": 8.5}, "x", error=ArtifactError),
        lambda: to_record(ModelFacts, {**MODEL, "width": 8}, "x", error=ArtifactError),
        lambda: ModelFacts("a", "0" * 64, 8, float("nan")),
        lambda: ModelFacts("a", "0" * 64, 0, 1.0),
        lambda: TextSpec(context_length=77.0),
        lambda: TextSpec(context_length=77, end_token_ids=(2**70,)),
        lambda: PixelSpec((224.0, 224.0), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ],
)
def test_facts_of_another_type_are_refused(build):
    with pytest.raises(ArtifactError):
        build()


def test_embeddings_round_trip_and_refuse_another_space(tmp_path):
    rng = np.random.default_rng(0)
    one = Embeddings(rng.normal(size=(3, 4)).astype(np.float32), ("a.png", "ü.png", "c"), "space-1")
    write_embeddings(tmp_path / "e.safetensors", one)
    read = read_embeddings(tmp_path / "e.safetensors")
    np.testing.assert_array_equal(read.vectors, one.vectors)
    assert (read.items, read.space_id) == (one.items, one.space_id)
    np.testing.assert_allclose(one.similarity(read), one.vectors @ one.vectors.T)
    with pytest.raises(InputError, match=r"space-1.*space-2"):
        one.similarity(Embeddings(one.vectors, one.items, "space-2"))
    (tmp_path / "bad").write_bytes(b"1234567890")
    for path in (tmp_path / "absent", tmp_path / "bad"):
        with pytest.raises(InputError):
            read_embeddings(path)


def test_the_bank_is_the_unit_mean_of_unit_prompts():
    vectors = np.eye(4)[[0, 1, 2, 2]]
    bank = class_bank(lambda texts: vectors[: len(texts)], ["x", "y"], ["{}", "a {}"])
    np.testing.assert_allclose(bank, [[0.5**0.5, 0.5**0.5, 0, 0], [0, 0, 1, 0]])
