"""Facts and class embeddings read from a graph's file: those that it is of, and nothing from a damaged file."""

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

import invariclip
from invariclip.artifact.folder import read_manifest, write_manifest
from invariclip.artifact.graph_file import read_class_bank, read_facts, without_facts
from invariclip.artifact.manifest import METADATA_KEY
from invariclip.errors import ArtifactError

WIDTH, CLASSES = 8, 5


def _bank(dtype=np.float32):
    rows = np.random.default_rng(0).normal(size=(CLASSES, WIDTH))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(dtype)


def _write(path, tensors, **how):
    graph = onnx.helper.make_graph([], "g", [], [], tensors)
    onnx.save(onnx.helper.make_model(graph), path, **how)
    return path


def _others():
    return [numpy_helper.from_array(np.ones((3, 3), np.float32), f"w{place}") for place in range(3)]


@pytest.mark.parametrize(("dtype", "name"), [(np.float32, "class_bank"), (np.float16, "class_bank_float16")])
@pytest.mark.parametrize("external", [False, True])
def test_the_bank_is_what_onnx_reads(dtype, name, external, tmp_path):
    bank = _bank(dtype)
    tensors = [*_others(), numpy_helper.from_array(np.ascontiguousarray(bank.T), name)]
    how = {"save_as_external_data": True, "location": "image.onnx.data", "size_threshold": 0} if external else {}
    path = _write(tmp_path / "image.onnx", tensors, **how)
    np.testing.assert_array_equal(read_class_bank(path, WIDTH, CLASSES), bank.astype(np.float32))


def test_an_artifact_gives_its_own_classes_without_the_text_tower(tiny_artifact, monkeypatch):
    model = invariclip.load(tiny_artifact)
    graph = onnx.load(tiny_artifact / "image.onnx").graph
    [wanted] = [numpy_helper.to_array(t) for t in graph.initializer if t.name == "class_bank"]
    monkeypatch.setattr(model._view.opened.text, "embed", None)
    np.testing.assert_array_equal(model.class_bank(), wanted.T)
    np.testing.assert_array_equal(model.hosting().class_bank(), wanted.T)


def test_other_classes_are_embedded(tiny_artifact):
    model = invariclip.load(tiny_artifact).with_classes(("sun", "moon"))
    assert model.class_bank().shape == (2, model.width)


def test_no_bank_is_no_error_and_another_shape_is(tmp_path):
    path = _write(tmp_path / "a.onnx", _others())
    assert read_class_bank(path, WIDTH, CLASSES) is None
    eight = numpy_helper.from_array(np.ones((WIDTH, CLASSES), np.int8), "class_bank")
    assert read_class_bank(_write(path, [eight]), WIDTH, CLASSES) is None
    bank = _bank()
    path = _write(path, [numpy_helper.from_array(bank, "class_bank")])
    with pytest.raises(ArtifactError, match=r"not \[8, 5\]"):
        read_class_bank(path, WIDTH, CLASSES)
    bank[0, 0] = np.nan
    path = _write(path, [numpy_helper.from_array(np.ascontiguousarray(bank.T), "class_bank")])
    with pytest.raises(ArtifactError, match="not finite"):
        read_class_bank(path, WIDTH, CLASSES)


def test_weights_in_another_file_are_refused(tmp_path):
    tensor = numpy_helper.from_array(np.ascontiguousarray(_bank().T), "class_bank")
    path = _write(tmp_path / "a.onnx", [tensor], save_as_external_data=True, location="b.data", size_threshold=0)
    with pytest.raises(ArtifactError, match="another file"):
        read_class_bank(path, WIDTH, CLASSES)


@given(st.integers(0, 10_000), st.integers(0, 255), st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_damaged_file_gives_an_error_or_an_array(tmp_path_factory, place, value, cut):
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    tensors = [*_others(), numpy_helper.from_array(np.ascontiguousarray(_bank().T), "class_bank")]
    content = bytearray(_write(path, tensors).read_bytes())
    place %= len(content)
    if cut:
        del content[place:]
    else:
        content[place] = value
    path.write_bytes(bytes(content))
    try:
        found = read_class_bank(path, WIDTH, CLASSES)
    except ArtifactError:
        return
    assert found is None or found.shape == (CLASSES, WIDTH)


def test_facts_are_those_that_onnx_reads_and_come_out_alone(tiny_artifact):
    manifest = read_manifest(tiny_artifact)
    for name in ("image.onnx", "text.onnx"):
        path = tiny_artifact / name
        proto = onnx.load(path)
        [text] = [item.value for item in proto.metadata_props if item.key == METADATA_KEY]
        assert read_facts(path) == json.loads(text) == json.loads(json.dumps(manifest.facts(name)))
        bare = onnx.load_from_string(without_facts(path))
        assert not bare.metadata_props
        assert bare.graph == proto.graph


def test_a_graph_without_facts_or_with_others_is_told(tmp_path):
    assert read_facts(_write(tmp_path / "a.onnx", _others())) is None
    model = onnx.load(tmp_path / "a.onnx")
    model.metadata_props.add(key=METADATA_KEY, value="[1]")
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(ArtifactError, match="hold no facts of an artifact"):
        read_facts(tmp_path / "a.onnx")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"classes": ("dog", "cat", "tree")}, "classes"),
        ({"templates": ("a sketch of a {}.",)}, "templates"),
        ({"opset": 21}, "opset"),
        ({"producer": {}}, "producer"),
    ],
)
def test_a_manifest_that_its_graphs_do_not_know_is_refused(tiny_artifact, tmp_path, change, named):
    """Sealed again after an edit, a manifest is whole; its graphs still say what they are of."""
    folder = shutil.copytree(tiny_artifact, tmp_path / "edited.icm")
    write_manifest(folder, replace(read_manifest(folder), **change))
    with pytest.raises(ArtifactError, match=rf"image.onnx and manifest.json differ in {named}; export again"):
        invariclip.load(folder)
