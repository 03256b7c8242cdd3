"""A loaded artifact answers like PyTorch, in any batch, from several threads, with other classes."""

import copy
import multiprocessing
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import invariclip
from invariclip.artifact.manifest import MANIFEST
from invariclip.errors import ArtifactError, InputError
from invariclip.preprocessing.find import find_images
from invariclip.preprocessing.pixels import stack
from invariclip.sites.site import new_site


@pytest.fixture(scope="module")
def model(tiny_artifact):
    return invariclip.load(tiny_artifact, threads=1)


@pytest.fixture(scope="module")
def paths(tiny_images):
    return find_images([tiny_images])


@pytest.fixture(scope="module")
def expected(tiny_checkpoint, tiny_projection):
    """PyTorch's encoder, the projection in float64, unit length."""
    from invariclip.export.checkpoints.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(str(tiny_checkpoint))

    def images(paths):
        return tiny_projection.apply(checkpoint.encode_images(stack(paths, checkpoint.pixels)))

    def texts(given):
        return tiny_projection.apply(checkpoint.encode_texts(checkpoint.tokenizer(given)))

    return images, texts, checkpoint.logit_scale


def test_embeddings_equal_the_reference(model, paths, expected):
    images, texts, _ = expected
    np.testing.assert_allclose(model.embed_images(paths), images(paths), atol=1e-5)
    sentences = ["a cat", "Two   dogs & a TREE", ""]
    np.testing.assert_allclose(model.embed_texts(sentences), texts(sentences), atol=1e-5)
    assert model.width == 8


def test_classes_equal_the_formula_baked_and_swapped(model, paths, expected):
    images, texts, logit_scale = expected
    bank = texts([f"a photo of a {name}." for name in ("cat", "dog", "tree")])
    logits = logit_scale * images(paths) @ bank.T
    formula = np.exp(logits - logits.max(1, keepdims=True))
    formula /= formula.sum(1, keepdims=True)
    np.testing.assert_allclose(model.probabilities(paths), formula, atol=1e-5)
    np.testing.assert_allclose(model.with_classes(["cat", "dog", "tree"]).probabilities(paths), formula, atol=1e-5)
    swapped = model.with_classes(["tree", "cat"], ["{}", "a drawing of a {}"])
    assert swapped.classes == ("tree", "cat")
    assert model.classes == ("cat", "dog", "tree")
    np.testing.assert_allclose(swapped.probabilities(paths).sum(1), 1, atol=1e-6)


def test_ranking_is_sorted_and_holds_the_best(model, paths):
    for prediction, row in zip(model.classify(paths, top_k=2), model.probabilities(paths), strict=True):
        assert prediction.ranking[0] == (prediction.label, prediction.probability)
        assert [p for _, p in prediction.ranking] == sorted(row.tolist(), reverse=True)[:2]
        assert prediction.label == model.classes[int(row.argmax())]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(12)), batch_size=st.integers(1, 13))
def test_any_batch_gives_the_same_rows(model, paths, order, batch_size):
    whole = model.embed_images(paths)
    part = model.embed_images([paths[i] for i in order], batch_size=batch_size)
    np.testing.assert_allclose(part, whole[list(order)], atol=1e-6)


def test_one_model_serves_many_threads(model, paths):
    whole = model.probabilities(paths)
    with ThreadPoolExecutor(4) as pool:
        for rows in pool.map(lambda _: model.probabilities(paths), range(12)):
            np.testing.assert_allclose(rows, whole, atol=1e-6)
        texts = list(pool.map(lambda _: model.embed_texts(["a cat"]), range(8)))
    assert all(np.array_equal(texts[0], other) for other in texts)


def test_prepared_batches_and_empty_lists(model, paths):
    prepared = stack(paths, model.manifest.pixels)
    np.testing.assert_allclose(model.embed_images(prepared), model.embed_images(paths), atol=1e-6)
    assert model.embed_images([]).shape == (0, 8)
    assert model.embed_texts([]).shape == (0, 8)
    assert model.classify([]) == []


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda m: m.classify("cat.png"), "list of images"),
        (lambda m: m.classify(["absent.png"]), "no such file"),
        (lambda m: m.classify([], top_k=0), "top_k"),
        (lambda m: m.embed_images([], batch_size=0), "batch_size"),
        (lambda m: m.embed_texts([], batch_size=0), "batch_size"),
        (lambda m: m.embed_images(np.zeros((2, 9, 9, 3), np.uint8)), "prepared batch"),
        (lambda m: m.with_classes([]), "at least one class"),
        (lambda m: m.with_classes(["a"], ["no slot"]), "exactly one"),
    ],
)
def test_wrong_calls_are_typed(model, call, reason):
    with pytest.raises(InputError, match=reason):
        call(model)


def test_damaged_artifacts_are_refused(tiny_artifact, tmp_path):
    copy = tmp_path / "copy.icm"
    shutil.copytree(tiny_artifact, copy)
    with pytest.raises(ArtifactError, match="no variant 'int8'; available: float32"):
        invariclip.load(copy, variant="int8")
    graph = copy / "image.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    with pytest.raises(ArtifactError, match="digest differs"):
        invariclip.load(copy)
    graph.unlink()
    with pytest.raises(ArtifactError, match=r"image\.onnx is missing"):
        invariclip.load(copy)
    (copy / MANIFEST).unlink()
    with pytest.raises(ArtifactError, match="not an artifact"):
        invariclip.load(copy)


