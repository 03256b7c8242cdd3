"""Classes, prompts and engines as a user of `predict` and `embed` names them."""

import json

import numpy as np
import pytest

import invariclip
from invariclip.errors import InputError, UnprovedBackendWarning
from invariclip.preprocessing.prompts import template_set


@pytest.fixture
def predicted(run, tiny_artifact, tiny_images):
    """Probabilities by label of one image, as `predict --json` answers with these options."""

    def of(*options):
        code, out, err = run("predict", tiny_artifact, tiny_images / "00.png", "--json", "--top-k", 9, *options)
        assert (code, err) == (0, "")
        return {one["label"]: one["probability"] for one in json.loads(out)["predictions"][0]["ranking"]}

    return of


def test_a_templates_file_and_the_ensemble_serve_the_artifacts_own_classes(
    predicted, tiny_artifact, tiny_images, tmp_path
):
    model = invariclip.load(tiny_artifact, threads=1)
    (tmp_path / "forms.txt").write_text("# two\n{}\na drawing of a {}.\n")
    for options, templates in (
        (("--templates-file", tmp_path / "forms.txt"), ("{}", "a drawing of a {}.")),
        (("--templates", "ensemble"), template_set("ensemble")),
    ):
        row = model.with_classes(model.classes, templates).probabilities([tiny_images / "00.png"])[0]
        assert predicted(*options) == pytest.approx(dict(zip(model.classes, map(float, row), strict=True)), abs=1e-5)
    # prompts matter, or the test above could not fail
    assert abs(predicted("--templates", "ensemble")["cat"] - predicted()["cat"]) > 1e-4


def test_other_classes_with_the_ensemble(predicted):
    assert set(predicted("--classes", "sun,moon", "--templates", "ensemble")) == {"sun", "moon"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--templates", "open"], "no set of templates is called 'open'; available: ensemble"),
        (["--templates", "ensemble", "--template", "{}"], "give one of --template, --templates-file and --templates"),
        (["--templates-file", "absent.txt"], "absent.txt: cannot be read as text"),
        (["--backend", "tensorflow"], "'tensorflow' is not one of"),
        (["--projection", "absent.safetensors"], "no such file; `invariclip calibrate` writes a projection"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(run, tiny_artifact, tiny_images, options, reason):
    code, out, err = run("predict", tiny_artifact, tiny_images / "00.png", *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert reason in err


def test_another_engine_answers_the_same(predicted, run, tiny_artifact, tiny_images):
    pytest.importorskip("openvino")
    _, out, err = run("predict", tiny_artifact, tiny_images / "00.png", "--json", "--backend", "openvino")
    assert json.loads(out)["engine"]["engine"] == "openvino"
    assert "was proved on onnxruntime, not on openvino" in err
    here = invariclip.load(tiny_artifact, threads=1)
    with pytest.warns(UnprovedBackendWarning):
        there = invariclip.load(tiny_artifact, backend="openvino", threads=1)
    images = [tiny_images / "00.png", tiny_images / "01.png"]
    assert np.abs(here.probabilities(images) - there.probabilities(images)).max() <= 1e-4
    texts = ["a cat", "", "a much longer text about a dog in a tree"]
    assert np.abs(here.embed_texts(texts) - there.embed_texts(texts)).max() <= 1e-5


def test_an_unknown_engine_is_named(tiny_artifact):
    with pytest.raises(InputError, match="no backend is called 'tf'; available: onnxruntime"):
        invariclip.load(tiny_artifact, backend="tf")
