"""Another projection in an artifact that was exported for that, held against an artifact that was built with it."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import invariclip
from invariclip import host_head
from invariclip.artifact.embeddings import read_embeddings
from invariclip.artifact.folder import read_manifest
from invariclip.artifact.manifest import space_id
from invariclip.artifact.projection import Projection, write_projection
from invariclip.errors import ArtifactError, InputError, ProjectionError
from invariclip.preprocessing.find import find_images
from invariclip.preprocessing.pixels import stack

CLASSES, FORMS = ("cat", "dog", "tree"), ("a photo of a {}.", "{}")


@pytest.fixture(scope="module")
def other():
    return Projection(np.random.default_rng(5).normal(size=(24, 8)), "shrinkage", 1.0)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    from invariclip.export.checkpoints.checkpoint import load_checkpoint

    return load_checkpoint(str(tiny_checkpoint))


@pytest.fixture(scope="module")
def paths(tiny_images):
    return find_images([tiny_images])


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, checkpoint, paths, tiny_projection):
    """Exported with a projection that may be exchanged."""
    from invariclip.export.build import export_artifact
    from invariclip.export.config import ExportConfig

    out = tmp_path_factory.mktemp("open") / "open.icm"
    export_artifact(
        checkpoint,
        out,
        ExportConfig(classes=CLASSES, templates=FORMS, images=paths, threads=1, projection_as_input=True),
        projection=tiny_projection,
    )
    return out


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory, checkpoint, paths, other):
    """The whole artifact built anew with the other projection, folded."""
    from invariclip.export.build import export_artifact
    from invariclip.export.config import ExportConfig

    out = tmp_path_factory.mktemp("rebuilt") / "rebuilt.icm"
    export_artifact(
        checkpoint, out, ExportConfig(classes=CLASSES, templates=FORMS, images=paths, threads=1), projection=other
    )
    return invariclip.load(out, threads=1)


@pytest.fixture(scope="module")
def model(artifact):
    return invariclip.load(artifact, threads=1)


def test_the_manifest_says_that_it_may_be_exchanged(artifact):
    manifest = read_manifest(artifact)
    assert (manifest.projection.image_fold, manifest.projection.text_fold) == ("input", "input")
    record = manifest.variants["float32"].parity["onnxruntime"]
    assert record["passed"] is True
    assert max(record[tower]["max_abs_diff"] for tower in ("image", "text")) <= 1e-5


def test_it_answers_like_a_full_rebuild(model, rebuilt, other, paths):
    changed = model.with_projection(other)
    texts = ["a cat", "Two   dogs & a TREE", "", "猫"]
    assert np.abs(changed.embed_images(paths) - rebuilt.embed_images(paths)).max() <= 1e-6
    assert np.abs(changed.embed_texts(texts) - rebuilt.embed_texts(texts)).max() <= 1e-6
    assert np.abs(changed.probabilities(paths) - rebuilt.probabilities(paths)).max() <= 1e-5
    assert changed.space_id == rebuilt.space_id != model.space_id
    assert (changed.classes, changed.templates, changed.width) == (CLASSES, FORMS, 8)
    # the planted fault: the bank of the old space is another answer
    assert np.abs(model.probabilities(paths) - rebuilt.probabilities(paths)).max() > 1e-2


def test_the_first_model_stays_as_it_was(model, other, paths):
    images, answers, space = model.embed_images(paths), model.probabilities(paths), model.space_id
    model.with_projection(other).probabilities(paths)
    np.testing.assert_array_equal(model.embed_images(paths), images)
    np.testing.assert_array_equal(model.probabilities(paths), answers)
    assert model.space_id == space


def test_there_and_back_is_where_it_was(model, other, tiny_projection, paths):
    back = model.with_projection(other).with_projection(tiny_projection)
    np.testing.assert_allclose(back.embed_images(paths), model.embed_images(paths), atol=1e-6)
    np.testing.assert_allclose(back.probabilities(paths), model.probabilities(paths), atol=1e-5)
    assert back.space_id == model.space_id


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3))
def test_any_projection_is_the_one_that_counts(model, checkpoint, paths, seed, scale):
    projection = Projection(scale * np.random.default_rng(seed).normal(size=(24, 8)), "icm")
    wanted = projection.apply(checkpoint.encode_images(stack(paths[:3], checkpoint.pixels)))
    changed = model.with_projection(projection)
    assert np.abs(changed.embed_images(paths[:3]) - wanted).max() <= 1e-5
    assert changed.space_id == space_id(
        checkpoint.sha256, projection.digest, checkpoint.pixels, checkpoint.tokenizer.spec
    )


def test_other_classes_before_or_after(model, rebuilt, other, paths):
    names, forms = ("sun", "moon"), ("a {} in the sky", "{}")
    wanted = rebuilt.with_classes(names, forms)
    for changed in (
        model.with_projection(other).with_classes(names, forms),
        model.with_classes(names, forms).with_projection(other),
    ):
        assert (changed.classes, changed.templates) == (names, forms)
        assert np.abs(changed.probabilities(paths) - wanted.probabilities(paths)).max() <= 1e-5


def test_classes_are_embedded_once_and_only_when_asked_for(model, other, paths, monkeypatch):
    calls = []
    bank = host_head.class_bank
    monkeypatch.setattr(host_head, "class_bank", lambda *given, **options: calls.append(1) or bank(*given, **options))
    changed = model.with_projection(other)
    changed.embed_images(paths)
    assert calls == []
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: changed.probabilities(paths), range(8)))
    assert calls == [1]
    for rows in answers[1:]:
        np.testing.assert_allclose(rows, answers[0], atol=1e-6)


def test_an_artifact_that_is_folded_says_how_to_export_it(tiny_artifact, other):
    with pytest.raises(ArtifactError, match=r"image folded, text folded.*--projection-as-input-initializer"):
        invariclip.load(tiny_artifact, threads=1).with_projection(other)


def test_another_shape_names_both(model):
    for D, d in ((24, 5), (32, 8)):
        with pytest.raises(ProjectionError, match=f"the projection is {D} → {d}, .* take 24 → 8; calibrate with"):
            model.with_projection(Projection(np.eye(D)[:, :d], "icm"))


def test_an_engine_that_cannot_is_named(model, other):
    elsewhere = model._but(opened=replace(model._view.opened, backend="openvino"))
    with pytest.raises(InputError, match="'openvino' cannot exchange the projection; available: onnxruntime"):
        elsewhere.with_projection(other)


def test_other_classes_can_be_baked_in(artifact, other, rebuilt, paths, tmp_path):
    from invariclip.export.swap import swap_classes

    swap_classes(artifact, tmp_path / "n.icm", ("sun", "moon"), images=paths, threads=1)
    model = invariclip.load(tmp_path / "n.icm", threads=1)
    wanted = rebuilt.with_classes(("sun", "moon"), FORMS).probabilities(paths)
    assert np.abs(model.with_projection(other).probabilities(paths) - wanted).max() <= 1e-5


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "invariclip", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_the_commands_take_another_projection(artifact, tiny_artifact, rebuilt, other, paths, tmp_path):
    write_projection(tmp_path / "p.safetensors", other)
    extra = ("--projection", tmp_path / "p.safetensors", "--threads", 1)
    done = command("embed", artifact, *paths[:2], "-o", tmp_path / "e.safetensors", *extra)
    assert (done.returncode, done.stderr) == (0, "")
    written = read_embeddings(tmp_path / "e.safetensors")
    assert written.space_id == rebuilt.space_id
    assert np.abs(written.vectors - rebuilt.embed_images(paths[:2])).max() <= 1e-6

    done = command("predict", artifact, *paths[:2], "--json", "--top-k", 1, *extra)
    answer = json.loads(done.stdout)
    assert answer["space_id"] == rebuilt.space_id
    for found, row in zip(answer["predictions"], rebuilt.probabilities(paths[:2]), strict=True):
        assert found["probability"] == pytest.approx(row.max(), abs=1e-5)

    done = command("predict", tiny_artifact, paths[0], *extra)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--projection-as-input-initializer" in done.stderr