def test_says_what_really_runs(model):
    assert model.describe() == {
        "engine": "onnxruntime",
        "version": model.describe()["version"],
        "execution_provider": "CPUExecutionProvider",
        "processor": model.describe()["processor"],
        "computes_in": "float32",
        "threads": 1,
        "spinning": False,
        "variant": "float32",
        "precision": "float32",
        "chosen_by": "default",
        "batch_sizes": "powers of two",
        "pixel_mode": "exact",
        "text_cache": model.describe()["text_cache"],
    }


class Counting:
    """An engine that notes how many rows each run had."""

    def __init__(self, inner):
        self.inner, self.rows = inner, []

    def run(self, inputs, outputs=None):
        self.rows.append(len(next(iter(inputs.values()))))
        return self.inner.run(inputs, outputs)


@pytest.mark.parametrize(("batch_size", "rows"), [(16, [8, 4]), (7, [8, 4, 1]), (5, [4, 1, 4, 1, 2]), (3, [4] * 4)])
def test_images_run_in_powers_of_two(tiny_artifact, paths, batch_size, rows):
    model = invariclip.load(tiny_artifact, threads=1)
    whole = model.embed_images(paths, batch_size=1)
    counting = Counting(model._view.opened.image)
    model = model._but(opened=replace(model._view.opened, image=counting))
    got = model.embed_images(paths, batch_size=batch_size)
    assert counting.rows == rows
    np.testing.assert_allclose(got, whole, atol=1e-6)
    counting.rows.clear()
    model.probabilities(paths, batch_size=batch_size)
    assert counting.rows == rows


def test_warm_up_runs_each_batch_size_once(tiny_artifact, paths):
    model = invariclip.load(tiny_artifact, threads=1)
    counting = Counting(model._view.opened.image)
    model = model._but(opened=replace(model._view.opened, image=counting))
    model.warm_up()
    assert counting.rows == [1]
    counting.rows.clear()
    model.warm_up([1, 7, 8, 13], texts=True)
    assert counting.rows == [1, 4, 8]
    assert model._view.opened.text._opened is not None
    swapped = model.with_classes(["tree", "cat"])
    counting.rows.clear()
    swapped.warm_up((2,))
    assert counting.rows == [2]
    for wrong in ([0], [1, 5000]):
        with pytest.raises(InputError, match="batch sizes must be from 1 to 1024"):
            model.warm_up(wrong)


def test_a_changed_graph_is_told_from_one_that_an_engine_cannot_load(tiny_artifact, tmp_path):
    copy = tmp_path / "copy.icm"
    shutil.copytree(tiny_artifact, copy)
    graph = copy / "image.onnx"
    graph.write_bytes(b"x" * graph.stat().st_size)  # the engine fails too, and first
    with pytest.raises(ArtifactError, match="digest differs"):
        invariclip.load(copy)


def test_a_model_goes_to_another_process(tiny_artifact, paths):
    model = invariclip.load(tiny_artifact, threads=1)
    shared = np.eye(1, model.width)[0]
    site = new_site("yard", model.space_id, 0.1 * shared, 3, {})
    site = site.adding(np.eye(4, model.width), np.eye(3, model.width))
    views = [model, model.with_classes(["sun", "moon"], ["a {}."]), model.with_site(site)]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for view in views:
            [there] = pool.map(invariclip.Model.answer, [view], [paths])
            np.testing.assert_array_equal(there.embeddings, view.answer(paths).embeddings)
            np.testing.assert_array_equal(there.probabilities, view.answer(paths).probabilities)


def test_a_pickled_model_is_loaded_once_and_a_copied_one_never(tiny_artifact):
    model = invariclip.load(tiny_artifact, threads=1, text_cache=7)
    content = pickle.dumps(model.with_classes(["sun"]))
    assert len(content) < 2000
    first, second = pickle.loads(content), pickle.loads(content)  # noqa: S301
    assert first._view.opened is second._view.opened
    assert (first.classes, first.describe()["threads"], first.describe()["text_cache"]["limit"]) == (("sun",), 1, 7)
    assert copy.copy(model) is copy.deepcopy(model) is model
    with pytest.raises(InputError, match="live site stays in its process"):
        pickle.dumps(model.adapting(invariclip.open_live_site(model, "yard")))


@pytest.mark.parametrize("make", [list, tuple, iter, np.array], ids=["list", "tuple", "iterator", "array"])
def test_classes_come_in_any_iterable(tiny_artifact, make):
    model = invariclip.load(tiny_artifact)
    assert model.with_classes(make(["sun", "moon"])).classes == ("sun", "moon")
    assert model.with_classes(["sun"], make(["a {}.", "the {}."])).templates == ("a {}.", "the {}.")


@pytest.mark.parametrize("classes", [[], (), np.array([]), iter(())], ids=["list", "tuple", "array", "iterator"])
def test_no_classes_are_refused_and_never_the_artifacts_own(tiny_artifact, classes):
    with pytest.raises(InputError, match="at least one class"):
        invariclip.load(tiny_artifact).with_classes(classes)


def test_no_templates_are_refused(tiny_artifact):
    with pytest.raises(InputError, match="at least one class and one template"):
        invariclip.load(tiny_artifact).with_classes(["sun"], [])
    with pytest.raises(InputError, match="one of them is 3"):
        invariclip.load(tiny_artifact).with_classes(["sun", 3])
